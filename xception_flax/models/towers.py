"""The Inception hypothesis as code: the modules of the paper's figures 1 to 4, and Xception at any point between.

The hypothesis (section 1.1): correlations across channels and across space are decoupled enough that
it is better not to map them jointly. How far a network follows it is the number of segments of the
channels with a spatial convolution of their own (sections 1.2 and 5: 'appears not to have been explored').
"""

from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.costs import list_layers
from xception_flax.models.layers import ACTIVATIONS, Conv, ModuleDef, PointwiseConv, TowerConv, segments
from xception_flax.models.xception import Xception
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup

# As in the figures, there is no normalization. Figure 1 has a ReLU after each convolution, as in
# Inception V3. Figures 2 to 4, which are about equivalence, have one only between 1x1 and 3x3.


class InceptionModule(nn.Module):
    """Figure 1: a canonical module of Inception V3. `[N, H, W, C]` -> `[N, H, W, 4 * features]`.

    Attributes:
      features: output channels of each of the four towers.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def conv(x: jax.Array, size: int, name: str) -> jax.Array:
            return nn.relu(Conv(self.features, (size, size), **dtypes, name=name)(x))

        towers = [
            conv(x, 1, "tower1_1x1"),
            conv(conv(x, 1, "tower2_1x1"), 3, "tower2_3x3"),
            conv(conv(conv(x, 1, "tower3_1x1"), 3, "tower3_3x3_1"), 3, "tower3_3x3_2"),
            conv(ops.average_pool(x), 1, "tower4_1x1"),
        ]  #                                                    4 times [N, H, W, features]
        return jnp.concatenate(towers, axis=-1)  #              [N, H, W, 4 * features]


class SimplifiedInceptionModule(nn.Module):
    """Figure 2: one size of convolution, no pooling. `[N, H, W, C]` -> `[N, H, W, features]`.

    Attributes:
      features: channels of the result, divided among the towers as `layers.segments` does.
      towers: from 1 to `features`; 3 in the figure.
      mid_activation: between the 1x1 and the 3x3 convolutions: None, 'relu' or 'elu'.

    Raises:
      UserError: `towers` is out of its range.
    """

    features: int
    towers: int | None = 3
    mid_activation: str | None = "relu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes, towers = dict(dtype=self.dtype, param_dtype=self.param_dtype), []
        for i, size in enumerate(segments(self.features, self.towers), start=1):
            y = PointwiseConv(size, **dtypes, name=f"tower{i}_1x1")(x)  #   [N, H, W, size]
            if self.mid_activation is not None:
                y = lookup(ACTIVATIONS, self.mid_activation, "mid_activation")(y)
            towers.append(Conv(size, **dtypes, name=f"tower{i}_3x3")(y))  # [N, H, W, size]
        return jnp.concatenate(towers, axis=-1)  #                          [N, H, W, features]


class SegmentedInceptionModule(TowerConv):
    """Figure 3, strictly equivalent to figure 2: one large 1x1, then a 3x3 in each of its segments.

    `[N, H, W, C]` -> 1x1 `[N, H, W, features]` -> parallel 3x3 `[N, H, W, features]`. `merge_towers`
    makes its weights from those of figure 2.
    """

    towers: int | None = 3
    order: str = "pointwise_first"
    mid_activation: str | None = "relu"


class ExtremeInceptionModule(SegmentedInceptionModule):
    """Figure 4: one 3x3 for each output channel of the 1x1. `[N, H, W, C]` -> `[N, H, W, features]`.

    It differs from the depthwise separable convolution in the order and the non-linearity (section 1.2).
    """

    towers: int | None = None


def merge_towers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights of figure 2 rearranged for figure 3, so that it computes the same.

    Args:
      params: collection 'params' of a `SimplifiedInceptionModule`.

    Returns:
      Collection 'params' of a `SegmentedInceptionModule` with as many towers.
    """
    count = len(params) // 2
    pointwise = [params[f"tower{i}_1x1"]["kernel"] for i in range(1, count + 1)]
    spatial = [params[f"tower{i}_3x3"]["kernel"] for i in range(1, count + 1)]
    merged = {"pointwise": {"kernel": jnp.concatenate(pointwise, axis=-1)}}
    larger = [kernel for kernel in spatial if kernel.shape == spatial[0].shape]
    for name, kernels in (("spatial", larger), ("spatial_smaller", spatial[len(larger) :])):
        if kernels:
            merged[name] = {"kernel": jnp.concatenate(kernels, axis=-1)}
    return merged


class XceptionTowers(Xception):
    """Xception with a `TowerConv` in place of every separable convolution, to compare numbers of towers.

    `towers=None`, one a channel, is Xception itself; `towers=1` is the same network with regular
    convolutions (each next to a 1x1); an Inception module has 3 or 4. The other fields are those of
    `Xception`, but numbers of channels may be any integers, so that `equal_width` is exact.

    Attributes:
      towers: from 1 to the fewest channels of a spatial convolution (at width 1: 64, or 128 with the
        pointwise convolution first), or None.
      order: 'depthwise_first' (separable convolution) or 'pointwise_first' (Inception).
    """

    towers: int | None = None
    order: str = "depthwise_first"
    width_multiple: int = 1

    @property
    def spatial_conv(self) -> ModuleDef:
        """Makes a convolution from its features, dilation and name."""
        return partial(
            TowerConv,
            towers=self.towers,
            order=self.order,
            mid_activation=self.mid_activation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


def equal_width(towers: int | None, *, order: str = "depthwise_first", keep: str = "parameters") -> float:
    """Returns the `width` at which `XceptionTowers` costs as much as Xception, within 1 %.

    Fewer towers cost more: each spatial convolution has `9 * (sum of squares of its segments)` weights.

    Args:
      towers: as in `XceptionTowers`.
      order: as in `XceptionTowers`.
      keep: 'parameters' (trainable, at 1000 classes) or 'macs' (multiply-adds at 299 px).

    Raises:
      UserError: a value is out of its range, or any network with room for the towers costs more.
    """
    quantity = lookup({"parameters": attrgetter("parameters"), "macs": attrgetter("macs")}, keep, "keep")

    def ratio(width: float) -> float:
        network = XceptionTowers(towers=towers, order=order, width=width)
        return sum(map(quantity, list_layers(network, image_shape))) / target

    image_shape = (299, 299, 3)
    target = sum(map(quantity, list_layers(Xception(), image_shape)))
    # The narrowest layer must have a channel for each tower, which sets the least width.
    narrowest = {"depthwise_first": 64, "pointwise_first": 128}  # input and output of block2_sepconv1
    channels = lookup(narrowest, order, "order")
    least = len(segments(channels, towers)) / channels
    low, width, high = least, 1.0, 1.0
    while abs((found := ratio(width)) - 1) > 0.009:
        low, high = (width, high) if found < 1 else (low, width)
        if high - low < 1e-4:
            raise UserError(f"{towers} towers need a width of {least} or more, at which they cost more than Xception.")
        width = round((low + high) / 2, 4)
    return width
