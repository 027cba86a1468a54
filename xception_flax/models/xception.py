"""Xception (Chollet 2016, arXiv 1610.02357v3, figure 5)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import check_fields, check_images, rate_at, scaled
from xception_flax.models.layers import Conv, PointwiseConv, SeparableConv, classifier_head, fused_separable_chain
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

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
      num_classes: width of the logits; 0 for no classifier: the pooled features `[N, 2048]` instead.
      dropout_rate: share of the pooled features that is dropped in training (section 4.3: 0.5 on
        ImageNet, none on JFT).
      residual: residual connections around blocks 2 to 13; off for the ablation of section 4.6.
      mid_activation: None, 'relu' or 'elu' between depthwise and pointwise (section 4.7).
      fc_layers: widths of hidden layers before the classifier; (4096, 4096) for the JFT variant of
        table 2.
      width: multiplies every number of channels but the classifier's.
      width_multiple: to a multiple of this they are then rounded.
      middle_repeats: blocks in the middle flow; 8 in the paper.
      output_stride: pixels of the image to a pixel of the last features: 32, or 16 or 8, where dilated
        convolutions stand for the strides left out. Weights fit all three.
      padding: of the max-pooling. 'SAME' is TensorFlow's and Keras', 'SYMMETRIC' PyTorch's: timm's
        `legacy_xception` is padding='SYMMETRIC', bn_epsilon=1e-5. They differ for even sizes.
      remat: compute the inside of each block again in the backward pass instead of keeping it.
      bn_decay: share of the old moving statistic that a step keeps (0.99: Keras; not in the paper).
      bn_frozen: training too normalizes by the moving statistics, and leaves them as they are.
      bn_epsilon: added to the variance (1e-3: the published weights need it; not in the paper).
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      ValueError: a field out of its range, images that are not `[N, H, W, C]` or too small, weights
        for another number of channels.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.5
    residual: bool = True
    mid_activation: str | None = None
    fc_layers: Sequence[int] = ()
    width: float = 1.0
    width_multiple: int = 8
    middle_repeats: int = 8
    output_stride: int = 32
    padding: str = "SAME"
    remat: bool = False
    bn_decay: float = 0.99
    bn_frozen: bool = False
    bn_epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if self.padding not in ("SAME", "SYMMETRIC"):
            raise UserError(f"model.padding must be 'SAME' or 'SYMMETRIC', got {written(self.padding)}.")

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image to a pixel of each stage."""
        return {f"stage{i}": min(2**i, self.output_stride) for i in range(1, 6)}

    def spatial_conv(self, features: int, dilation: int, name: str) -> nn.Module:
        """The convolution that the network is made of; what `XceptionTowers` puts in its place has the same shapes."""
        return SeparableConv(
            features,
            dilation=(dilation, dilation),
            mid_activation=self.mid_activation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns what a detector, a segmentation or a probe takes from the network, by name.

        `model.apply(variables, images, train=False, method="endpoints")`. 'stage1' to 'stage5': the
        last features at strides 2, 4, 8, 16 and 32 (see `strides`), all after a ReLU, as timm's
        `features_only` has them; at 299 px `[N, 147, 147, 64]`, `[N, 74, 74, 128]`, `[N, 37, 37, 256]`,
        `[N, 19, 19, 728]` and `[N, 10, 10, 2048]`. 'pooled': `[N, 2048]`. 'logits'.
        """
        check_images(images, MIN_IMAGE_SIZE, "Xception")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def channels(features: int) -> int:
            return scaled(features, self.width, self.width_multiple)

        def norm(x: jax.Array, name: str) -> jax.Array:
            options = dict(momentum=self.bn_decay, epsilon=self.bn_epsilon, **dtypes)
            return nn.BatchNorm(not train or self.bn_frozen, **options, name=f"{name}_bn")(x)

        def conv(x: jax.Array, features: int, name: str, *, strides: int = 1) -> jax.Array:
            conv = Conv(channels(features), strides=(strides, strides), padding="VALID", **dtypes, name=name)
            return norm(conv(x), name)

        def sepconvs(
            x: jax.Array, block: int, features: Sequence[int], dilation: int, *, relu_first: bool = True
        ) -> jax.Array:
            """Normalised, with a ReLU between them and, if `relu_first`, in front, but none behind."""
            convs = [
                self.spatial_conv(channels(f), dilation, f"block{block}_sepconv{i}")
                for i, f in enumerate(features, start=1)
            ]
            fusible = type(convs[0]) is SeparableConv and self.mid_activation is None
            if ops.fuses_chains() and fusible and train and not self.bn_frozen and not self.is_initializing():
                options = dict(bn_decay=self.bn_decay, bn_epsilon=self.bn_epsilon)
                return fused_separable_chain(x, convs, relu_first=relu_first, **options)
            for i, conv in enumerate(convs):
                x = norm(conv(nn.relu(x) if relu_first or i else x), conv.name)
            return x

        def residual(x: jax.Array, features: int, name: str, *, strides: int) -> jax.Array:
            conv = PointwiseConv(channels(features), strides=(strides, strides), **dtypes, name=name)
            return norm(conv(x), name)

        # A block is a function of the module so that it can be rematerialised; `stride` is that of its input.
        def downsampling_block(
            _: nn.Module, x: jax.Array, block: int, features: Sequence[int], stride: int
        ) -> jax.Array:
            rate = rate_at(stride, self.output_stride)
            # The stem has just applied its ReLU: only block 2 has none in front.
            y = sepconvs(x, block, features, rate, relu_first=block > 2)
            strides = 2 if stride < self.output_stride else 1
            if strides == 2:
                y = ops.max_pool(y, padding=self.padding)
            else:
                y = ops.atrous_max_pool(y, rate=rate, padding=self.padding)
            return y + residual(x, features[-1], f"block{block}_residual", strides=strides) if self.residual else y

        def middle_block(_: nn.Module, x: jax.Array, block: int, features: Sequence[int], stride: int) -> jax.Array:
            y = sepconvs(x, block, features, rate_at(stride, self.output_stride))
            return y + x if self.residual else y

        if self.remat:
            downsampling_block, middle_block = (
                nn.remat(block, static_argnums=(2, 3, 4)) for block in (downsampling_block, middle_block)
            )

        # Entry flow. Shapes at the paper's 299 px and width 1.
        x = images.astype(self.dtype)  #                                          [N, 299, 299, 3]
        x = nn.relu(conv(x, STEM[0], "block1_conv1", strides=2))  #               [N, 149, 149, 32]
        x = nn.relu(conv(x, STEM[1], "block1_conv2"))  #                          [N, 147, 147, 64]
        stages = [x]
        for block, features in enumerate(ENTRY_FLOW, start=2):
            x = downsampling_block(self, x, block, features, 2 ** (block - 1))  # [N, 74, 74, 128], [N, 37, 37, 256],
            stages.append(nn.relu(x))  #                                          [N, 19, 19, 728]

        for block in range(5, 5 + self.middle_repeats):  # blocks 5 to 12 in the paper
            x = middle_block(self, x, block, MIDDLE_FLOW, 16)  #                  [N, 19, 19, 728]
        stages[-1] = nn.relu(x)

        # Exit flow: blocks 13 and 14 in the paper.
        block = 5 + self.middle_repeats
        x = downsampling_block(self, x, block, EXIT_FLOW[0], 16)  #               [N, 10, 10, 1024]
        rate = rate_at(32, self.output_stride)
        x = nn.relu(sepconvs(x, block + 1, EXIT_FLOW[1], rate, relu_first=False))  # [N, 10, 10, 1536], then 2048
        stages.append(x)

        pooled = ops.global_average_pool(x)  #                                    [N, 2048]
        logits = classifier_head(  #                                              [N, num_classes]
            pooled,
            self.num_classes,
            train=train,
            fc_layers=self.fc_layers,
            dropout_rate=self.dropout_rate,
            **dtypes,
        )
        return {f"stage{i}": stage for i, stage in enumerate(stages, start=1)} | {"pooled": pooled, "logits": logits}
