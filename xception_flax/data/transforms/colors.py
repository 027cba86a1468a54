"""Changes of an image's colours: PIL's `ImageEnhance` and `ImageOps` on uint8 arrays.

Images are uint8 `[H, W, C]` with C 1, 3 or 4: of RGBA only the colours change, and alpha stays. The definitions are
those of torchvision and timm, computed with OpenCV and tables of 256 entries. A `factor` of 1 changes nothing; 0 gives
black, gray, one colour or blur. Results differ from PIL's by at most a level or two (`tests/data/transforms`), and by a
few for hue, which both compute in 8 bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from xception_flax.text.ranges import check_range

Image = np.ndarray

# A larger number in a recipe is a mistake: it would take memory or time, or leave nothing of an image.
MAX_JITTER = 100

_LEVELS = np.arange(256)


def _of_colors(change: Callable[..., Image]) -> Callable[..., Image]:
    """Returns a change of colours that leaves alpha, the fourth channel, as it is."""

    @functools.wraps(change)
    def changed(image: Image, *arguments: Any) -> Image:
        if image.shape[-1] != 4:
            return change(image, *arguments)
        colors = change(np.ascontiguousarray(image[..., :3]), *arguments)
        return np.concatenate([colors, image[..., 3:]], axis=-1)

    return changed


def _apply(table: np.ndarray, image: Image) -> Image:
    """Returns `table[image]`; the table is `[256]`, or `[256, C]` with a column for each channel."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table.reshape(256, 1, -1)).reshape(image.shape)


def _blend(image: Image, degenerate: Image, factor: float) -> Image:
    """Returns `factor * image + (1 - factor) * degenerate`, truncated to integers as by PIL; OpenCV rounds."""
    return cv2.addWeighted(image, factor, degenerate, 1 - factor, -0.49).reshape(image.shape)


def _luma(image: Image) -> Image:
    return image[..., 0] if image.shape[-1] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _histograms(image: Image) -> np.ndarray:
    """Returns `[C, 256]` counts."""
    return np.stack(
        [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(image.shape[-1])]
    )


@_of_colors
def adjust_brightness(image: Image, factor: float) -> Image:
    """Blends with black."""
    return _apply(factor * _LEVELS, image)


@_of_colors
def adjust_contrast(image: Image, factor: float) -> Image:
    """Blends with a gray of the image's mean luma."""
    mean = int(cv2.mean(_luma(image))[0] + 0.5)
    return _apply(mean + factor * (_LEVELS - mean), image)


@_of_colors
def adjust_saturation(image: Image, factor: float) -> Image:
    """Blends with the gray image (PIL's `Color`); a gray image stays as it is."""
    if image.shape[-1] == 1:
        return image
    return _blend(image, cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB), factor)


@_of_colors
def adjust_sharpness(image: Image, factor: float) -> Image:
    """Blends with the image smoothed by PIL's 3 x 3 kernel, which leaves the outermost pixels alone."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    inner = cv2.filter2D(image, -1, kernel).reshape(image.shape)[1:-1, 1:-1]
    smooth[1:-1, 1:-1] = inner
    return _blend(image, smooth, factor)


@_of_colors
def adjust_hue(image: Image, turn: float) -> Image:
    """Turns the hue by `turn` of the whole circle, in [-0.5, 0.5]; a gray image stays as it is."""
    if image.shape[-1] == 1:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)  # uint8 wraps around, like the circle
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@_of_colors
def posterize(image: Image, bits: int) -> Image:
    """Keeps the `bits` most significant bits of 8."""
    return _apply(_LEVELS & ~(2 ** (8 - bits) - 1), image)


@_of_colors
def solarize(image: Image, threshold: float) -> Image:
    """Inverts the levels that are not below the threshold."""
    return _apply(np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS), image)


@_of_colors
def autocontrast(image: Image) -> Image:
    """Stretches each channel to the whole range."""
    tables = []
    for histogram in _histograms(image):
        low, high = np.flatnonzero(histogram)[[0, -1]]
        scale = 255.0 / max(1, high - low)
        tables.append(_LEVELS * scale - low * scale if high > low else _LEVELS)  # in PIL's order, to the last bit
    return _apply(np.stack(tables, -1), image)


@_of_colors
def equalize(image: Image) -> Image:
    """Makes the histogram of each channel as even as a table of 256 levels can."""
    tables = []
    for histogram in _histograms(image):
        used = histogram[histogram > 0]
        step = (used.sum() - used[-1]) // 255
        below = np.cumsum(histogram) - histogram
        tables.append((below + step // 2) // step if step else _LEVELS)
    return _apply(np.stack(tables, -1), image)


def color_jitter(
    image: Image,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Image:
    """Changes the four properties in random order, as `torchvision.transforms.ColorJitter` does.

    Args:
      brightness, contrast, saturation: 0 to 100; the factor is uniform in [max(0, 1 - value), 1 + value].
      hue: 0 to 0.5; the turn is uniform in [-hue, hue] of the circle.
    """
    amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, amount in amounts.items():
        check_range(name, amount, 0, MAX_JITTER)
    check_range("hue", hue, 0, 0.5)
    factors = {name: rng.uniform(max(0.0, 1 - amount), 1 + amount) for name, amount in amounts.items()}
    factors["hue"] = rng.uniform(-hue, hue)
    adjustments = (
        ("brightness", adjust_brightness),
        ("contrast", adjust_contrast),
        ("saturation", adjust_saturation),
        ("hue", adjust_hue),
    )
    for i in rng.permutation(4):
        name, adjust = adjustments[i]
        if amounts.get(name, hue):
            image = adjust(image, factors[name])
    return image
