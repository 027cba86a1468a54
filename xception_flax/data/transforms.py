"""Augmentation on the host: each a function of (image, rng) -> image.

Images are uint8 `[H, W, C]`, C 1 or 3; `rng` is a `numpy.random.Generator` that belongs to this one
example of this one epoch. A recipe writes a chain of them as `'random_resized_crop(min_area=0.08,
kernel="bicubic") | flip_left_right'`; an `image_size` that a transform takes and the recipe does not
give there is the recipe's `data.image_size`. Each raises ValueError for a value out of its range,
which `parse_transforms` finds out by calling it.
"""

import ast
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np

from xception_flax.data import colors
from xception_flax.data.crops import SAMPLINGS
from xception_flax.data.rand_augment import BILINEAR, MAX_MAGNITUDE, NEAREST, OPERATIONS
from xception_flax.data.resampling import resample
from xception_flax.lookup import cut, lookup, suggest, written
from xception_flax.ranges import check_range

Image = np.ndarray
Transform = Callable[[Image, np.random.Generator], Image]

# What a recipe may ask for, where the definitions set no end: beyond it a number is a mistake, which would cost memory
# or time, or leave nothing of an image.
MAX_SIDE = 10_000  # pixels of an image
MAX_ASPECT = 1000
MAX_SCALE = 100
MAX_JITTER = 100
MAX_OPS = 100  # of RandAugment

cv2.setNumThreads(0)  # grain's threads and processes are the parallelism; two layers of it fight


# Size and place ------------------------------------------------------------------------------------


def resize(
    image: Image, rng: np.random.Generator, *, image_size: int, kernel: str = "bilinear", antialias: bool = False
) -> Image:
    """Scales the whole image to a square, whatever its shape.

    Args:
      kernel: 'bilinear' or 'bicubic'; see `resampling.resample`, for antialias too.
      antialias: False is TensorFlow's and OpenCV's habit, True that of PIL, torchvision and timm.
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
    """Takes the central square of `fraction` of the shorter side and scales it: crop first, as TensorFlow's recipes."""
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
    """Scales the shorter side to `resize_size` and takes the central square: scale first, as torchvision and timm.

    Published figures of theirs are with `antialias=True`; a `crop_pct` of timm's is image_size / resize_size.
    """
    check_range("image_size", image_size, 1, MAX_SIDE)
    check_range("resize_size", resize_size, image_size, MAX_SIDE)
    short = min(image.shape[:2])
    # Of a strip no more than its middle is scaled: all of it could fill the memory, to be cut off then.
    spare_height, spare_width = (max(0, side - 4 * short) // 2 for side in image.shape[:2])
    image = image[spare_height : image.shape[0] - spare_height, spare_width : image.shape[1] - spare_width]
    # The longer side is cut off to an integer and the place rounded half to even, as there.
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
      sampling: 'torchvision' or 'tensorflow', whose rectangles are distributed otherwise; see `crops`.
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
    """Adds `padding` black pixels at each side and takes a random square (He et al. 2015, section 4.2: CIFAR, 4)."""
    check_range("image_size", image_size, 1, MAX_SIDE)
    check_range("padding", padding, 0, image_size)
    height, width = (side + 2 * padding - image_size for side in image.shape[:2])
    if height < 0 or width < 0:
        raise ValueError(
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
    """Rotates, shifts and scales about the centre; what comes in from outside repeats the edge.

    Angle uniform in +-max_degrees (0 to 360), shift uniform in +-max_shift (share of each side, 0 to 1),
    logarithm of the scale uniform in +-log(max_scale) (1 to 100).
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
    """Mirrors every second image."""
    return cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image


# Colour, RandAugment, erasing ----------------------------------------------------------------------


def color_jitter(
    image: Image,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Image:
    """Changes the four in random order, as `torchvision.transforms.ColorJitter` does.

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
    for i in rng.permutation(4):
        name = ("brightness", "contrast", "saturation", "hue")[i]
        if amounts.get(name, hue):
            image = getattr(colors, f"adjust_{name}")(image, factors[name])
    return image


def rand_augment(
    image: Image, rng: np.random.Generator, *, num_ops: int = 2, magnitude: int = 9, kernel: str = "nearest"
) -> Image:
    """Applies random operations one after the other (Cubuk et al. 2019), by torchvision's definition and defaults.

    The paper's N and M. Each of the fourteen operations is as likely each time; what comes in from
    outside is black.

    Args:
      num_ops: how many, 0 to 100.
      magnitude: 0 to 30, of each; see `rand_augment.OPERATIONS`.
      kernel: 'nearest' or 'bilinear', of rotations and shears.
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


_OPERATIONS = tuple(OPERATIONS.values())


def random_erasing(
    image: Image,
    rng: np.random.Generator,
    *,
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    max_aspect: float = 10 / 3,
    fill: str = "noise",
) -> Image:
    """Covers a random rectangle (Zhong et al. 2017, arXiv 1708.04896), drawn as torchvision and timm do.

    Area and logarithm of the aspect ratio are uniform; after ten draws that do not fit, nothing is covered.

    Args:
      probability: of covering anything; the paper's and torchvision's 0.5.
      min_area, max_area: shares of the image's area, 0 to 1; the paper has 0.02 and 0.4.
      max_aspect: 1 to 1000; the ratio is in [1 / max_aspect, max_aspect].
      fill: 'noise', uniform 0 to 255 in every pixel and channel, which the paper found best; or 'gray',
        128: torchvision's zeros after normalization.
    """
    check_range("probability", probability, 0, 1)
    check_range("max_area", max_area, 0, 1, above=True)
    check_range("min_area", min_area, 0, max_area, above=True)
    check_range("max_aspect", max_aspect, 1, MAX_ASPECT)
    if fill not in ("noise", "gray"):
        raise ValueError(f"unknown fill {written(fill)}; {suggest(fill, ('noise', 'gray'))}")
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(min_area, max_area) * height * width
        root = math.exp(rng.uniform(-0.5, 0.5) * math.log(max_aspect))  # of the aspect ratio
        h, w = round(math.sqrt(area) * root), round(math.sqrt(area) / root)
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.copy()  # it may be the source's own
            covered = image[top : top + h, left : left + w]
            covered[:] = rng.integers(256, size=covered.shape, dtype=np.uint8) if fill == "noise" else 128
            return image
    return image


# Chains --------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[..., Image]] = {
    "resize": resize,
    "center_crop": center_crop,
    "resize_center_crop": resize_center_crop,
    "random_resized_crop": random_resized_crop,
    "random_crop_with_padding": random_crop_with_padding,
    "random_affine": random_affine,
    "flip_left_right": flip_left_right,
    "color_jitter": color_jitter,
    "rand_augment": rand_augment,
    "random_erasing": random_erasing,
}


def parse_transforms(text: str, image_size: int) -> tuple[Transform, ...]:
    """Turns a recipe's `'name(keyword=value) | name'` into functions of (image, rng).

    A value is a number, a string in quotes, True or False. Each transform is called once, on a
    black image, so that a value out of its range shows here.

    Raises:
      ValueError: bad syntax, an unknown transform or keyword, a value of the wrong type or out of its
        range; the message says what there is.
    """
    return tuple(_parse(call.strip(), image_size) for call in text.split("|"))


def _parse(call: str, image_size: int) -> Transform:
    wrong = ValueError(
        f"a transform must be written as name or name(keyword=value), joined by '|'; got {written(call)}."
    )
    try:
        node = ast.parse(call, mode="eval").body
        name = node.func.id if isinstance(node, ast.Call) else node.id
        keywords = node.keywords if isinstance(node, ast.Call) else []
        if (isinstance(node, ast.Call) and node.args) or any(k.arg is None for k in keywords):
            raise wrong
    except (SyntaxError, AttributeError, ValueError, RecursionError, MemoryError):  # the parser has all of them
        raise wrong from None
    transform = lookup(TRANSFORMS, name, "transform")
    parameters = dict(list(inspect.signature(transform).parameters.items())[2:])
    options = {k.arg: _value(call, name, k, parameters) for k in keywords}
    if len(options) < len(keywords):
        raise ValueError(f"transform {written(call)} gives a keyword twice.")
    if "image_size" in parameters:
        options.setdefault("image_size", image_size)
    for key, parameter in parameters.items():
        if key not in options and parameter.default is parameter.empty:
            raise ValueError(f"transform {name!r} needs {key!r}: {name}({key}=...).")
    transform = partial(transform, **options)
    try:
        transform(np.zeros((image_size, image_size, 3), np.uint8), np.random.default_rng(0))
    except ValueError as error:
        raise ValueError(f"transform {written(call)}: {error}") from None
    return transform


def _value(call: str, name: str, keyword: ast.keyword, parameters: dict[str, inspect.Parameter]) -> Any:
    if keyword.arg not in parameters:
        raise ValueError(f"transform {name!r} takes no {keyword.arg!r}; {suggest(keyword.arg, parameters)}")
    expected = parameters[keyword.arg].annotation
    words = {float: "a number", int: "an integer", bool: "True or False", str: "a string in quotes"}[expected]
    try:
        value = ast.literal_eval(keyword.value)
    except (ValueError, TypeError, RecursionError, MemoryError):  # a name without quotes, most likely
        value = None
    kinds = (int, float) if expected is float else expected
    # bool is an int to Python, and never to the author of a recipe.
    if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
        written = cut(ast.get_source_segment(call, keyword.value))
        raise ValueError(f"transform {name!r}: {keyword.arg} must be {words}, got {written}.")
    return value + 0 if isinstance(value, float) else value  # -0.0 is 0, and no end of an interval to NumPy
