"""What a source has and a network has no place for, in words."""

from collections.abc import Iterable

from xception_flax.text.lookup import cut
from xception_flax.text.naming import shown

MAX_NAMES = 5  # of arrays, in a line
MAX_MODULES = 10  # in words


def listed(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(cut(shown(name)) or "no prefix" for name in names[:MAX_NAMES]) + more


def modules(names: Iterable[str], separator: str = ".") -> list[str]:
    """Returns what is left out, by the first part of its names."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition(separator)[0], []).append(name)
    words = [f"{cut(shown(module))}: {listed(inside)}" for module, inside in list(found.items())[:MAX_MODULES]]
    return words + ([f"{len(found) - MAX_MODULES} more modules"] if len(found) > MAX_MODULES else [])
