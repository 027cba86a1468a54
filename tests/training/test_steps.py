"""The training step: one device against eight, and each of its parts against a formula."""

import socket

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.typing import DTypeLike

import shell
from xception_flax import create_model
from xception_flax.models import layers, ops
from xception_flax.recipes import reading
from xception_flax.text.errors import UserError
from xception_flax.training import losses, mixing, program, sharding, steps
from xception_flax.training.metrics import create_metrics
from xception_flax.training.optimizers import OPTIMIZERS, backbone_mask, create_optimizer, factors_of
from xception_flax.training.state import make_init

CLASSES, BATCH = 5, 16

NORMALIZE = steps.create_normalizer((127.5,), (127.5,))


class Small(nn.Module):
    """Has each kind of layer of Xception once. Tests of a step need no depth, and this compiles quickly."""

    num_classes: int = CLASSES
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        def norm(x, name):
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=name)(x)

        x = nn.relu(norm(layers.Conv(8, strides=(2, 2), dtype=self.dtype, name="conv")(images), "conv_bn"))
        x = nn.relu(norm(layers.SeparableConv(16, dtype=self.dtype, name="sepconv")(x), "sepconv_bn"))
        x = ops.global_average_pool(x)
        return layers.classifier_head(
            x, self.num_classes, train=train, dropout_rate=self.dropout_rate, dtype=self.dtype
        )


SMALL = Small()

XCEPTION = dict(
    model=create_model(
        "xception",
        num_classes=CLASSES,
        width=0.05,
        middle_repeats=0,
        dropout_rate=0.3,
        bn_decay=0.9,
        dtype="float64",
        param_dtype="float64",
    ),
    ema=True,
    ema_decay=0.9,
)


def batches(count: int, size: int = BATCH) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {
            "images": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
            "labels": rng.integers(0, CLASSES, size).astype(np.int32),
        }
        for _ in range(count)
    ]


def make(mesh, *, model=SMALL, optimizer="sgd", rate=0.05, ema=False, loss=None, **step):
    """Returns (init, train_step, abstract_state), of which nothing is compiled yet."""
    tx, _ = create_optimizer(optimizer, rate, schedule=lambda step: jnp.ones(()))
    loss = loss or losses.create_loss("softmax", label_smoothing=0.1, weight_decay=1e-3)
    init, abstract = make_init(model, tx, (32, 32, 3), mesh, ema=ema)
    train_step = steps.make_train_step(
        model, tx, loss, create_metrics("single_label"), NORMALIZE, abstract, mesh, seed=0, **step
    )
    return init, train_step, abstract


def build(mesh, **options):
    """Returns (state, train_step, abstract_state)."""
    init, *others = make(mesh, **options)
    return init(jax.random.key(0)), *others


def train(mesh, data, initial=None, **options):
    """Returns the state after a step with each batch, and the losses; `initial` in place of a random state."""
    init, train_step, abstract = make(mesh, **options)
    if initial is None:
        state = init(jax.random.key(0))
    else:
        state = jax.device_put(initial, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    curve = []
    for batch in data:
        state, sums = train_step(state, sharding.global_batch(mesh, batch))
        curve.append(float(sums["loss"].total / sums["loss"].count))
    return jax.device_get(state), curve


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_eight_devices_equal_one(monkeypatch, reference, axes):
    """Ten steps of a narrow Xception in float64: losses within 1e-6, each array within 1e-7 of its largest value.

    In float32, the rounding of another order of summation would be enough to flip a ReLU. With both axes the initial
    state is drawn anew, and is the same too.
    """
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)  # a narrow network has no large arrays
    with jax.enable_x64(True):
        mesh = sharding.create_mesh(**({"data": 1} | axes))
        _, _, abstract = make(mesh, **XCEPTION)
        split = [leaf for leaf in jax.tree.leaves(abstract.params) if "fsdp" in str(leaf.sharding.spec)]
        assert len(split) > 20 if mesh.shape["fsdp"] > 1 else not split
        initial, expected_state, expected_curve = reference
        state, curve = train(mesh, batches(10), None if len(axes) == 2 else initial, **XCEPTION)

    np.testing.assert_allclose(curve, expected_curve, rtol=1e-6)
    assert len(set(curve)) == 10
    assert state.step == 10
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected_state), strict=True):
        assert np.abs(a - b).max() <= 1e-7 * max(np.abs(b).max(), 1e-3), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def reference(one_device):
    """The initial state, and the same ten steps on one device, with dropout, averages and momentum."""
    with jax.enable_x64(True):
        initial = jax.device_get(build(one_device, **XCEPTION)[0])
        return initial, *train(one_device, batches(10), initial, **XCEPTION)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_shards(monkeypatch, one_device, name):
    """Its state is split over fsdp, and after three steps in float64 it is the same as on one device."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    with jax.enable_x64(True):
        options = dict(model=SMALL.clone(dtype=jnp.float64), optimizer=name, rate=0.01)
        mesh = sharding.create_mesh(data=2, fsdp=4)
        _, _, abstract = make(mesh, **options)
        kinds = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if "fsdp" in str(leaf.sharding.spec)]
        assert len(kinds) >= 3
        results = [train(m, batches(3), **options) for m in (one_device, mesh)]
    for a, b in zip(*(jax.tree.leaves(state) for state, _ in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_state_is_created_where_it_belongs(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    mesh = sharding.create_mesh(data=1, fsdp=8)
    state, train_step, abstract = build(mesh)
    for stage in ("created", "stepped"):
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding == expected.sharding, stage
        state, _ = train_step(state, sharding.global_batch(mesh, batches(1)[0]))
    kernel = state.params["sepconv"]["pointwise"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_the_old_state_is_donated(one_device):
    state, train_step, _ = build(one_device, ema=True, ema_decay=0.9)
    train_step(state, batches(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_batch_normalization_sees_the_global_batch():
    """The moving mean after a step is the mean over all 16 images, not over the two of one device."""
    mesh = sharding.create_mesh()
    data = batches(1)
    data[0]["images"][:8] = data[0]["images"][:8] // 8  # some devices have dark images, others have bright ones
    state, _ = train(mesh, data)
    initial, _, _ = build(mesh)
    kernel = jax.device_get(initial.params["conv"]["kernel"])
    x = np.asarray(NORMALIZE(data[0]["images"]))
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = np.asarray(y, np.float64)
    stats = state.batch_stats["conv_bn"]
    np.testing.assert_allclose(stats["mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-3)
    local = [y[2 * d : 2 * d + 2].var((0, 1, 2)) for d in range(8)]
    assert np.abs(np.mean(local, 0) - y.var((0, 1, 2))).max() > 1e-2  # what statistics per device would give


HOST = """
import sys
import jax
import numpy as np
from xception_flax.host import processes
address, number, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
processes.connect(address, 2, number)
sys.path.append("tests")  # as pytest has it
from tests.training.test_steps import batches, train
from xception_flax.training import sharding
half = slice(8 * number, 8 * number + 8)
state, curve = train(sharding.create_mesh(), [{k: v[half] for k, v in batch.items()} for batch in batches(3)])
if number == 0:
    np.savez(path, *jax.tree.leaves(state), curve)
"""


def test_two_hosts_normalize_over_all_images(one_device, tmp_path):
    """Three steps of two processes, each with half of the images, are those of one: losses, statistics, momentum."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = tmp_path / "state.npz"
    hosts = [shell.start("-c", HOST, address, number, path, devices=1) for number in range(2)]
    state, curve = train(one_device, batches(3))
    results = [shell.finish(host) for host in hosts]
    assert [code for code, _, _ in results] == [0, 0], results
    with np.load(path) as found:
        for a, b in zip(found.values(), [*jax.tree.leaves(state), np.array(curve)], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_one_step_is_the_gradient_of_loss_and_penalty(one_device):
    """SGD with momentum 0.9 and rate 0.05: the first step is -0.05 * gradient, L2 included."""
    batch = batches(1)[0]
    state, train_step, _ = build(one_device)
    params, stats = jax.device_get((state.params, state.batch_stats))

    def objective(params):
        logits, _ = SMALL.apply(
            {"params": params, "batch_stats": stats}, NORMALIZE(batch["images"]), train=True, mutable=["batch_stats"]
        )
        targets = 0.9 * jax.nn.one_hot(batch["labels"], CLASSES) + 0.1 / CLASSES
        cross_entropy = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))
        squares = sum(
            jnp.sum(leaf**2) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"
        )
        return cross_entropy + 1e-3 / 2 * squares, (cross_entropy, squares)

    (_, (cross_entropy, squares)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    new, sums = train_step(state, batch)
    assert float(sums["loss"].total) / BATCH == pytest.approx(float(cross_entropy), rel=1e-5)
    assert float(sums["penalty"].total) == pytest.approx(float(1e-3 / 2 * squares), rel=1e-5)
    assert float(sums["gradient_norm"].total) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    for old, g, after in zip(*map(jax.tree.leaves, (params, grads, new.params)), strict=True):
        np.testing.assert_allclose(after, old - 0.05 * g, rtol=1e-4, atol=1e-5 * max(1, np.abs(g).max()))


def test_accumulation_is_the_mean_gradient_of_the_parts(one_device):
    """Four parts of 4 images: part i has images i, i + 4, ...; one part after the other updates the statistics."""
    batch = batches(1)[0]
    state, train_step, _ = build(one_device, accumulation_steps=4)
    params, stats = jax.device_get((state.params, state.batch_stats))
    loss = losses.create_loss("softmax", label_smoothing=0.1, weight_decay=1e-3)

    @jax.jit
    def part_gradient(params, stats, images, labels):
        def objective(params):
            logits, updates = SMALL.apply(
                {"params": params, "batch_stats": stats}, NORMALIZE(images), train=True, mutable=["batch_stats"]
            )
            return loss.example(logits, labels).mean() + loss.penalty(params), updates["batch_stats"]

        return jax.grad(objective, has_aux=True)(params)

    total = jax.tree.map(np.zeros_like, params)
    for i in range(4):
        grads, stats = part_gradient(params, stats, batch["images"][i::4], batch["labels"][i::4])
        total = jax.tree.map(lambda t, g: t + np.asarray(g) / 4, total, grads)
    new, sums = train_step(state, batch)
    assert float(sums["loss"].count) == BATCH
    for old, g, after in zip(*map(jax.tree.leaves, (params, total, new.params)), strict=True):
        np.testing.assert_allclose(after, old - 0.05 * g, rtol=1e-4, atol=1e-5 * max(1, np.abs(g).max()))
    for a, b in zip(jax.tree.leaves(new.batch_stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_accumulation_on_eight_devices_equals_one(one_device):
    data = batches(3)
    _, expected = train(one_device, data, accumulation_steps=2)
    _, curve = train(sharding.create_mesh(data=4, fsdp=2), data, accumulation_steps=2)
    np.testing.assert_allclose(curve, expected, rtol=1e-4)


MIX = mixing.make_mixing(mixup_alpha=0.8, cutmix_alpha=1.0)


def test_a_mixed_step_is_the_loss_of_the_mixed_batch(one_device):
    """The loss is smoothed cross-entropy with both labels, by their shares; metrics take the larger share's label."""
    state, train_step, _ = build(one_device, mix=MIX, accumulation_steps=4)
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    mixed = jax.device_get(jax.jit(MIX)(mixing.mixing_key(0, 0), batches(1)[0]))
    forward = jax.jit(lambda images: SMALL.apply(variables, images, train=True, mutable=["batch_stats"])[0])
    assert 0.5 <= mixed["share"][0] < 0.99
    losses, hits = [], []
    for i in range(4):
        part = {key: value[i::4] for key, value in mixed.items()}
        log_p = np.asarray(jax.nn.log_softmax(forward(NORMALIZE(part["images"]))), np.float64)
        rows = np.arange(len(log_p))
        both = [0.9 * log_p[rows, part[key]] + 0.1 * log_p.mean(-1) for key in ("labels", "minor_labels")]
        losses += list(-part["share"] * both[0] - (1 - part["share"]) * both[1])
        hits += list(log_p.argmax(-1) == part["labels"])
    _, sums = train_step(state, batches(1)[0])
    assert float(sums["loss"].total / sums["loss"].count) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(sums["top1"].total) == np.sum(hits)


def test_mixing_on_eight_devices_equals_one(one_device):
    data = batches(3)
    curves = [train(mesh, data, mix=MIX)[1] for mesh in (one_device, sharding.create_mesh(data=4, fsdp=2))]
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_averages_follow_tensorflows_rule(one_device):
    """ema = d * ema + (1 - d) * new with d = min(decay, (1 + step) / (10 + step)), statistics too."""
    state, train_step, _ = build(one_device, ema=True, ema_decay=0.25)
    ema = jax.device_get((state.params, state.batch_stats))
    for step, batch in enumerate(batches(4)):
        state, _ = train_step(state, batch)
        keep = min(0.25, (1 + step) / (10 + step))
        new = jax.device_get((state.params, state.batch_stats))
        ema = jax.tree.map(lambda e, n, keep=keep: keep * e + (1 - keep) * n, ema, new)
    for a, b in zip(jax.tree.leaves((state.ema_params, state.ema_batch_stats)), jax.tree.leaves(ema), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert state.variables("ema")["params"] is state.ema_params
    assert state.variables("raw")["params"] is state.params
    plain, _, _ = build(one_device)
    with pytest.raises(UserError, match="the recipe keeps no average"):
        plain.variables("ema")


def test_frozen_normalization_and_layers_stay_bit_for_bit(one_device):
    """So do their averages; what is not frozen moves, and the statistics do without `bn_frozen`."""
    model = create_model("xception", num_classes=CLASSES, dropout_rate=0.0, width=0.05, middle_repeats=0)
    rules = "block2_: 0; block1_conv1$: 0"

    def frozen(params):
        return jax.tree.map(lambda factor: factor == 0, factors_of(params, 1.0, rules))

    for bn_frozen in (True, False):
        tx, _ = create_optimizer("adamw", 0.01, schedule=lambda step: jnp.ones(()), layer_factors=rules)
        network = model.clone(bn_frozen=bn_frozen)
        init, abstract = make_init(network, tx, (32, 32, 3), one_device, ema=True)
        loss, measured = losses.create_loss("softmax", weight_decay=1e-2), create_metrics("single_label")
        step = steps.make_train_step(
            network, tx, loss, measured, NORMALIZE, abstract, one_device, seed=0, ema_decay=0.7, frozen=frozen
        )
        state = init(jax.random.key(0))
        # Statistics of real networks are no round numbers.
        stats = jax.tree.map(lambda x: x * 1.01234567 + 1.234567e-5, state.batch_stats)
        state = state.replace(batch_stats=stats, ema_batch_stats=jax.tree.map(jnp.copy, stats))
        before = jax.device_get(state)
        for batch in batches(3):
            state, _ = step(state, sharding.global_batch(one_device, batch))
        after = jax.device_get(state)
        for old, new in ((before.params, after.params), (before.ema_params, after.ema_params)):
            for layer, arrays in old.items():
                stays = layer.startswith("block2_") or layer == "block1_conv1"
                equal = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (arrays, new[layer])), strict=True)]
                assert all(equal) if stays else not any(equal), layer
        for old, new in ((before.batch_stats, after.batch_stats), (before.ema_batch_stats, after.ema_batch_stats)):
            equal = jax.tree.leaves(jax.tree.map(np.array_equal, old, new))
            assert all(equal) if bn_frozen else not any(equal)


def test_dropout_depends_on_seed_and_step_only(one_device):
    data = [batches(1)[0]] * 3
    model = SMALL.clone(dropout_rate=0.5)
    _, curve = train(one_device, data, model=model, rate=0.0)
    _, again = train(one_device, data, model=model, rate=0.0)
    assert curve == again
    assert len(set(curve)) == 3  # the same batch, the same weights, another mask at each step


def test_bfloat16_trains_float32_parameters(one_device):
    state, curve = train(one_device, [batches(1)[0]] * 10, model=SMALL.clone(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state))} <= {
        np.dtype("float32"),
        np.dtype("int32"),
    }
    _, exact = train(one_device, [batches(1)[0]] * 10)
    assert curve[-1] < 0.95 * curve[0]
    np.testing.assert_allclose(curve, exact, rtol=0.03)


def test_normalizer(rng):
    images = rng.integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    to_one = steps.create_normalizer((127.5,), (127.5,))
    assert (float(to_one(images).min()), float(to_one(images).max())) == pytest.approx(
        (images.min() / 127.5 - 1, images.max() / 127.5 - 1)
    )
    per_channel = steps.create_normalizer((1.0, 2.0, 3.0), (1.0, 2.0, 4.0))
    np.testing.assert_allclose(per_channel(images), (images - np.array([1, 2, 3])) / np.array([1, 2, 4]), rtol=1e-6)
    with pytest.raises(UserError, match="mean has 3 values, but the images have 1 channels"):
        per_channel(images[..., :1])
    with pytest.raises(UserError, match=r"normalize\.std must be positive, got 0\.0"):
        steps.create_normalizer((0.0,), (0.0,))


@pytest.mark.parametrize(
    ("options", "message"), [({"ema_decay": 1.0}, "ema_decay"), ({"accumulation_steps": 0}, "accumulation_steps")]
)
def test_bad_step_options_are_refused(one_device, options, message):
    with pytest.raises(UserError, match=message):
        build(one_device, **options)


@pytest.mark.parametrize(
    ("head", "got"),
    [
        (lambda x: nn.Dense(CLASSES - 1)(x), r"\(16, 4\)"),
        (lambda x: nn.Dense(CLASSES)(x)[:, None, None], r"\(16, 1, 1, 5\)"),
        (lambda x: (nn.Dense(CLASSES)(x), x), "tuple"),
    ],
)
def test_logits_of_another_shape_are_refused(one_device, head, got):
    """Before anything is compiled. The loss of 4 logits would be 0 wherever the class is the fifth."""

    class Wrong(Linear):
        @nn.compact
        def __call__(self, images, *, train):
            return head(ops.global_average_pool(images))

    message = rf"network Wrong must return logits \[N, model.num_classes\], here \(16, 5\), got {got};"
    (batch,), measured, loss = batches(1), create_metrics("single_label"), losses.create_loss("softmax")
    _, train_step, abstract = make(one_device, model=Wrong())
    with pytest.raises(UserError, match=message):
        jax.eval_shape(train_step, abstract, batch)
    eval_step = steps.make_eval_step(Wrong(), loss, measured, NORMALIZE, one_device)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(eval_step, abstract.variables("raw"), batch | {"mask": np.ones(BATCH, np.float32)})


def test_a_loss_that_is_a_mean_is_refused(one_device):
    loss = losses.create_loss("softmax")
    loss = loss._replace(example=lambda *given: jnp.mean(losses.create_loss("softmax").plain(*given)))
    _, train_step, abstract = make(one_device, model=Linear(), loss=loss)
    with pytest.raises(UserError, match=r"a value for each image, \[N\], here \(16,\), got shape \(\);"):
        jax.eval_shape(train_step, abstract, batches(1)[0])


def test_evaluation_counts_real_images_only(one_device):
    eval_step = steps.make_eval_step(
        SMALL, losses.create_loss("softmax", label_smoothing=0.1), create_metrics("single_label"), NORMALIZE, one_device
    )
    state, _, _ = build(one_device)
    batch = batches(1)[0]
    sums, logits = eval_step(state.variables("raw"), batch | {"mask": np.float32([1] * 10 + [0] * 6)})
    expected = -jax.nn.log_softmax(logits)[np.arange(10), batch["labels"][:10]]
    assert float(sums["loss"].count) == 10
    assert float(sums["loss"].total) == pytest.approx(float(expected.sum()), rel=1e-5)


class Linear(nn.Module):
    """Has no batch statistics, which would include images that are left out."""

    num_classes: int = CLASSES
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.num_classes)(ops.global_average_pool(images))


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_masked_is_as_if_it_were_not_there(one_device, parts):
    """With 6 of 16 images masked, unequally over the parts, step and metrics are those of the 10 others alone."""
    batch = batches(1)[0]
    mask = np.float32([1, 0] * 5 + [1, 1, 1, 1, 0, 1])
    bad = batch | {"images": np.where(mask[:, None, None, None] > 0, batch["images"], 0).astype(np.uint8)}
    expected, train_step, _ = build(one_device, model=Linear())
    expected, expected_sums = train_step(expected, {k: v[mask > 0] for k, v in batch.items()})
    state, train_step, _ = build(one_device, model=Linear(), accumulation_steps=parts)
    state, sums = train_step(state, bad | {"mask": mask})
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    assert float(sums["loss"].count) == float(sums["top1"].count) == mask.sum() == 10
    for name in ("loss", "top1", "top5", "gradient_norm"):
        assert float(sums[name].total) == pytest.approx(float(expected_sums[name].total), rel=1e-5)


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_leaves_the_penalty(one_device):
    batch = batches(1)[0]
    plain, train_step, _ = build(one_device)
    plain, _ = train_step(plain, batch)
    state, train_step, _ = build(one_device)
    state, _ = train_step(state, batch | {"mask": np.ones(BATCH, np.float32)})
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    state, train_step, _ = build(one_device, loss=losses.create_loss("softmax"))
    before = jax.device_get(state.params)
    state, sums = train_step(state, batch | {"mask": np.zeros(BATCH, np.float32)})
    assert float(sums["loss"].count) == 0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_frozen_backbone_has_no_gradient(one_device):
    """The classifier is updated as in a whole step, all else stays, and the backbone's backward pass is left out."""
    (batch,), results = batches(1), []
    for frozen in (None, backbone_mask):
        state, train_step, _ = build(one_device, loss=losses.create_loss("softmax"), frozen=frozen)
        given = sharding.global_batch(one_device, batch)
        flops = train_step.lower(state, given).compile().cost_analysis()["flops"]
        before = jax.device_get(state.params)
        results.append((flops, before, jax.device_get(train_step(state, given)[0].params)))
    (whole, _, moved), (half, before, after) = results
    for layer, arrays in after.items():
        expected = moved if layer == "predictions" else before
        jax.tree.map(np.testing.assert_array_equal, arrays, expected[layer])
    assert (after["predictions"]["kernel"] != before["predictions"]["kernel"]).all()
    assert half < 0.6 * whole


# Values that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "rate", "what"), [("sgd", 0.05, "image"), ("adamw", 0.05, "image"), ("sgd", 3e38, "update")]
)
def test_a_step_that_is_not_finite_is_skipped(optimizer, rate, what):
    """Everything but counters is bit for bit as before, and the step after it is as if only counters had moved.

    A NaN in one of 16 images, on one of eight devices, makes loss, gradient and statistics NaN. An update that is too
    long shows in the new weights alone.
    """
    mesh = sharding.create_mesh()
    options = dict(optimizer=optimizer, ema=True, ema_decay=0.9, on_nonfinite="skip")
    state, step, _ = build(mesh, **options)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    first, second, third = (sharding.global_batch(mesh, batch) for batch in batches(3))
    state, sums = step(state, first)
    assert (float(sums["skipped_steps"].total), float(sums["skipped_steps"].count)) == (0, 1)
    before = jax.device_get(state)
    if what == "image":
        images = np.asarray(second["images"], np.float32)
        images[3, 0, 0, 0] = np.nan
        second = sharding.global_batch(mesh, {**batches(2)[1], "images": images})
        after, sums = step(state, second)
    else:
        heavy = losses.create_loss("softmax", weight_decay=1e4)
        after, sums = build(mesh, rate=rate, loss=heavy, **options)[1](state, second)
    assert {name: float(of.count) for name, of in sums.items()} == dict.fromkeys(sums, 0.0) | {"skipped_steps": 1.0}
    assert float(sums["skipped_steps"].total) == 1
    after = jax.device_get(after)
    expected = jax.tree.map(lambda x: x + 1 if np.issubdtype(x.dtype, np.integer) else x, before)
    assert sum(np.issubdtype(x.dtype, np.integer) for x in jax.tree.leaves(before)) >= 2  # the step, and the schedule's
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(new, old, err_msg=str(path))

    went_on, sums = step(jax.device_put(after, shardings), third)
    plain = build(mesh, **options | {"on_nonfinite": "stop"})[1]
    same, stopped_sums = plain(jax.device_put(expected, shardings), third)
    assert "skipped_steps" not in stopped_sums
    assert float(sums["skipped_steps"].total) == 0
    for new, old in zip(jax.tree.leaves(went_on), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(np.asarray(new), np.asarray(old), rtol=1e-5, atol=1e-6)


def test_an_evaluation_of_large_images_is_compiled_with_the_options(one_device):
    """Of a recipe at 128 px, XLA's library has the reductions alone; at 96 px products and convolutions too."""
    fused = {}
    for size in (96, 128):
        config = reading.load("digits:lenet", [f"--config.data.image_size={size}"])
        evaluated = program.create_program(config, one_device, (size, size, 1), num_images=1257)
        shapes = {"images": ((8, size, size, 1), "uint8"), "labels": ((8,), "int32"), "mask": ((8,), "float32")}
        batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        compiled = evaluated.eval_step.lower(evaluated.abstract_state.variables("raw"), batch).compile()
        fused[size] = compiled.as_text().count("ynn_fusion")
    known = ops.compiler_options("cpu", 128, 128) is not None
    assert fused[128] < fused[96] if known else fused[128] == fused[96]
