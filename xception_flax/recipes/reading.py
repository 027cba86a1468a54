"""Reads a recipe from its file, with overrides applied."""

import contextlib
import importlib.util
import inspect
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.host.project import PROJECT, RECIPES
from xception_flax.recipes.checking import resolve
from xception_flax.recipes.signatures import keys_of
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, suggest, written

COUNTED = -1  # model.num_classes of a recipe for any folder or table: as many as there are

NAME = re.compile(r"\w+")  # of a recipe of this project, such as digits; whatever has a dot or a slash is a file

MAX_SAID = 1000  # letters of a recipe's own error, which may quote an argument of any length

_IMPORTING = threading.RLock()  # the path of imports is one for all threads


def load(path_and_argument: str, overrides: Sequence[str] = (), groups: Sequence[str] | None = None) -> ConfigDict:
    """Returns the resolved recipe of `FILE`, `NAME` or either with `:ARGUMENT`, with overrides applied.

    If its `model.num_classes` is `COUNTED`, it becomes the number of classes that the training data have.

    Args:
      path_and_argument: a file, or the name of a recipe of this project: `digits` is its configs/digits.py. The part
        after the colon is passed to the recipe's `get_config`.
      overrides: `('--config.model.width=0.5', ...)`; if a key is given twice, the last counts.
      groups: those that the overrides may touch; None for all.

    Raises:
      UserError: the file cannot be read or run, a key or value is wrong, or the data to be counted are.
    """
    config = resolve(as_written(path_and_argument), overrides, groups)
    if config.model.num_classes == COUNTED:
        config.model.num_classes = len(_class_names(config.data))
    return config


def _class_names(group: ConfigDict) -> tuple[str, ...]:
    """Returns the classes of the training data, by the group `data` of a resolved recipe."""
    function = data.SOURCES[group.source]
    return function(group.train_split, **{key: group[key] for key in keys_of(function)}).class_names


def override(config: ConfigDict, overrides: Sequence[str], groups: Sequence[str] | None) -> ConfigDict:
    """Returns a resolved recipe with overrides applied; they may only touch `groups`, None for all.

    Raises:
      UserError: a key is unknown or of another group, or a value is wrong.
    """
    return resolve(config.to_dict(), overrides, groups)


def as_written(path_and_argument: str) -> dict[str, Any]:
    """Returns what the function `get_config` of a recipe's file returns: the recipe without its defaults.

    Raises:
      UserError: as of `load`, but keys and values are not checked.
    """
    path, _, argument = path_and_argument.partition(":")
    named = path
    if NAME.fullmatch(path) and path in (own := _own_recipes()):
        path = str(own[path])
    if not os.path.isfile(path):  # False if the path is too long; Path.is_file may raise
        raise _no_recipe(path, argument)
    with _import_path(path):
        return _call(_attribute(path, "get_config"), path, named, argument)


@contextlib.contextmanager
def _import_path(path: str) -> Iterator[None]:
    """Lets a recipe import others by `from configs import NAME`: from the folder above its own, or from this project.

    Python itself adds the folder of train.py, but none for `xception-flax`.
    """
    with _IMPORTING:
        before = sys.path.copy()
        sys.path[:0] = [str(Path(path).absolute().parent.parent), str(PROJECT)]
        try:
            yield
        finally:
            sys.path[:] = before


def read_names(path: str, names: Sequence[str]) -> list[Any]:
    """Returns what the file of a recipe calls by these names, beside its `get_config`.

    Raises:
      UserError: the file cannot be read or run, or lacks a name.
    """
    if not os.path.isfile(path):
        raise _no_recipe(path)
    with _import_path(path):
        return [_attribute(path, name) for name in names]


def _call(get_config: Any, path: str, named: str, argument: str) -> dict[str, Any]:
    """Returns what a recipe's `get_config` returns; `named` is what the user calls the file at `path`."""
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):  # not a function, or one without a signature
        raise UserError(
            f"recipe {path}: get_config must be a function that returns a ConfigDict, got {written(get_config)}."
        ) from None
    takes_none, takes_one = _takes(signature), _takes(signature, argument)
    if not (takes_none or takes_one):
        raise UserError(f"recipe {path}: get_config must take one argument or none, got get_config{signature}.")
    if argument and not takes_one:
        raise UserError(f"recipe {named} takes no argument, got {written(f'{named}:{argument}')}.")
    if not argument and not takes_none:
        parameter = next(iter(signature.parameters)).upper()
        raise UserError(f"recipe {named} needs an argument: --config {named}:{parameter}")
    try:
        config = get_config(argument) if argument else get_config()
        if isinstance(config, ConfigDict):
            return config.to_dict()  # raises an error for a placeholder without a value
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None
    raise UserError(f"recipe {path}: get_config() must return a ConfigDict, got {type(config).__name__}.")


def _takes(signature: inspect.Signature, *arguments: str) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _attribute(path: str, name: str) -> Any:
    """Runs a recipe's file and returns what it calls `name`."""
    spec = importlib.util.spec_from_file_location("recipe_" + Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path!r} is no Python file; a recipe ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        code = f": {cut(error.text.strip())}" if error.text else ""
        raise UserError(f"recipe {error.filename or path}{line}: {error.msg}{code}") from None
    except AttributeError as error:
        if error.obj is not module:
            raise _failed(path, error) from None
        what = "function get_config()" if name == "get_config" else name
        raise UserError(f"recipe {path} has no {what}.") from None
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None


def _own_recipes() -> dict[str, Path]:
    """Returns the files of this project's recipes by name."""
    return {file.stem: file for file in RECIPES.glob("*.py")}


def _no_recipe(path: str, argument: str = "") -> UserError:
    is_folder = os.path.isdir(path or ".")
    folder = Path(path) if is_folder else Path(path).parent
    try:
        files = [file for place in (".", "configs") for file in (folder / place).glob("*.py") if file.is_file()]
        recipes = {file.stem: str(file) for file in files if b"def get_config(" in file.read_bytes()}
    except (OSError, ValueError):  # the folder cannot be read, or its name is not valid
        recipes = {}
    own = _own_recipes()
    if NAME.fullmatch(path):
        recipes |= {name: name for name in own}
    wrong = f"{written(path)} is a folder, not a recipe file" if is_folder else f"no recipe file {written(path)}"
    if recipes:  # compared by stem: all have the folder and the suffix in common
        return UserError(f"{wrong}; {suggest(Path(path).stem, recipes, spell=recipes.__getitem__)}")
    if Path(path).is_absolute():
        return UserError(f"{wrong}, and no recipe beside it; check the path.")
    stem, behind = Path(path).stem, f":{argument}" if argument else ""
    named = f", or take this project's own: --config {stem}{behind}" if stem in own else ""
    return UserError(
        f"{wrong}, seen from {Path.cwd()}; change to the folder of the project, give the file's whole path{named}."
    )


def _failed(path: str, error: Exception | SystemExit) -> UserError:
    said = cut(str(error), MAX_SAID) if len(str(error)) > MAX_SAID else str(error)
    if isinstance(error, UserError):  # about the argument; other errors are in the recipe, so its line helps
        return UserError(f"recipe {path}: {said}")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if Path(frame.filename).name == Path(path).name]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return UserError(f"recipe {path}{f', line {lines[-1].lineno}' if lines else ''}: {kind}{said}")
