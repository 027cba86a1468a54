"""Reading a recipe's file, and overrides from the command line."""

import ast
import importlib.util
import inspect
import math
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xception_flax.recipes.checking import complete, fits, mistyped, parameters_of, resolve, unknown_key
from xception_flax.recipes.groups import GROUPS, LOOP, Group
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, suggest, written


def load(path_and_argument: str, overrides: Sequence[str] = (), groups: Sequence[str] | None = None) -> ConfigDict:
    """Returns the resolved recipe of `FILE` or `FILE:ARGUMENT`, with overrides applied.

    Args:
      path_and_argument: what follows the colon is handed to the recipe's `get_config`.
      overrides: `('--config.model.width=0.5', ...)`; of one key given twice the last counts.
      groups: those that the overrides may touch; None for all.

    Raises:
      ValueError: the file cannot be read or run, or a key or value is wrong.
    """
    if groups is not None:
        _check_groups(overrides, groups)
    return resolve(_override(_run_recipe(path_and_argument), overrides))


def override(config: ConfigDict, overrides: Sequence[str], groups: Sequence[str]) -> ConfigDict:
    """Returns a resolved recipe with overrides applied, which may only touch some groups.

    Raises:
      ValueError: a key of another group, an unknown key or a wrong value.
    """
    _check_groups(overrides, groups)
    return resolve(_override(config.to_dict(), overrides))


def resolve_group(name: str, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns one group without a recipe around it, every default filled in, with overrides applied.

    Args:
      name: a key of `GROUPS`.
      values: keys of the group, such as `{"name": "xception"}`.
      overrides: as for `load`; they may only touch this group.

    Raises:
      ValueError: a key of another group, an unknown or missing key or a wrong value.
    """
    _check_groups(overrides, (name,))
    return ConfigDict(
        complete(f"{name}.", GROUPS[name], _override({name: dict(values)}, overrides)[name]), convert_dict=True
    )


def _check_groups(overrides: Sequence[str], groups: Sequence[str]) -> None:
    for text in overrides:
        key, _ = _split_override(text)
        if key.partition(".")[0] not in groups:
            raise UserError(f"{cut(f'--config.{key}')} cannot be changed here; only keys of: {', '.join(groups)}.")


def _run_recipe(path_and_argument: str) -> dict[str, Any]:
    path, _, argument = path_and_argument.partition(":")
    if not os.path.isfile(path):  # which, unlike Path's, is False where a path is too long to be one
        raise _no_recipe(path)
    spec = importlib.util.spec_from_file_location("recipe_" + Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path!r} is no Python file; a recipe ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
    except SyntaxError as error:
        raise UserError(
            f"recipe {error.filename or path}{f', line {error.lineno}' if error.lineno else ''}: {error.msg}"
            + (f": {cut(error.text.strip())}" if error.text else "")
        ) from None
    except AttributeError as error:
        if error.obj is not module:
            raise _failed(path, error) from None
        raise UserError(f"recipe {path} has no function get_config().") from None
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None

    try:
        parameters = inspect.signature(get_config).parameters.values()
    except (TypeError, ValueError):  # no function, or one that says nothing of its arguments
        raise UserError(
            f"recipe {path}: get_config must be a function that returns a ConfigDict, got {written(get_config)}."
        ) from None
    if argument and not parameters:
        raise UserError(f"recipe {path} takes no argument, got {written(path_and_argument)}.")
    if not argument and any(p.default is p.empty for p in parameters):
        needed = ", ".join(p.name.upper() for p in parameters if p.default is p.empty)
        raise UserError(f"recipe {path} needs an argument: --config {path}:{needed}")
    try:
        config = get_config(argument) if argument else get_config()
        if isinstance(config, ConfigDict):
            return config.to_dict()  # where a placeholder without a value shows
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None
    raise UserError(f"recipe {path}: get_config() must return a ConfigDict, got {type(config).__name__}.")


def _no_recipe(path: str) -> UserError:
    is_folder = os.path.isdir(path or ".")
    folder = Path(path) if is_folder else Path(path).parent
    try:
        files = [file for place in (".", "configs") for file in (folder / place).glob("*.py") if file.is_file()]
        recipes = {file.stem: str(file) for file in files if b"def get_config(" in file.read_bytes()}
    except (OSError, ValueError):  # a folder that cannot be read, or whose name is none
        recipes = {}
    wrong = f"{written(path)} is a folder, not a recipe file" if is_folder else f"no recipe file {written(path)}"
    if recipes:  # compared without what they have in common, the folder and the suffix
        return UserError(f"{wrong}; {suggest(Path(path).stem, recipes, spell=recipes.__getitem__)}")
    if Path(path).is_absolute():
        return UserError(f"{wrong}, and no recipe beside it; check the path.")
    return UserError(
        f"{wrong}, seen from {Path.cwd()}; change to the folder of the project, or give the file's whole path."
    )


def _failed(path: str, error: Exception | SystemExit) -> UserError:
    if isinstance(error, UserError):  # about the argument; all else is a mistake in the recipe, and where it is helps
        return UserError(f"recipe {path}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if Path(frame.filename).name == Path(path).name]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return UserError(f"recipe {path}{f', line {lines[-1].lineno}' if lines else ''}: {kind}{error}")


def _override(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    parsed = dict(_split_override(text) for text in overrides)
    # Choices first: they decide which other keys there are.
    for key in sorted(parsed, key=lambda key: not _is_selector(key)):
        name, dot, option = key.rpartition(".")
        if key in GROUPS:
            raise UserError(f"--config.{key} is a group; set one of its keys: --config.{key}.KEY=VALUE.")
        if dot and name not in GROUPS:
            raise UserError(
                f"unknown recipe group {written(name)} in {cut(f'--config.{key}')}; {suggest(name, GROUPS)}"
            )
        group = GROUPS[name] if dot else LOOP
        values = recipe.setdefault(name, {}) if dot else recipe
        if not isinstance(values, Mapping):
            raise UserError(f"recipe key {name!r} must be a group of keys, got {written(values)}.")
        if option == group.selector:
            _select(name + dot, group, values, _parse_value(key, parsed[key], str))
            continue
        parameters = parameters_of(name + dot, group, values)
        if option not in parameters:
            raise unknown_key(name + dot, option, group, values, list(parameters))
        values[option] = _parse_value(key, parsed[key], parameters[option].annotation)
    return recipe


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals or not key:
        raise UserError(f"unknown argument {written(text)}; a recipe's key is set by --config.KEY=VALUE.")
    return key, value


def _is_selector(key: str) -> bool:
    name, _, option = key.rpartition(".")
    return name in GROUPS and GROUPS[name].selector == option


def _select(prefix: str, group: Group, values: dict[str, Any], choice: str) -> None:
    """Sets the selector; keys that only the old choice takes go with it."""
    old = set(parameters_of(prefix, group, values)) if group.selector in values else set()
    values[group.selector] = choice
    for key in old - set(parameters_of(prefix, group, values)):
        values.pop(key, None)


def _parse_value(key: str, text: str, annotation: Any) -> Any:
    """The first reading of `text` that has the right type: a Python literal, else the text itself."""
    literals = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}
    try:
        literal = literals[text.lower()] if text.lower() in literals else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as ast's documentation lists them
        literal = text
    for value in (literal, text):
        if fits(value, annotation):
            return value
    raise mistyped(key, annotation, literal)
