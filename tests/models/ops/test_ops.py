"""Operations against loops written in NumPy, and gradients against finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from xception_flax import create_model
from xception_flax.models import ops
from xception_flax.models.ops import lowerings
from xception_flax.planning.hlo import Collective, Hlo
from xception_flax.text.errors import UserError
from xception_flax.training import sharding


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """TensorFlow's rule: total = max((ceil(size / stride) - 1) * stride + window - size, 0), the odd one last."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def windows(x: np.ndarray, size: int, stride: int, padding: str, fill: float, dilation: int = 1):
    """Yields (row, column, window `[N, size, size, C]`) of every output pixel."""
    span = dilation * (size - 1) + 1
    pads = {
        "SAME": [same_padding(s, span, stride) for s in x.shape[1:3]],
        "SYMMETRIC": [((span - 1) // 2,) * 2] * 2,  # torch's padding=(span - 1) // 2
        "VALID": [(0, 0)] * 2,
    }[padding]
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    for i in range((x.shape[1] - span) // stride + 1):
        for j in range((x.shape[2] - span) // stride + 1):
            top, left = i * stride, j * stride
            yield i, j, x[:, top : top + span : dilation, left : left + span : dilation]


def assemble(results) -> np.ndarray:
    pixels = {(i, j): value for i, j, value in results}
    rows, columns = (max(p[axis] for p in pixels) + 1 for axis in (0, 1))
    return np.stack([np.stack([pixels[i, j] for j in range(columns)], 1) for i in range(rows)], 1)


@pytest.mark.parametrize("shape", [(2, 7, 9, 4), (1, 8, 5, 4), (1, 3, 3, 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolution(rng, shape, stride, padding, multiplier):
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 1, 4 * multiplier)).astype(np.float32)
    per_channel = kernel.reshape(3, 3, 4, multiplier)
    expected = assemble(
        (i, j, np.einsum("nhwc,hwcm->ncm", w, per_channel).reshape(len(x), -1))
        for i, j, w in windows(x, 3, stride, padding, 0.0)
    )
    result = ops.depthwise_convolution(x, kernel, strides=(stride, stride), padding=padding)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def both_lowerings(function, *operands):
    """Pairs the values and gradients of the lowerings 'platform' and 'stock', for the same cotangent."""
    results = []
    for name in ("platform", "stock"):
        with ops.lowering(name):
            y, vjp = jax.vjp(function, *operands)
            cotangent = np.random.default_rng(1).normal(size=y.shape).astype(jnp.bfloat16).astype(y.dtype)
            results.append([np.asarray(r, np.float32) for r in (y, *vjp(cotangent))])
    return zip(*results, strict=True)


def assert_equal_lowerings(function, x: jax.Array, kernel: jax.Array) -> None:
    """float32 is equal up to rounding. bfloat16 is compared with float32: ours is within 1 / 256, its spacing.

    XLA's own lowering may add up in 8 bits: with JAX 0.12 a 1x1 kernel's gradient is wrong by 2 %.
    """
    if x.dtype == jnp.float32:
        for ours, stock in both_lowerings(function, x, kernel):
            np.testing.assert_allclose(ours, stock, rtol=1e-5, atol=1e-5 * np.abs(stock).max())
        return
    in_float32 = both_lowerings(function, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for (ours, stock), (_, exact) in zip(both_lowerings(function, x, kernel), in_float32, strict=True):
        largest = np.abs(exact).max()
        np.testing.assert_allclose(ours, exact, rtol=1 / 256, atol=largest / 256)
        np.testing.assert_allclose(stock, exact, rtol=1 / 32, atol=largest / 32)


STRIDES_AND_DILATIONS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 2), (1, 1)), ((1, 1), (2, 3)), ((2, 3), (2, 1))]
DTYPES_AND_PADDINGS = [("float32", padding) for padding in ops.PADDINGS] + [("bfloat16", "SAME")]


@pytest.mark.parametrize(("dtype", "padding"), DTYPES_AND_PADDINGS)
@pytest.mark.parametrize(("strides", "dilation"), STRIDES_AND_DILATIONS)
@pytest.mark.parametrize(
    ("function", "kernel_shape"),
    [
        (ops.depthwise_convolution, (3, 3, 1, 4)),
        (ops.depthwise_convolution, (3, 2, 1, 8)),  # channel multiplier 2
        (ops.convolution, (3, 3, 4, 5)),
        (ops.convolution, (1, 4, 4, 5)),
        (ops.convolution, (1, 1, 4, 5)),
        (partial(ops.convolution, groups=2), (3, 3, 2, 6)),
        (partial(ops.convolution, groups=2), (1, 1, 2, 6)),
    ],
    ids=["depthwise", "multiplier", "convolution", "1x4", "1x1", "groups", "1x1 groups"],
)
def test_lowerings_of_convolutions_are_equal(rng, dtype, padding, strides, dilation, function, kernel_shape):
    """Value and both gradients; 33 rows, since the depthwise kernel's is summed by two rows on CPUs."""
    x = jnp.asarray(rng.normal(size=(3, 11, 10, 4)), dtype)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), dtype)
    function = partial(function, strides=strides, padding=padding, dilation=dilation)
    assert_equal_lowerings(function, x, kernel)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_lowerings_of_the_pointwise_convolution_are_equal(rng, dtype, strides):
    x, kernel = jnp.asarray(rng.normal(size=(2, 5, 6, 3)), dtype), jnp.asarray(rng.normal(size=(1, 1, 3, 7)), dtype)
    assert_equal_lowerings(partial(ops.pointwise_convolution, strides=strides), x, kernel)


@pytest.mark.parametrize(("dtype", "padding"), DTYPES_AND_PADDINGS)
@pytest.mark.parametrize(
    ("window", "strides"), [((3, 3), (2, 2)), ((3, 3), (1, 1)), ((2, 3), (3, 2)), ((5, 4), (2, 3)), ((1, 130), (1, 2))]
)
def test_lowerings_of_max_pooling_are_equal(rng, dtype, padding, window, strides):
    """Half of the pixels are 0, as after a ReLU, so most windows have equal maxima: the first one gets the gradient."""
    x = np.maximum(rng.integers(-3, 3, size=(2, 14, max(13, window[1]), 3)), 0)
    x[0, :, :, 0] = -1  # and a channel without a positive number, next to the padding
    function = partial(ops.max_pool, window=window, strides=strides, padding=padding)
    tolerance = 1e-6 if dtype == "float32" else 1 / 32  # several gradients of 8 bits add up in another order
    for ours, stock in both_lowerings(function, jnp.asarray(x, dtype)):
        np.testing.assert_allclose(ours, stock, rtol=tolerance, atol=tolerance * np.abs(stock).max())


@pytest.mark.parametrize(
    ("function", "kernel_shape"), [(ops.depthwise_convolution, (3, 3, 1, 4)), (ops.convolution, (3, 3, 4, 5))]
)
def test_each_device_computes_the_kernel_gradient_of_its_images(rng, function, kernel_shape):
    """Over 8 devices only that gradient is sent, once, and it is the same as on one device."""
    mesh = sharding.create_mesh(data=4, fsdp=2)
    x, kernel = rng.normal(size=(16, 7, 7, 4)).astype(np.float32), rng.normal(size=kernel_shape).astype(np.float32)
    gradient = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(function(x, kernel))))
    expected = gradient(kernel, x)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shardings = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
        compiled = jax.jit(gradient, in_shardings=shardings).lower(kernel, x).compile()
    assert Hlo(compiled.as_text()).collectives() == [Collective("all-reduce", kernel.nbytes, 1)]
    np.testing.assert_allclose(compiled(kernel, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "kernel_shape"),
    [
        (ops.depthwise_convolution, (3, 3, 1, 4)),
        (ops.convolution, (3, 3, 4, 5)),
        (ops.pointwise_convolution, (1, 1, 4, 5)),
    ],
)
@pytest.mark.parametrize("manual", [True, False], ids=["shard_map", "explicit"])
def test_gradients_within_shard_map_and_over_explicit_meshes(rng, manual, function, kernel_shape):
    """Where types say how arrays are split, gradients are those of one device.

    Over an Explicit mesh JAX has no gradient by a convolution's kernel, so there it is the one by the images.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto if manual else AxisType.Explicit,))
    x, kernel = rng.normal(size=(16, 6, 6, 4)).astype(np.float32), rng.normal(size=kernel_shape).astype(np.float32)

    def loss(kernel, x):
        return jnp.sum(jnp.sin(function(x, kernel)))

    gradient = jax.grad(loss, argnums=0 if manual else 1)
    expected = gradient(kernel, x)
    if manual:
        share = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        result = jax.jit(share)(kernel, x)  # the gradient of a replicated array is the sum over devices
    else:
        with jax.set_mesh(mesh):
            result = jax.jit(gradient)(kernel, jax.device_put(x, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 7, 7, 4), (2, 7, 11, 4)], ids=["no image", "window too wide"])
@pytest.mark.parametrize(("function", "channels"), [(ops.depthwise_convolution, (1, 4)), (ops.convolution, (4, 5))])
def test_nothing_has_a_gradient_of_zero(shape, function, channels):
    x, kernel = jnp.ones(shape), jnp.ones((1, 7, *channels))
    function = partial(function, strides=(2, 2), padding="VALID", dilation=(1, 2))
    y, vjp = jax.vjp(function, x, kernel)
    assert y.shape == (shape[0], 4, 0, channels[1])
    dx, dkernel = vjp(y)
    assert dx.shape == shape
    np.testing.assert_array_equal(dkernel, np.zeros(kernel.shape))


def test_lowering_is_chosen_by_platform():
    def lowered(function, *operands, platform):
        traced = jax.jit(lambda *operands: function(*operands)).trace(*operands)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4))
    for platform in ("tpu", "cuda"):
        assert "feature_group_count = 4" in lowered(ops.depthwise_convolution, x, kernel, platform=platform)
        assert "reduce_window" in lowered(ops.max_pool, x, platform=platform)
    assert "stablehlo.convolution" not in lowered(ops.depthwise_convolution, x, kernel, platform="cpu")
    assert "reduce_window" not in lowered(ops.max_pool, x, platform="cpu")
    with ops.lowering("stock"):
        assert "feature_group_count = 4" in lowered(ops.depthwise_convolution, x, kernel, platform="cpu")


def test_options_of_the_compiler_change_nothing_but_rounding(rng):
    """A forward pass at the smallest size that has options; float32 rounds differently in another order of sums."""
    options = ops.compiler_options("cpu", 128, 160)
    assert options is not None
    assert options.keys() == {"xla_cpu_experimental_ynn_fusion_type"}
    model = create_model("xception", width=0.25, middle_repeats=1, num_classes=5)
    images = rng.normal(size=(2, 128, 128, 3)).astype(np.float32)
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)
    expected, found = (
        jax.jit(model.apply, static_argnames="train", compiler_options=each)(variables, images, train=False)
        for each in (None, options)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("platform", "height", "width"), [("cpu", 127, 299), ("cpu", 299, 96), ("gpu", 299, 299)])
def test_small_images_and_other_platforms_have_no_options(platform, height, width):
    assert ops.compiler_options(platform, height, width) is None


@pytest.mark.parametrize("unknown", [{"xla_cpu_nothing": "1"}, {"xla_cpu_experimental_ynn_fusion_type": "NOTHING"}])
def test_a_jaxlib_without_the_option_runs_without(monkeypatch, unknown):
    monkeypatch.setattr(lowerings, "_BY_EIGEN", unknown)
    lowerings._has_eigen_option.cache_clear()
    assert ops.compiler_options("cpu", 299, 299) is None
    lowerings._has_eigen_option.cache_clear()


def test_unknown_lowering_is_refused():
    with pytest.raises(UserError, match=r"unknown lowering 'stok'; did you mean 'stock'\?"), ops.lowering("stok"):
        pass


def test_depthwise_convolution_dilated(rng):
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 1, 3)).astype(np.float32)
    expected = assemble(
        (i, j, np.einsum("nhwc,hwc->nc", w, kernel[:, :, 0])) for i, j, w in windows(x, 3, 1, "SAME", 0.0, dilation=2)
    )
    result = ops.depthwise_convolution(x, kernel, dilation=(2, 2))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution(rng, padding, stride, dilation, groups):
    x = rng.normal(size=(2, 8, 7, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 4 // groups, 8)).astype(np.float32)
    # Segment g of the channels has part g of the filters, of `groups` equal parts.
    expected = assemble(
        (
            i,
            j,
            np.concatenate(
                [
                    np.einsum("nhwc,hwcf->nf", part, filters)
                    for part, filters in zip(np.split(w, groups, -1), np.split(kernel, groups, -1), strict=True)
                ],
                axis=-1,
            ),
        )
        for i, j, w in windows(x, 3, stride, padding, 0.0, dilation)
    )
    options = dict(strides=(stride,) * 2, padding=padding, dilation=(dilation,) * 2, groups=groups)
    np.testing.assert_allclose(ops.convolution(x, kernel, **options), expected, rtol=1e-5, atol=1e-5)


def test_unknown_padding_is_refused():
    with pytest.raises(UserError, match=r"unknown padding 'SAMME'; did you mean 'SAME'\?"):
        ops.convolution(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), padding="SAMME")


@pytest.mark.parametrize("shape", [(2, 5, 6, 3), (1, 1, 4, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution(rng, shape, stride):
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(1, 1, 3, 7)).astype(np.float32)
    result = ops.pointwise_convolution(x, kernel, strides=(stride, stride))
    expected = np.einsum("nhwc,cf->nhwf", x[:, ::stride, ::stride], kernel[0, 0])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    # A 1x1 window needs no padding, so 'SAME' keeps the pixels 0, 2, 4, ... too.
    convolved = ops.convolution(x, kernel, strides=(stride, stride), padding="SAME")
    np.testing.assert_allclose(result, convolved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize("size", [5, 6, 74], ids=str)
def test_max_pool(rng, size, padding):
    """74 -> 37 is the pool of block 3 at 299 px, whose 'SAME' padding is (0, 1): none above, one below."""
    x = rng.normal(size=(1, size, size, 2)).astype(np.float32)
    if size == 74:
        assert same_padding(74, 3, 2) == (0, 1)
    expected = assemble((i, j, w.max((1, 2))) for i, j, w in windows(x, 3, 2, padding, -np.inf))
    np.testing.assert_array_equal(ops.max_pool(x, padding=padding), expected)


@pytest.mark.parametrize("padding", ["SAME", "SYMMETRIC"])
@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 19, 20, 3), (1, 37, 38, 3), (1, 8, 5, 3)], ids=str)
def test_atrous_max_pool_is_the_strided_pool_at_every_pixel(rng, shape, rate, padding):
    x = rng.normal(size=shape).astype(np.float32)
    dense = np.asarray(ops.atrous_max_pool(x, rate=rate, padding=padding))
    assert dense.shape == x.shape
    strided = ops.max_pool(x[:, ::rate, ::rate], padding=padding)
    np.testing.assert_array_equal(dense[:, :: 2 * rate, :: 2 * rate], strided)
    # Elsewhere too it is the maximum of nine pixels `rate` apart: of the grid that starts there.
    if padding == "SYMMETRIC":
        shifted = ops.max_pool(x[:, rate // 2 :: rate, rate // 2 :: rate], strides=(1, 1), padding=padding)
        np.testing.assert_array_equal(dense[:, rate // 2 :: rate, rate // 2 :: rate], shifted)


@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (5, 3)])
def test_average_pool_counts_real_pixels_only(rng, padding, window, stride):
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    expected = assemble((i, j, np.nanmean(w, (1, 2))) for i, j, w in windows(x, window, stride, padding, np.nan))
    result = ops.average_pool(x, window=(window,) * 2, strides=(stride,) * 2, padding=padding)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ops.PADDINGS)
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (5, 3)])
def test_average_pool_counts_the_padding_where_asked(rng, padding, window, stride):
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    expected = assemble((i, j, np.mean(w, (1, 2))) for i, j, w in windows(x, window, stride, padding, 0))
    options = dict(window=(window,) * 2, strides=(stride,) * 2, padding=padding)
    np.testing.assert_allclose(ops.average_pool(x, **options, count_include_pad=True), expected, rtol=1e-5, atol=1e-6)


def test_average_pool_sums_in_float32(rng):
    x = jnp.asarray(1 + rng.normal(size=(1, 16, 16, 2)) / 8, jnp.bfloat16)
    pooled = ops.average_pool(x)
    assert pooled.dtype == jnp.bfloat16
    exact = ops.average_pool(x.astype(jnp.float32))
    np.testing.assert_array_equal(pooled, exact.astype(jnp.bfloat16))  # one rounding, at the end


def test_max_pool_of_negative_numbers_never_takes_the_padding():
    assert np.all(np.asarray(ops.max_pool(-jnp.ones((1, 4, 4, 1)))) == -1)


def test_global_average_pool_sums_in_float32(rng):
    x = jnp.asarray(1 + rng.normal(size=(1, 64, 64, 2)) / 8, jnp.bfloat16)
    pooled = ops.global_average_pool(x)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, np.asarray(x, np.float64).mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "kernel_shape"),
    [
        (ops.convolution, (3, 3, 3, 2)),
        (partial(ops.convolution, groups=3), (3, 3, 1, 6)),
        (ops.depthwise_convolution, (3, 3, 1, 6)),
        (ops.pointwise_convolution, (1, 1, 3, 2)),
    ],
)
@pytest.mark.parametrize(("lowering", "modes"), [("platform", ["rev"]), ("stock", ["fwd", "rev"])])
def test_gradients(rng, function, kernel_shape, lowering, modes):
    """First and second derivatives against finite differences; only the stock lowering has forward mode."""
    with jax.enable_x64(True), ops.lowering(lowering):
        x, kernel = jnp.asarray(rng.normal(size=(2, 5, 6, 3))), jnp.asarray(rng.normal(size=kernel_shape))
        check_grads(lambda x, k: function(x, k, strides=(2, 2)), (x, kernel), 2, modes, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("function", [ops.max_pool, ops.atrous_max_pool, ops.average_pool])
def test_pooling_gradients(rng, function):
    with jax.enable_x64(True):
        check_grads(function, (jnp.asarray(rng.normal(size=(2, 5, 6, 3))),), 2, ["rev"], atol=1e-6, rtol=1e-6)


def test_operations_map_over_another_dimension(rng):
    """`vmap` of a gradient, as for gradients of single examples, against a loop."""
    x = jnp.asarray(rng.normal(size=(3, 1, 6, 7, 4)), jnp.float32)
    kernels = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 3, 4, 4), (3, 3, 1, 4), (1, 1, 4, 2)]]

    def loss(kernels, x):
        x = ops.convolution(x, kernels[0])
        return jnp.sum(
            ops.pointwise_convolution(ops.max_pool(ops.depthwise_convolution(x, kernels[1])), kernels[2]) ** 2
        )

    mapped = jax.vmap(jax.grad(loss), (None, 0))(kernels, x)
    one_by_one = [jax.grad(loss)(kernels, image) for image in x]
    for i, gradients in enumerate(zip(*one_by_one, strict=True)):
        np.testing.assert_allclose(mapped[i], np.stack(gradients), rtol=1e-4, atol=1e-4)
