"""Linen modules that the networks are made of: convolutions, the separable convolution, the classifier head."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax import ops
from xception_flax.lookup import lookup

# Neither the paper nor its code states an initialiser; with batch normalization after every
# convolution only the direction of a kernel matters. Variance 1 / fan_in keeps the signal's size
# where a kernel is followed by another kernel (depthwise, then pointwise).
kernel_init = nn.initializers.lecun_normal()

# What may stand between the depthwise and the pointwise convolution (paper, section 4.7, figure 10).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "elu": nn.elu}


class Conv(nn.Module):
    """Dense 2-D convolution without bias: `[N, H, W, C]` -> `[N, H', W', features]`.

    Parameters: `kernel` `[kh, kw, C, features]`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return ops.convolution(x, kernel, strides=self.strides, padding=self.padding)


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
        shape = (*self.kernel_size, 1, x.shape[-1] * self.multiplier)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return ops.depthwise_convolution(x, kernel, strides=self.strides, padding=self.padding, dilation=self.dilation)


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
        kernel = self.param("kernel", kernel_init, (1, 1, x.shape[-1], self.features), self.param_dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return ops.pointwise_convolution(x, kernel, strides=self.strides)


class SeparableConv(nn.Module):
    """Depthwise separable convolution: depthwise, then pointwise (paper, section 3).

    `[N, H, W, C]` -> `[N, H, W, features]`. Between the two there is no batch normalization, and
    no non-linearity unless `mid_activation` ('relu', 'elu') asks for the variants of section 4.7.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    mid_activation: str | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = DepthwiseConv(self.kernel_size, **dtypes, name="depthwise")(x)
        if self.mid_activation is not None:
            x = lookup(ACTIVATIONS, self.mid_activation, "mid_activation")(x)
        return PointwiseConv(self.features, **dtypes, name="pointwise")(x)


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
    """Global average pooling, optional hidden layers, dropout, logistic regression.

    To be called inside a module's compact `__call__`: its layers become that module's `fc1`, `fc2`,
    ... and `predictions`. `fc_layers` are the widths of the 'optional fully-connected layers' of the
    paper's figure 5, each followed by a ReLU. Dropout (section 4.3) takes the random stream
    'dropout' while `train` is true.

    Args:
      x: `[N, H, W, C]`.

    Returns:
      Logits `[N, num_classes]`, float32 (float64 where `dtype` is).
    """
    x = ops.global_average_pool(x)
    for i, features in enumerate(fc_layers, start=1):
        x = nn.relu(nn.Dense(features, dtype=dtype, param_dtype=param_dtype, name=f"fc{i}")(x))
    x = nn.Dropout(dropout_rate, deterministic=not train)(x)
    # Never below float32, whatever the rest computes in: a logit's error is the loss's error.
    logits_dtype = jnp.promote_types(dtype, jnp.float32)
    return nn.Dense(num_classes, dtype=logits_dtype, param_dtype=param_dtype, name="predictions")(x)
