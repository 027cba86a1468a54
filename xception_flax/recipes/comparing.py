"""Compares recipes: what differs, and what may differ."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from xception_flax.recipes.groups import OPERATIONAL, OPERATIONAL_GROUPS, PER_HOST
from xception_flax.text import naming
from xception_flax.text.lookup import differing
from xception_flax.text.ranges import LARGEST


def recipe_json(config: ConfigDict) -> str:
    """Returns the recipe as JSON text, keys sorted."""
    return naming.to_json(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns a line 'key: old -> new' for each key that differs and changes the result."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {_shown(before.get(key, '(none)'))} -> {_shown(after.get(key, '(none)'))}"
        for key in sorted(differing([before, after]))
        if key not in OPERATIONAL and key.partition(".")[0] not in OPERATIONAL_GROUPS
    ]


def _shown(value: Any) -> str:
    return "inf" if value == LARGEST else repr(value)  # as `text.values.Endless` is written


def alike(config: ConfigDict) -> dict[str, Any]:
    """Returns the values that must be equal on all hosts of a run, by 'recipe key KEY', their name in messages."""
    return {f"recipe key {key}": value for key, value in _flat(config).items() if key not in PER_HOST}


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Returns the values as JSON has them, by full keys such as 'model.width'."""

    def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat = {}
        for key, value in values.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    return flatten(naming.from_json(recipe_json(config)))
