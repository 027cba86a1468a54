"""Resolves recipes: fills in the defaults, applies overrides, checks every key and value."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from xception_flax.recipes import overrides
from xception_flax.recipes.groups import GROUPS, LOOP, PARTS, Group, Loop
from xception_flax.recipes.signatures import keys_of
from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written


def resolve(
    recipe: Mapping[str, Any], arguments: Sequence[str] = (), groups: Sequence[str] | None = None
) -> ConfigDict:
    """Returns the recipe with overrides applied, every default filled in, every key and value checked.

    Args:
      recipe: the keys of the loop, and the groups.
      arguments: overrides, such as `--config.model.width=0.5`.
      groups: those that the overrides may touch; None for all.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    texts = overrides.split(arguments, groups)
    resolved = _complete("", LOOP, {key: value for key, value in recipe.items() if key not in GROUPS}, texts[""])
    Loop(**resolved)
    for name, group in GROUPS.items():
        given = recipe.get(name, {})
        if not isinstance(given, Mapping):
            raise UserError(f"recipe key {name!r} must be a group of keys, got {written(given)}.")
        resolved[name] = _complete(f"{name}.", group, given, texts[name])
    return ConfigDict(resolved, convert_dict=True)


def resolve_group(
    name: str, given: Mapping[str, Any], arguments: Sequence[str] = (), groups: Sequence[str] | None = None
) -> ConfigDict:
    """Returns one group, resolved as it would be in a recipe.

    Args:
      name: a key of `GROUPS`.
      given: keys of the group, such as `{"name": "xception"}`.
      arguments: overrides.
      groups: those that the overrides may touch; None for this one.

    Raises:
      UserError: a key is of another group, unknown or missing, or a value is wrong.
    """
    texts = overrides.split(arguments, groups or (name,))
    return ConfigDict(_complete(f"{name}.", GROUPS[name], given, texts[name]), convert_dict=True)


def _complete(prefix: str, group: Group, given: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the value of every key of a group: from the command line, else the recipe, else the default."""
    choice = ""
    if group.selector:
        given, texts = _choose(prefix, group, given, texts)
        choice = given[group.selector]
    keys = group.keys(choice)
    for key in (*given, *texts):
        if key not in keys:
            where = f" with {prefix}{group.selector}={choice!r}" if choice else ""
            known = (*keys, *GROUPS) if group is LOOP else keys
            elsewhere = " or ".join(map(repr, _elsewhere(key, group)))
            hint = f"did you mean {elsewhere}?" if elsewhere else suggest(key, known)
            raise UserError(f"unknown recipe key {written(f'{prefix}{key}')}{where}; {hint}")
    resolved = {}
    for key, (annotation, default, _) in keys.items():
        name = f"recipe key '{prefix}{key}'"
        if key in texts:
            resolved[key] = values.parse(name, texts[key], annotation)
        elif key not in given and keys[key].is_required:
            raise UserError(
                f"{name} is missing; set it by --config.{prefix}{key}=VALUE ({values.describe(annotation)})."
            )
        else:
            resolved[key] = values.check(name, given.get(key, default), annotation)
    return resolved


def _elsewhere(key: str, group: Group) -> Iterator[str]:
    """Yields the full names of the keys that other groups have of this name, or that it spells without their dot."""
    for name, part in PARTS.items():
        if part is not group and part.takes(key):
            yield f"{name}.{key}" if name else key
        of_part = key.removeprefix(f"{name}_")
        if name and of_part != key and part.takes(of_part):
            yield f"{name}.{of_part}"


def _choose(
    prefix: str, group: Group, given: Mapping[str, Any], texts: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns `given` with the chosen entry of the group's table, and `texts` without it.

    If the command line chooses another entry than the recipe, keys that only the recipe's entry takes are dropped.
    """
    selector, table, texts = group.selector, group.table, dict(texts)
    name, own = prefix + selector, given.get(selector, keys_of(group.function)[selector].default)
    choice = values.parse(f"recipe key '{name}'", texts.pop(selector), str) if selector in texts else own
    if choice is inspect.Parameter.empty:
        raise UserError(f"recipe key '{name}' is missing; {suggest('', table)}")
    if not isinstance(choice, str) or choice not in table:
        raise UserError(f"unknown {name} {written(choice)}; {suggest(choice, table)}")
    if choice != own and isinstance(own, str) and own in table:
        gone = group.keys(own).keys() - group.keys(choice).keys()
        given = {key: value for key, value in given.items() if key not in gone}
    return {**given, selector: choice}, texts
