"""Filling in every default of a recipe, and checking every key and value."""

import inspect
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import typeguard
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from xception_flax.recipes.groups import ENDLESS, GROUPS, LOOP, Group, Loop
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.ranges import LARGEST, check_number

MAX_TEXT = 4096  # characters of a value: as many bytes as Linux takes for a path


def resolve(recipe: Mapping[str, Any]) -> ConfigDict:
    """Returns the recipe with every default filled in, every key and type checked.

    Raises:
      ValueError: an unknown, missing or mistyped key, or a value out of its range.
    """
    top = {key: value for key, value in recipe.items() if key not in GROUPS}
    resolved = complete("", LOOP, top)
    Loop(**resolved)
    for name, group in GROUPS.items():
        values = recipe.get(name, {})
        if not isinstance(values, Mapping):
            raise UserError(f"recipe key {name!r} must be a group of keys, got {written(values)}.")
        resolved[name] = complete(f"{name}.", group, values)
    return ConfigDict(resolved, convert_dict=True)


def parameters_of(prefix: str, group: Group, values: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a group feeds: of its function and of the entry it selects."""
    parameters = dict(inspect.signature(group.function).parameters)
    if group.selector:
        choice = values.get(group.selector, parameters[group.selector].default)
        if choice is inspect.Parameter.empty:
            raise UserError(f"recipe key '{prefix}{group.selector}' is missing; {suggest('', group.table)}")
        if not isinstance(choice, str) or choice not in group.table:
            raise UserError(f"unknown {prefix}{group.selector} {written(choice)}; {suggest(choice, group.table)}")
        parameters = dict(inspect.signature(group.table[choice]).parameters) | parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in group.supplied and parameter.kind is not parameter.VAR_KEYWORD
    }


def unknown_key(prefix: str, key: str, group: Group, values: Mapping[str, Any], known: Sequence[str]) -> UserError:
    choice = values.get(group.selector) if group.selector else None
    where = f" with {prefix}{group.selector}={choice!r}" if choice else ""
    known = [*known, *GROUPS] if group is LOOP else known
    return UserError(f"unknown recipe key {written(f'{prefix}{key}')}{where}; {suggest(key, known)}")


def complete(prefix: str, group: Group, values: Mapping[str, Any]) -> dict[str, Any]:
    parameters = parameters_of(prefix, group, values)
    for key in values:
        if key not in parameters:
            raise unknown_key(prefix, key, group, values, list(parameters))
    resolved = {}
    for key, parameter in parameters.items():
        value = values.get(key, parameter.default)
        if value is parameter.empty:
            raise UserError(
                f"recipe key '{prefix}{key}' is missing; set it by --config.{prefix}{key}=VALUE "
                f"({_type_name(parameter.annotation)})."
            )
        if key in values and not fits(value, parameter.annotation):
            raise mistyped(prefix + key, parameter.annotation, value)
        if prefix + key in ENDLESS and value == math.inf:
            value = LARGEST
        for leaf in _leaves(value):
            _check_value(prefix + key, leaf)
        resolved[key] = _canonical(value, parameter.annotation)
    return resolved


def _leaves(value: Any, depth: int = 3) -> Iterator[Any]:
    """What a value is made of: itself, or all that its tuples and lists hold, down to a depth that no key has."""
    if isinstance(value, list | tuple) and depth:
        for element in value:
            yield from _leaves(element, depth - 1)
    else:
        yield value


def _check_value(key: str, value: Any) -> None:
    """Raises ValueError for what no key has a meaning for, whatever its type and its own range."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"recipe key '{key}' must be an integer of 64 bits, got {written(value)}.")
    if isinstance(value, int | float):
        check_number(f"recipe key '{key}'", value)
    if isinstance(value, str) and ("\0" in value or len(value) > MAX_TEXT):
        raise UserError(
            f"recipe key '{key}' must be a text of at most {MAX_TEXT:,} characters, none of them NUL, "
            f"got {written(value)}."
        )


def fits(value: Any, annotation: Any) -> bool:
    leaves = list(_leaves(value))
    # bool is an int to Python, and never to the author of a recipe.
    if any(isinstance(leaf, bool) for leaf in leaves) and bool not in (annotation, *typing.get_args(annotation)):
        return False
    # A text is a sequence to Python, and so are bytes and a range; a list here is one too many in another.
    if any(isinstance(leaf, Sequence) and not isinstance(leaf, str) for leaf in leaves):
        return False
    if isinstance(value, str) and typing.get_origin(annotation) is Sequence:
        return False
    if annotation is DTypeLike:  # which is anything to typeguard, and None a float64 to NumPy
        return value is not None and (isinstance(value, str) or _names_dtype(value))
    try:
        typeguard.check_type(value, annotation, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def _names_dtype(value: Any) -> bool:
    try:
        np.dtype(value)
    except (TypeError, ValueError):
        return False
    return True


def _canonical(value: Any, annotation: Any) -> Any:
    """The form that survives JSON: tuples for lists, names for types."""
    if annotation is DTypeLike and not isinstance(value, str):
        return np.dtype(value).name
    return tuple(value) if isinstance(value, list) else value


def mistyped(key: str, annotation: Any, value: Any) -> UserError:
    return UserError(f"recipe key '{key}' must be {_type_name(annotation)}, got {written(value)}.")


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return name.replace("collections.abc.", "").replace("typing.", "")
