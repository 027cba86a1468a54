"""Extreme values of every key of every group, made from its annotation: refused in one line, or listed here.

A new key is tried automatically. Extreme values that it accepts must be added to `ACCEPTED`, with their meaning.
"""

import argparse
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from xception_flax import data, models
from xception_flax.commands import cli
from xception_flax.data.transforms import TRANSFORMS, parse_transforms
from xception_flax.recipes import checking, groups
from xception_flax.text.errors import UserError
from xception_flax.text.ranges import check_range
from xception_flax.text.sizes import ImageSize
from xception_flax.training import checkpoint, losses, metrics, mixing, optimizers, sharding, steps
from xception_flax.training.length import RunLength
from xception_flax.training.patience import Patience
from xception_flax.training.program import create_program
from xception_flax.training.state import abstract_variables
from xception_flax.weights import initial

LONG, LONG_NAME = "x" * 5000, "x" * 300  # longer than a path, longer than a file's name
EXTREMES = {
    float: (math.nan, math.inf, -math.inf, -1.0, -0.0, 1e-320, 1e300, True),
    int: (-1, 0, 2**31, 2**63, 10**30, True),
    str: ("", "a\0b", "a\nb", LONG_NAME, LONG, "~nobody"),
    bool: (0, 1, "yes"),
    types.NoneType: (None,),
    DTypeLike: ("", "i4,(", "int8", "complex64", "float64", "float8_e4m3fn", "a\0b", LONG, None, 3),
}


def extremes(annotation: Any) -> Iterator[Any]:
    """Yields values of a type, or nearly of it, that come from a number too long, a slip or malice."""
    if annotation in EXTREMES:
        yield from EXTREMES[annotation]
    elif annotation is ImageSize:
        yield from (*EXTREMES[int], "", "8", "8*8", "8X8", "8x", "8x8x8", (), (8,), (8, 8, 8), "9" * 40 + "x8", 8.0)
        yield from ((value, 8) for value in (*EXTREMES[int], 8.0, None))
    elif typing.get_origin(annotation) is Sequence:
        (kind,) = typing.get_args(annotation)
        ordinary = {int: 8, float: 1.0}.get(kind, (8, 2))
        yield from ((), "", "text", b"ab", range(3), (ordinary,) * 5000, ((ordinary,),), (ordinary, "x"))
        yield from ((ordinary, value) for value in extremes(kind))
    else:
        yield from (value for kind in typing.get_args(annotation) for value in extremes(kind))


# Values that are accepted, by their `repr`. All others must be refused.
ACCEPTED = {
    # It counts as 0: nothing is dropped, kept, decayed, mixed or learned.
    "-0.0": (
        *("model.dropout_rate", "model.bn_decay", "loss.label_smoothing", "loss.weight_decay", "step.ema_decay"),
        *("optimizer.learning_rate", "optimizer.momentum", "optimizer.decoupled_weight_decay", "optimizer.decay"),
        *("optimizer.beta1", "optimizer.beta2", "optimizer.backbone_factor", "schedule.warmup_epochs"),
        *("schedule.final_factor", "mix.mixup_alpha", "mix.cutmix_alpha", "mix.probability", "mix.switch_probability"),
    ),
    "inf": (
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoint_every_minutes",
        "patience_epochs",
        "watchdog_minutes",
    ),  # at the end alone, or never
    # A seed, a backbone without classifier, no middle flow, off, none.
    "0": (
        *("seed", "model.num_classes", "model.middle_repeats", "data.num_workers", "data.min_decoded_side"),
        *("checkpoint.keep_best", "init.bn_batches"),
    ),
    "-1": ("data.num_threads", "data.num_workers", "mesh.data"),  # as many as there are, or suit
    # Never, all, or a seed as good as another.
    "2147483648": ("seed", "log_every_steps", "metrics.k", "checkpoint.keep_latest", "checkpoint.keep_best"),
    "()": ("model.fc_layers",),
    "(1.0, -0.0)": ("loss.class_weights",),  # a class that does not count
    "None": (
        *("model.mid_activation", "model.towers", "metrics.class_weights", "optimizer.clip_norm"),
        "loss.class_weights",
        "schedule.every_images",  # every_epochs is given
        "data.max_value",  # 16 bits as they are
        # Of a table: its own folder, what the names of columns say, one label, no groups.
        *("data.data_dir", "data.image_column", "data.label_column", "data.label_separator", "data.split_column"),
        "data.group_by",
    ),
    # No profile, the metric of the best checkpoint, no other factors, no splits in the table. A checkpoint's name is
    # not looked at if no workdir is named.
    "''": ("profile", "patience_metric", "optimizer.layer_factors", "init.checkpoint", "data.split_column"),
    # Any text may divide labels.
    **{repr(text): ("init.checkpoint", "data.label_separator") for text in ("a\nb", LONG_NAME, "~nobody")},
}

MINIMAL = {
    "": {"batch_size": 8, "epochs": 1.0},
    "model": {"name": "lenet", "num_classes": 10, "features": (8,), "fc_layers": ()},
    "normalize": {"mean": (0.0,), "std": (1.0,)},
    "loss": {"name": "softmax"},
    "metrics": {"name": "single_label"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "data": {"source": "digits", "image_size": 8, "channels": 1},
}
RUN = RunLength(batch_size=8, num_images=1257, total_steps=157)


def resolve(name: str, values: dict[str, Any]) -> ConfigDict:
    """The least recipe with `values` as its group `name`, or as its keys outside of groups."""
    groups = {**MINIMAL, name: values}
    return checking.resolve(groups.pop("") | groups)


# The function of each group, called with it: on shapes, or on as little data as shows NaN.


def finite(tree: Any) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def try_loop(config: ConfigDict, mesh: Mesh) -> None:
    sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)
    split = data.load(**config.data, batch_size=config.batch_size, seed=config.seed, train=True)
    length = create_program(config, mesh, split.image_shape, split.num_images).length
    Patience(config.metrics.name, config.patience_metric, config.patience_epochs, length)


def try_model(config: ConfigDict, mesh: Mesh) -> None:
    side = 75 if config.model.name == "inception_v3" else 32
    abstract_variables(models.create_model(**config.model), (side, side, 1), mesh)


def try_init(config: ConfigDict, mesh: Mesh) -> None:
    model = models.create_model(**config.model)
    initial.load(**config.init, **config.normalize, model=model, image_shape=(8, 8, 1), mesh=mesh, class_names=())


def try_normalize(config: ConfigDict, mesh: Mesh) -> None:
    finite(steps.create_normalizer(**config.normalize)(np.uint8([0, 255]).reshape(2, 1, 1, 1)))


def try_loss(config: ConfigDict, mesh: Mesh) -> None:
    loss = losses.create_loss(**config.loss)
    several = losses.LOSSES[config.loss.name].activation == "sigmoid"
    labels = jnp.eye(2, dtype=jnp.int32) if several else jnp.arange(2)
    finite((loss.example(jnp.eye(2), labels), loss.penalty({"conv1": {"kernel": jnp.ones(2)}})))


def try_metrics(config: ConfigDict, mesh: Mesh) -> None:
    labels = jnp.arange(2) if config.metrics.name == "single_label" else jnp.eye(2, dtype=jnp.int32)
    finite(metrics.create_metrics(**config.metrics)(jnp.eye(2), labels, jnp.ones(2)))


def try_optimizer(config: ConfigDict, mesh: Mesh) -> None:
    tx, rate = optimizers.create_optimizer(**config.optimizer, schedule=optimizers.constant(RUN))
    params = {layer: {"kernel": jnp.ones(2)} for layer in ("conv1", "predictions")}
    finite((rate(0), tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)))


def try_schedule(config: ConfigDict, mesh: Mesh) -> None:
    schedule = optimizers.create_schedule(**config.schedule, run=RUN)
    finite([schedule(jnp.int32(step)) for step in (0, 1, 156, 2**31 - 1)])


def try_mix(config: ConfigDict, mesh: Mesh) -> None:
    mix = mixing.make_mixing(**config.mix)
    if mix is not None:
        finite(mix(jax.random.key(0), {"images": jnp.zeros((2, 4, 4, 1), jnp.uint8), "labels": jnp.arange(2)}))


def try_step(config: ConfigDict, mesh: Mesh) -> None:
    sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)
    program = create_program(config, mesh, (8, 8, 1), RUN.num_images)
    shapes = {"images": ((8, 8, 8, 1), np.uint8), "labels": ((8,), np.int32)}
    jax.eval_shape(program.train_step, program.abstract_state, sharding.abstract_batch(mesh, shapes))


def try_data(config: ConfigDict, mesh: Mesh) -> None:
    for train in (True, False):
        data.load(**config.data, batch_size=config.batch_size, train=train)


def try_checkpoint(config: ConfigDict, mesh: Mesh) -> None:
    # The folder does not exist and is read only, so nothing is created.
    checkpoint.open_manager(Path("/nowhere"), best_metric="top1", read_only=True, **config.checkpoint).close()


TRY: dict[str, Callable[[ConfigDict, Mesh], None]] = {
    "": try_loop,
    "model": try_model,
    "init": try_init,
    "normalize": try_normalize,
    "loss": try_loss,
    "metrics": try_metrics,
    "optimizer": try_optimizer,
    "schedule": try_schedule,
    "mix": try_mix,
    "step": try_step,
    "data": try_data,
    "mesh": lambda config, mesh: sharding.create_mesh(**config.mesh),
    "checkpoint": try_checkpoint,
}


def choices() -> Iterator[tuple[str, str]]:
    """Yields every group with every entry of its table; of networks that differ only in values of fields, one."""
    for name, group in groups.PARTS.items():
        entries = {getattr(entry, "func", entry): choice for choice, entry in group.table.items()}
        yield from ((name, choice) for choice in entries.values() or [""])


@pytest.fixture(scope="module")
def least(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The keys that an entry of a table needs, besides those in `MINIMAL`."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(40):  # 20 of each class: some are of split 'val'
        (folder / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / "photos" / "ab"[i % 2] / f"{i}.png"), np.zeros((8, 8), np.uint8))
    rows = [f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}" for i in range(40)]
    (folder / "photos" / "labels.csv").write_text("\n".join(["image,label", *rows]))
    images, labels = np.zeros((8, 8, 8), np.uint8), np.arange(8) % 2
    np.savez(folder / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return {
        **{network: {"middle_repeats": 0} for network in ("xception", "xception_towers", "xception65p")},
        "exponential": {"decay_rate": 0.9, "every_epochs": 1.0},
        "folder": {"data_dir": str(folder / "photos"), "eval_split": "val"},
        "arrays": {"path": str(folder / "a.npz")},
        "table": {"path": str(folder / "photos" / "labels.csv"), "eval_split": "val"},
        "fashion_mnist": {"data_dir": str(folder)},
        "tfds": {"name": "mnist", "data_dir": str(folder)},
    }


NOT_THERE = ("fashion_mnist", "tfds")  # without their data everything is refused


def refusal(run: Callable[[], Any]) -> str | None:
    """Returns the message of a UserError; None if nothing is wrong. Other errors are raised."""
    try:
        run()
    except UserError as error:
        return str(error)
    return None


def test_every_group_is_tried():
    assert TRY.keys() == groups.PARTS.keys()


@pytest.mark.parametrize(("name", "choice"), list(choices()))
def test_extremes(name, choice, least, one_device):
    group, values = groups.PARTS[name], dict(MINIMAL.get(name, {}))
    if choice:
        values = {group.selector: choice} | (values if name != "model" or choice == "lenet" else {"num_classes": 10})
        values |= {group.selector: choice, **least.get(choice, {})}
    accepted, tried = set(), set()
    keys = group.keys(choice)
    for key in keys:
        for value in extremes(keys[key].annotation):
            what = f"{name}.{key}".lstrip("."), repr(value)
            tried.add(what)
            message = refusal(lambda key=key, value=value: TRY[name](resolve(name, values | {key: value}), one_device))
            if message is None:
                accepted.add(what)
                continue
            assert message.count("\n") < 2, (what, message)
            assert len(message) < 1000, (what, message)
            # For a text the message may say what it is instead: 'unknown split'.
            assert key in message or isinstance(value, str) or choice in NOT_THERE, (what, message)
    names = {f"{name}.{key}".lstrip(".") for key in keys}
    expected = {(key, value) for value, taken in ACCEPTED.items() for key in taken if key in names} & tried
    assert accepted == (set() if choice in NOT_THERE else expected)


# Numbers for transforms, as text: a chain is one value of a recipe.
NUMBERS = (
    "1e999",
    "-1e999",
    "-1.0",
    "-0.0",
    "1e-320",
    "1e300",
    "nan",
    "-1",
    "0",
    "2147483648",
    "9" * 31,
    "0x" + "f" * 4000,
)
ACCEPTED_BY_TRANSFORMS = {
    "-0.0": ("max_degrees", "max_shift", "brightness", "contrast", "saturation", "hue", "probability"),
    "0": ("padding", "num_ops", "magnitude"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_extremes_in_a_chain(name):
    """A transform that needs `resize_size` gets the smallest one, `image_size`."""
    keywords = {k: p for k, p in list(inspect.signature(TRANSFORMS[name]).parameters.items())[2:]}
    accepted = set()
    for key, parameter in keywords.items():
        whole = parameter.annotation in (int, ImageSize)
        texts = {
            int: NUMBERS,
            float: NUMBERS,
            bool: ("1", "yes"),
            str: ("'a\0b'", repr(LONG)),
            ImageSize: (*NUMBERS, "'8x'", "(8,)", "(8, 0)", "(8, -1)", f"(8, {10**30})", "(8, 8.0)", "'8x0'"),
        }[parameter.annotation]
        needed = ", resize_size=8" if "resize_size" in keywords and key != "resize_size" else ""
        for text in texts:
            chain = f"{name}({key}={text}{needed})"
            message = refusal(lambda chain=chain: parse_transforms(chain, 8))
            if message is not None:
                assert "\n" not in message, chain
                assert len(message) < 1000, chain
            elif whole == text.lstrip("-").isdecimal():  # a float takes integers too: not listed twice
                accepted.add((key, text))
    expected = {(key, value) for value, taken in ACCEPTED_BY_TRANSFORMS.items() for key in taken if key in keywords}
    assert accepted == expected


# Values that once ended in a traceback or were accepted. The tests above check that they are refused; these check how.


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("optimizer", {"decoupled_weight_decay": -1}, r"^optimizer\.decoupled_weight_decay must be 0 or pos"),
        ("optimizer", {"momentum": 1.0}, r"^optimizer\.momentum must be in \[0, 1\), got 1\.0\.$"),
        ("optimizer", {"clip_norm": 1e-320}, r"^recipe key 'optimizer\.clip_norm' must not be nearer to 0 than 1"),
        ("model", {"width": 1e9}, r"^model\.width=1000000000\.0 makes a layer of 8e\+09 channels; at most 16,777,216"),
        ("step", {"accumulation_steps": 0}, r"^step\.accumulation_steps must be at least 1, got 0\.$"),
        ("", {"epochs": 1e20}, r"^epochs=1e\+20 of 1,257 images are 1\.57e\+22 steps of batch_size=8; "),
        ("", {"eval_every_epochs": 1e-320}, r"^recipe key 'eval_every_epochs' must not be nearer to 0 than 1\.2e-38"),
        ("", {"batch_size": 2**40}, r"^batch_size=1,099,511,627,776 of data\.image_size=8 takes 70,369 GB, but this"),
        ("data", {"image_size": 10**6}, r"^data\.image_size must be in \[1, 10,000\], got 1000000\.$"),
        ("data", {"num_workers": 10**4}, r"^data\.num_workers \(-1: .*\) must be in \[-1, 256\], got 10000\.$"),
        ("init", {"weights": LONG_NAME}, r"^init\.weights: 'x+ \.\.\. x+' cannot be opened: File name too long\.$"),
        ("init", {"weights": "~nobody/a"}, r"^init\.weights: \S*/a is neither a file nor a folder; expected"),
        ("normalize", {"std": (0.0,)}, r"^normalize\.std must be positive, got 0\.0\.$"),
        ("normalize", {"std": (2e-38,)}, r"^\(255 - normalize\.mean\) / normalize\.std, of 0\.0 and 2e-38, must be at"),
        ("schedule", {"name": "exponential", "every_images": 9, "decay_rate": 0.0}, r"decay_rate must be positive"),
    ],
)  # fmt: skip
def test_messages(name, values, message, one_device):
    with pytest.raises(UserError, match=message):
        TRY[name](resolve(name, MINIMAL.get(name, {}) | values), one_device)


def test_an_infinite_rate_is_refused_without_a_recipe_too():
    with pytest.raises(UserError, match=r"^optimizer\.learning_rate must be 0 or positive, and finite, got inf\.$"):
        optimizers.create_optimizer("sgd", math.inf, schedule=optimizers.constant(RUN))


def test_float64_without_jaxs_switch_is_refused(one_device):
    """JAX would compute in float32 after a warning."""
    model = models.create_model("lenet", num_classes=2, dtype="float64")
    with pytest.raises(UserError, match=r"^model\.dtype=float64 needs JAX_ENABLE_X64=1 in the environment"):
        abstract_variables(model, (8, 8, 1), one_device)
    with jax.enable_x64(True):
        abstract_variables(model, (8, 8, 1), one_device)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (1, dict(low=0, high=1, below=True), r"n must be in [0, 1), got 1."),
        (0.0, dict(low=0, high=1, above=True), r"n must be in (0, 1], got 0.0."),
        (10_001, dict(low=1, high=10_000), "n must be in [1, 10,000], got 10001."),
        (math.nan, dict(low=0, high=1), "n must be in [0, 1], got nan."),
        (-1, dict(low=0), "n must be 0 or positive, got -1."),
        (math.nan, dict(low=0), "n must be 0 or positive, and finite, got nan."),
        (0, dict(low=0, above=True), "n must be positive, got 0."),
        (math.inf, dict(low=0, above=True), "n must be positive and finite, got inf."),
        (0, dict(low=1), "n must be at least 1, got 0."),
        (1.5, dict(low=1.5, above=True), "n must be above 1.5, got 1.5."),
        (1e39, dict(low=0), "n must be at most 3.4e+38, float32's largest number, got 1e+39."),
        (1e-39, dict(low=0), "n must not be nearer to 0 than 1.2e-38, float32's smallest number, got 1e-39."),
        (
            1 - 2**-26,
            dict(low=0, high=1, below=True),
            f"n must be below 1 in float32 too, which rounds to it; got {1 - 2**-26}.",
        ),
        (1 << 20_000, dict(low=0, high=1), "n must be in [0, 1], got a value of type int that cannot be written."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranges(value, bounds, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_range("n", value, **bounds)


def test_what_float32_holds_is_in_range():
    """Also its limits: 2^-126 and (2 - 2^-23) 2^127."""
    check_range("n", 1 - 2**-24, 0, 1, below=True)  # float32's last number below 1
    for value in (0, -0.0, float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max), 2**100):
        check_range("n", value, 0)


def test_counts_of_a_command_have_a_range():
    assert cli.positive("0012") == 12
    for text, message in [
        ("0", "must be a positive integer, got '0'"),
        ("10000000001", "must be at most 10,000,000,000, got '10000000001'"),
        ("9" * 5000, "must be a positive integer, got '9{59} "),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            cli.positive(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be a path, got ''$"):
        cli.directory("")
