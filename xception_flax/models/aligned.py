"""Aligned Xception (DeepLab v3+, Chen et al. 2018, arXiv 1802.02611, figure 4), as timm has it.

What it changes in Xception: strided depthwise convolutions instead of max-pooling, batch
normalization after each depthwise convolution too, three separable convolutions in every block, a
deeper middle flow, symmetric padding. (DeepLab's paper has a ReLU after each depthwise convolution as
well; timm, which loads DeepLab's weights, has it in the last block only, and so is it here.) The
pre-activation variants are timm's own.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import MAX_LAYERS, check_fields, check_images, check_widths, rate_at, scaled
from xception_flax.models.layers import Conv, DepthwiseConv, PointwiseConv, classifier_head
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

MIN_IMAGE_SIZE = 32  # pixels a side; five halvings leave one

# Output channels, before `width`; (channels, stride) of each block of the entry flow.
STEM = (32, 64)
ENTRY_FLOW = ((128, 2), (256, 2), (728, 2))
ENTRY_FLOW_71 = ((128, 2), (256, 1), (256, 2), (728, 1), (728, 2))
MIDDLE_FLOW = (728, 728, 728)  # repeated
EXIT_FLOW = ((728, 1024, 1024), (1536, 1536, 2048))  # the block with stride 2, then the last without residual


class AlignedXception(nn.Module):
    """Aligned Xception from the strides of its entry flow and the length of its middle flow.

    `xception41`, `xception65` and `xception71` in `MODELS`, and `xception41p`, `xception65p` with
    pre-activation. Images, collections and `train` as for `Xception`.

    Attributes:
      num_classes: width of the logits; 0 for no classifier: the pooled features `[N, 2048]` instead.
      entry_flow: (channels, stride) of its blocks; three strides of 2 in all.
      middle_repeats: blocks in the middle flow.
      preactivation: normalization and ReLU before each separable convolution, and none in it.
      dropout_rate: share of the pooled features that is dropped in training.
      width: multiplies every number of channels but the classifier's.
      width_multiple: to a multiple of this they are then rounded.
      output_stride: pixels of the image to a pixel of the last features: 32, or 16 or 8, where dilated
        convolutions stand for the strides left out. Weights fit all three. (In timm, xception71 with
        output_stride=8 lacks one shortcut convolution that it has with 16 and 32; here it stays.)
      remat: compute the inside of each block again in the backward pass instead of keeping it.
      bn_decay: share of the old moving statistic that a step keeps.
      bn_frozen: training too normalizes by the moving statistics, and leaves them as they are.
      bn_epsilon: added to the variance (1e-3 in DeepLab; 1e-5 in timm's xception41p).
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      ValueError: a field out of its range, images that are not `[N, H, W, C]` or too small, weights
        for another number of channels.
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
        """Pixels of the image to a pixel of each stage."""
        return {f"stage{i}": min(2**i, self.output_stride) for i in range(1, 6)}

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns what a detector, a segmentation or a probe takes from the network, by name.

        `model.apply(variables, images, train=False, method="endpoints")`. 'stage1' to 'stage5': the
        last features at strides 2, 4, 8, 16 and 32 (see `strides`). The first four are the inputs of
        the strided convolutions (DeepLab's decoder and timm's `features_only` take these), after
        their ReLU, or before normalization and ReLU with `preactivation`; at 299 px
        `[N, 150, 150, 128]`, `[N, 75, 75, 256]`, `[N, 38, 38, 728]`, `[N, 19, 19, 1024]` and
        `[N, 10, 10, 2048]`. 'pooled': `[N, 2048]`. 'logits'.
        """
        check_images(images, MIN_IMAGE_SIZE, "Aligned Xception")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def channels(features: int) -> int:
            return scaled(features, self.width, self.width_multiple)

        def norm(x: jax.Array, name: str) -> jax.Array:
            options = dict(momentum=self.bn_decay, epsilon=self.bn_epsilon, **dtypes)
            return nn.BatchNorm(not train or self.bn_frozen, **options, name=f"{name}_bn")(x)

        def conv(x: jax.Array, features: int, name: str, *, strides: int = 1) -> jax.Array:
            options = dict(strides=(strides, strides), padding="SYMMETRIC")
            return Conv(channels(features), **options, **dtypes, name=name)(x)

        def depthwise(x: jax.Array, name: str, *, strides: int, rate: int) -> jax.Array:
            options = dict(strides=(strides, strides), padding="SYMMETRIC", dilation=(rate, rate))
            return DepthwiseConv(**options, **dtypes, name=f"{name}_depthwise")(x)

        def pointwise(x: jax.Array, features: int, name: str, *, strides: int = 1) -> jax.Array:
            return PointwiseConv(channels(features), strides=(strides, strides), **dtypes, name=name)(x)

        def same(x: jax.Array) -> jax.Array:
            return x

        def block(
            _: nn.Module, x: jax.Array, number: int, features: Sequence[int], strided: bool, stride: int, last: bool
        ) -> tuple[jax.Array, jax.Array]:
            """Returns the block's result and what enters its third convolution; `stride` is that of its input."""
            rate = rate_at(stride, self.output_stride)
            strides = 2 if strided and stride < self.output_stride else 1
            if self.preactivation:  # once, for the convolutions and for the shortcut
                x = nn.relu(norm(x, f"block{number}_sepconv1"))
            y = tapped = x
            for i, f in enumerate(features, start=1):
                name = f"block{number}_sepconv{i}"
                if self.preactivation:
                    tapped = y
                    y = nn.relu(norm(y, name)) if i > 1 else y
                    y = depthwise(y, name, strides=strides if i == 3 else 1, rate=rate)
                    y = pointwise(y, f, f"{name}_pointwise")
                else:
                    # Every block has its ReLUs in front, but the last: that one has no residual to
                    # add to, and has them behind each normalization.
                    before, after = (same, nn.relu) if last else (nn.relu, same)
                    tapped = y = before(y)
                    y = depthwise(y, name, strides=strides if i == 3 else 1, rate=rate)
                    y = after(norm(y, f"{name}_depthwise"))
                    y = after(norm(pointwise(y, f, f"{name}_pointwise"), f"{name}_pointwise"))
            if last:
                return y, tapped
            if strided or x.shape[-1] != y.shape[-1]:
                name = f"block{number}_residual"
                x = pointwise(x, features[-1], name, strides=strides)
                x = x if self.preactivation else norm(x, name)
            return y + x, tapped

        if self.remat:
            block = nn.remat(block, static_argnums=(2, 3, 4, 5, 6))

        # Entry flow. Shapes at 299 px and width 1.
        x = images.astype(self.dtype)  #                                            [N, 299, 299, 3]
        x = nn.relu(norm(conv(x, STEM[0], "block1_conv1", strides=2), "block1_conv1"))  # [N, 150, 150, 32]
        x = conv(x, STEM[1], "block1_conv2")  #                                     [N, 150, 150, 64]
        x = x if self.preactivation else nn.relu(norm(x, "block1_conv2"))
        stride, stages = 2, []
        for number, (features, strides) in enumerate(self.entry_flow, start=2):  #  xception41 and 65:
            x, tapped = block(self, x, number, (features,) * 3, strides == 2, stride, False)
            if strides == 2:  #                                                     [N, 75, 75, 128], [N, 38, 38, 256],
                stages.append(tapped)  #                                            [N, 19, 19, 728]
                stride *= 2

        for _ in range(self.middle_repeats):
            number += 1
            x, _ = block(self, x, number, MIDDLE_FLOW, False, stride, False)  #     [N, 19, 19, 728]

        # Exit flow.
        x, tapped = block(self, x, number + 1, EXIT_FLOW[0], True, stride, False)  # [N, 10, 10, 1024]
        x, _ = block(self, x, number + 2, EXIT_FLOW[1], False, 2 * stride, True)  # [N, 10, 10, 2048]
        stages += [tapped, x]
        if self.preactivation:
            x = nn.relu(x)

        pooled = ops.global_average_pool(x)  #                                      [N, 2048]
        logits = classifier_head(pooled, self.num_classes, train=train, dropout_rate=self.dropout_rate, **dtypes)
        return {f"stage{i}": stage for i, stage in enumerate(stages, start=1)} | {"pooled": pooled, "logits": logits}
