"""The signatures of the functions that take the groups, and of all entries of their tables."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import pytest
from flax import linen as nn

from xception_flax.recipes import checking, groups, signatures
from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.training import losses, optimizers
from xception_flax.weights import initial

FUNCTIONS = {
    **{name: group.function for name, group in groups.PARTS.items()},
    **{f"{name}.{choice}": entry for name, group in groups.PARTS.items() for choice, entry in group.table.items()},
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_key_has_a_type_a_default_of_it_and_a_meaning(function):
    """An object of the program, such as a mesh, would fail here if it were between / and *."""
    for name, key in signatures.keys_of(function).items():
        values.describe(key.annotation)
        assert key.meaning, f"{name} has no entry in 'Args:' or 'Attributes:' of the docstring"
        if not key.is_required:
            values.check(name, key.default, key.annotation)


def _untyped(logits, labels, /, q=0.7, *, label_smoothing):
    pass


def _without_slash(logits: jax.Array, labels: jax.Array, *, label_smoothing: float):
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_untyped, r"parameter 'q' of \S+test_groups\._untyped must have a type that a user can write .*, got none\."),
        (
            _without_slash,
            r"parameter 'logits' of \S+_without_slash must .*, got \S*Array\. What the program gives stands",
        ),
    ],
)
def test_a_key_without_a_type_is_named(monkeypatch, function, message):
    monkeypatch.setitem(groups.GROUPS["loss"].table, "new", function)
    with pytest.raises(UserError, match=message):
        checking.resolve_group("loss", {"name": "new"})


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_docstring_names_the_arguments_and_no_other(function):
    """Those before / may be left out, and those that Flax gives every module."""
    function = getattr(function, "func", function)
    parameters = inspect.signature(function).parameters
    before = {name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY}
    of_flax = {"parent", "name"} if isinstance(function, type) and issubclass(function, nn.Module) else set()
    told = {name.lstrip("*") for name in signatures.meanings_of(function)}
    assert parameters.keys() - before - of_flax <= told <= parameters.keys()


@pytest.mark.parametrize(("name", "group"), groups.PARTS.items(), ids=groups.PARTS)
def test_functions_take_their_keys_and_the_programs_arguments(name, group):
    """`function(a, b, **config.group, c=c)` binds with every entry of the table, and so does the call of the entry."""
    for choice in group.table or [""]:
        keys = dict.fromkeys(group.keys(choice))
        bind(group.function, keys)
        if choice:
            own = signatures.keys_of(group.function)
            bind(group.table[choice], {key: None for key in signatures.keys_of(group.table[choice]) if key not in own})


def bind(function: Callable[..., Any], keys: dict[str, Any]) -> None:
    """Raises TypeError unless the program can call `function`: before / by position, after * by name."""
    parameters = inspect.signature(function).parameters.values()
    before = [None for p in parameters if p.kind is p.POSITIONAL_ONLY]
    behind = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY} | keys
    inspect.signature(function).bind(*before, **behind)


def test_init_has_the_keys_of_the_function_that_it_stands_for():
    """`initial.load(**config.init, **config.normalize, ...)`; `recipes` cannot import it."""
    parameters = inspect.signature(initial.load).parameters.values()
    keys = {name: key.annotation for name, key in groups.GROUPS["init"].keys().items()}
    assert {p.name: p.annotation for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} == keys
    keys = {name: key.annotation for name, key in groups.GROUPS["normalize"].keys().items()}
    assert {p.name: p.annotation for p in parameters if p.name in keys} == keys


def test_what_the_program_gives_is_no_key():
    keys = {name: set(group.keys(next(iter(group.table), ""))) for name, group in groups.PARTS.items()}
    assert keys["step"] == {"ema_decay", "accumulation_steps", "lowering", "on_nonfinite"}
    assert keys["checkpoint"] == {"keep_latest", "keep_best", "on_damaged"}
    assert keys["mesh"] == {"data", "fsdp"}
    assert keys["init"] == {"weights", "checkpoint", "bn_batches"}
    assert keys["schedule"] == {"name"}
    assert not keys["data"] & {"train", "batch_size", "seed", "process_index", "process_count", "split"}
    assert not any(
        {"parent"} & group.keys(choice).keys() for group in groups.PARTS.values() for choice in group.table or [""]
    )
    assert "name" not in signatures.keys_of(groups.GROUPS["model"].table["xception"])
    assert "learning_rate" not in signatures.keys_of(optimizers.sgd)


def test_a_partials_values_are_defaults():
    """In a partial's own signature every parameter after a keyword that it sets is keyword-only."""
    keys = groups.GROUPS["model"].keys("xception41p")
    assert (keys["preactivation"].default, keys["bn_epsilon"].default, keys["width"].default) == (True, 1e-5, 1.0)


def test_a_meaning_is_the_first_sentence():
    def function(a: int, b: int, c: int, *, d: int) -> None:
        """Does nothing.

        Args:
          a: of the first,
            as Who et al. 2017 have it. And more.
          b: one that ends in 0.5
          c: 'x' or
             'y' (see data/x.py). 'z' is none.
          d: the program's.

        Raises:
          UserError: never.
        """

    assert [key.meaning for key in signatures.keys_of(function).values()] == [
        "of the first, as Who et al. 2017 have it",
        "one that ends in 0.5",
        "'x' or 'y' (see data/x.py)",
    ]
    assert signatures.keys_of(losses.create_loss)["name"].meaning.startswith("'softmax' for")
