"""Height and width of images, as a user gives them: 299 for a square, 224x320 or (224, 320) for height x width.

Height comes first, as in the papers, in timm and in the shapes of arrays. The normal form is a number for a square and
`(height, width)` for any other size, so that a recipe with a square is the same in either spelling.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.ranges import check_range

ImageSize = Annotated[int | tuple[int, int], "HxW"]

EXPECTED = "a number, or height x width such as 224x320"

_SPELLED = re.compile(r"([0-9]{1,18})x([0-9]{1,18})")


def fits(value: Any) -> bool:
    """Whether a value is an image size in any of its spellings; their range is for `check_size`."""
    if isinstance(value, str):
        return _SPELLED.fullmatch(value) is not None
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(type(side) is int for side in value)
    return type(value) is int


def normal(value: int | str | Sequence[int]) -> int | tuple[int, int]:
    """Returns the normal form of a value that `fits`."""
    if isinstance(value, str):
        value = tuple(map(int, value.split("x")))
    if isinstance(value, int):
        return value
    height, width = value
    return height if height == width else (height, width)


def sides(size: ImageSize) -> tuple[int, int]:
    """Returns `(height, width)` in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def spelled(size: ImageSize) -> str:
    """Returns a size as a user writes it: '299', '224x320'."""
    height, width = sides(size)
    return str(height) if height == width else f"{height}x{width}"


def shown(size: ImageSize) -> str:
    """Returns a size in words, height first: '299 x 299'."""
    return " x ".join(map(str, sides(size)))


def check_size(name: str, size: ImageSize, high: int, low: int = 1) -> None:
    """Raises UserError unless this is an image size with both sides from `low` to `high`.

    Args:
      name: as the user knows it, such as 'data.image_size'.
      size: from anywhere; of another type too.
      high, low: pixels.
    """
    if not fits(size) or isinstance(size, str):
        raise UserError(f"{name} must be {EXPECTED}, got {written(size)}.")
    if isinstance(size, int):
        check_range(name, size, low, high)
        return
    for side, pixels in zip(("height", "width"), size, strict=True):
        check_range(f"the {side} of {name}", pixels, low, high)
