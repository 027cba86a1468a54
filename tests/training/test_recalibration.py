"""Statistics of batch normalization computed anew: against float64, on one device and eight, in a run and resumed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import train
from small_run import DIGITS
from workdirs import arrays
from xception_flax import create_model
from xception_flax.recipes import reading
from xception_flax.text.errors import UserError
from xception_flax.training import sharding, steps
from xception_flax.training.optimizers import create_optimizer
from xception_flax.training.recalibration import make_statistics_step, recalibrate
from xception_flax.training.state import make_init
from xception_flax.weights import initial

MODEL = create_model("xception", num_classes=5, width=0.05, middle_repeats=0, bn_frozen=True)
NORMALIZE = steps.create_normalizer((100.0,), (50.0,))


def batches(count: int = 3) -> list[dict[str, np.ndarray]]:
    """Of other means and spreads each, as the batches of a small data set are."""
    rng, found = np.random.default_rng(1), []
    for i in range(count):
        images = rng.normal(90 + 30 * i, 20 + 10 * i, (16, 32, 32, 3)).clip(0, 255).astype(np.uint8)
        found.append({"images": images, "labels": np.zeros(16, np.int32)})
    return found


def recalibrated(mesh, given=None, model=MODEL, ema=True):
    """Returns the state before and after."""
    tx, _ = create_optimizer("sgd", 0.1, schedule=lambda step: jnp.ones(()))
    init, _ = make_init(model, tx, (32, 32, 3), mesh, ema=ema)
    state, step = init(jax.random.key(0)), make_statistics_step(model, NORMALIZE, mesh)
    return state, recalibrate(state, step, [sharding.global_batch(mesh, batch) for batch in given or batches()])


def test_the_first_layer_has_the_moments_of_all_images(one_device):
    """A convolution and its moments in float64, over the pixels of three batches together: within 1e-5."""
    state, found = recalibrated(one_device)
    kernel = np.float64(state.params["block1_conv1"]["kernel"])
    images = (np.concatenate([batch["images"] for batch in batches()]).astype(np.float64) - 100) / 50
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), (1, 2))[:, ::2, ::2]
    outputs = np.einsum("nhwcij,ijcf->nhwf", windows, kernel)
    statistics = found.batch_stats["block1_conv1_bn"]
    assert outputs.shape[1:] == (15, 15, kernel.shape[-1])
    np.testing.assert_allclose(statistics["mean"], outputs.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], outputs.var((0, 1, 2)), rtol=1e-5)


def test_all_layers_normalize_one_batch_as_training_does(one_device):
    """With the statistics of one batch, inference on it is training on it: logits within 1e-4 of their spread."""
    (batch,) = batches(1)
    state, found = recalibrated(one_device, [batch])
    images = NORMALIZE(batch["images"])
    thawed = MODEL.clone(bn_frozen=False, dropout_rate=0.0)
    expected, _ = jax.jit(lambda v, x: thawed.apply(v, x, train=True, mutable=["batch_stats"]))(
        state.variables("raw"), images
    )
    logits = jax.jit(lambda v, x: MODEL.apply(v, x, train=False))(found.variables("raw"), images)
    assert np.abs(logits - expected).max() <= 1e-4 * np.ptp(expected)
    before = jax.jit(lambda v, x: MODEL.apply(v, x, train=False))(state.variables("raw"), images)
    assert np.abs(before - expected).max() > 1e-1 * np.ptp(expected)


def test_eight_devices_equal_one(one_device):
    """In float64, each statistic within 1e-9 of the largest of its layer; weights stay bit for bit, averages follow."""
    with jax.enable_x64(True):
        model = MODEL.clone(dtype="float64", param_dtype="float64")
        state, expected = recalibrated(one_device, model=model)
        expected = jax.device_get(expected.batch_stats)
        _, found = recalibrated(sharding.create_mesh(data=8), model=model)
        for place, value in flatten_dict(jax.device_get(found.batch_stats)).items():
            reference = flatten_dict(expected)[place]
            assert np.abs(value - reference).max() <= 1e-9 * np.abs(reference).max(), place
            assert (value != flatten_dict(jax.device_get(state.batch_stats))[place]).all(), place
        for a, b in zip(*map(jax.tree.leaves, (found.ema_batch_stats, found.batch_stats)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found.params, jax.device_get(state.params))))


def test_what_is_not_finite_is_named(one_device):
    tx, _ = create_optimizer("sgd", 0.1, schedule=lambda step: jnp.ones(()))
    init, _ = make_init(MODEL, tx, (32, 32, 3), one_device, ema=False)
    state = init(jax.random.key(0))
    params = dict(state.params) | {"block1_conv2": {"kernel": state.params["block1_conv2"]["kernel"] * np.inf}}
    step = make_statistics_step(MODEL, NORMALIZE, one_device)
    with pytest.raises(UserError, match=r"^init\.bn_batches: the mean of block1_conv2_bn is not finite; look at init"):
        recalibrate(state.replace(params=params), step, [sharding.global_batch(one_device, batches(1)[0])])


@pytest.mark.parametrize(
    ("model", "count", "message"),
    [
        (MODEL.clone(bn_frozen=False), 1, r"^init\.bn_batches=1 computes statistics that stay; set model\.bn_frozen=T"),
        (create_model("lenet", num_classes=5), 2, r"^init\.bn_batches=2 .*; LeNet has no such field; leave it out\.$"),
        (MODEL, -1, r"^init\.bn_batches \(0: off\) must be in \[0, 1,000,000\], got -1\.$"),
    ],
)
def test_mistakes(model, count, message, one_device):
    options = dict(image_shape=(32, 32, 3), mesh=one_device, class_names=(), mean=(0.0,), std=(1.0,))
    with pytest.raises(UserError, match=message):
        initial.load("random", "latest", count, model=model, **options)


def recipe(*overrides: str):
    small = ["model.width=0.02", "model.middle_repeats=0", "model.bn_frozen=True", "data.image_size=32", "epochs=1"]
    small += ["schedule.warmup_epochs=0.2", "step.ema_decay=0.9", "batch_size=64", "checkpoint_every_epochs=0.5"]
    return reading.load(DIGITS, [f"--config.{text}" for text in (*small, "init.bn_batches=3", *overrides)])


def test_a_run_keeps_them_and_its_resume_does_not_compute_them_again(tmp_path, monkeypatch, capsys):
    """Twenty steps of 64 digits. Every checkpoint has the statistics of the first three batches, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seen = []
    compute = train.recalibrate
    monkeypatch.setattr(train, "recalibrate", lambda *given: seen.append(compute(*given)) or seen[-1])
    monkeypatch.setattr(train, "begin_or_resume", kept := Kept(train.begin_or_resume))
    assert train.train(recipe(), whole) == 0
    err = capsys.readouterr().err
    assert "statistics of batch normalization: 192 images in 0:" in err
    assert "statistics of 3 batches (init.bn_batches)" in err
    assert len(seen) == 1
    steps_there = sorted(int(path.name) for path in (whole / "checkpoints").iterdir() if path.name.isdecimal())
    first, last = steps_there[0], steps_there[-1]
    assert first < last == 20
    for step in (first, last):
        found = arrays(whole, step)
        for item in ("raw", "ema"):
            for place, value in kept.statistics.items():
                layer, name = place
                np.testing.assert_array_equal(found[f"{item}['batch_stats']['{layer}']['{name}']"], value)

    shutil.copytree(whole, cut)
    for step in steps_there[1:]:
        shutil.rmtree(cut / "checkpoints" / str(step))
    config = cut / "config.json"
    assert json.loads(config.read_text())["init"]["bn_batches"] == 3
    assert train.train(recipe(), cut) == 0
    assert len(seen) == 1  # not again
    expected, found = arrays(whole, last), arrays(cut, last)
    assert expected.keys() == found.keys()
    for place, value in expected.items():
        np.testing.assert_array_equal(found[place], value, err_msg=place)


class Kept:
    """Calls a function, and keeps the statistics that its state begins with."""

    def __init__(self, function) -> None:
        self.function, self.statistics = function, None

    def __call__(self, *given):
        state, note = self.function(*given)
        self.statistics = flatten_dict(jax.device_get(state.batch_stats))
        return state, note


def test_without_a_whole_batch_there_are_no_statistics(one_device):
    """A batch with a bad image is left out by the caller."""
    state, _ = recalibrated(one_device)
    with pytest.raises(UserError, match=r"^init\.bn_batches: each of the batches has a bad image; look at the data\.$"):
        recalibrate(state, None, [])
