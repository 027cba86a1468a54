"""RandAugment's operations (Cubuk et al. 2019, arXiv 1909.13719), with torchvision's magnitudes.

There are fourteen, each a function of (image, level). A magnitude from 0 to 30 is a share of each operation's
strongest level, as in `torchvision.transforms.RandAugment` with its 31 bins. timm's code and the paper's count to 10;
their strongest levels are about the same.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from xception_flax.data.transforms import colors
from xception_flax.text.lookup import lookup
from xception_flax.text.ranges import check_range

Image = np.ndarray

MAX_MAGNITUDE = 30
MAX_OPS = 100  # a larger number in a recipe is a mistake
NEAREST, BILINEAR = cv2.INTER_NEAREST, cv2.INTER_LINEAR


class Operation(NamedTuple):
    """One of RandAugment's operations.

    Attributes:
      function: (image, level, interpolation) -> image; only operations that move pixels use the interpolation.
      level: magnitude / 30 -> level.
      signed: whether the level is negated in half of the draws.
    """

    function: Callable[[Image, float, int], Image]
    level: Callable[[float], float]
    signed: bool = False


def _warp(image: Image, inverse: list[list[float]], interpolation: int) -> Image:
    """Takes pixel (x, y) from `inverse @ (x, y, 1)`, or black outside of the image."""
    height, width = image.shape[:2]
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, np.asarray(inverse, np.float64), (width, height), flags=flags).reshape(image.shape)


# torchvision's shears use PIL's coordinates, which are of pixels' corners, not centres. So half a level is added.
def _shear_x(image: Image, level: float, interpolation: int) -> Image:
    return _warp(image, [[1, level, level / 2], [0, 1, 0]], interpolation)


def _shear_y(image: Image, level: float, interpolation: int) -> Image:
    return _warp(image, [[1, 0, 0], [level, 1, level / 2]], interpolation)


def _translate_x(image: Image, level: float, interpolation: int) -> Image:
    return _warp(image, [[1, 0, -int(level * image.shape[1])], [0, 1, 0]], interpolation)


def _translate_y(image: Image, level: float, interpolation: int) -> Image:
    return _warp(image, [[1, 0, 0], [0, 1, -int(level * image.shape[0])]], interpolation)


def _rotate(image: Image, degrees: float, interpolation: int) -> Image:
    height, width = image.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _warp(image, [[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y]], interpolation)


OPERATIONS = {
    "identity": Operation(lambda image, level, _: image, lambda share: 0.0),
    "shear_x": Operation(_shear_x, lambda share: 0.3 * share, signed=True),
    "shear_y": Operation(_shear_y, lambda share: 0.3 * share, signed=True),
    "translate_x": Operation(_translate_x, lambda share: 150 / 331 * share, signed=True),
    "translate_y": Operation(_translate_y, lambda share: 150 / 331 * share, signed=True),
    "rotate": Operation(_rotate, lambda share: 30 * share, signed=True),
    "brightness": Operation(
        lambda image, level, _: colors.adjust_brightness(image, 1 + level), lambda share: 0.9 * share, signed=True
    ),
    "color": Operation(
        lambda image, level, _: colors.adjust_saturation(image, 1 + level), lambda share: 0.9 * share, signed=True
    ),
    "contrast": Operation(
        lambda image, level, _: colors.adjust_contrast(image, 1 + level), lambda share: 0.9 * share, signed=True
    ),
    "sharpness": Operation(
        lambda image, level, _: colors.adjust_sharpness(image, 1 + level), lambda share: 0.9 * share, signed=True
    ),
    "posterize": Operation(
        lambda image, level, _: colors.posterize(image, int(level)), lambda share: 8 - round(4 * share)
    ),
    "solarize": Operation(lambda image, level, _: colors.solarize(image, level), lambda share: 255 * (1 - share)),
    "autocontrast": Operation(lambda image, level, _: colors.autocontrast(image), lambda share: 0.0),
    "equalize": Operation(lambda image, level, _: colors.equalize(image), lambda share: 0.0),
}

_OPERATIONS = tuple(OPERATIONS.values())


def rand_augment(
    image: Image, rng: np.random.Generator, *, num_ops: int = 2, magnitude: int = 9, kernel: str = "nearest"
) -> Image:
    """Applies random operations one after the other (Cubuk et al. 2019), by torchvision's definition and defaults.

    Each of the fourteen operations is equally likely each time. Pixels from outside are black.

    Args:
      num_ops: number of operations, 0 to 100; the paper's N.
      magnitude: of each operation, 0 to 30; the paper's M.
      kernel: 'nearest' or 'bilinear', for operations that move pixels.
    """
    check_range("num_ops", num_ops, 0, MAX_OPS)
    check_range("magnitude", magnitude, 0, MAX_MAGNITUDE)
    interpolation = lookup({"nearest": NEAREST, "bilinear": BILINEAR}, kernel, "kernel")
    for _ in range(num_ops):
        operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
        level = operation.level(magnitude / MAX_MAGNITUDE)
        if operation.signed and rng.random() < 0.5:
            level = -level
        image = operation.function(image, level, interpolation)
    return image
