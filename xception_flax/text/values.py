"""Values that a user writes in a recipe, on a command line or in a chain of transforms: read and checked by their type.

The types are those of keywords in signatures: `int`, `float`, `bool`, `str`, `X | None`, `Sequence[X]`, `DTypeLike`,
`Endless` and `ImageSize`.
"""

import ast
import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np

from xception_flax.text import sizes
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.ranges import LARGEST, check_number

MAX_TEXT = 4096  # characters of a value: as many bytes as Linux takes for a path

# A number that may be infinite, which means 'never'. JSON has no infinity, so float32's largest number stands for it.
Endless = Annotated[float, "inf"]

_WORDS = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}

_NAMES = {  # of one value, and of several
    bool: ("True or False", "True or False"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    Endless: ("a number or inf", "numbers or inf"),
    sizes.ImageSize: (sizes.EXPECTED, "image sizes"),
    types.NoneType: ("None", "None"),
}


def parse(name: str, text: str, annotation: Any) -> Any:
    """Returns the value that `text` stands for: a Python literal of the right type, or else the text itself.

    `true`, `none`, `inf` and the like may be written in small letters, and texts without quotes.

    Args:
      name: what the user calls the value, for messages.
      text: as it was written.
      annotation: the type of the value.

    Raises:
      UserError: it is of another type, or `check` refuses it.
    """
    try:
        literal = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as ast's documentation lists them
        literal = text
    # Python reads 0x64 as 100; as a size it is a height of 0.
    is_text = fits(text, annotation) and (annotation is sizes.ImageSize or not fits(literal, annotation))
    return check(name, text if is_text else literal, annotation)


def check(name: str, value: Any, annotation: Any) -> Any:
    """Returns `value` in the form that JSON can give back: tuples for lists, names for data types, 0 for -0.

    An image size comes in its normal form (`sizes.normal`).

    Args:
      name: what the user calls it, for messages.
      value: of any type.
      annotation: the type that it must have.

    Raises:
      UserError: it is of another type, an integer of more than 64 bits, a number that float32 cannot hold, or a text
        that is too long or has NUL in it.
    """
    if not fits(value, annotation):
        raise UserError(f"{name} must be {describe(annotation)}, got {written(value)}.")
    if annotation is Endless and value == math.inf:
        return LARGEST
    if annotation is sizes.ImageSize:
        value = sizes.normal(value)
    return _checked(name, value)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type. An integer is a number too; a list or a tuple is a sequence, a text is none."""
    if _is_data_type(annotation):
        return isinstance(value, str | type | np.dtype)
    if annotation is sizes.ImageSize:
        return sizes.fits(value)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in arguments)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(fits(element, arguments[0]) for element in value)
    if isinstance(value, bool):  # an int in Python, but not in a recipe
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def describe(annotation: Any, *, several: bool = False) -> str:
    """Returns the words for a type, to follow 'must be': 'an integer', 'a list of numbers', 'a text or None'.

    Args:
      annotation: the type.
      several: for values of the type: 'integers'.

    Raises:
      TypeError: no value of such a type can be written.
    """
    if _is_data_type(annotation):
        return "data types" if several else "a data type"
    if annotation in _NAMES:
        return _NAMES[annotation][several]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(kind, several=several) for kind in arguments)
    if origin is Sequence:
        return f"{'lists' if several else 'a list'} of {describe(arguments[0], several=True)}"
    raise TypeError(f"{annotation} is no type of a value that a user can write.")


def check_parameter(function: Callable[..., Any], name: str, annotation: Any) -> None:
    """Raises UserError if a parameter that users set has no type, or one of which no value can be written."""
    try:
        describe(annotation)
    except TypeError:
        kind = "none" if annotation is inspect.Parameter.empty else inspect.formatannotation(annotation)
        raise UserError(
            f"parameter {name!r} of {function.__module__}.{function.__qualname__} must have a type that a user can "
            f"write (int, float, bool, str, ...), got {kind}. What the program gives stands before '/' or after '*'."
        ) from None


def as_text(value: Any, annotation: Any) -> str:
    """Returns the text from which `parse` makes the checked value."""
    if annotation is Endless and value == LARGEST:
        return "inf"
    if annotation is sizes.ImageSize:
        return sizes.spelled(value)
    if isinstance(value, str) and parse("", value, annotation) == value:
        return value
    return repr(value)


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_checked(name, element) for element in value)
    if isinstance(value, str):
        if "\0" in value or len(value) > MAX_TEXT:
            raise UserError(
                f"{name} must be a text of at most {MAX_TEXT:,} characters, none of them NUL, got {written(value)}."
            )
        return value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{name} must be an integer of 64 bits, got {written(value)}.")
        check_number(name, value)
        return value + 0  # NumPy does not take -0.0 as the end of an interval
    return np.dtype(value).name


def _is_data_type(annotation: Any) -> bool:
    """Whether this is JAX's `DTypeLike`, a union with NumPy's `dtype`; decided without importing JAX."""
    return any((typing.get_origin(kind) or kind) is np.dtype for kind in typing.get_args(annotation))
