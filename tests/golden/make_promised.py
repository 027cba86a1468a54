"""Writes promised.json, what docs/stability.md promises to keep: it adds what is new. Run it for a new version.

python tests/golden/make_promised.py
"""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xception_flax
from xception_flax.__main__ import VERBS, command
from xception_flax.commands import completion
from xception_flax.data.transforms import TRANSFORMS
from xception_flax.host.project import RECIPES
from xception_flax.inference.predictor import Predictor
from xception_flax.inference.preprocessing import Preprocessing
from xception_flax.recipes import groups
from xception_flax.training.sharding import create_mesh

FILE = Path(__file__).with_name("promised.json")


def calls(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Yields how a function may be called: whatever breaks a caller takes one away, and all else only adds some.

    With each number of arguments by place, 'f(x)' and 'f(x, y)', beside them what must be given by name; and 'f y=' for
    each argument that may be given by name.
    """
    parameters = inspect.signature(function).parameters.values()
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [f"{p.name}=" for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    for number in range(sum(p.default is p.empty for p in by_place), len(by_place) + 1):
        yield f"{name}({', '.join([*(p.name for p in by_place[:number]), *needed])})"
    yield from (f"{name} {p.name}=" for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    yield from (f"{name} **{p.name}" for p in parameters if p.kind is p.VAR_KEYWORD)


def public(module: Any) -> list[str]:
    """Returns the names of a module that others may use, or of an object."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]


def exports() -> Iterator[str]:
    """Yields what `xception_flax` exports, what that has itself, and what `load` returns."""
    for name in xception_flax.__all__:
        yield name
        value = getattr(xception_flax, name)
        if inspect.ismodule(value):
            for inside in public(value):
                yield f"{name}.{inside}"
                if callable(found := getattr(value, inside)):
                    yield from calls(f"{name}.{inside}", found)
        elif callable(value):
            yield from calls(name, value)
    how = Preprocessing(28, 3, "resize", (0.0,), (1.0,))
    predictor = Predictor(xception_flax.create_model("lenet"), {}, (), how, mesh=create_mesh())
    yield from (f"Predictor.{name}" for name in vars(predictor) if not name.startswith("_"))
    for name, method in inspect.getmembers(predictor, inspect.ismethod):
        if not name.startswith("_"):
            yield from calls(f"Predictor.{name}", method)


def found() -> dict[str, list[str]]:
    """Returns what there is now, by kind."""
    options = {verb: completion.options_of(command(verb)) for verb in VERBS}
    selected = {f"{name}.{part.selector}": part.table for name, part in groups.PARTS.items() if part.selector}
    return {
        "keys of recipes": [key for name in groups.PARTS for key in completion.keys_of(name)],
        "names in recipes": [f"{key}={name}" for key, table in selected.items() for name in table]
        + [f"step.lowering={name}" for name in xception_flax.ops.LOWERINGS]
        + [f"transform {name}" for name in TRANSFORMS],
        "recipes": [path.stem for path in RECIPES.glob("*.py")],
        "verbs and options": [f"{verb} {option}" for verb, names in options.items() for option in names or [""]],
        "exports": list(exports()),
    }


if __name__ == "__main__":
    promised = json.loads(FILE.read_text()) if FILE.exists() else {}
    content = {kind: sorted({*names, *promised.get(kind, [])}) for kind, names in found().items()}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
