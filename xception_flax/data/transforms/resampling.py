"""Scaling an image to another size, with a choice of kernel and antialiasing.

`tf.image.resize` and OpenCV scale without antialiasing by default; PIL, and so torchvision and timm, scale with it. On
one core, scaling a photo of 400 x 300 to 299 x 299 took 0.17 ms without and 1.3 ms with antialiasing (bicubic: 0.25 and
2.1 ms; OpenCV's INTER_AREA: 1.1 ms). So antialiasing costs about as much as decoding a JPEG of that size.
"""

import cv2
import numpy as np
import PIL.Image

from xception_flax.text.lookup import lookup

Image = np.ndarray

# The kernels of OpenCV and of PIL. The two bicubic kernels differ: Keys' a is -0.75 in OpenCV and in torch without
# antialiasing, and -0.5 in PIL and TensorFlow.
KERNELS = {
    "bilinear": (cv2.INTER_LINEAR, PIL.Image.Resampling.BILINEAR),
    "bicubic": (cv2.INTER_CUBIC, PIL.Image.Resampling.BICUBIC),
}


def resample(image: Image, height: int, width: int, kernel: str = "bilinear", antialias: bool = False) -> Image:
    """Scales uint8 `[H, W, C]` to `[height, width, C]`, with half-pixel centres: corners stay corners.

    Args:
      image: the image.
      height, width: of the result, in pixels.
      kernel: a key of `KERNELS`.
      antialias: where the image shrinks, widen the kernel so that every pixel counts, as PIL does.

    Raises:
      UserError: the kernel is unknown.
    """
    opencv, pil = lookup(KERNELS, kernel, "kernel")
    # Where nothing shrinks, PIL's bilinear equals OpenCV's up to rounding. Its bicubic is a different kernel.
    shrinks = image.shape[0] > height or image.shape[1] > width
    if antialias and (shrinks or kernel == "bicubic"):
        if image.shape[-1] != 4:
            return _by_pil(image, height, width, pil)
        # Alpha apart: of an image with it, Pillow scales the colours times alpha, and loses those that nobody sees.
        return np.concatenate([_by_pil(part, height, width, pil) for part in np.split(image, [3], axis=-1)], axis=-1)
    resized = cv2.resize(image, (width, height), interpolation=opencv)
    return resized.reshape(height, width, image.shape[-1])


def _by_pil(image: Image, height: int, width: int, kernel: PIL.Image.Resampling) -> Image:
    """Scales `[H, W, C]` with C 1 or 3."""
    pixels = np.ascontiguousarray(image if image.shape[-1] == 3 else image[..., 0])
    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), kernel)).reshape(height, width, -1)
