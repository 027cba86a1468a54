"""The networks as modules of Flax NNX, by its bridge, and under JAX's transformations: the same numbers as without."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from xception_flax import create_model, ops
from xception_flax.models.layers import Conv, SeparableConv, classifier_head, separable_units

STATISTICS = ("batch_stats",)


class Small(nn.Module):
    """All operations that have a gradient rule of their own, in few layers: networks compile longer."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = norm(name="conv1_bn")(Conv(8, strides=(2, 2), name="conv1")(images))
        x = separable_units(x, (8, 16), SeparableConv, norm, name="sepconv", pool_padding="SAME")
        return classifier_head(ops.global_average_pool(x), 3, train=train)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, dict[str, Any], jax.Array]:
    return prepared(Small(), 12)


@pytest.fixture(scope="module", params=["small", "xception"])
def network(request) -> tuple[nn.Module, dict[str, Any], jax.Array]:
    """What the transformations are tried on."""
    if request.param == "small":
        return request.getfixturevalue("small")
    return prepared(create_model("xception", num_classes=3, width=0.02, middle_repeats=0, dropout_rate=0.0), 48)


def prepared(model: nn.Module, size: int) -> tuple[nn.Module, dict[str, Any], jax.Array]:
    """Returns the model, variables with no constant array in them, and 16 images."""
    images = jax.random.normal(jax.random.key(1), (16, size, size, 3))
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, fan_in = path[-1].key, np.prod(leaf.shape[:-1])
        drawn = rng.uniform(0.5, 1.5, leaf.shape) if name in ("scale", "mean", "var") else rng.normal(size=leaf.shape)
        return jnp.asarray(drawn * (2 / fan_in) ** 0.5 if name == "kernel" else drawn, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, variables), images


def assert_equal(found: Any, expected: Any) -> None:
    """Bit for bit, and not because all is 0."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(np.asarray(b))


def assert_close(found: Any, expected: Any, within: float = 1e-5) -> None:
    """But for the order of sums: to `within` of the largest value of an array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=within * np.abs(b).max())


def update(model: nn.Module, variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
    """Returns the variables after a step of gradient descent."""

    def loss(params: Any) -> tuple[jax.Array, dict[str, Any]]:
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=STATISTICS)
        return jnp.sum(jnp.sin(logits)), updates

    grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
    return {"params": jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads), **updates}


def to_nnx(model: nn.Module, variables: dict[str, Any], images: jax.Array) -> nnx.Module:
    """As docs/nnx.md has it."""
    network = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model).lazy_init(images, train=False, rngs=jax.random.key(0)))
    for collection, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
        state = nnx.state(network, kind)
        nnx.replace_by_pure_dict(state, variables[collection])
        nnx.update(network, state)
    return network


def to_linen(network: nnx.Module) -> dict[str, Any]:
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return {collection: nnx.to_pure_dict(nnx.state(network, kind)) for collection, kind in kinds.items()}


def test_the_bridge_changes_no_bit():
    """Xception: weights in and out, logits, and in training logits and statistics.

    In training `nnx.jit` gives another program, with all variables as results, which rounds otherwise. So both are
    compiled by `jax.jit`, from variables to logits and variables.
    """
    fields = dict(num_classes=3, width=0.02, middle_repeats=0, dropout_rate=0.0, bn_decay=0.9)
    model, variables, images = prepared(create_model("xception", **fields), 32)
    network = to_nnx(model, variables, images)
    assert_equal(to_linen(network), variables)
    plain = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert_equal(nnx.jit(lambda n, x: n(x, train=False))(network, images), plain)
    assert_equal(to_linen(network), variables)

    def train(variables: dict[str, Any], images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        logits, updates = model.apply(variables, images, train=True, mutable=STATISTICS)
        return logits, variables | updates

    def train_by_nnx(variables: dict[str, Any], images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        network = to_nnx(model, variables, images)
        return network(images, train=True, mutable=STATISTICS), to_linen(network)

    logits, after = jax.jit(train)(variables, images)
    assert_equal(jax.jit(train_by_nnx)(variables, images), (logits, after))
    assert np.abs(logits - plain).max() > 1e-3
    for old, new in zip(*(jax.tree.leaves(v["batch_stats"]) for v in (variables, after)), strict=True):
        assert np.all(old != new)


def test_a_step_on_nnx_state_is_the_step_on_variables(small):
    """`nnx.grad` with respect to `nnx.Param`; the statistics change on the way."""
    model, variables, images = small
    network = to_nnx(*small)

    @nnx.jit
    def step(network: nnx.Module, images: jax.Array) -> None:
        def loss(network: nnx.Module) -> jax.Array:
            return jnp.sum(jnp.sin(network(images, train=True, mutable=STATISTICS)))

        grads = nnx.grad(loss)(network)
        params = nnx.state(network, nnx.Param)
        nnx.update(network, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads))

    step(network, images)
    assert_close(to_linen(network), jax.jit(partial(update, model))(variables, images))


def test_vmap_over_weights_is_each_network_by_itself(network):
    """An ensemble: logits in inference, and a step of training."""
    model, variables, images = network
    members = [jax.tree.map(lambda leaf, i=i: leaf * (1 + 0.1 * i), variables) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def both(variables: dict[str, Any], images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return model.apply(variables, images, train=False), update(model, variables, images)

    found = jax.jit(jax.vmap(both, in_axes=(0, None)))(stacked, images)
    alone = jax.jit(both)
    assert_close(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(alone(m, images) for m in members)))


def test_donated_variables_are_given_up(network):
    model, variables, images = network
    expected = jax.jit(partial(update, model))(variables, images)
    given = jax.tree.map(jnp.copy, variables)
    assert_equal(jax.jit(partial(update, model), donate_argnums=0)(given, images), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_shard_map_over_images_is_the_whole_batch(network):
    """Two images on each of eight devices: logits, and gradients, which `shard_map` adds up."""
    model, variables, images = network
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def logits(params: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables | {"params": params}, images, train=False)

    specs = dict(in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data"))
    sharded = jax.shard_map(logits, mesh=mesh, **specs)

    def both(logits: Callable[..., jax.Array]) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            found = logits(params, images)
            return jnp.sum(jnp.sin(found)), found

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    found = both(sharded)
    assert len(found[1].sharding.device_set) == 8
    assert_close(found, both(logits), within=1e-5 if isinstance(model, Small) else 1e-4)


def test_gradients_inside_shard_map_come_summed(network):
    """As docs/nnx.md has it: where the parameters are replicated, a sum over the devices would count it eight times."""
    model, variables, images = network
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(model.apply(variables, images, train=False)))

    specs = dict(in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec())
    sharded = jax.shard_map(jax.grad(loss), mesh=mesh, **specs)
    expected = jax.jit(jax.grad(loss))(variables, images)
    assert_close(jax.jit(sharded)(variables, images), expected, within=1e-5 if isinstance(model, Small) else 1e-4)


def test_checkpoint_changes_no_gradient(network):
    """`jax.checkpoint` around the whole network computes it twice: twice the convolutions of the forward pass."""
    model, variables, images = network

    def gradients(wrap: Callable[..., Any]) -> Callable[..., Any]:
        def logits(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            return model.apply(variables | {"params": params}, images, train=True, mutable=STATISTICS)

        def loss(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            found, updates = wrap(logits)(params)
            return jnp.sum(jnp.sin(found)), updates

        return jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"])

    plain, twice = gradients(lambda function: function), gradients(jax.checkpoint)
    assert twice.as_text().count("optimization_barrier") > plain.as_text().count("optimization_barrier")
    assert_close(twice.compile()(variables["params"]), plain.compile()(variables["params"]))
