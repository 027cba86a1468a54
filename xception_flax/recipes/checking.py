"""One walk over a recipe: every default filled in, every override in its place, every key and value checked."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from xception_flax.recipes import overrides
from xception_flax.recipes.groups import GROUPS, LOOP, Group, Loop
from xception_flax.recipes.signatures import keys_of
from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written


def resolve(
    recipe: Mapping[str, Any], arguments: Sequence[str] = (), groups: Sequence[str] | None = None
) -> ConfigDict:
    """Returns the recipe with overrides applied, every default filled in, every key and type checked.

    Args:
      recipe: the keys of the loop, and the groups.
      arguments: overrides, such as `--config.model.width=0.5`.
      groups: those that the overrides may touch; None for all.

    Raises:
      ValueError: an unknown, missing or mistyped key, or a value out of its range.
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


def resolve_group(name: str, given: Mapping[str, Any], arguments: Sequence[str] = ()) -> ConfigDict:
    """Returns one group without a recipe around it, resolved as in one.

    Args:
      name: a key of `GROUPS`.
      given: keys of the group, such as `{"name": "xception"}`.
      arguments: overrides; they may only touch this group.

    Raises:
      ValueError: a key of another group, an unknown or missing key or a wrong value.
    """
    texts = overrides.split(arguments, (name,))
    return ConfigDict(_complete(f"{name}.", GROUPS[name], given, texts[name]), convert_dict=True)


def _complete(prefix: str, group: Group, given: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Returns every key of a group with its value: that of the command line, or the recipe's, or the default."""
    choice = ""
    if group.selector:
        given, texts = _choose(prefix, group, given, texts)
        choice = given[group.selector]
    keys = group.keys(choice)
    for key in (*given, *texts):
        if key not in keys:
            where = f" with {prefix}{group.selector}={choice!r}" if choice else ""
            known = (*keys, *GROUPS) if group is LOOP else keys
            raise UserError(f"unknown recipe key {written(f'{prefix}{key}')}{where}; {suggest(key, known)}")
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


def _choose(
    prefix: str, group: Group, given: Mapping[str, Any], texts: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns both arguments with the selector, an entry of the group's table, among what is given.

    Where the command line chooses another entry than the recipe, the keys that only the recipe's takes go.
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
