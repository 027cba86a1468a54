"""What the probe says of a step, against JAX's own gradients and Flax's own intermediates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from xception_flax import models
from xception_flax.models.costs import list_layers
from xception_flax.training import losses, probing, sharding, steps
from xception_flax.training.state import TrainState

SHAPE = (32, 32, 3)


def network(**fields):
    return models.create_model("xception", num_classes=4, width=0.02, middle_repeats=0, dropout_rate=0.0, **fields)


@pytest.fixture(scope="module")
def state() -> TrainState:
    variables = jax.jit(network().init, static_argnames="train")(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    return TrainState(jnp.int32(3), variables["params"], variables["batch_stats"], ())


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.float32([1, 1, 0, 1, 1, 1, 1, 1])
    return {"images": rng.integers(0, 256, (8, *SHAPE), np.uint8), "labels": np.int32([0, 1, 2, 3] * 2), "mask": mask}


def probe(model, mesh, *, parts: int = 1, normalize=lambda x: x.astype(jnp.float32) / 255):
    options = dict(accumulation_steps=parts, lowering="platform", seed=0, mix=None, frozen=None)
    return probing.make_probe(model, losses.create_loss("softmax"), normalize, mesh, **options)


def values(x) -> probing.Values:
    x = np.asarray(x, np.float64)
    finite = x[np.isfinite(x)]
    return probing.Values(np.sqrt((finite**2).sum()), finite.min(), finite.max(), int((~np.isfinite(x)).sum()))


def test_it_says_what_jax_and_flax_say(state, batch, one_device):
    """Outputs as by `capture_intermediates`; the layers of `costs.list_layers`, in their order, and the blocks.

    Also where the network would compute blocks again to save memory.
    """
    model, mask = network(), batch["mask"]
    found = probe(network(remat=True), one_device)(state, sharding.global_batch(one_device, batch))
    names = [layer.name for layer in found.layers]
    assert [name for name in names if not name.startswith("block") or "_" in name] == [
        "/".join(layer.path) for layer in list_layers(model, SHAPE)
    ]
    assert [name for name in names if name.startswith("block") and "_" not in name] == [
        "block2",
        "block3",
        "block4",
        "block5",
    ]

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, kept = model.apply(
            variables,
            batch["images"] / np.float32(255),
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )
        each = -jax.nn.log_softmax(logits)[jnp.arange(8), batch["labels"]]
        return (each * mask).sum() / mask.sum(), (logits, each, kept["intermediates"])

    (mean, (logits, each, kept)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    assert found.loss == pytest.approx(float(mean), rel=1e-5)
    np.testing.assert_allclose(found.losses, each, rtol=1e-4)
    outputs = {path[:-1]: value[0] for path, value in flatten_dict(kept).items() if path[-1] == "__call__"}
    of_layers = flatten_dict(grads)
    close = dict(rtol=2e-3, atol=1e-4)
    for layer in found.layers:
        path = tuple(layer.name.split("/"))
        if path in outputs:
            np.testing.assert_allclose(layer.output, values(outputs[path]), **close, err_msg=layer.name)
        own = [g for place, g in of_layers.items() if place[:-1] == path]
        assert (layer.weight_gradient is None) == (not own)
        if own:
            np.testing.assert_allclose(
                layer.weight_gradient, values(np.concatenate([np.ravel(g) for g in own])), **close, err_msg=layer.name
            )
    last = found.layers[-1]
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(batch["labels"], 4)) * mask[:, None] / mask.sum()
    np.testing.assert_allclose(last.output_gradient, values(expected), rtol=1e-4, atol=1e-6)


def test_parts_and_devices_change_nothing_but_rounding(batch, one_device):
    """Without batch normalization a batch in parts is the batch; images are told apart on any number of devices."""
    model = models.create_model("lenet", num_classes=4, width=0.25)
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    state = TrainState(jnp.int32(3), variables["params"], {}, ())
    images = np.float32(batch["images"])
    images[5, 1, 2, 0] = np.inf
    bad = batch | {"images": images}
    mesh = sharding.create_mesh(data=4, devices=jax.devices()[:4])
    expected = probe(model, one_device)(state, sharding.global_batch(one_device, bad))
    state = jax.device_put(state, sharding.replicated(mesh))
    found = probe(model, mesh, parts=2)(state, sharding.global_batch(mesh, bad))
    assert found.pixels.tolist() == [row != 5 for row in range(8)]
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)
    for one, other in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(one.images, np.arange(8) == 5)
        np.testing.assert_allclose(one.output, other.output, rtol=1e-3, atol=1e-4)
        assert one.output.not_finite == other.output.not_finite > 0


def test_numbers_of_arrays():
    """The square of a large number does not overflow, and a count is exact beyond the whole numbers of float32."""
    x = jnp.float32([[3e30, np.nan], [-4e30, np.inf]])
    measured = probing._values([np.asarray(probing._measure(x))])
    np.testing.assert_allclose(measured, (5e30, -4e30, 3e30, 2), rtol=1e-6)
    none = jnp.full((2**12, 2**12 + 1), np.nan, jnp.float16)
    measured = probing._values([np.asarray(probing._measure(none)), np.asarray(probing._measure(x))])
    assert measured.not_finite == 2**24 + 2**12 + 2
    assert measured.norm == pytest.approx(5e30)
    assert probing._values([np.asarray(probing._measure(jnp.zeros(3)))]) == (0, 0, 0, 0)


def test_parts_come_back_in_order(one_device):
    rows = {"x": jnp.arange(12)}
    parts = jax.jit(lambda batch: steps.split(batch, 3, one_device))(rows)["x"]
    assert parts.shape == (3, 4)
    assert probing._in_order(np.asarray(parts)).tolist() == list(range(12))
