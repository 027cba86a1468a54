"""Images with colours over them that say where something is."""

import cv2
import numpy as np

BLUR = 0.015  # of signed values, as a share of the height: single pixels alternate, and nobody sees them


def warm(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Returns an image, grayer, with `heat` over it: nothing where it is 0, bright yellow where it is largest.

    Args:
      pixels: `[H, W, C]`, 0 to 255, of 1, 3 or 4 channels; alpha is not looked at.
      heat: `[h, w]`, 0 and more; enlarged to the image.

    Returns:
      uint8 `[H, W, 3]`.
    """
    share = _enlarged(heat / _largest(heat), pixels).clip(0, 1)
    return _mixed(pixels, "inferno", 0.2 + 0.8 * share, 0.8 * share)


def for_and_against(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns an image, grayer, with signed `values` `[H, W]` over it: red above 0, blue below. As `warm` otherwise."""
    smooth = cv2.GaussianBlur(values.astype(np.float32), (0, 0), max(BLUR * len(values), 0.5))
    share = smooth / _largest(np.abs(smooth))
    return _mixed(pixels, "coolwarm", 0.5 + 0.5 * np.sign(share), 0.85 * np.abs(share) ** 0.7)


def _largest(values: np.ndarray) -> float:
    return max(float(values.max()), float(np.finfo(np.float32).tiny))


def _enlarged(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


def _mixed(pixels: np.ndarray, colormap: str, values: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Lays the colours of `values`, 0 to 1, over the image, whose own colours are paled so that they do not compete."""
    import matplotlib  # of an extra: who only asks for the help of a command does without it

    colors = matplotlib.colormaps[colormap](values)
    image = np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3)) / np.float32(255)
    image = 0.85 * image.mean(-1, keepdims=True) + 0.15 * image
    opacity = opacity[..., None]
    mixed = (image * (1 - opacity) + colors[..., :3] * opacity).clip(0, 1)
    return np.round(255 * mixed).astype(np.uint8)
