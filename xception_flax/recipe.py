"""Recipes: reading one, filling in every default, checking every key, remembering it in a workdir.

A recipe is a Python file with `get_config() -> ml_collections.ConfigDict`. Each group in it is the
keywords of exactly one function, named in `GROUPS`: that signature is where a key's default, type
and meaning stand. Keys outside of groups are the fields of `Loop`.
"""

import ast
import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import inspect
import math
import os
import re
import shlex
import socket
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import typeguard
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from xception_flax import checkpoint, data, metrics, mixing, models, naming, optimizers, pretrained, sharding, steps
from xception_flax.files import check_kind, file_errors, read_config, write_whole
from xception_flax.lookup import cut, suggest, written
from xception_flax.ranges import LARGEST, check_number, check_range


@dataclasses.dataclass(frozen=True)
class Loop:
    """The keys of a recipe outside of its groups: how long, how often, how many at a time.

    Attributes:
      batch_size: images a step, over all devices of all hosts.
      epochs: length of the run, in passes over the training split; may be a fraction.
      seed: of initial weights, data order, augmentation, mixing and dropout.
      log_every_steps: steps between two lines of training metrics.
      eval_every_epochs: epochs between two evaluations; the end is always evaluated, and at inf nothing else.
      checkpoint_every_epochs: epochs between two checkpoints; the end is always saved, and at inf nothing else.
      profile: steps to trace into `workdir/profile`, as `FIRST:LAST`, both included; '' for none. The
        first step compiles, and its trace is large.
    """

    batch_size: int
    epochs: float
    seed: int = 0
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    checkpoint_every_epochs: float = 1.0
    profile: str = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs"):
            check_range(f"recipe key {name!r}", getattr(self, name), 0, above=True)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"recipe key 'seed' must be in [0, 2**32), got {written(self.seed)}.")
        profiled_steps(self.profile)


def profiled_steps(profile: str) -> range:
    """Returns the steps that the key `profile` names.

    Raises:
      ValueError: it is neither empty nor `FIRST:LAST`.
    """
    if not profile:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", profile)  # as many digits as the last step can have
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"recipe key 'profile' must be FIRST:LAST, got {written(profile)}; 10:12 traces the steps 10, 11 and 12."
        )
    return range(first, last + 1)


class Group(NamedTuple):
    """The function that a group of a recipe feeds.

    Where `selector` is set, that key names an entry of `table`, and the group also takes the
    keywords of the entry. `supplied` are the parameters that the program gives and no recipe can.
    """

    function: Callable[..., Any]
    supplied: frozenset[str] = frozenset()
    selector: str = ""
    table: Mapping[str, Callable[..., Any]] = MappingProxyType({})


def _group(function: Callable[..., Any], supplied: str = "", **choice: Any) -> Group:
    return Group(function, frozenset(supplied.split()), **choice)


GROUPS = {
    "model": _group(models.create_model, "parent", selector="name", table=models.MODELS),
    "init": _group(pretrained.load, "model image_shape mesh class_names mean std"),
    "normalize": _group(steps.create_normalizer),
    "loss": _group(steps.create_loss),
    "metrics": _group(metrics.create_metrics, selector="name", table=metrics.METRICS),
    "optimizer": _group(optimizers.create_optimizer, "schedule", selector="name", table=optimizers.OPTIMIZERS),
    "schedule": _group(optimizers.create_schedule, "run", selector="name", table=optimizers.SCHEDULES),
    "mix": _group(mixing.make_mixing),
    "step": _group(
        steps.make_train_step, "model tx loss metrics normalize abstract_state mesh seed mix backbone_frozen"
    ),
    "data": _group(
        data.load,
        "train batch_size seed process_index process_count processes_per_host split",
        selector="source",
        table=data.SOURCES,
    ),
    "mesh": _group(sharding.create_mesh, "devices"),
    "checkpoint": _group(checkpoint.open_manager, "workdir best_metric read_only"),
}
LOOP = _group(Loop)

# Keys that change how a result is computed or shown and not the result: free to differ on resuming.
# On bad images: what a run that did not stop has read is the same.
OPERATIONAL = (
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "data.on_bad_image",
    "log_every_steps",
    "profile",
)
OPERATIONAL_GROUPS = ("mesh", "checkpoint")

# Keys that each host of a run may have of its own.
PER_HOST = ("data.data_dir", "data.num_threads", "data.num_workers")

# Keys of which infinity means something: at the end alone. JSON has none, so it becomes float32's largest number.
ENDLESS = ("eval_every_epochs", "checkpoint_every_epochs")

MAX_TEXT = 4096  # characters of a value: as many bytes as Linux takes for a path


# Reading -------------------------------------------------------------------------------------------


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
        _complete(f"{name}.", GROUPS[name], _override({name: dict(values)}, overrides)[name]), convert_dict=True
    )


def _check_groups(overrides: Sequence[str], groups: Sequence[str]) -> None:
    for text in overrides:
        key, _ = _split_override(text)
        if key.partition(".")[0] not in groups:
            raise ValueError(f"{cut(f'--config.{key}')} cannot be changed here; only keys of: {', '.join(groups)}.")


def _run_recipe(path_and_argument: str) -> dict[str, Any]:
    path, _, argument = path_and_argument.partition(":")
    if not os.path.isfile(path):  # which, unlike Path's, is False where a path is too long to be one
        raise _no_recipe(path)
    spec = importlib.util.spec_from_file_location("recipe_" + Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path!r} is no Python file; a recipe ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
    except SyntaxError as error:
        raise ValueError(
            f"recipe {error.filename or path}{f', line {error.lineno}' if error.lineno else ''}: {error.msg}"
            + (f": {cut(error.text.strip())}" if error.text else "")
        ) from None
    except AttributeError as error:
        if error.obj is not module:
            raise _failed(path, error) from None
        raise ValueError(f"recipe {path} has no function get_config().") from None
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None

    try:
        parameters = inspect.signature(get_config).parameters.values()
    except (TypeError, ValueError):  # no function, or one that says nothing of its arguments
        raise ValueError(
            f"recipe {path}: get_config must be a function that returns a ConfigDict, got {written(get_config)}."
        ) from None
    if argument and not parameters:
        raise ValueError(f"recipe {path} takes no argument, got {written(path_and_argument)}.")
    if not argument and any(p.default is p.empty for p in parameters):
        needed = ", ".join(p.name.upper() for p in parameters if p.default is p.empty)
        raise ValueError(f"recipe {path} needs an argument: --config {path}:{needed}")
    try:
        config = get_config(argument) if argument else get_config()
        if isinstance(config, ConfigDict):
            return config.to_dict()  # where a placeholder without a value shows
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None
    raise ValueError(f"recipe {path}: get_config() must return a ConfigDict, got {type(config).__name__}.")


def _no_recipe(path: str) -> ValueError:
    is_folder = os.path.isdir(path or ".")
    folder = Path(path) if is_folder else Path(path).parent
    try:
        files = [file for place in (".", "configs") for file in (folder / place).glob("*.py") if file.is_file()]
        recipes = {file.stem: str(file) for file in files if b"def get_config(" in file.read_bytes()}
    except (OSError, ValueError):  # a folder that cannot be read, or whose name is none
        recipes = {}
    wrong = f"{written(path)} is a folder, not a recipe file" if is_folder else f"no recipe file {written(path)}"
    if recipes:  # compared without what they have in common, the folder and the suffix
        return ValueError(f"{wrong}; {suggest(Path(path).stem, recipes, spell=recipes.__getitem__)}")
    if Path(path).is_absolute():
        return ValueError(f"{wrong}, and no recipe beside it; check the path.")
    return ValueError(
        f"{wrong}, seen from {Path.cwd()}; change to the folder of the project, or give the file's whole path."
    )


def _failed(path: str, error: Exception | SystemExit) -> ValueError:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if Path(frame.filename).name == Path(path).name]
    # What a recipe raises itself, or a function of ours that it asks about its argument, is about that; all else is a
    # mistake in the recipe, and where it is helps.
    ours = lines[-1:] == frames[-1:] or Path(__file__).parent in Path(frames[-1].filename).parents
    if isinstance(error, ValueError) and ours and (frames[-1].line or "").startswith("raise "):
        return ValueError(f"recipe {path}: {error}")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return ValueError(f"recipe {path}{f', line {lines[-1].lineno}' if lines else ''}: {kind}{error}")


# Resolving -----------------------------------------------------------------------------------------


def resolve(recipe: Mapping[str, Any]) -> ConfigDict:
    """Returns the recipe with every default filled in, every key and type checked.

    Raises:
      ValueError: an unknown, missing or mistyped key, or a value out of its range.
    """
    top = {key: value for key, value in recipe.items() if key not in GROUPS}
    resolved = _complete("", LOOP, top)
    Loop(**resolved)
    for name, group in GROUPS.items():
        values = recipe.get(name, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe key {name!r} must be a group of keys, got {written(values)}.")
        resolved[name] = _complete(f"{name}.", group, values)
    return ConfigDict(resolved, convert_dict=True)


def _parameters(prefix: str, group: Group, values: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a group feeds: of its function and of the entry it selects."""
    parameters = dict(inspect.signature(group.function).parameters)
    if group.selector:
        choice = values.get(group.selector, parameters[group.selector].default)
        if choice is inspect.Parameter.empty:
            raise ValueError(f"recipe key '{prefix}{group.selector}' is missing; {suggest('', group.table)}")
        if not isinstance(choice, str) or choice not in group.table:
            raise ValueError(f"unknown {prefix}{group.selector} {written(choice)}; {suggest(choice, group.table)}")
        parameters = dict(inspect.signature(group.table[choice]).parameters) | parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in group.supplied and parameter.kind is not parameter.VAR_KEYWORD
    }


def _unknown(prefix: str, key: str, group: Group, values: Mapping[str, Any], known: Sequence[str]) -> ValueError:
    choice = values.get(group.selector) if group.selector else None
    where = f" with {prefix}{group.selector}={choice!r}" if choice else ""
    known = [*known, *GROUPS] if group is LOOP else known
    return ValueError(f"unknown recipe key {written(f'{prefix}{key}')}{where}; {suggest(key, known)}")


def _complete(prefix: str, group: Group, values: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(prefix, group, values)
    for key in values:
        if key not in parameters:
            raise _unknown(prefix, key, group, values, list(parameters))
    complete = {}
    for key, parameter in parameters.items():
        value = values.get(key, parameter.default)
        if value is parameter.empty:
            raise ValueError(
                f"recipe key '{prefix}{key}' is missing; set it by --config.{prefix}{key}=VALUE "
                f"({_type_name(parameter.annotation)})."
            )
        if key in values and not _fits(value, parameter.annotation):
            raise _mistyped(prefix + key, parameter.annotation, value)
        if prefix + key in ENDLESS and value == math.inf:
            value = LARGEST
        for leaf in _leaves(value):
            _check_value(prefix + key, leaf)
        complete[key] = _canonical(value, parameter.annotation)
    return complete


def _leaves(value: Any, depth: int = 3) -> Iterator[Any]:
    """What a value is made of: itself, or all that its tuples and lists hold, down to a depth that no key has."""
    if isinstance(value, list | tuple) and depth:
        for element in value:
            yield from _leaves(element, depth - 1)
    else:
        yield value


def _check_value(key: str, value: Any) -> None:
    """Raises ValueError for what no key has a meaning for, whatever its type and its own range."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"recipe key '{key}' must be an integer of 64 bits, got {written(value)}.")
    if isinstance(value, int | float):
        check_number(f"recipe key '{key}'", value)
    if isinstance(value, str) and ("\0" in value or len(value) > MAX_TEXT):
        raise ValueError(
            f"recipe key '{key}' must be a text of at most {MAX_TEXT:,} characters, none of them NUL, "
            f"got {written(value)}."
        )


def _fits(value: Any, annotation: Any) -> bool:
    leaves = list(_leaves(value))
    # bool is an int to Python, and never to the author of a recipe.
    if any(isinstance(leaf, bool) for leaf in leaves) and bool not in (annotation, *typing.get_args(annotation)):
        return False
    # A text is a sequence to Python, and so are bytes and a range; a list here is one too many in another.
    if any(isinstance(leaf, Sequence) and not isinstance(leaf, str) for leaf in leaves):
        return False
    if isinstance(value, str) and typing.get_origin(annotation) is Sequence:
        return False
    if annotation is DTypeLike:  # which is anything to typeguard, and None a float64 to NumPy
        return value is not None and (isinstance(value, str) or _names_dtype(value))
    try:
        typeguard.check_type(value, annotation, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def _names_dtype(value: Any) -> bool:
    try:
        np.dtype(value)
    except (TypeError, ValueError):
        return False
    return True


def _canonical(value: Any, annotation: Any) -> Any:
    """The form that survives JSON: tuples for lists, names for types."""
    if annotation is DTypeLike and not isinstance(value, str):
        return np.dtype(value).name
    return tuple(value) if isinstance(value, list) else value


def _mistyped(key: str, annotation: Any, value: Any) -> ValueError:
    return ValueError(f"recipe key '{key}' must be {_type_name(annotation)}, got {written(value)}.")


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return name.replace("collections.abc.", "").replace("typing.", "")


# Overrides -----------------------------------------------------------------------------------------


def _override(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    parsed = dict(_split_override(text) for text in overrides)
    # Choices first: they decide which other keys there are.
    for key in sorted(parsed, key=lambda key: not _is_selector(key)):
        name, dot, option = key.rpartition(".")
        if key in GROUPS:
            raise ValueError(f"--config.{key} is a group; set one of its keys: --config.{key}.KEY=VALUE.")
        if dot and name not in GROUPS:
            raise ValueError(
                f"unknown recipe group {written(name)} in {cut(f'--config.{key}')}; {suggest(name, GROUPS)}"
            )
        group = GROUPS[name] if dot else LOOP
        values = recipe.setdefault(name, {}) if dot else recipe
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe key {name!r} must be a group of keys, got {written(values)}.")
        if option == group.selector:
            _select(name + dot, group, values, _parse_value(key, parsed[key], str))
            continue
        parameters = _parameters(name + dot, group, values)
        if option not in parameters:
            raise _unknown(name + dot, option, group, values, list(parameters))
        values[option] = _parse_value(key, parsed[key], parameters[option].annotation)
    return recipe


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals or not key:
        raise ValueError(f"unknown argument {written(text)}; a recipe's key is set by --config.KEY=VALUE.")
    return key, value


def _is_selector(key: str) -> bool:
    name, _, option = key.rpartition(".")
    return name in GROUPS and GROUPS[name].selector == option


def _select(prefix: str, group: Group, values: dict[str, Any], choice: str) -> None:
    """Sets the selector; keys that only the old choice takes go with it."""
    old = set(_parameters(prefix, group, values)) if group.selector in values else set()
    values[group.selector] = choice
    for key in old - set(_parameters(prefix, group, values)):
        values.pop(key, None)


def _parse_value(key: str, text: str, annotation: Any) -> Any:
    """The first reading of `text` that has the right type: a Python literal, else the text itself."""
    literals = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}
    try:
        literal = literals[text.lower()] if text.lower() in literals else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as ast's documentation lists them
        literal = text
    for value in (literal, text):
        if _fits(value, annotation):
            return value
    raise _mistyped(key, annotation, literal)


# Workdir -------------------------------------------------------------------------------------------

# What a run writes there, by `claim`, `progress`, `checkpoint`, `pictures` and `profiling`.
FILES = (".lock", "config.json", "metrics.jsonl", "curves.png")
FOLDERS = ("checkpoints", "tensorboard", "profile")
REPLACED = ("config.json", "metrics.jsonl")  # by new files at each start, whoever the old ones belong to


def to_json(config: ConfigDict) -> str:
    """The recipe as JSON text, keys sorted."""
    return naming.to_json(config.to_dict(), indent=2, sort_keys=True) + "\n"


def read(workdir: Path) -> ConfigDict:
    """Returns the recipe that `workdir` was trained with.

    Raises:
      ValueError: there is none, or it is not one of this version.
    """
    path = workdir / "config.json"
    with file_errors(path, "read"):
        if not path.is_file():
            raise ValueError(
                f"{workdir} is no workdir of a run: it has no config.json{checkpoint.run_around(workdir)}."
            )
    recipe = read_config(path)
    try:
        return resolve(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lines 'key: old -> new' for every key that differs and changes the result."""
    flat_old, flat_new = (_flatten(naming.from_json(to_json(config))) for config in (old, new))
    return [
        f"{key}: {flat_old.get(key, '(none)')!r} -> {flat_new.get(key, '(none)')!r}"
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key)
        and key not in OPERATIONAL
        and key.partition(".")[0] not in OPERATIONAL_GROUPS
    ]


def alike(config: ConfigDict) -> dict[str, Any]:
    """The keys of a resolved recipe that all hosts of a run must have alike, by the name that a message gives them."""
    flat = _flatten(naming.from_json(to_json(config)))
    return {f"recipe key {key}": value for key, value in flat.items() if key not in PER_HOST}


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in recipe.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError where `workdir` cannot be written, or holds a run of another recipe or foreign files.

    Writes nothing.
    """
    _check_place(workdir, config)
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
        if not existing.is_dir():
            wrong = "is a file" if existing == workdir else f"lies in {existing}, which is a file"
            raise ValueError(f"workdir {workdir} {wrong}; expected a folder, or a name that is free.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _not_writable(workdir, error) from None
    for name in FILES + FOLDERS:
        access = os.R_OK if name in REPLACED else os.R_OK | os.W_OK
        check_kind(workdir / name, folder=name in FOLDERS, access=access)
    if not (workdir / "config.json").is_file():
        foreign = [name for name in ("checkpoints", "metrics.jsonl", "curves.png") if (workdir / name).exists()]
        if foreign:
            raise ValueError(
                f"workdir {workdir} has {', '.join(foreign)} and no config.json: not a run of this program, or a "
                "damaged one. Nothing was changed; take another workdir."
            )
    if (workdir / "config.json").is_file() and (changed := differences(read(workdir), config)):
        raise ValueError(
            f"{workdir} holds a run of another recipe; nothing was changed. Take a new workdir, or the old values:\n  "
            + "\n  ".join(changed)
            + (f"\n{how_to_train_on(workdir)}" if _could_train_on(workdir, changed) else "")
        )


def _check_place(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError for a folder that an unset variable in a script, or a slip, names; a run in it goes on."""
    if (workdir / "config.json").is_file():
        return
    here, program = os.path.realpath(workdir), Path(__file__).parent.parent
    if config.data.source == "folder":
        images = os.path.realpath(os.path.expanduser(config.data.data_dir))
        if Path(images) in (
            Path(here),
            *Path(here).parents,
        ):  # where it would be taken for a class
            raise ValueError(f"workdir {workdir} lies in the folder of the images, {images}; take one outside of it.")
    for place, what in (
        ("/", "the root of all folders"),
        ("~", "your home folder"),
        (program, "this program's folder"),
    ):
        if here == os.path.realpath(os.path.expanduser(place)):
            raise ValueError(f"workdir {str(workdir)!r} is {what}; take a folder that is for this run alone.")


def how_to_train_on(workdir: Path) -> str:
    """A sentence for whoever wants more epochs of a run: its recipe stays as it is, and its weights begin another."""
    return (
        "To train its weights for more epochs, take a new workdir and "
        f"--config.init.weights={shlex.quote(str(workdir))}: that run begins with them (the averaged ones, where there "
        "are), its optimizer, schedule and steps anew."
    )


def _could_train_on(workdir: Path, changed: Sequence[str]) -> bool:
    """Whether what another recipe changes leaves the weights of the run in `workdir` as good."""
    groups = {line.partition(":")[0].partition(".")[0] for line in changed}
    return checkpoint.has_steps(workdir) and not groups & {"model", "normalize"}


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes `workdir`, with its `config.json`, and keeps every other run out of it meanwhile.

    The lock is the kernel's, on `workdir/.lock`: it goes with the process, however that ends. On a
    file system without locks there is none.

    Raises:
      ValueError: another process holds it, or the reasons of `check_workdir`.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+")
    except OSError as error:
        raise _not_writable(workdir, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise ValueError(
                f"workdir {workdir} is in use by {holder} (it holds {file.name}); wait for its end, or take another."
            ) from None
        except OSError:  # no such locks here: as many shared file systems do without, so do we
            pass
        with file_errors(workdir / ".lock", "written"):
            file.truncate(0)
            file.write(_holder())
            file.flush()
        check_workdir(workdir, config)  # once more: another run may have begun here and ended since
        if not (workdir / "config.json").exists():
            remember(workdir, config)
        yield


CLAIM_AGAIN_SECONDS = 5.0


def check_claim(workdir: Path) -> None:
    """Raises ValueError where `workdir` is no longer what this process claimed: removed, renamed, or another run's.

    To be asked before something is written there: Orbax makes the folder again where it is gone.
    """
    lock = workdir / ".lock"
    try:
        try:
            holder = lock.read_text(errors="replace")
        except FileNotFoundError:
            raise
        except OSError:  # a network file system has such moments; a run of days must not end by one
            time.sleep(CLAIM_AGAIN_SECONDS)
            holder = lock.read_text(errors="replace")
    except OSError as error:
        raise ValueError(
            f"workdir {workdir} was removed, renamed or closed to this run while it was going on "
            f"(.lock: {error.strerror}). Put it back, and the same command goes on from its newest checkpoint."
        ) from None
    if holder != _holder():
        raise ValueError(f"workdir {workdir} now belongs to {holder or 'another run'}, by its .lock; this run ends.")


@functools.cache  # the name of a host may change, and its claims stay
def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _not_writable(workdir: Path, error: OSError) -> ValueError:
    return ValueError(f"workdir {workdir} cannot be written: {error.strerror}.")


def remember(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`, whole or not at all, and a power cut does not undo it."""
    write_whole(workdir / "config.json", [to_json(config).encode()])
