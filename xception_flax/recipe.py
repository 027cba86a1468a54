"""Recipes: reading one, filling in every default, checking every key, remembering it in a workdir.

A recipe is a Python file with `get_config() -> ml_collections.ConfigDict`. Each group in it is the
keywords of exactly one function, named in `GROUPS`: that signature is where a key's default, type
and meaning stand. Keys outside of groups are the fields of `Loop`.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typeguard
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from xception_flax import checkpoint, data, metrics, models, optimizers, sharding, steps
from xception_flax.lookup import suggest


@dataclasses.dataclass(frozen=True)
class Loop:
    """The keys of a recipe outside of its groups: how long, how often, how many at a time.

    Attributes:
      batch_size: images a step, over all devices of all hosts.
      epochs: length of the run, in passes over the training split; may be a fraction.
      seed: of initial weights, data order, augmentation and dropout.
      log_every_steps: steps between two lines of training metrics.
      eval_every_epochs: epochs between two evaluations; the end is always evaluated.
      checkpoint_every_epochs: epochs between two checkpoints; the end is always saved.
    """

    batch_size: int
    epochs: float
    seed: int = 0
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    checkpoint_every_epochs: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0 and field.name != "seed":
                raise ValueError(f"{field.name} must be positive, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}.")


class Group(NamedTuple):
    """The function that a group of a recipe feeds.

    Where `selector` is set, that key names an entry of `table`, and the group also takes the
    keywords of the entry.
    """

    function: Callable[..., Any]
    selector: str | None = None
    table: Mapping[str, Callable[..., Any]] | None = None


GROUPS = {
    "model": Group(models.create_model, "name", models.MODELS),
    "normalize": Group(steps.create_normalizer),
    "loss": Group(steps.create_loss),
    "metrics": Group(metrics.create_metrics, "name", metrics.METRICS),
    "optimizer": Group(optimizers.create_optimizer, "name", optimizers.OPTIMIZERS),
    "schedule": Group(optimizers.create_schedule, "name", optimizers.SCHEDULES),
    "step": Group(steps.make_train_step),
    "data": Group(data.load, "source", data.SOURCES),
    "mesh": Group(sharding.create_mesh),
    "checkpoint": Group(checkpoint.open_manager),
}

# Parameters of those functions that the program supplies and no recipe can set.
SUPPLIED = frozenset(
    [
        "abstract_state",
        "batch_size",
        "best_metric",
        "loss",
        "mesh",
        "metrics",
        "model",
        "normalize",
        "parent",
        "process_count",
        "process_index",
        "read_only",
        "run",
        "schedule",
        "seed",
        "split",
        "train",
        "tx",
        "workdir",
    ]
)

# Keys that change how a result is computed or shown and not the result: free to differ on resuming.
OPERATIONAL = ("data.data_dir", "data.num_threads", "data.num_workers", "log_every_steps")
OPERATIONAL_GROUPS = ("mesh", "checkpoint")


# Reading -------------------------------------------------------------------------------------------


def load(path_and_argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the resolved recipe of `FILE` or `FILE:ARGUMENT`, with overrides applied.

    Args:
      path_and_argument: what follows the colon is handed to the recipe's `get_config`.
      overrides: `('--config.model.width=0.5', ...)`.

    Raises:
      ValueError: the file cannot be read or run, or a key or value is wrong.
    """
    return resolve(_override(_run_recipe(path_and_argument), overrides))


def override(config: ConfigDict, overrides: Sequence[str], groups: Sequence[str]) -> ConfigDict:
    """Returns a resolved recipe with overrides applied, which may only touch some groups.

    Raises:
      ValueError: a key of another group, an unknown key or a wrong value.
    """
    for text in overrides:
        key, _ = _split_override(text)
        if key.partition(".")[0] not in groups:
            raise ValueError(f"--config.{key} cannot be changed here; only keys of: {', '.join(groups)}.")
    return resolve(_override(config.to_dict(), overrides))


def _run_recipe(path_and_argument: str) -> dict[str, Any]:
    path, _, argument = path_and_argument.partition(":")
    if not Path(path).is_file():
        close = sorted(str(p) for p in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else []
        raise ValueError(f"no recipe file {path!r}; {suggest(path, close)}")
    spec = importlib.util.spec_from_file_location("recipe_" + Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path!r} is no Python file; a recipe ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
    except SyntaxError as error:
        raise ValueError(
            f"recipe {error.filename or path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
        ) from None
    except AttributeError as error:
        if error.obj is not module:
            raise _failed(path, error) from None
        raise ValueError(f"recipe {path} has no function get_config().") from None
    except Exception as error:
        raise _failed(path, error) from None

    parameters = inspect.signature(get_config).parameters.values()
    if argument and not parameters:
        raise ValueError(f"recipe {path} takes no argument, got {path_and_argument!r}.")
    if not argument and any(p.default is p.empty for p in parameters):
        needed = ", ".join(p.name.upper() for p in parameters if p.default is p.empty)
        raise ValueError(f"recipe {path} needs an argument: --config {path}:{needed}")
    try:
        config = get_config(argument) if argument else get_config()
    except Exception as error:
        raise _failed(path, error) from None
    if not isinstance(config, ConfigDict):
        raise ValueError(f"recipe {path}: get_config() must return a ConfigDict, got {type(config).__name__}.")
    return config.to_dict()


def _failed(path: str, error: Exception) -> ValueError:
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if Path(traceback.tb_frame.f_code.co_filename).name == Path(path).name:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return ValueError(f"recipe {path}, line {line}: {kind}{error}")


# Resolving -----------------------------------------------------------------------------------------


def resolve(recipe: Mapping[str, Any]) -> ConfigDict:
    """Returns the recipe with every default filled in, every key and type checked.

    Raises:
      ValueError: an unknown, missing or mistyped key; the message names the function that takes it.
    """
    for key in recipe:
        if key not in GROUPS and key not in _parameters_of(Loop):
            raise ValueError(f"unknown recipe key {key!r}; {suggest(key, [*GROUPS, *_parameters_of(Loop)])}")
    top = {key: value for key, value in recipe.items() if key not in GROUPS}
    resolved = _complete("", Loop.__name__, _parameters_of(Loop), top)
    Loop(**resolved)
    for name, group in GROUPS.items():
        values = recipe.get(name, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe key {name!r} must be a group of keys, got {values!r}.")
        resolved[name] = _complete(f"{name}.", _describe(group, values), _parameters(name, values), values)
    return ConfigDict(resolved, convert_dict=True)


def _parameters(name: str, values: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The parameters that group `name` feeds: of its function and of the entry it selects."""
    group = GROUPS[name]
    parameters = _parameters_of(group.function)
    if group.selector is not None:
        parameters = _parameters_of(_selected(name, values)) | parameters
    return parameters


def _selected(name: str, values: Mapping[str, Any]) -> Callable[..., Any]:
    group = GROUPS[name]
    default = inspect.signature(group.function).parameters[group.selector].default
    choice = values.get(group.selector, default)
    if choice is inspect.Parameter.empty:
        raise ValueError(f"recipe key '{name}.{group.selector}' is missing; {suggest('', group.table)}")
    if choice not in group.table:
        raise ValueError(f"unknown {name}.{group.selector} {choice!r}; {suggest(choice, group.table)}")
    return group.table[choice]


def _parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    supplied = SUPPLIED if function is not Loop else frozenset()
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in supplied and parameter.kind is not parameter.VAR_KEYWORD
    }


def _describe(group: Group, values: Mapping[str, Any]) -> str:
    choice = values.get(group.selector) if group.selector else None
    return group.function.__name__ + (f" with {group.selector}={choice!r}" if choice else "")


def _complete(
    prefix: str, takes: str, parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    for key in values:
        if key not in parameters:
            raise ValueError(f"unknown recipe key '{prefix}{key}': {takes} takes no such key; "
                             f"{suggest(key, parameters)}")  # fmt: skip
    complete = {}
    for key, parameter in parameters.items():
        value = values.get(key, parameter.default)
        if value is parameter.empty:
            raise ValueError(f"recipe key '{prefix}{key}' is missing; {takes} needs it.")
        if key in values and not _fits(value, parameter.annotation):
            raise ValueError(_mistyped(prefix + key, parameter.annotation, value))
        complete[key] = _canonical(value, parameter.annotation)
    return complete


def _fits(value: Any, annotation: Any) -> bool:
    # bool is an int to Python, and never to the author of a recipe.
    if isinstance(value, bool) and annotation is not bool and bool not in typing.get_args(annotation):
        return False
    try:
        typeguard.check_type(value, annotation)
    except typeguard.TypeCheckError:
        return False
    return True


def _canonical(value: Any, annotation: Any) -> Any:
    """The form that survives JSON: tuples for lists, names for types."""
    if annotation is DTypeLike and not isinstance(value, str):
        return np.dtype(value).name
    return tuple(value) if isinstance(value, list) else value


def _mistyped(key: str, annotation: Any, value: Any) -> str:
    expected = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for verbose in ("collections.abc.", "typing."):
        expected = expected.replace(verbose, "")
    return f"recipe key '{key}' must be {expected}, got {value!r}."


# Overrides -----------------------------------------------------------------------------------------


def _override(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    parsed = dict(_split_override(text) for text in overrides)
    # Choices first: they decide which other keys there are.
    for key in sorted(parsed, key=lambda key: not _is_selector(key)):
        group, _, name = key.rpartition(".")
        if group and group not in GROUPS:
            raise ValueError(f"unknown recipe group {group!r} in --config.{key}; {suggest(group, GROUPS)}")
        if not group and name in GROUPS:
            raise ValueError(f"--config.{key} is a group; set one of its keys: --config.{key}.KEY=VALUE.")
        values = recipe.setdefault(group, {}) if group else recipe
        if _is_selector(key):
            _select(group, values, parsed[key])
            continue
        parameters = _parameters(group, values) if group else _parameters_of(Loop)
        if name not in parameters:
            takes = _describe(GROUPS[group], values) if group else "the loop"
            known = parameters if group else [*parameters, *GROUPS]
            raise ValueError(f"unknown recipe key in --config.{key}: {takes} takes no such key; {suggest(name, known)}")
        values[name] = _parse_value(key, parsed[key], parameters[name].annotation)
    return recipe


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals or not key:
        raise ValueError(f"unknown argument {text!r}; a recipe's key is set by --config.KEY=VALUE.")
    return key, value


def _is_selector(key: str) -> bool:
    group, _, name = key.rpartition(".")
    return group in GROUPS and GROUPS[group].selector == name


def _select(name: str, values: dict[str, Any], choice: str) -> None:
    """Sets the selector; keys that only the old choice takes go with it."""
    old = set(_parameters(name, values)) if values else set()
    values[GROUPS[name].selector] = choice
    new = _parameters(name, values)
    for key in set(values) & old - set(new):
        del values[key]


def _parse_value(key: str, text: str, annotation: Any) -> Any:
    """The first reading of `text` that has the right type: a Python literal, else the text itself."""
    literals = {"true": True, "false": False, "none": None}
    try:
        literal = literals[text.lower()] if text.lower() in literals else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        literal = text
    for value in (literal, text):
        if _fits(value, annotation):
            return value
    raise ValueError(_mistyped(key, annotation, literal))


# Workdir -------------------------------------------------------------------------------------------


def to_json(config: ConfigDict) -> str:
    """The recipe as JSON text, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def read(workdir: Path) -> ConfigDict:
    """Returns the recipe that `workdir` was trained with.

    Raises:
      ValueError: there is none, or it is not one of this version.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} is no workdir of a run: it has no config.json.")
    try:
        return resolve(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lines 'key: old -> new' for every key that differs and changes the result."""
    flat_old, flat_new = _flatten(json.loads(to_json(old))), _flatten(json.loads(to_json(new)))
    return [
        f"{key}: {flat_old.get(key, '(none)')!r} -> {flat_new.get(key, '(none)')!r}"
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key)
        and key not in OPERATIONAL
        and key.partition(".")[0] not in OPERATIONAL_GROUPS
    ]


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in recipe.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError where `workdir` cannot be written or holds a run of another recipe."""
    if (workdir / "config.json").is_file() and (changed := differences(read(workdir), config)):
        raise ValueError(
            f"{workdir} holds a run of another recipe; nothing was changed. Take a new workdir, or the old values:\n  "
            + "\n  ".join(changed)
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}.") from None


def remember(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`, whole or not at all."""
    partial = workdir / "config.json.partial"
    partial.write_text(to_json(config))
    os.replace(partial, workdir / "config.json")
