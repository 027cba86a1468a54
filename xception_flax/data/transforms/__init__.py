"""Augmentation on the host: functions (image, rng) -> image.

Images are uint8 `[H, W, C]`, C 1, 3 or 4; `rng` is a `numpy.random.Generator` for one example in one epoch. A recipe
writes a chain of transforms as `'random_resized_crop(min_area=0.08, kernel="bicubic") | flip_left_right'`. If a
transform takes an `image_size` and the chain gives none, it is the recipe's `data.image_size`. A transform raises
UserError for a value out of its range; `parse_transforms` calls each one once to find that out.
"""

import ast
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import cv2
import numpy as np

from xception_flax.data.transforms import rand_augment
from xception_flax.data.transforms.colors import color_jitter
from xception_flax.data.transforms.erasing import random_erasing
from xception_flax.data.transforms.geometry import (
    center_crop,
    flip_left_right,
    random_affine,
    random_crop_with_padding,
    random_resized_crop,
    resize,
    resize_center_crop,
)
from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, suggest, written
from xception_flax.text.sizes import ImageSize, sides

Image = np.ndarray
Transform = Callable[[Image, np.random.Generator], Image]

cv2.setNumThreads(0)  # grain's threads and processes are the parallelism; OpenCV's own would compete with them

#: The transforms by name, as a chain has them.
TRANSFORMS: dict[str, Callable[..., Image]] = {
    "resize": resize,
    "center_crop": center_crop,
    "resize_center_crop": resize_center_crop,
    "random_resized_crop": random_resized_crop,
    "random_crop_with_padding": random_crop_with_padding,
    "random_affine": random_affine,
    "flip_left_right": flip_left_right,
    "color_jitter": color_jitter,
    "rand_augment": rand_augment.rand_augment,
    "random_erasing": random_erasing,
}


def parse_transforms(text: str, image_size: ImageSize) -> tuple[Transform, ...]:
    """Turns a recipe's `'name(keyword=value) | name'` into functions of (image, rng).

    Values are written as on a command line; text may be without quotes, and a size that is not square is
    `(height, width)`. Each transform is called once, on a black image, so that a value out of its range is found here.

    Raises:
      UserError: the syntax is wrong, a transform or keyword is unknown, a value has the wrong type or is out of its
        range, or a transform makes no image of uint8.
    """
    return tuple(_parse(call.strip(), image_size) for call in text.split("|"))


def _parse(call: str, image_size: ImageSize) -> Transform:
    name, texts = _split(call)
    transform = lookup(TRANSFORMS, name, "transform")
    parameters = dict(list(inspect.signature(transform).parameters.items())[2:])
    options = {}
    for key, text in texts.items():
        if key not in parameters:
            raise UserError(f"transform {name!r} takes no {key!r}; {suggest(key, parameters)}")
        values.check_parameter(transform, key, parameters[key].annotation)
        options[key] = values.parse(f"transform {name!r}: {key}", text, parameters[key].annotation)
    if "image_size" in parameters:
        options.setdefault("image_size", image_size)
    for key, parameter in parameters.items():
        if key not in options and parameter.default is parameter.empty:
            raise UserError(f"transform {name!r} needs {key!r}: {name}({key}=...).")
    transform = partial(transform, **options)
    try:
        image = transform(np.zeros((*sides(image_size), 3), np.uint8), np.random.default_rng(0))
    except UserError as error:
        raise UserError(f"transform {written(call)}: {error}") from None
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3:
        raise UserError(f"transform {name!r} must make an image of uint8, [H, W, C], made {made(image)}.")
    return transform


def made(image: Any) -> str:
    """Returns what a transform has made, in words: 'float32 of shape (8, 8, 3)'."""
    if isinstance(image, np.ndarray):
        return f"{image.dtype} of shape {image.shape}"
    return "None" if image is None else type(image).__name__


def _split(call: str) -> tuple[str, dict[str, str]]:
    """Returns the name of a transform and the text of each keyword's value."""
    wrong = UserError(
        f"a transform must be written as name or name(keyword=value), joined by '|'; got {written(call)}."
    )
    try:
        node = ast.parse(call, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise wrong
        name, keywords = node.func.id, node.keywords
        texts = {keyword.arg: ast.get_source_segment(call, keyword.value) for keyword in keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the parser may raise any of these
        raise wrong from None
    if node.args or None in texts:  # a value without a keyword, or `**keywords`
        raise wrong
    if len(texts) < len(keywords):
        raise UserError(f"transform {written(call)} gives a keyword twice.")
    return name, cast("dict[str, str]", texts)
