"""The kernels for TPUs, interpreted: values and gradients are those of the separate operations."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from xception_flax import create_model
from xception_flax.models import ops
from xception_flax.models.ops import lowerings, tpu
from xception_flax.training import sharding


def arguments(dtype, shape=(32, 5, 6, 24), features=40):
    n, height, width, channels = shape
    keys = jax.random.split(jax.random.key(0), 7)
    x = jax.random.normal(keys[0], shape, dtype)
    scale, shift = (jax.random.normal(key, (channels,)) for key in keys[1:3])
    depthwise = jax.random.normal(keys[3], (3, 3, 1, channels), dtype) / 3
    pointwise = jax.random.normal(keys[4], (1, 1, channels, features), dtype) / channels**0.5
    cotangent = jax.random.normal(keys[5], (n, height, width, features), dtype)
    moments_cotangent = jax.random.normal(keys[6], (2, features)) * n * height * width
    return (x, scale, shift, depthwise, pointwise), (cotangent, moments_cotangent)


def fused_moments(*arguments, relu):
    y, sums = tpu.separable(*arguments, relu, True)
    return y, jnp.sum(sums, axis=0) / (y.size // y.shape[-1])


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("shape", [(32, 5, 6, 24), (16, 1, 1, 8), (16, 2, 3, 8)], ids=str)
def test_fused_separable_has_the_values_and_gradients_of_its_parts(dtype, tolerance, relu, shape):
    primals, cotangents = arguments(dtype, shape)
    result, pullback = jax.vjp(partial(fused_moments, relu=relu), *primals)
    expected, expected_pullback = jax.vjp(partial(ops.normalized_separable_convolution, relu=relu), *primals)
    for ours, theirs in zip((*result, *pullback(cotangents)), (*expected, *expected_pullback(cotangents)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("shape", "features", "fits"),
    [
        ((128, 147, 147, 128), 128, True),
        ((128, 19, 19, 728), 728, True),
        ((128, 10, 10, 1536), 2048, True),
        ((128, 147, 147, 64), 128, False),  # half of each row of lanes would be padding
        ((120, 19, 19, 728), 728, False),  # no multiple of sixteen images
        ((128, 1200, 1200, 728), 728, False),  # rows too long for the chip's memory
    ],
)
def test_fits(shape, features, fits):
    assert tpu.fits(shape, features, 2) == fits


def test_kernels_are_lowered_for_tpus_without_one():
    primals, _ = arguments(jnp.bfloat16, (16, 19, 19, 128), 256)
    step = jax.grad(lambda *primals: tpu.separable(*primals, True)[0].astype(jnp.float32).sum(), argnums=(0, 3, 4))
    text = jax.export.export(jax.jit(step), platforms=["tpu"])(*primals).mlir_module()
    assert "forward_kernel" in text
    assert "backward_kernel" in text


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernels interpreted, on any mesh and for any shape; returns the shapes of their inputs."""
    shapes = []

    def separable(*arguments, relu=None, kernels=tpu.separable):
        if relu is not None:  # called by `ops`, not by its own rule for the gradient
            shapes.append(arguments[0].shape)
            arguments = *arguments, relu, True
        return kernels(*arguments)

    monkeypatch.setattr(tpu, "is_on_tpus", lambda mesh: not mesh.empty)
    monkeypatch.setattr(tpu, "fits", lambda *_: True)
    monkeypatch.setattr(tpu, "separable", separable)
    return shapes


@pytest.fixture
def four_devices():
    return jax.make_mesh((2, 2), ("data", "fsdp"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)


def test_fused_separable_over_a_mesh_has_the_values_and_gradients_of_one_device(interpreted, four_devices):
    primals, cotangents = arguments(jnp.float32, (64, 3, 4, 8), 16)

    def result_and_gradients(primals):
        result, pullback = jax.vjp(ops.normalized_separable_convolution, *primals)
        return *result, *pullback(cotangents)

    expected = result_and_gradients(primals)
    everywhere = jax.device_put(primals, sharding.replicated(four_devices))
    with ops.lowering("fused"), jax.sharding.use_abstract_mesh(four_devices.abstract_mesh):
        result = jax.jit(lambda primals: result_and_gradients(primals))(everywhere)
    assert set(interpreted) == {(16, 3, 4, 8)}
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


def test_a_program_says_which_layers_are_fused(interpreted, four_devices):
    model = create_model("xception", num_classes=5, width=0.02, middle_repeats=0, dropout_rate=0.0)
    images = jax.ShapeDtypeStruct((64, 35, 35, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    step = jax.jit(lambda variables, images: model.apply(variables, images, train=True, mutable="batch_stats"))
    with ops.lowering("fused"), jax.sharding.use_abstract_mesh(four_devices.abstract_mesh):
        names = re.findall(r'loc\("([^"]+)"', step.lower(variables, images).as_text(debug_info=True))
    sepconvs = {name for name in variables["params"] if "sepconv" in name and not name.endswith("_bn")}
    assert len(sepconvs) == 10
    assert set(map(ops.fused_layer, names)) == sepconvs | {None}


def test_a_network_with_fused_lowering_is_the_same_network(monkeypatch, interpreted, four_devices):
    """Loss, gradients and statistics of a narrow Xception in training; float32 rounding moves a ReLU here and there."""
    model = create_model("xception", num_classes=5, width=0.02, middle_repeats=0, dropout_rate=0.0)
    images = jax.random.normal(jax.random.key(0), (64, 35, 35, 3))
    variables = jax.jit(lambda: model.init(jax.random.key(1), images[:1], train=False))()

    def loss(params):
        stats = variables["batch_stats"]
        logits, updates = model.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable="batch_stats"
        )
        return jnp.sum(jnp.square(logits)), updates["batch_stats"]

    results, params = [], jax.device_put(variables["params"], sharding.replicated(four_devices))
    for name, has_triton in (("platform", False), ("fused", False), ("platform", True)):
        monkeypatch.setattr(lowerings, "has_triton", lambda has_triton=has_triton: has_triton)
        with ops.lowering(name), jax.sharding.use_abstract_mesh(four_devices.abstract_mesh):
            results.append(jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(params))
    assert len(interpreted) == 10  # separable convolutions: 6 of the entry flow, 4 of the exit flow
    plain, *others = (jax.tree_util.tree_leaves_with_path(result) for result in results)
    # A bias that the next normalization cancels has only rounding as gradient, so errors are relative to others.
    least = 1e-2 * max(np.linalg.norm(theirs) for _, theirs in plain)
    for (path, theirs), *leaves in zip(plain, *others, strict=True):
        for _, ours in leaves:
            difference = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), least)
            assert difference < 1e-3, (jax.tree_util.keystr(path), difference)
