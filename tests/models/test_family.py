"""Every network of the family in the sharded training step: 8 devices equal 1."""

import jax
import numpy as np
import pytest

from xception_flax import MODELS, create_model
from xception_flax.training import losses, sharding, steps
from xception_flax.training.metrics import create_metrics
from xception_flax.training.optimizers import create_optimizer
from xception_flax.training.state import make_init

CLASSES, BATCH, STEPS = 5, 16, 2

# The narrowest of each. Those that differ only in depth are left out. Xception itself is in test_steps.py, with more
# steps.
FAMILY = {
    "xception_towers": dict(width=0.07, middle_repeats=0, towers=3, mid_activation="relu"),
    "inception_v3": dict(width=0.02),
    "xception41": dict(width=0.02, middle_repeats=0),
    "xception41p": dict(width=0.02, middle_repeats=0),
    "lenet": dict(width=0.25),
}
OTHER_DEPTHS = {"xception65", "xception71", "xception65p"}


def test_the_family_is_complete():
    assert {"xception", *FAMILY, *OTHER_DEPTHS} == set(MODELS), "add a row to FAMILY, or take one away"


@pytest.mark.parametrize("name", FAMILY)
def test_eight_devices_equal_one(monkeypatch, one_device, name):
    """Two steps with momentum, data and fsdp at once, float64: losses to 1e-6, all state to 1e-7 of its largest."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)  # a narrow network has no large arrays
    # Dropout is tested in test_steps.py.
    fields = dict(num_classes=CLASSES, dropout_rate=0.0, dtype="float64", param_dtype="float64", **FAMILY[name])
    model = create_model(name, **fields)
    size = 75 if name == "inception_v3" else 32
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        """An initial state without compiling the initialization, which test_steps.py tests."""
        field, name = path[0].name, getattr(path[-1], "key", "")
        if field == "params" and name == "kernel":
            return rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
        return np.full(leaf.shape, float(field != "opt_state" and name in ("scale", "var")), leaf.dtype)

    batches = [
        {
            "images": rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8),
            "labels": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        }
        for _ in range(STEPS)
    ]
    with jax.enable_x64(True):
        runs, initial = [], None
        for mesh in (one_device, sharding.create_mesh(data=2, fsdp=4)):
            tx, _ = create_optimizer("sgd", 0.01, schedule=lambda step: 1.0)
            _, abstract = make_init(model, tx, (size, size, 3), mesh, ema=False)
            initial = jax.tree_util.tree_map_with_path(draw, abstract) if initial is None else initial
            state = jax.device_put(initial, jax.tree.map(lambda leaf: leaf.sharding, abstract))
            train_step = steps.make_train_step(
                model,
                tx,
                losses.create_loss("softmax", weight_decay=1e-3),
                create_metrics("single_label"),
                steps.create_normalizer((127.5,), (127.5,)),
                abstract,
                mesh,
                seed=0,
            )
            curve = []
            for batch in batches:
                state, sums = train_step(state, sharding.global_batch(mesh, batch))
                curve.append(float(sums["loss"].total / sums["loss"].count))
            runs.append((jax.device_get(state), curve))

    assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(abstract.params))
    (expected_state, expected_curve), (state, curve) = runs
    np.testing.assert_allclose(curve, expected_curve, rtol=1e-6)
    assert curve[0] != curve[1]
    for (path, a), b, start in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(expected_state),
        jax.tree.leaves(initial),
        strict=True,
    ):
        assert np.abs(a - b).max() <= 1e-7 * max(np.abs(b).max(), 1e-3), jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (start.dtype, start.shape), jax.tree_util.keystr(path)
        assert np.abs(a - start).max() > 0, jax.tree_util.keystr(path)  # every array has moved
