"""Size and place: resizing, cropping, flipping, affine maps."""

import cv2
import numpy as np

from xception_flax.data.transforms.crops import MAX_ASPECT, SAMPLINGS
from xception_flax.data.transforms.resampling import resample
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup
from xception_flax.text.ranges import check_range

Image = np.ndarray

# A larger number in a recipe is a mistake: it would take memory or time, or leave nothing of an image.
MAX_SIDE = 10_000  # pixels of an image
MAX_SCALE = 100


def resize(
    image: Image, rng: np.random.Generator, *, image_size: int, kernel: str = "bilinear", antialias: bool = False
) -> Image:
    """Scales the whole image to a square, whatever its shape.

    Args:
      kernel: 'bilinear' or 'bicubic'; see `resampling.resample`.
      antialias: False as in TensorFlow and OpenCV, True as in PIL, torchvision and timm.
    """
    check_range("image_size", image_size, 1, MAX_SIDE)
    return resample(image, image_size, image_size, kernel, antialias)


def center_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: int,
    fraction: float = 0.875,
    kernel: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """Takes the central square of `fraction` of the shorter side, then scales it, as TensorFlow's recipes do."""
    check_range("image_size", image_size, 1, MAX_SIDE)
    check_range("fraction", fraction, 0, 1, above=True)
    height, width = image.shape[:2]
    side = max(1, round(fraction * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return resample(image[top : top + side, left : left + side], image_size, image_size, kernel, antialias)


def resize_center_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: int,
    resize_size: int,
    kernel: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """Scales the shorter side to `resize_size`, then takes the central square, as torchvision and timm do.

    Their published figures are with `antialias=True`. timm's `crop_pct` is image_size / resize_size.
    """
    check_range("image_size", image_size, 1, MAX_SIDE)
    check_range("resize_size", resize_size, image_size, MAX_SIDE)
    short = min(image.shape[:2])
    # Only the middle of a strip is scaled. All of it could fill the memory, and would be cut off afterwards.
    spare_height, spare_width = (max(0, side - 4 * short) // 2 for side in image.shape[:2])
    image = image[spare_height : image.shape[0] - spare_height, spare_width : image.shape[1] - spare_width]
    # As in torchvision, the longer side is truncated to an integer, and the offset is rounded half to even.
    height, width = (resize_size * side // short for side in image.shape[:2])
    image = resample(image, height, width, kernel, antialias)
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    return image[top : top + image_size, left : left + image_size]


def random_resized_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: int,
    min_area: float = 0.08,
    max_area: float = 1.0,
    max_aspect: float = 4 / 3,
    sampling: str = "torchvision",
    kernel: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """Takes a random rectangle and scales it to a square (Szegedy et al. 2015, section 6).

    Args:
      min_area, max_area: shares of the image's area, 0 to 1.
      max_aspect: 1 to 1000; width / height of the rectangle is in [1 / max_aspect, max_aspect].
      sampling: 'torchvision' or 'tensorflow', which distribute the rectangles differently; see `crops`.
      kernel, antialias: as for `resize`.
    """
    check_range("image_size", image_size, 1, MAX_SIDE)
    check_range("max_area", max_area, 0, 1, above=True)
    check_range("min_area", min_area, 0, max_area, above=True)
    check_range("max_aspect", max_aspect, 1, MAX_ASPECT)
    box = lookup(SAMPLINGS, sampling, "sampling")
    top, left, height, width = box(rng, *image.shape[:2], min_area=min_area, max_area=max_area, max_aspect=max_aspect)
    return resample(image[top : top + height, left : left + width], image_size, image_size, kernel, antialias)


def random_crop_with_padding(image: Image, rng: np.random.Generator, *, image_size: int, padding: int = 4) -> Image:
    """Adds `padding` black pixels at each side and takes a random square (He et al. 2015, section 4.2, for CIFAR)."""
    check_range("image_size", image_size, 1, MAX_SIDE)
    check_range("padding", padding, 0, image_size)
    height, width = (side + 2 * padding - image_size for side in image.shape[:2])
    if height < 0 or width < 0:
        raise UserError(
            f"random_crop_with_padding(padding={padding}) cannot take {image_size} x {image_size} pixels of an image "
            f"of {image.shape[0]} x {image.shape[1]}; put a resize before it."
        )
    padded = cv2.copyMakeBorder(image, *[padding] * 4, cv2.BORDER_CONSTANT).reshape(
        height + image_size, width + image_size, -1
    )
    top, left = rng.integers(height + 1), rng.integers(width + 1)
    return padded[top : top + image_size, left : left + image_size]


def random_affine(
    image: Image,
    rng: np.random.Generator,
    *,
    max_degrees: float = 0.0,
    max_shift: float = 0.0,
    max_scale: float = 1.0,
) -> Image:
    """Rotates, shifts and scales about the centre; pixels from outside repeat the edge.

    Args:
      max_degrees: 0 to 360; the angle is uniform in +-max_degrees.
      max_shift: share of each side, 0 to 1; the shift is uniform in +-max_shift.
      max_scale: 1 to 100; the logarithm of the scale is uniform in +-log(max_scale).
    """
    check_range("max_degrees", max_degrees, 0, 360)
    check_range("max_shift", max_shift, 0, 1)
    check_range("max_scale", max_scale, 1, MAX_SCALE)
    height, width = image.shape[:2]
    angle = rng.uniform(-max_degrees, max_degrees)
    scale = np.exp(rng.uniform(-1, 1) * np.log(max_scale))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
    matrix[:, 2] += rng.uniform(-max_shift, max_shift, 2) * (width, height)
    moved = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return moved.reshape(image.shape)  # OpenCV drops a single channel


def flip_left_right(image: Image, rng: np.random.Generator) -> Image:
    """Mirrors the image with a probability of one half."""
    return cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image
