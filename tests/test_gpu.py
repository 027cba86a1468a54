"""The depthwise convolutions for GPUs, on CPUs (Triton's kernels interpreted): values and gradients are XLA's own."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax import gpu, ops, sharding
from xception_flax.hlo import Collective, Hlo

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def assert_equals_stock(rng, function, shape, kernel_shape, dtype, **options):
    """Value and both gradients against XLA's of the same numbers in float32; bfloat16 to half its spacing, 1 in 256."""
    stock = partial(ops.depthwise_by_groups, **options)
    x, kernel = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=kernel_shape), dtype)
    cotangent = jnp.asarray(rng.normal(size=jax.eval_shape(stock, x, kernel).shape), dtype)
    y, pullback = jax.vjp(function, x, kernel)
    expected, exact_pullback = jax.vjp(stock, x.astype(jnp.float32), kernel.astype(jnp.float32))
    tolerance = 1e-5 if dtype == "float32" else 1 / 256
    for ours, exact in zip(
        (y, *pullback(cotangent)), (expected, *exact_pullback(cotangent.astype(jnp.float32))), strict=True
    ):
        assert ours.dtype == dtype
        ours = np.asarray(ours, np.float32)
        np.testing.assert_allclose(ours, exact, rtol=tolerance, atol=1e-5 * np.abs(exact).max())


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


def test_strips_of_rows_are_those_of_an_image(rng, monkeypatch):
    """One program with all ten tiles of rows, and three with four, of which the last has but two within the image."""
    for strips in (1, 5):
        monkeypatch.setattr(gpu, "BACKWARD", gpu.BACKWARD._replace(strips=strips))
        function = partial(gpu.depthwise, interpret=True)
        assert_equals_stock(rng, function, (2, 19, 6, 8), (3, 3, 1, 8), "float32", **SAME)


def test_kernels_over_a_mesh(rng, monkeypatch):
    """Each device computes its images; nothing but the kernel's gradient is sent, once."""
    shapes = []

    def interpreted(x, kernel):
        shapes.append(x.shape)
        return gpu.depthwise(x, kernel, interpret=True)

    monkeypatch.setattr(ops, "gpu", SimpleNamespace(fits=gpu.fits, depthwise=interpreted))
    mesh = sharding.create_mesh(data=4, fsdp=2)
    x, kernel = rng.normal(size=(16, 7, 7, 4)).astype(np.float32), rng.normal(size=(3, 3, 1, 4)).astype(np.float32)

    def gradient(function):
        return jax.grad(lambda kernel, x: jnp.sum(jnp.sin(function(x, kernel, **SAME))))

    expected = gradient(ops.depthwise_by_groups)(kernel, x)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shardings = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
        compiled = jax.jit(gradient(ops.depthwise_by_triton), in_shardings=shardings).lower(kernel, x).compile()
    assert set(shapes) == {(2, 7, 7, 4)}
    assert Hlo(compiled.as_text()).collectives() == [Collective("all-reduce", kernel.nbytes, 1)]
    np.testing.assert_allclose(compiled(kernel, x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


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
