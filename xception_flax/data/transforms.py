"""Augmentation on the host: each a function of (image, rng) -> image.

Images are uint8 `[H, W, C]`; `rng` is a `numpy.random.Generator` that belongs to this one example
of this one epoch. A recipe writes a chain of them as `'random_resized_crop(min_area=0.08) |
flip_left_right'`; an `image_size` that a transform takes and the recipe does not give there is the
recipe's `data.image_size`.
"""

import ast
import inspect
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

from xception_flax.lookup import lookup, suggest

Image = np.ndarray
Transform = Callable[[Image, np.random.Generator], Image]

cv2.setNumThreads(0)  # grain's threads and processes are the parallelism; two layers of it fight


def resize(image: Image, rng: np.random.Generator, *, image_size: int) -> Image:
    """Scales the whole image to a square, whatever its shape; bilinear, without antialiasing."""
    return _resize(image, image_size, image_size)


def center_crop(image: Image, rng: np.random.Generator, *, image_size: int, fraction: float = 0.875) -> Image:
    """Takes the central square of `fraction` of the shorter side and scales it; bilinear."""
    height, width = image.shape[:2]
    side = max(1, round(fraction * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[top : top + side, left : left + side], image_size, image_size)


def random_resized_crop(
    image: Image,
    rng: np.random.Generator,
    *,
    image_size: int,
    min_area: float = 0.08,
    max_area: float = 1.0,
    max_aspect: float = 4 / 3,
) -> Image:
    """Takes a random rectangle and scales it to a square (Szegedy et al. 2015, section 6).

    The rectangle's share of the area is uniform in [min_area, max_area], the logarithm of its
    aspect ratio uniform in [-log max_aspect, log max_aspect], as in torchvision; after ten draws
    that do not fit, the largest central square. Bilinear, without antialiasing.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(min_area, max_area) * height * width
        aspect = np.exp(rng.uniform(-1, 1) * np.log(max_aspect))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return _resize(image[top : top + h, left : left + w], image_size, image_size)
    return center_crop(image, rng, image_size=image_size, fraction=1.0)


def random_affine(
    image: Image,
    rng: np.random.Generator,
    *,
    max_degrees: float = 0.0,
    max_shift: float = 0.0,
    max_scale: float = 1.0,
) -> Image:
    """Rotates, shifts and scales about the centre; what comes in from outside repeats the edge.

    Angle uniform in +-max_degrees, shift uniform in +-max_shift (share of each side), logarithm of
    the scale uniform in +-log(max_scale).
    """
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


def _resize(image: Image, height: int, width: int) -> Image:
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[-1])


TRANSFORMS: dict[str, Callable[..., Image]] = {
    "resize": resize,
    "center_crop": center_crop,
    "random_resized_crop": random_resized_crop,
    "random_affine": random_affine,
    "flip_left_right": flip_left_right,
}


def parse_transforms(text: str, image_size: int) -> tuple[Transform, ...]:
    """Turns a recipe's `'name(keyword=value) | name'` into functions of (image, rng).

    Raises:
      ValueError: bad syntax, an unknown transform or keyword; the message has the names there are.
    """
    return tuple(_parse(call.strip(), image_size) for call in text.split("|"))


def _parse(call: str, image_size: int) -> Transform:
    wrong = ValueError(f"a transform must be written as name or name(keyword=number), joined by '|'; got {call!r}.")
    try:
        node = ast.parse(call, mode="eval").body
        name = node.func.id if isinstance(node, ast.Call) else node.id
        if isinstance(node, ast.Call) and node.args:
            raise wrong
        keywords = node.keywords if isinstance(node, ast.Call) else []
        options = {k.arg: ast.literal_eval(k.value) for k in keywords}
    except (SyntaxError, AttributeError, ValueError):
        raise wrong from None
    transform = lookup(TRANSFORMS, name, "transform")
    known = list(inspect.signature(transform).parameters)[2:]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"transform {name!r} takes no {option!r}; {suggest(option, known)}")
        if not isinstance(value, int | float):
            raise wrong
    if "image_size" in known:
        options.setdefault("image_size", image_size)
    return partial(transform, **options)
