"""Linen modules that the networks are made of: convolutions, the separable convolution, the classifier head."""

import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup

# Neither the paper nor its code states an initializer; with batch normalization after every
# convolution only the direction of a kernel matters. Variance 1 / fan_in keeps the signal's size
# where a kernel is followed by another kernel (depthwise, then pointwise).
kernel_init = nn.initializers.lecun_normal()

ModuleDef = Callable[..., nn.Module]  # a class of modules with some of its fields filled in

# What may stand between the depthwise and the pointwise convolution (paper, section 4.7, figure 10).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "elu": nn.elu}


def _kernel(module: nn.Module, shape: tuple[int, ...]) -> jax.Array:
    """Returns the module's parameter `kernel`, cast to the type of its computation.

    Raises:
      UserError: the loaded weights have another shape.
    """
    if module.has_variable("params", "kernel"):
        loaded = module.get_variable("params", "kernel").shape
        if loaded != shape:
            raise UserError(
                f"{'/'.join(module.path) or type(module).__name__}: the input and the model's fields need a kernel of "
                f"{_dimensions(shape)} (rows x columns x channels x features), the weights have {_dimensions(loaded)}; "
                "give images and fields that fit the weights, or other weights."
            )
    return module.param("kernel", kernel_init, shape, module.param_dtype).astype(module.dtype)


def _dimensions(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


class Conv(nn.Module):
    """2-D convolution without bias: `[N, H, W, C]` -> `[N, H', W', features]`.

    With `groups`, each of as many equal segments of the channels has its own filters. Parameters:
    `kernel` `[kh, kw, C / groups, features]`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _kernel(self, (*self.kernel_size, x.shape[-1] // self.groups, self.features))
        options = dict(strides=self.strides, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return ops.convolution(x.astype(self.dtype), kernel, **options)


class DepthwiseConv(nn.Module):
    """Spatial convolution of each channel by itself: `[N, H, W, C]` -> `[N, H', W', C * multiplier]`.

    A grouped convolution with `feature_group_count = C`. Parameters: `kernel`
    `[kh, kw, 1, C * multiplier]`.
    """

    kernel_size: tuple[int, int] = (3, 3)
    multiplier: int = 1
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    dilation: tuple[int, int] = (1, 1)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _kernel(self, (*self.kernel_size, 1, x.shape[-1] * self.multiplier))
        options = dict(strides=self.strides, padding=self.padding, dilation=self.dilation)
        return ops.depthwise_convolution(x.astype(self.dtype), kernel, **options)


class PointwiseConv(nn.Module):
    """1x1 convolution without bias: `[N, H, W, C]` -> `[N, H', W', features]`.

    Parameters: `kernel` `[1, 1, C, features]`.
    """

    features: int
    strides: tuple[int, int] = (1, 1)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _kernel(self, (1, 1, x.shape[-1], self.features))
        return ops.pointwise_convolution(x.astype(self.dtype), kernel, strides=self.strides)


class SeparableConv(nn.Module):
    """Depthwise separable convolution: depthwise, then pointwise (paper, section 3).

    `[N, H, W, C]` -> `[N, H, W, features]`. Between the two there is no batch normalization, and
    no non-linearity unless `mid_activation` ('relu', 'elu') asks for the variants of section 4.7.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    dilation: tuple[int, int] = (1, 1)
    mid_activation: str | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = DepthwiseConv(self.kernel_size, dilation=self.dilation, **dtypes, name="depthwise")(x)
        if self.mid_activation is not None:
            x = lookup(ACTIVATIONS, self.mid_activation, "mid_activation")(x)
        return PointwiseConv(self.features, **dtypes, name="pointwise")(x)

    def normalized(
        self, x: jax.Array, scale: jax.Array, shift: jax.Array, *, relu: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The convolution of `relu(x * scale + shift)`, without `mid_activation`, and the moments of the result.

        See `ops.normalized_separable_convolution`.
        """
        kernels = (self.get_variable("params", name)["kernel"] for name in ("depthwise", "pointwise"))
        return ops.normalized_separable_convolution(
            x, scale, shift, *(kernel.astype(self.dtype) for kernel in kernels), relu=relu, dilation=self.dilation
        )


class _BatchNormAffine(nn.Module):
    """`nn.BatchNorm`, with the same variables, as the scale and shift that it applies.

    Moments `[2, C]` (means of an array and of its square) -> scale `[C]`, shift `[C]`. With `use_running_average`
    the moments do not matter.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, moments: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, variance = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
        moving = [self.variable("batch_stats", name, jnp.zeros_like, mean) for name in ("mean", "var")]
        if self.use_running_average:
            mean, variance = (statistic.value.astype(mean.dtype) for statistic in moving)
        else:
            for statistic, value in zip(moving, (mean, variance), strict=True):
                statistic.value = self.momentum * statistic.value + (1 - self.momentum) * value
        scale = self.param("scale", nn.initializers.ones, mean.shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, mean.shape, self.param_dtype)
        scale = (scale * jax.lax.rsqrt(variance + self.epsilon)).astype(mean.dtype)
        return scale, (bias - mean * scale).astype(mean.dtype)


def separable_units(
    x: jax.Array,
    features: Sequence[int],
    sepconv: ModuleDef,
    norm: ModuleDef,
    *,
    name: str,
    rate: int = 1,
    relu_first: bool = True,
    pool_padding: str | None = None,
) -> jax.Array:
    """Applies units of Xception one after the other: ReLU, separable convolution, batch normalization.

    To be called inside a module's compact `__call__`: its layers become that module's `NAME1`,
    `NAME1_bn`, `NAME2`, ...

    Args:
      x: `[N, H, W, C]`.
      features: output channels of each unit.
      sepconv: makes a convolution from its features, dilation and name.
      norm: makes a batch normalization from its name.
      rate: dilation of the convolutions.
      relu_first: whether the first unit has a ReLU too.
      pool_padding: of a max-pooling 3x3, stride 2, after the last unit; None for no max-pooling.

    Returns:
      `[N, H, W, features[-1]]`, or of half the height and width; normalized, without a final ReLU.
    """
    convs = [sepconv(f, dilation=(rate, rate), name=f"{name}{i}") for i, f in enumerate(features, start=1)]
    if _can_chain(convs[0], norm, x.shape[0]):
        return _chained_units(x, convs, norm, relu_first=relu_first, pool_padding=pool_padding)
    for i, conv in enumerate(convs):
        x = norm(name=f"{conv.name}_bn")(conv(nn.relu(x) if relu_first or i else x))
    return x if pool_padding is None else ops.max_pool(x, padding=pool_padding)


def _can_chain(conv: nn.Module, norm: ModuleDef, images: int) -> bool:
    """Whether `ops` takes the convolution with its neighbours: a plain separable one whose result nobody else asks for.

    Among its neighbours there are no results of single layers that Flax could capture as intermediates.
    """
    separable = isinstance(conv, SeparableConv) and conv.mid_activation is None
    watched = conv.is_initializing() or conv.is_mutable_collection("intermediates")
    return separable and not watched and ops.takes_chains(images, train=not norm(parent=None).use_running_average)


def _chained_units(
    x: jax.Array, convs: Sequence[SeparableConv], norm: ModuleDef, *, relu_first: bool, pool_padding: str | None
) -> jax.Array:
    """`separable_units` with each normalization's scale and shift applied by the operation after it.

    So `ops` can compute both, and the sums of the next normalization, in one pass over memory.
    """
    fields = norm(parent=None)  # of nn.BatchNorm
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    scale, shift = jnp.ones(x.shape[-1], wide), jnp.zeros(x.shape[-1], wide)
    for i, conv in enumerate(convs):
        x, moments = conv.normalized(x, scale, shift, relu=relu_first or i > 0)
        affine = _BatchNormAffine(
            fields.use_running_average, fields.momentum, fields.epsilon, fields.param_dtype, name=f"{conv.name}_bn"
        )
        scale, shift = affine(moments)
    if pool_padding is not None:
        return ops.normalized_max_pool(x, scale, shift, padding=pool_padding)
    scale, shift = scale[None, None, None], shift[None, None, None]
    return (x.astype(wide) * scale + shift).astype(dtype)


def segments(channels: int, towers: int | None) -> tuple[int, ...]:
    """Returns the sizes of the segments into which `towers` spatial convolutions divide the channels.

    They are as equal as possible, the larger ones first: `segments(10, 4)` is `(3, 3, 2, 2)`. With
    `towers=None` each segment is one channel.

    Raises:
      UserError: `towers` is not from 1 to `channels`.
    """
    towers = channels if towers is None else towers
    if not isinstance(towers, int) or not 1 <= towers <= channels:
        raise UserError(
            f"towers must be from 1 (a regular convolution) to the {channels} channels of the layer "
            f"(one filter a channel; also towers=None), got {towers!r}."
        )
    size, larger = divmod(channels, towers)
    return (size + 1,) * larger + (size,) * (towers - larger)


class TowerConv(nn.Module):
    """A point on the axis between the regular and the depthwise separable convolution (sections 1.2 and 5).

    `[N, H, W, C]` -> `[N, H, W, features]`. A 1x1 convolution mixes all channels, and `towers` spatial
    convolutions each work on a segment of the channels. With 1 tower this is a regular convolution next
    to a 1x1, with 3 or 4 the Inception module of figures 2 and 3, with one tower a channel (None) the
    'extreme' module of figure 4 or, in the other order, `SeparableConv`.

    Parameters: `pointwise/kernel` `[1, 1, C, features]` and `spatial/kernel` `[kh, kw, c / towers, c]`, where
    `c` is the number of channels of the spatial convolutions. If `towers` does not divide `c`, the larger
    segments are in `spatial` and the smaller ones in `spatial_smaller`. In all these are `C * features +
    kh * kw * sum(s**2 for s in segments(c, towers))` weights, and as many multiply-adds a pixel.

    Attributes:
      features: channels of the result.
      towers: number of segments, from 1 to `c`, which is `features` if the 1x1 comes first, else C. It
        need not divide `c`: see `segments`.
      order: 'depthwise_first' (separable convolution) or 'pointwise_first' (Inception).
      kernel_size: of the spatial convolutions.
      dilation: of the spatial convolutions.
      mid_activation: None, 'relu' or 'elu' between the two (Inception has one; in section 4.7 Xception is
        better without).

    Raises:
      UserError: a value is out of its range.
    """

    features: int
    towers: int | None = None
    order: str = "depthwise_first"
    kernel_size: tuple[int, int] = (3, 3)
    dilation: tuple[int, int] = (1, 1)
    mid_activation: str | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def pointwise(x: jax.Array) -> jax.Array:
            return PointwiseConv(self.features, **dtypes, name="pointwise")(x)

        def spatial(x: jax.Array) -> jax.Array:
            sizes = segments(x.shape[-1], self.towers)
            results, start = [], 0
            for size, name in zip(sorted(set(sizes), reverse=True), ("spatial", "spatial_smaller"), strict=False):
                groups = sizes.count(size)
                part = x[..., start : start + groups * size]
                options = dict(kernel_size=self.kernel_size, dilation=self.dilation, groups=groups, **dtypes)
                results.append(Conv(groups * size, **options, name=name)(part))
                start += groups * size
            return jnp.concatenate(results, axis=-1)

        orders = {"depthwise_first": (spatial, pointwise), "pointwise_first": (pointwise, spatial)}
        first, second = lookup(orders, self.order, "order")
        x = first(x)
        if self.mid_activation is not None:
            x = lookup(ACTIVATIONS, self.mid_activation, "mid_activation")(x)
        return second(x)


def is_classifier(layer: str) -> bool:
    """Whether a top-level name of `params` is one of `classifier_head`'s; the other layers are the backbone."""
    return re.fullmatch(r"fc\d+|predictions", layer) is not None


def classifier_head(
    x: jax.Array,
    num_classes: int,
    *,
    train: bool,
    fc_layers: Sequence[int] = (),
    dropout_rate: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Optional hidden layers, dropout and logistic regression on the pooled features.

    To be called inside a module's compact `__call__`: its layers become that module's `fc1`, `fc2`,
    ... and `predictions`. `fc_layers` are the widths of the 'optional fully-connected layers' of the
    paper's figure 5, each followed by a ReLU. With `train`, dropout (section 4.3) draws from the random
    stream 'dropout'.

    Args:
      x: `[N, C]`, as `ops.global_average_pool` gives it.
      num_classes: width of the logits; with 0, `x` is returned.

    Returns:
      Logits `[N, num_classes]`, float32 (float64 where `dtype` is).
    """
    if num_classes == 0:
        return x
    for i, features in enumerate(fc_layers, start=1):
        x = nn.relu(nn.Dense(features, dtype=dtype, param_dtype=param_dtype, name=f"fc{i}")(x))
    x = nn.Dropout(dropout_rate, deterministic=not train)(x)
    # Never below float32, whatever the rest computes in: a logit's error is the loss's error.
    logits_dtype = jnp.promote_types(dtype, jnp.float32)
    return nn.Dense(num_classes, dtype=logits_dtype, param_dtype=param_dtype, name="predictions")(x)
