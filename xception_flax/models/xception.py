"""Xception (Chollet 2016, arXiv 1610.02357v3, figure 5)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax import ops
from xception_flax.layers import ACTIVATIONS, Conv, PointwiseConv, SeparableConv, classifier_head
from xception_flax.lookup import lookup

MIN_IMAGE_SIZE = 32  # pixels a side; five halvings leave one

# Output channels, before `width`, of each convolution of a block.
STEM = (32, 64)
ENTRY_FLOW = ((128, 128), (256, 256), (728, 728))  # blocks 2 to 4, each with stride 2
MIDDLE_FLOW = (728, 728, 728)  # repeated
EXIT_FLOW = ((728, 1024), (1536, 2048))  # the block with stride 2, then the last without residual


class Xception(nn.Module):
    """Xception as in the paper's figure 5; names of modules as in the published Keras weights.

    `model.apply(variables, images, train=False)`: images `[N, H, W, C]`, H and W at least 32, any
    C, normalised as the recipe says ([-1, 1] for the published weights) -> logits
    `[N, num_classes]`, float32. Collections: `params`, `batch_stats`. While `train` is true, batch
    normalization uses the statistics of the batch (of the *global* batch, under `jit` over sharded
    arrays), updates `batch_stats`, and dropout takes the random stream 'dropout'.

    Attributes:
      num_classes: width of the logits.
      dropout_rate: share of the pooled features that is dropped in training (section 4.3: 0.5 on
        ImageNet, none on JFT).
      residual: residual connections around blocks 2 to 13; off for the ablation of section 4.6.
      mid_activation: None, 'relu' or 'elu' between depthwise and pointwise (section 4.7).
      fc_layers: widths of hidden layers before the classifier; (4096, 4096) for the JFT variant of
        table 2.
      width: multiplies every number of channels but the classifier's (then rounded to a multiple of 8).
      middle_repeats: blocks in the middle flow; 8 in the paper.
      bn_decay: share of the old moving statistic that a step keeps (0.99: Keras; not in the paper).
      bn_epsilon: added to the variance (1e-3: the published weights need it; not in the paper).
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      ValueError: a field out of its range, images that are not `[N, H, W, C]` or too small.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.5
    residual: bool = True
    mid_activation: str | None = None
    fc_layers: Sequence[int] = ()
    width: float = 1.0
    middle_repeats: int = 8
    bn_decay: float = 0.99
    bn_epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}.")
        if self.mid_activation is not None:
            lookup(ACTIVATIONS, self.mid_activation, "mid_activation")
        if any(not isinstance(features, int) or features < 1 for features in self.fc_layers):
            raise ValueError(f"fc_layers must be positive integers, got {tuple(self.fc_layers)}.")
        if self.bn_epsilon <= 0:
            raise ValueError(f"bn_epsilon must be positive, got {self.bn_epsilon}.")
        if self.width <= 0:
            raise ValueError(f"width must be positive, got {self.width}.")
        if self.middle_repeats < 0:
            raise ValueError(f"middle_repeats must not be negative, got {self.middle_repeats}.")
        if not 0 <= self.bn_decay < 1:
            raise ValueError(f"bn_decay, the share kept, must be in [0, 1), got {self.bn_decay}.")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        _check_images(images)
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def channels(features: int) -> int:
            return max(8, 8 * round(features * self.width / 8))

        def norm(x: jax.Array, name: str) -> jax.Array:
            bn = nn.BatchNorm(not train, momentum=self.bn_decay, epsilon=self.bn_epsilon, **dtypes, name=f"{name}_bn")
            return bn(x)

        def conv(x: jax.Array, features: int, name: str, *, strides: int = 1) -> jax.Array:
            conv = Conv(channels(features), strides=(strides, strides), padding="VALID", **dtypes, name=name)
            return norm(conv(x), name)

        def sepconv(x: jax.Array, features: int, name: str) -> jax.Array:
            conv = SeparableConv(channels(features), mid_activation=self.mid_activation, **dtypes, name=name)
            return norm(conv(x), name)

        def residual(x: jax.Array, features: int, name: str) -> jax.Array:
            conv = PointwiseConv(channels(features), strides=(2, 2), **dtypes, name=name)
            return norm(conv(x), name)

        def downsampling_block(x: jax.Array, features: Sequence[int], name: str, *, leading_relu: bool) -> jax.Array:
            y = x
            for i, f in enumerate(features, start=1):
                y = nn.relu(y) if leading_relu or i > 1 else y
                y = sepconv(y, f, f"{name}_sepconv{i}")
            y = ops.max_pool(y)
            return y + residual(x, features[-1], f"{name}_residual") if self.residual else y

        def middle_block(x: jax.Array, name: str) -> jax.Array:
            y = x
            for i, f in enumerate(MIDDLE_FLOW, start=1):
                y = sepconv(nn.relu(y), f, f"{name}_sepconv{i}")
            return y + x if self.residual else y

        # Entry flow. Shapes at the paper's 299 px and width 1.
        x = images.astype(self.dtype)  #                                                     [N, 299, 299, 3]
        x = nn.relu(conv(x, STEM[0], "block1_conv1", strides=2))  #                          [N, 149, 149, 32]
        x = nn.relu(conv(x, STEM[1], "block1_conv2"))  #                                     [N, 147, 147, 64]
        # The stem has just applied its ReLU: only block 2 has none in front.
        x = downsampling_block(x, ENTRY_FLOW[0], "block2", leading_relu=False)  #            [N, 74, 74, 128]
        x = downsampling_block(x, ENTRY_FLOW[1], "block3", leading_relu=True)  #             [N, 37, 37, 256]
        x = downsampling_block(x, ENTRY_FLOW[2], "block4", leading_relu=True)  #             [N, 19, 19, 728]

        for block in range(5, 5 + self.middle_repeats):  # blocks 5 to 12 in the paper
            x = middle_block(x, f"block{block}")  #                                          [N, 19, 19, 728]

        # Exit flow: blocks 13 and 14 in the paper.
        block = 5 + self.middle_repeats
        x = downsampling_block(x, EXIT_FLOW[0], f"block{block}", leading_relu=True)  #       [N, 10, 10, 1024]
        for i, f in enumerate(EXIT_FLOW[1], start=1):
            x = nn.relu(sepconv(x, f, f"block{block + 1}_sepconv{i}"))  #                    [N, 10, 10, 2048]

        return classifier_head(  #                                                           [N, num_classes]
            x,
            self.num_classes,
            train=train,
            fc_layers=self.fc_layers,
            dropout_rate=self.dropout_rate,
            **dtypes,
        )


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be [N, H, W, C], got shape {images.shape}.")
    if min(images.shape[1:3]) < MIN_IMAGE_SIZE:
        height, width = images.shape[1:3]
        raise ValueError(
            f"Xception needs images of at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, "
            f"got {height} x {width}; raise the recipe's data.image_size."
        )
