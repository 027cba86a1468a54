"""Size and place: resizing, cropping, flipping, affine maps.

An `image_size` is a number for a square, or height x width; see `text.sizes`.
"""

import cv2
import numpy as np

from xception_flax.data.transforms.crops import MAX_ASPECT, SAMPLINGS
from xception_flax.data.transforms.resampling import resample
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup
from xception_flax.text.ranges import check_range
from xception_flax.text.sizes import ImageSize, check_size, shown, sides

Image = np.ndarray

# A larger number in a recipe is a mistake: it would take memory or time, or leave nothing of an image.
MAX_SIDE = 10_000  # pixels of an image
MAX_SCALE = 100


def resize(
    image: Image, rng: np.random.Generator, *, image_size: ImageSize, kernel: str = "bilinear", antialias: bool = False
) -> Image:
    """Scales the whole image to `image_size`, whatever its shape.

    Args:
      kernel: 'bilinear' or 'bicubic'; see `resampling.resample`.
      antialias: False as in TensorFlow and OpenCV, True as in PIL, torchvision and timm.
    """
    check_size("image_size", image_size, MAX_SIDE)
    return resample(image, *sides(image_size), kernel, antialias)


def center_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: ImageSize,
    fraction: float = 0.875,
    kernel: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """Takes the central square of `fraction` of the shorter side, then scales it, as TensorFlow's recipes do.

    For another shape it is the largest central rectangle with the shape of `image_size`, times `fraction`.
    """
    check_size("image_size", image_size, MAX_SIDE)
    check_range("fraction", fraction, 0, 1, above=True)
    inner = sides(image_size)
    wide = inner[1] / inner[0]
    whole_height, whole_width = image.shape[:2]
    height = max(1, round(fraction * min(whole_height, whole_width / wide)))
    width = max(1, round(fraction * min(whole_width, whole_height * wide)))
    top, left = (whole_height - height) // 2, (whole_width - width) // 2
    return resample(image[top : top + height, left : left + width], *sides(image_size), kernel, antialias)


def resize_center_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: ImageSize,
    resize_size: ImageSize,
    kernel: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """Scales the shorter side to `resize_size`, then takes the central `image_size`, as torchvision and timm do.

    Their published figures are with `antialias=True`. timm's `crop_pct` is image_size / resize_size.

    Args:
      resize_size: pixels of the shorter side, no less than either side of `image_size`; or height x width, which the
        scaled image just covers, as in timm for images that are not square.
      kernel, antialias: as for `resize`.
    """
    check_size("image_size", image_size, MAX_SIDE)
    inner = sides(image_size)
    if isinstance(resize_size, int):
        check_range("resize_size", resize_size, max(inner), MAX_SIDE)
    check_size("resize_size", resize_size, MAX_SIDE)
    covered = sides(resize_size)
    for name, least, side in zip(("height", "width"), inner, covered, strict=True):
        check_range(f"the {name} of resize_size", side, least, MAX_SIDE)
    # The axis along which the image has the fewest pixels for each one to be covered.
    tight = 0 if image.shape[0] * covered[1] <= image.shape[1] * covered[0] else 1
    short = image.shape[tight]
    # Only the middle of a strip is scaled. All of it could fill the memory, and would be cut off afterwards.
    used = [-(-short * side // covered[tight]) for side in covered]  # pixels of the image that are covered
    rows, columns = (
        slice(spare := max(0, side - 4 * least) // 2, side - spare)
        for side, least in zip(image.shape[:2], used, strict=True)
    )
    image = image[rows, columns]
    if covered[0] == covered[1]:  # as in torchvision, the longer side is truncated to an integer
        height, width = (covered[0] * side // short for side in image.shape[:2])
    else:  # as in timm's ResizeKeepRatio
        height, width = (round(side / (short / covered[tight])) for side in image.shape[:2])
    image = resample(image, height, width, kernel, antialias)
    # As in torchvision, the offset is rounded half to even.
    top, left = round((height - inner[0]) / 2), round((width - inner[1]) / 2)
    return image[top : top + inner[0], left : left + inner[1]]


def random_resized_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: ImageSize,
    min_area: float = 0.08,
    max_area: float = 1.0,
    max_aspect: float = 4 / 3,
    sampling: str = "torchvision",
    kernel: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """Takes a random rectangle and scales it to `image_size` (Szegedy et al. 2015, section 6).

    Args:
      min_area, max_area: shares of the image's area, 0 to 1.
      max_aspect: 1 to 1000; width / height of the rectangle is in [1 / max_aspect, max_aspect], whatever
        the shape of `image_size`, as in torchvision and timm: the rectangle is stretched to it.
      sampling: 'torchvision' or 'tensorflow', which distribute the rectangles differently; see `crops`.
      kernel, antialias: as for `resize`.
    """
    check_size("image_size", image_size, MAX_SIDE)
    check_range("max_area", max_area, 0, 1, above=True)
    check_range("min_area", min_area, 0, max_area, above=True)
    check_range("max_aspect", max_aspect, 1, MAX_ASPECT)
    box = lookup(SAMPLINGS, sampling, "sampling")
    top, left, height, width = box(rng, *image.shape[:2], min_area=min_area, max_area=max_area, max_aspect=max_aspect)
    return resample(image[top : top + height, left : left + width], *sides(image_size), kernel, antialias)


def random_crop_with_padding(
    image: Image, rng: np.random.Generator, *, image_size: ImageSize, padding: int = 4
) -> Image:
    """Adds `padding` black pixels at each side, takes a random `image_size` of it (He et al. 2015, 4.2, for CIFAR)."""
    check_size("image_size", image_size, MAX_SIDE)
    size = sides(image_size)
    check_range("padding", padding, 0, min(size))
    spare = [side + 2 * padding - least for side, least in zip(image.shape[:2], size, strict=True)]
    if min(spare) < 0:
        raise UserError(
            f"random_crop_with_padding(padding={padding}) cannot take {shown(image_size)} pixels of an image "
            f"of {image.shape[0]} x {image.shape[1]}; put a resize before it."
        )
    padded = cv2.copyMakeBorder(image, padding, padding, padding, padding, cv2.BORDER_CONSTANT)
    padded = padded.reshape(*padded.shape[:2], -1)  # OpenCV drops a single channel
    top, left = (rng.integers(rest + 1) for rest in spare)
    return padded[top : top + size[0], left : left + size[1]]


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
