"""The lowerings for GPUs, on CPUs (Triton's kernels interpreted): values and gradients are those of XLA's own."""

import dataclasses
import itertools
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from xception_flax.models import ops
from xception_flax.models.ops import gpu, lowerings, stock
from xception_flax.planning.hlo import Hlo
from xception_flax.training import sharding

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TOLERANCES = {"float32": 1e-5, "bfloat16": 1 / 256, "float16": 1 / 2048}  # half of the spacing of the short ones


def assert_equals_stock(rng, function, shape, kernel_shape, dtype, **options):
    """Compares value and both gradients with XLA's in float32, to `TOLERANCES`."""
    x, kernel = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=kernel_shape), dtype)
    assert_equal(rng, function, partial(stock.depthwise, **options), x, kernel)


def assert_equal(rng, function, exact_function, *operands, atol=1e-5):
    exact_operands = [operand.astype(jnp.float32) for operand in operands]
    expected, exact_pullback = jax.vjp(exact_function, *exact_operands)
    y, pullback = jax.vjp(function, *operands)
    cotangent = jnp.asarray(rng.normal(size=y.shape), y.dtype)
    results, exacts = pullback(cotangent), exact_pullback(cotangent.astype(jnp.float32))
    for like, ours, exact in zip((y, *operands), (y, *results), (expected, *exacts), strict=True):
        assert ours.dtype == like.dtype
        largest = np.abs(exact).max()
        rtol = TOLERANCES[ours.dtype.name]
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, rtol=rtol, atol=atol * largest)


SAME = dict(strides=(1, 1), padding="SAME", dilation=(1, 1))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product(
            [(2, 19, 19, 24), (3, 10, 5, 8), (1, 3, 9, 130), (2, 1, 1, 3), (1, 5, 17, 1), (1, 147, 6, 4)],
            ["float32", "bfloat16"],
        ),
        ((2, 19, 19, 24), "float16"),
    ],
)
def test_kernels(rng, dtype, shape):
    """Heights, widths and channels that are no multiples of a tile, and a height above `_HIGH`."""
    function = partial(gpu.triton_depthwise, interpret=True)
    assert_equals_stock(rng, function, shape, (3, 3, 1, shape[-1]), dtype, **SAME)


@pytest.mark.parametrize(
    ("shape", "relu", "dtype"),
    [
        *itertools.product([(3, 5, 7, 6)], [True, False], ["float32", "bfloat16"]),
        *itertools.product([(1, 147, 6, 6)], [True], TOLERANCES),
    ],
)
def test_kernels_with_a_normalization(rng, dtype, relu, shape):
    """The padding is zeros after the normalization, and pixels outside the image do not count in the sums."""
    x, kernel = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=(3, 3, 1, 6)), dtype)
    affine = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)

    def one_by_one(x, kernel, affine):
        scale, shift = affine[:, None, None, None]
        z = x * scale + shift
        return stock.depthwise(jax.nn.relu(z) if relu else z, kernel, **SAME)

    assert_equal(rng, lambda *operands: gpu.triton_depthwise(*operands, relu, True), one_by_one, x, kernel, affine)


def test_plans():
    """What the middle flow of 128 images has: a warp walks over half an image; and of one image: over one tile."""
    plan = gpu._Plan.of((128, 19, 19, 728), gpu.NORMALIZED_BACKWARD)
    assert (plan.row_tiles, plan.column_tiles, plan.grid) == (5, 10, (6, 2, 128))
    plan = gpu._Plan.of((128, 19, 19, 728), gpu.FORWARD)
    assert (plan.row_tiles, plan.column_tiles, plan.grid) == (1, 4, (6, 5, 128))
    plan = gpu._Plan.of((1, 19, 19, 728), gpu.FORWARD)
    assert (plan.row_tiles, plan.column_tiles, plan.grid) == (1, 1, (6, 20, 1))


@pytest.mark.parametrize("wave", [1, 64, 10_000], ids=["whole image", "strips", "tiles"])
def test_strips_are_those_of_an_image(rng, monkeypatch, wave):
    """Programs with all ten tiles of rows; with some of them, the last beyond the image; with one tile."""
    monkeypatch.setattr(gpu, "_WAVE", wave)
    rows = {1: 10, 64: 1, 10_000: 1}
    assert gpu._Plan.of((2, 19, 6, 8), gpu.BACKWARD).row_tiles == rows[wave]
    function = partial(gpu.triton_depthwise, interpret=True)
    assert_equals_stock(rng, function, (2, 19, 6, 8), (3, 3, 1, 8), "float32", **SAME)


@DTYPES
@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_convolution_of_few_channels(rng, dtype, padding, channels):
    """As a product of patches, up to four channels."""
    x = jnp.asarray(rng.normal(size=(2, 9, 8, channels)), dtype)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, 5)), dtype)
    options = dict(strides=(2, 2), padding=padding, dilation=(1, 1))
    assert_equal(rng, partial(gpu.convolution, **options), partial(stock.convolution, **options), x, kernel)
    made_of_patches = "conv_general_dilated" not in str(jax.make_jaxpr(partial(gpu.convolution, **options))(x, kernel))
    assert made_of_patches == (channels <= 4)


@DTYPES
@pytest.mark.parametrize("padding", ops.PADDINGS)
def test_max_pooling_with_a_normalization(rng, dtype, padding):
    """With scales below 0 too, for which a maximum is where the minimum was; against XLA's in float32."""
    x = jnp.asarray(rng.permutation(2 * 9 * 8 * 4).reshape(2, 9, 8, 4) % 251 / 64 - 2, dtype)  # exact in bfloat16
    affine = jnp.asarray([[1.5, -0.75, 2.0, -1.0], rng.normal(size=4)], jnp.float32)
    options = dict(window=(3, 3), strides=(2, 2), padding=padding)
    functions = (partial(module.normalized_max_pool, **options) for module in (gpu, stock))
    atol = 1e-5 if dtype == "float32" else 1 / 256  # up to four gradients of 8 bits add up
    assert_equal(rng, *functions, x, affine, atol=atol)


@DTYPES
def test_moments_by_one_reduction(rng, dtype):
    assert_equal(rng, gpu.moments, stock.moments, jnp.asarray(rng.normal(size=(3, 5, 7, 6)), dtype))


def test_moments_of_no_image_are_those_of_stock():
    for module in (gpu, stock):
        assert np.isnan(module.moments(jnp.zeros((0, 5, 7, 6)))).all()


@DTYPES
@pytest.mark.parametrize("shape", [(128, 6, 9, 2), (128, 5, 9, 2), (3, 5, 9, 2)], ids=["parts", "prime", "few images"])
def test_products_by_parts(rng, dtype, shape):
    kernel = jnp.asarray(rng.normal(size=(2, 3)), dtype)
    assert_equal(rng, gpu.product, stock.product, jnp.asarray(rng.normal(size=shape), dtype), kernel)


def test_kernels_over_a_mesh(rng, monkeypatch):
    """Each device computes its images; only the gradients of replicated arrays are sent, once."""
    shapes = []

    def interpreted(x, kernel, affine, relu, interpret=True, *, kernels=gpu.triton_depthwise):
        shapes.append(x.shape)
        return kernels(x, kernel, affine, relu, interpret)

    monkeypatch.setattr(gpu, "triton_depthwise", interpreted)
    mesh = sharding.create_mesh(data=4, fsdp=2)
    x, kernel = rng.normal(size=(16, 7, 7, 4)).astype(np.float32), rng.normal(size=(3, 3, 1, 4)).astype(np.float32)

    arguments = (rng.normal(size=(2, 4)).astype(np.float32), kernel, x)

    def gradient(function):
        def loss(affine, kernel, x):
            return jnp.sum(jnp.sin(function(x, affine, kernel, relu=True, dilation=(1, 1))))

        return jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=shardings)

    shardings = (sharding.replicated(mesh), sharding.replicated(mesh), sharding.batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = gradient(gpu.normalized_depthwise).lower(*arguments).compile()
        expected = gradient(stock.normalized_depthwise)(*arguments)
    assert set(shapes) == {(2, 7, 7, 4)}
    assert [c.kind for c in Hlo(compiled.as_text()).collectives()] == ["all-reduce"]
    for ours, theirs in zip(compiled(*arguments), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_second_derivatives(rng):
    """Those of a penalty on a gradient are XLA's."""
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 4, 3), (3, 3, 1, 3)))
    affine = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def gradients(function, *operands):
        return jax.grad(lambda *operands: jnp.sum(jnp.sin(function(*operands).astype(jnp.float32))), (0, 1, 2))(
            *operands
        )

    def one_by_one(x, kernel, affine):
        return stock.normalized_depthwise(x, affine, kernel, relu=True, dilation=(1, 1))

    def penalty(function):
        return lambda *operands: sum(jnp.sum(jnp.square(g)) for g in gradients(function, *operands))

    ours = jax.grad(penalty(lambda *operands: gpu.triton_depthwise(*operands, True, True)), (0, 1, 2))
    theirs = jax.grad(penalty(one_by_one), (0, 1, 2))
    for result, expected in zip(ours(x, kernel, affine), theirs(x, kernel, affine), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_kernels_map_over_another_dimension(rng):
    """`vmap` of a gradient, as for gradients of single examples, against a loop."""
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 1, 3, 5, 4), (3, 3, 1, 4)))
    gradient = jax.grad(lambda kernel, x: jnp.sum(gpu.triton_depthwise(x, kernel, interpret=True) ** 2))
    mapped = jax.vmap(gradient, (None, 0))(kernel, x)
    for result, image in zip(mapped, x, strict=True):
        np.testing.assert_allclose(result, gradient(kernel, image), rtol=1e-4, atol=1e-4)


# What is lowered for which GPU ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, "depthwise_forward"),
        ({"strides": (2, 2)}, "feature_group_count = 4"),
        ({"dilation": (2, 2)}, "feature_group_count = 4"),
        ({"padding": "VALID"}, "feature_group_count = 4"),
    ],
)
def test_what_is_lowered_for_gpus(monkeypatch, options, used):
    """Triton's kernel, where there is one, is only for NVIDIA GPUs, and never used with 'stock'."""
    monkeypatch.setattr(lowerings, "has_triton", lambda: True)
    # Newer JAX lowers a kernel for a GPU that it knows: one here, or the mesh's. The choice is that without a mesh.
    monkeypatch.setattr(lowerings, "_kind_of_mesh", lambda: None)
    with jax.sharding.use_abstract_mesh(mesh_of_gpus()):
        assert lowered(options) == {"cuda": used, "rocm": STOCK, "tpu": STOCK, "cpu": "shifts"}
        with ops.lowering("stock"):
            assert lowered(options) == dict.fromkeys(("cuda", "rocm", "tpu", "cpu"), STOCK)


def test_without_a_gpu_that_has_triton_its_kernels_are_not_lowered():
    assert lowered({}) == {"cuda": STOCK, "rocm": STOCK, "tpu": STOCK, "cpu": "shifts"}


STOCK = "feature_group_count = 4"


def lowered(options) -> dict[str, str]:
    """Which depthwise convolution the program of each platform has."""
    x, kernel = jnp.zeros((8, 8, 8, 4), jnp.bfloat16), jnp.zeros((3, 3, 1, 4), jnp.bfloat16)
    traced = jax.jit(partial(ops.depthwise_convolution, **options)).trace(x, kernel)
    found = {}
    for platform in ("cuda", "rocm", "tpu", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        (found[platform],) = [mark for mark in ("depthwise_forward", STOCK) if mark in text] or ["shifts"]
    return found


H100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", compute_capability="9.0")
T4 = SimpleNamespace(device_kind="Tesla T4", platform="gpu", compute_capability="7.5")
MI300X = SimpleNamespace(device_kind="AMD Instinct MI300X", platform="gpu", compute_capability="gfx942")
CPU = SimpleNamespace(device_kind="cpu", platform="cpu")
V5E = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")


def mesh_of_gpus() -> jax.sharding.AbstractMesh:
    """Eight H100s, elsewhere."""
    mesh = sharding.create_mesh(data=4, fsdp=2).abstract_mesh
    device = dataclasses.replace(mesh.abstract_device, device_kind=H100.device_kind)
    return jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device)


@pytest.mark.parametrize(
    ("local", "compiled_for", "expected"),
    [
        ([H100, H100], None, True),
        ([H100, H100], H100, True),
        ([H100, T4], H100, False),
        ([T4], None, False),
        ([MI300X], None, False),
        ([MI300X], MI300X, False),
        ([CPU], H100, True),  # of another machine
        ([H100], CPU, False),
        ([CPU], None, False),
        ([V5E], None, False),
        ([CPU], V5E, False),
    ],
)
def test_which_devices_have_triton(monkeypatch, local, compiled_for, expected):
    monkeypatch.setattr(jax, "local_devices", lambda: local)
    mesh = SimpleNamespace(abstract_device=compiled_for, empty=compiled_for is None, axis_types=(AxisType.Auto,))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert lowerings.has_triton() == expected
    assert ops.takes_chains(1, train=True) == expected
    assert ops.takes_chains(8, train=False) == expected
    assert not ops.takes_chains(7, train=False)  # evaluation of few images
    with ops.lowering("stock"):
        assert not ops.takes_chains(8, train=True)


def test_the_largest_array_is_a_share():
    """128 images of the second block on each of eight GPUs: 2.8e9 values in all, and 32 bits count each GPU's."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 147, 147, 128), (3, 3, 1, 128)))
    assert not gpu.has_kernel(x, kernel, **SAME)
    with jax.sharding.use_abstract_mesh(mesh_of_gpus()):
        assert gpu.has_kernel(x, kernel, **SAME)
        assert not gpu.has_kernel(jax.ShapeDtypeStruct((1001, *x.shape[1:]), x.dtype), kernel, **SAME)


@pytest.mark.parametrize(("shape", "axis"), [((70_000, 1, 1, 128), 2), ((1, 1200, 1200, 4), 1)])
def test_a_grid_may_be_larger_than_cuda_takes(shape, axis):
    """Of its second and third axis CUDA has 65,535 blocks at most: Pallas makes the first axis of what is more."""
    x, kernel = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((3, 3, 1, shape[-1]), jnp.float32)
    assert gpu.has_kernel(x, kernel, **SAME)
    assert gpu._Plan.of(shape, gpu.FORWARD).grid[axis] > 65_535
    text = jax.jit(gpu.triton_depthwise).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    grid = [int(blocks) for blocks in re.findall(r"grid_[xyz] = (\d+)", text)]
    assert max(grid) > 65_535
    assert sorted(grid)[:2] == [1, 1]


def test_products_by_parts_of_a_share():
    """128 images on each of eight GPUs are summed in the same parts as 128 images on one."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 147, 147, 64), (64, 128)))

    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(gpu.product(x, kernel)))(kernel)

    with jax.sharding.use_abstract_mesh(mesh_of_gpus()):
        assert "bf16[1024,3,7203,64]" in str(jax.make_jaxpr(gradient)(x, kernel))
    one = jax.ShapeDtypeStruct((128, *x.shape[1:]), x.dtype)
    assert "bf16[128,3,7203,64]" in str(jax.make_jaxpr(gradient)(one, kernel))


def test_over_a_mesh_of_gpus_no_choice_is_left_to_the_program():
    """XLA would keep a `cond` around a kernel over several devices, and what is never called need not be traced."""
    with jax.sharding.use_abstract_mesh(mesh_of_gpus()):
        traced = jax.jit(ops.depthwise_convolution).trace(jnp.zeros((8, 5, 5, 4)), jnp.zeros((3, 3, 1, 4)))
    assert "depthwise_forward" in str(traced.jaxpr)
    assert "cond[" not in str(traced.jaxpr)


@pytest.mark.parametrize("name", ops.LOWERINGS)
def test_strided_products_keep_the_slice_apart_on_gpus(monkeypatch, name):
    """XLA for GPUs aborts the process if it fuses the two, in any evaluation at 299 px: openxla/xla issue 47381."""
    monkeypatch.setattr(lowerings, "has_triton", lambda: True)
    with ops.lowering(name):
        traced = jax.jit(partial(ops.pointwise_convolution, strides=(2, 2))).trace(
            jnp.zeros((2, 7, 7, 4)), jnp.zeros((1, 1, 4, 8))
        )
    barrier = {
        platform: "optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "tpu", "cpu")
    }
    assert barrier == {"cuda": True, "tpu": False, "cpu": False}
