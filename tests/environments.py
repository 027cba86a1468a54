"""Processes that find only some of the libraries of this environment, as if no other were installed."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ONLY = """\
import sys
from importlib.machinery import PathFinder

OTHERS = {others!r}


class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in OTHERS else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Only
"""


def restrict(folder: Path, requirements: Iterable[str]) -> None:
    """Writes a `sitecustomize.py` for a process with `folder` first in its PYTHONPATH.

    Args:
      folder: there.
      requirements: what is installed, as metadata write it: with all that it needs itself.
    """
    needed = required(requirements)
    owners = metadata.packages_distributions()
    others = {name for name, of in owners.items() if not needed & set(map(canonicalize_name, of))}
    (folder / "sitecustomize.py").write_text(ONLY.format(others=others - {"xception_flax", "benchmarks"}))


def required(requirements: Iterable[str]) -> set[str]:
    """Returns the names of the distributions that `requirements` are, and of those that these need, and so on."""
    found: set[str] = set()
    waiting, seen = [(line, "") for line in requirements], set()
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        found.add(name := canonicalize_name(requirement.name))
        for its_extra in ("", *requirement.extras):
            if (name, its_extra) not in seen and list(metadata.distributions(name=name)):
                seen.add((name, its_extra))
                waiting += [(each, its_extra) for each in metadata.requires(name) or []]
    return found
