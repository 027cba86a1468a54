"""Overrides on the command line: `--config.KEY=VALUE`, `--config.GROUP.KEY=VALUE`."""

import itertools
from collections.abc import Collection, Sequence

from xception_flax.recipes.groups import GROUPS, PARTS
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, suggest, written

Texts = dict[str, dict[str, str]]


def split(overrides: Sequence[str], groups: Sequence[str] | None = None) -> Texts:
    """Returns the text of each value by group and key. Keys outside of groups are in group ''.

    Args:
      overrides: `('--config.model.width=0.5', ...)`; if a key is given twice, the last counts.
      groups: those that may be changed; None for all groups and the keys outside of them.

    Raises:
      UserError: an argument has another form, or names an unknown group or one that may not be changed.
    """
    texts: Texts = {name: {} for name in PARTS}
    for override, after in itertools.pairwise([*overrides, ""]):
        name, value = _name_and_value(override, after, PARTS if groups is None else groups)
        group, _, key = name.rpartition(".")
        if groups is not None and name.partition(".")[0] not in groups:
            raise UserError(f"{cut(f'--config.{name}')} cannot be changed here; only keys of: {', '.join(groups)}.")
        if name in GROUPS:
            raise UserError(f"--config.{name} is a group; set one of its keys: --config.{name}.KEY=VALUE.")
        if "." in name and group not in GROUPS:
            raise UserError(
                f"unknown recipe group {written(group)} in {cut(f'--config.{name}')}; {suggest(group, GROUPS)}"
            )
        texts[group][key] = value
    return texts


def _name_and_value(override: str, after: str, groups: Collection[str]) -> tuple[str, str]:
    name, equals, value = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals or not name:
        if override.startswith("--config.") and not equals:
            raise UserError(f"{written(override)} has no value; write it in one word, {cut(override)}=VALUE.")
        raise UserError(
            f"unknown argument {written(override)}; --help lists them, and a recipe's key is set by "
            f"{_meant(override, after, groups)}."
        )
    return name, value


def _meant(option: str, after: str, groups: Collection[str]) -> str:
    """Returns how the key is set that an unknown option names: '--config.epochs=3' for '--epochs' and '3' after it."""
    name, equals, value = option.removeprefix("--").partition("=")
    key = name.replace("-", "_")
    parts = {group: PARTS[group] for group in groups if group in PARTS}
    keys = [f"{group}.{key}" if group else key for group, part in parts.items() if part.takes(key)]
    if not option.startswith("--") or not keys:
        return "--config.KEY=VALUE"
    value = value if equals else "" if after.startswith("--") else after
    return " or ".join(f"--config.{key}={cut(value) or 'VALUE'}" for key in keys)
