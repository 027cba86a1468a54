"""Schedules against the paper's formulas, optimizers against traces written by hand, and one contract for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xception_flax.text.errors import UserError
from xception_flax.training.length import RunLength
from xception_flax.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    create_optimizer,
    create_schedule,
    decay_mask,
    factors_of,
)

IMAGENET = RunLength(batch_size=1536, num_images=1_281_167, total_steps=83_409)


def constant(step):
    return jnp.ones(())


def test_imagenet_schedule_is_the_papers():
    """Section 4.2: 0.045, times 0.94 every 2 epochs."""
    schedule = create_schedule("exponential", run=IMAGENET, decay_rate=0.94, every_epochs=2.0)
    _, rate = create_optimizer("sgd", 0.045, schedule=schedule)
    for epoch in (0.0, 0.5, 1.99, 2.01, 3.99, 4.01, 50.5, 99.9):
        step = int(epoch * IMAGENET.num_images / IMAGENET.batch_size)
        assert float(rate(step)) == pytest.approx(0.045 * 0.94 ** (epoch // 2), rel=1e-5)


def test_jft_schedule_counts_samples():
    """Section 4.2: 0.001, times 0.9 every 3,000,000 samples; the batch size does not matter."""
    for batch_size in (500, 1536, 4096):
        run = RunLength(batch_size, num_images=350_000_000, total_steps=10**6)
        schedule = create_schedule("exponential", run=run, decay_rate=0.9, every_images=3_000_000)
        _, rate = create_optimizer("rmsprop", 0.001, schedule=schedule)
        for samples in (0, 2_990_000, 3_010_000, 8_990_000, 9_010_000, 150_010_000):
            expected = 0.001 * 0.9 ** (samples // 3_000_000)
            assert float(rate(samples // batch_size)) == pytest.approx(expected, rel=1e-4)


def test_staircase_falls_exactly_at_each_interval():
    """At every step of 40 whole intervals, compiled: rounding makes no interval begin early or late."""
    run = RunLength(batch_size=10, num_images=30, total_steps=1000)
    schedule = create_schedule("exponential", run=run, decay_rate=0.5, every_epochs=1.0)
    factors = jax.jit(jax.vmap(schedule))(jnp.arange(120))
    np.testing.assert_array_equal(factors, np.float32(0.5) ** (np.arange(120) // 3))


def test_smooth_exponential():
    run = RunLength(batch_size=10, num_images=40, total_steps=1000)
    schedule = create_schedule("exponential", run=run, decay_rate=0.5, every_epochs=1.0, staircase=False)
    assert float(schedule(2)) == pytest.approx(0.5**0.5, rel=1e-6)


def test_cosine_with_warmup():
    run = RunLength(batch_size=10, num_images=100, total_steps=100)
    schedule = create_schedule("cosine", run=run, warmup_epochs=2.0, final_factor=0.1)
    assert float(schedule(0)) == 0
    assert float(schedule(10)) == pytest.approx(0.5)
    assert float(schedule(20)) == 1
    assert float(schedule(60)) == pytest.approx(0.55, rel=1e-5)  # half-way: mean of 1 and 0.1
    assert float(schedule(100)) == pytest.approx(0.1, rel=1e-5)
    no_warmup = create_schedule("cosine", run=run)
    assert float(no_warmup(0)) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exponental", {}, "unknown schedule 'exponental'; did you mean 'exponential'"),
        ("exponential", {"decay_rate": 0.9}, "exactly one of every_epochs and every_images"),
        ("exponential", {"decay_rate": 0.9, "every_epochs": 1.0, "every_images": 3}, "exactly one"),
        ("exponential", {"decay_rate": 0.9, "every_images": 0}, "schedule.every_images must be at least 1, got 0"),
        ("cosine", {"warmup_epochs": 10.0}, "10 are 100 steps, but the whole run has 100"),
    ],
)
def test_bad_schedules_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        create_schedule(name, run=RunLength(10, 100, 100), **options)


def run_optimizer(tx, gradients: np.ndarray, start: np.ndarray) -> np.ndarray:
    params = {"kernel": jnp.asarray(start)}
    state, trace = tx.init(params), []
    for g in gradients:
        updates, state = tx.update({"kernel": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        trace.append(np.asarray(params["kernel"]))
    return np.stack(trace)


@pytest.fixture
def problem(rng):
    return rng.normal(0, 2, (20, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)


def test_rmsprop_is_tf1s(problem):
    """20 steps of tf.train.RMSPropOptimizer: accumulator from 1, epsilon in the root, rate inside the momentum."""
    gradients, p = problem
    decay, momentum, epsilon = 0.9, 0.9, 1.0
    expected, s, m = [], np.ones(5), np.zeros(5)
    w = p.astype(np.float64)
    for t, g in enumerate(gradients.astype(np.float64)):
        s = decay * s + (1 - decay) * g**2
        m = momentum * m + 0.001 * 0.9 ** (t // 7) * g / np.sqrt(s + epsilon)
        w = w - m
        expected.append(w)
    schedule = create_schedule("exponential", run=RunLength(1, 1, 20), decay_rate=0.9, every_images=7)
    tx, _ = create_optimizer("rmsprop", 0.001, schedule=schedule, decay=decay, momentum=momentum, epsilon=epsilon)
    np.testing.assert_allclose(run_optimizer(tx, gradients, p), expected, rtol=1e-5)


def test_sgd_is_tf1s_momentum(problem):
    """20 steps of tf.train.MomentumOptimizer: m = momentum * m + g; p -= rate * m."""
    gradients, p = problem
    expected, m, w = [], np.zeros(5), p.astype(np.float64)
    for t, g in enumerate(gradients.astype(np.float64)):
        m = 0.9 * m + g
        w = w - 0.045 * 0.94 ** (t // 6) * m
        expected.append(w)
    schedule = create_schedule("exponential", run=RunLength(1, 3, 20), decay_rate=0.94, every_epochs=2.0)
    tx, _ = create_optimizer("sgd", 0.045, schedule=schedule)
    np.testing.assert_allclose(run_optimizer(tx, gradients, p), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decoupled_decay_shrinks_by_rate_times_decay(name):
    """Without a gradient, each step multiplies a kernel by (1 - rate * decay), whatever the momentum."""
    tx, _ = create_optimizer(name, 0.1, schedule=constant, decoupled_weight_decay=0.5)
    trace = run_optimizer(tx, np.zeros((3, 2), np.float32), np.ones(2, np.float32))
    np.testing.assert_allclose(trace[:, 0], [0.95, 0.95**2, 0.95**3], rtol=1e-6)


def test_decay_mask_is_kernels_only():
    params = {"block1_conv1": {"kernel": 1.0}, "block1_conv1_bn": {"scale": 1.0, "bias": 1.0}}
    assert decay_mask(params) == {"block1_conv1": {"kernel": True}, "block1_conv1_bn": {"scale": False, "bias": False}}


def test_clipping_shortens_the_whole_gradient():
    tx, _ = create_optimizer("sgd", 1.0, schedule=constant, momentum=0.0, clip_norm=1.0)
    params = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}
    updates, _ = tx.update({"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}, tx.init(params), params)
    assert (float(updates["kernel"][0]), float(updates["bias"][0])) == pytest.approx((-0.6, -0.8))
    with pytest.raises(UserError, match=r"clip_norm \(None: no clipping\) must be positive, got 0.0"):
        create_optimizer("sgd", 1.0, schedule=constant, clip_norm=0.0)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw"])
def test_a_backbone_factor_is_one_of_the_learning_rate(name):
    """After ten steps the classifier is as without the factor, and the backbone as with that learning rate.

    With a factor of 0 the backbone stays as it is, bit for bit.
    """
    decay = {} if name == "rmsprop" else {"decoupled_weight_decay": 0.1}
    gradients = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float32)

    def run(rate, **options):
        tx, _ = create_optimizer(name, rate, schedule=constant, **decay, **options)
        params = {layer: {"kernel": jnp.arange(1.0, 4.0)} for layer in ("block1_conv1", "predictions")}
        state = tx.init(params)
        for g in gradients:
            grads = {"block1_conv1": {"kernel": g[0]}, "predictions": {"kernel": g[1]}}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["block1_conv1"]["kernel"], params["predictions"]["kernel"]

    (_, fast), (slow, _), (backbone, classifier) = run(0.01), run(0.002), run(0.01, backbone_factor=0.2)
    np.testing.assert_allclose(backbone, slow, rtol=1e-6)
    np.testing.assert_array_equal(classifier, fast)
    np.testing.assert_array_equal(run(0.01, backbone_factor=0.0)[0], [1, 2, 3])
    with pytest.raises(UserError, match=r"backbone_factor must be 0 or positive, got -1"):
        run(0.01, backbone_factor=-1)


def test_layers_have_factors_of_their_own():
    """The first pattern that fits counts, then `backbone_factor`; a factor scales the whole update, 0 freezes."""
    names = ("block1_conv1", "block13_sepconv1", "block14_sepconv2_bn", "block2_sepconv1", "fc1", "predictions")
    params = {name: {"kernel": jnp.ones(2), "bias": jnp.ones(1)} for name in names}

    def factors(rules, backbone_factor=0.5):
        found = factors_of(params, backbone_factor, rules)
        assert all(arrays["kernel"] == arrays["bias"] for arrays in found.values())
        return [found[name]["kernel"] for name in names]

    assert factors("") == [0.5, 0.5, 0.5, 0.5, 1, 1]
    assert factors("block1[34]_: 0.1; block: 0") == [0, 0.1, 0.1, 0, 1, 1]
    assert factors("block1_:0") == [0, 0.5, 0.5, 0.5, 1, 1]
    assert factors("fc: 2 ; .*_bn:3", 0.0) == [0, 0, 3, 0, 2, 1]
    assert factors("(?i)BLOCK(?:1|2)_: 1e-3", 1.0) == [1e-3, 1, 1, 1e-3, 1, 1]

    def update(**options):
        tx, _ = create_optimizer("sgd", 0.1, schedule=constant, decoupled_weight_decay=0.01, **options)
        return tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]

    plain, scaled = update(), update(layer_factors="block1[34]_: 0.25; block: 0")
    for name, factor in zip(names, (0, 0.25, 0.25, 0, 1, 1), strict=True):
        np.testing.assert_array_equal(scaled[name]["kernel"], factor * plain[name]["kernel"])
    for rules, message in [
        (
            "block",
            r"must be PATTERN: NUMBER; PATTERN: NUMBER; ..., such as 'block1\[34\]_: 0.1; block: 0', got 'block'",
        ),
        ("block: x", "must be PATTERN: NUMBER"),
        (": 1", "must be PATTERN: NUMBER"),
        ("block: 1;", "must be PATTERN: NUMBER"),
        ("block: -1", "each number, must be 0 or positive, got -1"),
        ("block: inf", "each number, must be"),
        ("block(: 1", r"'block\(' is no regular expression: missing \)"),
    ]:
        with pytest.raises(UserError, match=message):
            create_optimizer("sgd", 0.1, schedule=constant, layer_factors=rules)
    with pytest.raises(
        UserError, match="no layer begins with 'conv'; layers are block13_sepconv1, block14_sepconv2_bn"
    ):
        factors("conv: 1")


RATES = {"sgd": 0.02, "rmsprop": 0.05, "adamw": 0.1}


def test_the_contract_covers_every_optimizer():
    assert set(RATES) == set(OPTIMIZERS)
    assert set(SCHEDULES) == {"constant", "exponential", "cosine"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contract(name):
    """Every optimizer minimises a quadratic, and goes on from a state that was copied to the host and back."""
    tx, _ = create_optimizer(name, RATES[name], schedule=constant)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.sum((p["kernel"] - 1.0) ** 2 * jnp.array([1.0, 4.0])))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = {"kernel": jnp.array([3.0, -2.0])}
    state, losses = tx.init(params), []
    for t in range(200):
        if t == 100:
            params, state = jax.tree.map(jnp.array, jax.device_get((params, state)))
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] == 40
    assert losses[-1] < 1e-2
