"""The depthwise convolutions for GPUs, on CPUs (Triton's kernels interpreted): values and gradients are XLA's own."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax import gpu, ops, sharding
from xception_flax.hlo import Hlo

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def assert_equals_stock(rng, function, shape, kernel_shape, dtype, **options):
    """Value and both gradients against XLA's of the same numbers in float32; bfloat16 to half its spacing, 1 in 256."""
    x, kernel = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=kernel_shape), dtype)
    assert_equal(rng, function, partial(ops.depthwise_by_groups, **options), x, kernel)


def assert_equal(rng, function, exact_function, *operands):
    exact_operands = [operand.astype(jnp.float32) for operand in operands]
    expected, exact_pullback = jax.vjp(exact_function, *exact_operands)
    y, pullback = jax.vjp(function, *operands)
    cotangent = jnp.asarray(rng.normal(size=y.shape), y.dtype)
    results, exacts = pullback(cotangent), exact_pullback(cotangent.astype(jnp.float32))
    for like, ours, exact in zip((y, *operands), (y, *results), (expected, *exacts), strict=True):
        assert ours.dtype == like.dtype
        tolerance = 1e-5 if ours.dtype == jnp.float32 else 1 / 256
        atol = 1e-5 * np.abs(exact).max()
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, rtol=tolerance, atol=atol)


@DTYPES
@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize(
    ("strides", "dilation"), [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 2), (1, 1)), ((1, 1), (2, 3)), ((2, 3), (2, 1))]
)
@pytest.mark.parametrize("window", [(3, 3), (3, 2)])
def test_shifts(rng, dtype, padding, strides, dilation, window):
    # With a multiplier the gradient of x in bfloat16 is the sum of so many roundings.
    kernel_shape = (*window, 1, 8 if dtype == "float32" else 4)
    options = dict(strides=strides, padding=padding, dilation=dilation)
    function = partial(ops.depthwise_by_fusions, **options)
    assert_equals_stock(rng, function, (2, 11, 10, 4), kernel_shape, dtype, **options)


SAME = dict(strides=(1, 1), padding="SAME", dilation=(1, 1))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 19, 19, 24), (3, 10, 5, 8), (1, 3, 9, 130), (2, 1, 1, 3), (1, 5, 17, 1)])
def test_kernels(rng, dtype, shape):
    """Heights, widths and channels that are no multiples of a tile."""
    function = partial(gpu.depthwise, interpret=True)
    assert_equals_stock(rng, function, shape, (3, 3, 1, shape[-1]), dtype, **SAME)


@DTYPES
@pytest.mark.parametrize("relu", [True, False])
def test_kernels_with_a_normalization(rng, dtype, relu):
    """The padding is zeros after the normalization, and what is not within the image has no share in the sums."""
    x, kernel = jnp.asarray(rng.normal(size=(3, 5, 7, 6)), dtype), jnp.asarray(rng.normal(size=(3, 3, 1, 6)), dtype)
    affine = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)

    def one_by_one(x, kernel, affine):
        z = x * affine[0] + affine[1]
        return ops.depthwise_by_groups(jax.nn.relu(z) if relu else z, kernel, **SAME)

    assert_equal(rng, lambda *operands: gpu.depthwise(*operands, relu, True), one_by_one, x, kernel, affine)


def test_strips_of_rows_are_those_of_an_image(rng, monkeypatch):
    """One program with all ten tiles of rows, and three with four, of which the last has but two within the image."""
    for strips in (1, 5):
        monkeypatch.setattr(gpu, "BACKWARD", gpu.BACKWARD._replace(strips=strips))
        function = partial(gpu.depthwise, interpret=True)
        assert_equals_stock(rng, function, (2, 19, 6, 8), (3, 3, 1, 8), "float32", **SAME)


@DTYPES
def test_moments_by_one_reduction(rng, dtype):
    assert_equal(rng, ops._moments_at_once, ops._moments, jnp.asarray(rng.normal(size=(3, 5, 7, 6)), dtype))


@DTYPES
@pytest.mark.parametrize("shape", [(128, 6, 9, 2), (128, 5, 9, 2), (3, 5, 9, 2)], ids=["parts", "prime", "few images"])
def test_products_by_parts(rng, dtype, shape):
    kernel = jnp.asarray(rng.normal(size=(2, 3)), dtype)
    assert_equal(rng, ops._product_by_parts, ops._product, jnp.asarray(rng.normal(size=shape), dtype), kernel)


def test_kernels_over_a_mesh(rng, monkeypatch):
    """Each device computes its images; nothing but the gradients of what all have is sent, once."""
    shapes = []

    def interpreted(x, kernel, affine, relu):
        shapes.append(x.shape)
        return gpu.depthwise(x, kernel, affine, relu, interpret=True)

    monkeypatch.setattr(ops, "gpu", SimpleNamespace(fits=gpu.fits, depthwise=interpreted))
    mesh = sharding.create_mesh(data=4, fsdp=2)
    x, kernel = rng.normal(size=(16, 7, 7, 4)).astype(np.float32), rng.normal(size=(3, 3, 1, 4)).astype(np.float32)

    arguments = (rng.normal(size=(2, 4)).astype(np.float32), kernel, x)

    def gradient(function):
        def loss(affine, kernel, x):
            return jnp.sum(jnp.sin(function(x, affine, kernel, relu=True, dilation=(1, 1))))

        return jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=shardings)

    shardings = (sharding.replicated(mesh), sharding.replicated(mesh), sharding.batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = gradient(ops._normalized_by_triton).lower(*arguments).compile()
        expected = gradient(ops._normalized_by_groups)(*arguments)
    assert set(shapes) == {(2, 7, 7, 4)}
    assert [c.kind for c in Hlo(compiled.as_text()).collectives()] == ["all-reduce"]
    for ours, theirs in zip(compiled(*arguments), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "options", "used"),
    [
        ("triton", {}, "depthwise_forward"),
        ("triton", {"strides": (2, 2)}, "stablehlo.pad"),
        ("triton", {"dilation": (2, 2)}, "stablehlo.pad"),
        ("shifts", {}, "stablehlo.pad"),
        ("platform", {}, "feature_group_count = 4"),
    ],
)
def test_what_is_lowered_for_gpus(name, options, used):
    x, kernel = jnp.zeros((8, 8, 8, 4), jnp.bfloat16), jnp.zeros((3, 3, 1, 4), jnp.bfloat16)
    with ops.lowering(name):
        traced = jax.jit(partial(ops.depthwise_convolution, **options)).trace(x, kernel)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu", "cpu")}
    found = [
        mark for mark in ("depthwise_forward", "stablehlo.pad", "feature_group_count = 4") if mark in texts["cuda"]
    ]
    assert found == [used]
    assert "feature_group_count = 4" in texts["tpu"]
    assert "depthwise_forward" not in texts["cpu"]


@pytest.mark.parametrize("name", ops.LOWERINGS)
def test_strided_products_keep_the_slice_apart_on_gpus(name):
    """XLA for GPUs aborts the process where it fuses the two: openxla/xla issue 47381, in any evaluation at 299 px."""
    with ops.lowering(name):
        traced = jax.jit(partial(ops.pointwise_convolution, strides=(2, 2))).trace(
            jnp.zeros((2, 7, 7, 4)), jnp.zeros((1, 1, 4, 8))
        )
    barrier = {
        platform: "optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "tpu", "cpu")
    }
    assert barrier == {"cuda": True, "tpu": False, "cpu": False}
