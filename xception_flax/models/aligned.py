"""Aligned Xception (DeepLab v3+, Chen et al. 2018, arXiv 1802.02611, figure 4), as in timm.

It differs from Xception in these points: strided depthwise convolutions instead of max-pooling, batch
normalization also after each depthwise convolution, three separable convolutions in every block, a
deeper middle flow, symmetric padding. (DeepLab's paper also has a ReLU after each depthwise
convolution. timm, which loads DeepLab's weights, has it only in the last block, and so has this
network.) The pre-activation variants are timm's own.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import (
    MAX_LAYERS,
    add_block,
    batch_norm,
    check_fields,
    check_images,
    check_widths,
    mark_stage,
    rate_at,
    scaled,
)
from xception_flax.models.layers import Conv, DepthwiseConv, ModuleDef, PointwiseConv, classifier_head
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

MIN_IMAGE_SIZE = 32  # pixels a side; five halvings leave one

# (output channels before `width`, stride) of each block of the entry flow.
ENTRY_FLOW = ((128, 2), (256, 2), (728, 2))
ENTRY_FLOW_71 = ((128, 2), (256, 1), (256, 2), (728, 1), (728, 2))


class Block(nn.Module):
    """Three separable convolutions, the third one strided, and a shortcut around them.

    `[N, H, W, C]` -> `[N, H / 2, W / 2, features[-1]]` where `downsample` and `stride` < `output_stride`,
    else `[N, H, W, features[-1]]`. Also returns the input of the third convolution, after its ReLU.

    Attributes:
      features: output channels of each separable convolution.
      stride: of the input in the network without dilation, in pixels of the image.
      output_stride: as in `AlignedXception`.
      depthwise: makes a depthwise convolution from its strides, dilation and name.
      pointwise: makes a 1x1 convolution from its features, strides and name.
      norm: makes a batch normalization from its name.
      downsample: whether the third convolution has stride 2 in the network without dilation.
      last: whether it is the network's last block, which has no shortcut, and a ReLU after each
        normalization instead of one before each separable convolution.
    """

    features: Sequence[int]
    stride: int
    output_stride: int
    depthwise: ModuleDef
    pointwise: ModuleDef
    norm: ModuleDef
    downsample: bool = False
    last: bool = False

    @property
    def rate(self) -> int:
        """Dilation of the depthwise convolutions."""
        return rate_at(self.stride, self.output_stride)

    @property
    def strides(self) -> tuple[int, int]:
        """Strides of the third convolution and of the shortcut."""
        return (2, 2) if self.downsample and self.stride < self.output_stride else (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        before, after = (_identity, nn.relu) if self.last else (nn.relu, _identity)
        y = entering = x
        for i, features in enumerate(self.features, start=1):
            entering = before(y)
            name, strides = f"{self.name}_sepconv{i}", self.strides if i == 3 else (1, 1)
            y = self.depthwise(strides=strides, dilation=(self.rate, self.rate), name=f"{name}_depthwise")(entering)
            y = after(self.norm(name=f"{name}_depthwise_bn")(y))
            y = self.pointwise(features, name=f"{name}_pointwise")(y)
            y = after(self.norm(name=f"{name}_pointwise_bn")(y))
        if self.last:
            return y, entering
        if self.downsample or x.shape[-1] != y.shape[-1]:
            name = f"{self.name}_residual"
            x = self.pointwise(self.features[-1], strides=self.strides, name=name)(x)
            x = self.norm(name=f"{name}_bn")(x)
        return y + x, entering


class PreactivationBlock(Block):
    """`Block` with normalization and ReLU before each separable convolution, and none inside or after it.

    The first normalization and ReLU are before the shortcut too. The second result is the input of the
    third normalization.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = y = entering = nn.relu(self.norm(name=f"{self.name}_sepconv1_bn")(x))
        for i, features in enumerate(self.features, start=1):
            name, strides = f"{self.name}_sepconv{i}", self.strides if i == 3 else (1, 1)
            entering = y
            if i > 1:
                y = nn.relu(self.norm(name=f"{name}_bn")(y))
            y = self.depthwise(strides=strides, dilation=(self.rate, self.rate), name=f"{name}_depthwise")(y)
            y = self.pointwise(features, name=f"{name}_pointwise")(y)
        if self.last:
            return y, entering
        if self.downsample or x.shape[-1] != y.shape[-1]:
            x = self.pointwise(self.features[-1], strides=self.strides, name=f"{self.name}_residual")(x)
        return y + x, entering


def _identity(x: jax.Array) -> jax.Array:
    return x


class AlignedXception(nn.Module):
    """Aligned Xception with a given entry flow and a given length of the middle flow.

    `xception41`, `xception65` and `xception71` in `MODELS`, and `xception41p`, `xception65p` with
    pre-activation. Images, collections and `train` as for `Xception`.

    Attributes:
      num_classes: width of the logits; 0 for no classifier: the pooled features `[N, 2048]` instead.
      entry_flow: (channels, stride) of each block; three strides are 2, all others 1.
      middle_repeats: blocks in the middle flow.
      preactivation: normalization and ReLU before each separable convolution, and none inside it.
      dropout_rate: share of the pooled features that is dropped in training.
      width: multiplies every number of channels but the classifier's.
      width_multiple: numbers of channels are rounded to a multiple of this, after `width`.
      output_stride: stride of the last features, in pixels of the image: 32, or 16 or 8 with dilated
        convolutions in place of the last strides. Weights fit all three. (In timm, xception71 lacks
        one shortcut convolution with output_stride=8; here it has that too.)
      remat: recompute the inside of each block in the backward pass, which saves memory.
      bn_decay: share of the old moving statistic that a step keeps.
      bn_frozen: normalize by the moving statistics in training too, and leave them unchanged.
      bn_epsilon: added to the variance (1e-3 in DeepLab; 1e-5 in timm's xception41p).
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      UserError: a field is out of its range, the images are not `[N, H, W, C]` or too small, or the
        weights are for another number of channels.
    """

    num_classes: int = 1000
    entry_flow: Sequence[Sequence[int]] = ENTRY_FLOW
    middle_repeats: int = 8
    preactivation: bool = False
    dropout_rate: float = 0.0
    width: float = 1.0
    width_multiple: int = 8
    output_stride: int = 32
    remat: bool = False
    bn_decay: float = 0.99
    bn_frozen: bool = False
    bn_epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        pairs = len(self.entry_flow) <= MAX_LAYERS and all(
            isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) and n >= 1 for n in block)
            for block in self.entry_flow
        )
        if not pairs or sorted(stride for _, stride in self.entry_flow if stride > 1) != [2, 2, 2]:
            raise UserError(
                f"model.entry_flow must be (channels, stride) of blocks with strides 1 or 2, three of them 2, "
                f"got {written(self.entry_flow)}."
            )
        check_widths("model.entry_flow", [channels for channels, _ in self.entry_flow])

    @property
    def strides(self) -> dict[str, int]:
        """Stride of each stage, in pixels of the image."""
        return {f"stage{i}": min(2**i, self.output_stride) for i in range(1, 6)}

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns the features for detection, segmentation or probes, and the logits, by name.

        `model.apply(variables, images, train=False, method="endpoints")`. 'stage1' to 'stage5': the
        last features at strides 2, 4, 8, 16 and 32 (see `strides`). The first four are the inputs of
        the strided convolutions, as DeepLab's decoder and timm's `features_only` use them: after
        their ReLU, or with `preactivation` before normalization and ReLU. At 299 px
        `[N, 150, 150, 128]`, `[N, 75, 75, 256]`, `[N, 38, 38, 728]`, `[N, 19, 19, 1024]` and
        `[N, 10, 10, 2048]`. 'pooled': `[N, 2048]`. 'logits'.
        """
        check_images(images, MIN_IMAGE_SIZE, "Aligned Xception")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = batch_norm(self, train=train)
        conv, pointwise = partial(Conv, padding="SYMMETRIC", **dtypes), partial(PointwiseConv, **dtypes)
        depthwise = partial(DepthwiseConv, padding="SYMMETRIC", **dtypes)
        fields = dict(output_stride=self.output_stride, depthwise=depthwise, pointwise=pointwise, norm=norm)
        block = partial(add_block, self, PreactivationBlock if self.preactivation else Block, **fields)

        def channels(*features: int) -> tuple[int, ...]:
            return tuple(scaled(f, self.width, self.width_multiple) for f in features)

        # Entry flow. Shapes at 299 px and width 1.
        x = images.astype(self.dtype)  #                                         N x 299 x 299 x 3
        x = conv(*channels(32), strides=(2, 2), name="block1_conv1")(x)
        x = nn.relu(norm(name="block1_conv1_bn")(x))  #                          N x 150 x 150 x 32
        x = conv(*channels(64), name="block1_conv2")(x)  #                       N x 150 x 150 x 64
        if not self.preactivation:
            x = nn.relu(norm(name="block1_conv2_bn")(x))
        stages, stride = [], 2
        for i, (features, strides) in enumerate(self.entry_flow, start=2):  #    in xception41 and xception65:
            widths = channels(features, features, features)  #                   N x 75 x 75 x 128
            if strides == 2:
                x = mark_stage(self, f"stage{len(stages) + 1}", x)
            fields = dict(stride=stride, downsample=strides == 2)  #             N x 38 x 38 x 256
            x, entering = block(widths, **fields, name=f"block{i}")(x)  #        N x 19 x 19 x 728
            if strides == 2:
                stages.append(entering)
                stride *= 2

        # Middle flow.
        widths = channels(728, 728, 728)
        for _ in range(self.middle_repeats):
            i += 1
            x, _ = block(widths, stride=16, name=f"block{i}")(x)  #              N x 19 x 19 x 728

        # Exit flow.
        x = mark_stage(self, "stage4", x)
        widths = channels(728, 1024, 1024)
        x, entering = block(widths, stride=16, downsample=True, name=f"block{i + 1}")(x)  # N x 10 x 10 x 1024
        widths = channels(1536, 1536, 2048)
        x, _ = block(widths, stride=32, last=True, name=f"block{i + 2}")(x)  #   N x 10 x 10 x 2048
        stages += [entering, x]

        if self.preactivation:
            x = nn.relu(x)
        x = mark_stage(self, "stage5", x)
        pooled = ops.global_average_pool(x)  #                                   N x 2048
        logits = classifier_head(pooled, self.num_classes, train=train, dropout_rate=self.dropout_rate, **dtypes)
        return {f"stage{i}": stage for i, stage in enumerate(stages, start=1)} | {"pooled": pooled, "logits": logits}
