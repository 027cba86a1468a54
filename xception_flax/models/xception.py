"""Xception (Chollet 2016, arXiv 1610.02357v3, figure 5)."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import (
    add_block,
    batch_norm,
    check_fields,
    check_images,
    mark_stage,
    rate_at,
    scaled,
)
from xception_flax.models.layers import Conv, ModuleDef, PointwiseConv, SeparableConv, classifier_head, separable_units
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

MIN_IMAGE_SIZE = 32  # pixels a side; five halvings leave one


class Block(nn.Module):
    """Separable convolutions, then max-pooling where `pool_strides` are given, and a shortcut around both (figure 5).

    `[N, H, W, C]` -> `[N, H / stride, W / stride, features[-1]]`. The shortcut is a 1x1 convolution where there is
    max-pooling, else the identity, for which `features[-1]` is C.

    Attributes:
      features: output channels of each separable convolution.
      rate: dilation of the separable convolutions and of the max-pooling.
      sepconv: makes a separable convolution from its features, dilation and name.
      pointwise: makes a 1x1 convolution from its features, strides and name.
      norm: makes a batch normalization from its name.
      padding: of the max-pooling.
      pool_strides: of the max-pooling: (2, 2), or (1, 1) where dilation replaces them; None for no max-pooling.
      relu_first: whether the first convolution has a ReLU before it, as the others do.
      residual: whether there is a shortcut.
    """

    features: Sequence[int]
    rate: int
    sepconv: ModuleDef
    pointwise: ModuleDef
    norm: ModuleDef
    padding: str
    pool_strides: tuple[int, int] | None = None
    relu_first: bool = True
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = dict(rate=self.rate, relu_first=self.relu_first, name=f"{self.name}_sepconv")
        options |= dict(pool_padding=self.padding if self.pool_strides == (2, 2) else None)
        y = separable_units(x, self.features, self.sepconv, self.norm, **options)
        if self.pool_strides == (1, 1):
            y = ops.atrous_max_pool(y, rate=self.rate, padding=self.padding)
        if not self.residual:
            return y
        if self.pool_strides is not None:
            name = f"{self.name}_residual"
            x = self.norm(name=f"{name}_bn")(self.pointwise(self.features[-1], strides=self.pool_strides, name=name)(x))
        return y + x


class Xception(nn.Module):
    """Xception as in the paper's figure 5; names of modules as in the published Keras weights.

    `model.apply(variables, images, train=False)`: images `[N, H, W, C]`, H and W at least 32, any
    C, normalized as the recipe says ([-1, 1] for the published weights) -> logits
    `[N, num_classes]`, float32. Collections: `params`, `batch_stats`. With `train`, batch normalization
    uses the statistics of the batch (the *global* batch, under `jit` over sharded arrays) and updates
    `batch_stats`, and dropout draws from the random stream 'dropout'.

    Attributes:
      num_classes: width of the logits; 0 for no classifier: the pooled features `[N, 2048]` instead.
      dropout_rate: share of the pooled features that is dropped in training (section 4.3: 0.5 on
        ImageNet, none on JFT).
      residual: residual connections around blocks 2 to 13; off for the ablation of section 4.6.
      mid_activation: None, 'relu' or 'elu' between depthwise and pointwise (section 4.7).
      fc_layers: widths of hidden layers before the classifier; (4096, 4096) for the JFT variant of
        table 2.
      width: multiplies every number of channels but the classifier's.
      width_multiple: numbers of channels are rounded to a multiple of this, after `width`.
      middle_repeats: blocks in the middle flow; 8 in the paper.
      output_stride: stride of the last features, in pixels of the image: 32, or 16 or 8 with dilated
        convolutions in place of the last strides. Weights fit all three.
      padding: of the max-pooling: 'SAME' (TensorFlow and Keras) or 'SYMMETRIC' (PyTorch), which differ for
        even sizes. In timm, `legacy_xception` is padding='SYMMETRIC', bn_epsilon=1e-5.
      remat: recompute the inside of each block in the backward pass, which saves memory.
      bn_decay: share of the old moving statistic that a step keeps (0.99: Keras; not in the paper).
      bn_frozen: normalize by the moving statistics in training too, and leave them unchanged.
      bn_epsilon: added to the variance (1e-3: the published weights need it; not in the paper).
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      UserError: a field is out of its range, the images are not `[N, H, W, C]` or too small, or the
        weights are for another number of channels.
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
        """Stride of each stage, in pixels of the image."""
        return {f"stage{i}": min(2**i, self.output_stride) for i in range(1, 6)}

    @property
    def spatial_conv(self) -> ModuleDef:
        """Makes a convolution from features, dilation and name; `XceptionTowers` has another with the same shapes."""
        return partial(
            SeparableConv, mid_activation=self.mid_activation, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns the features for detection, segmentation or probes, and the logits, by name.

        `model.apply(variables, images, train=False, method="endpoints")`. 'stage1' to 'stage5': the
        last features at strides 2, 4, 8, 16 and 32 (see `strides`), all after a ReLU, as timm's
        `features_only` has them; at 299 px `[N, 147, 147, 64]`, `[N, 74, 74, 128]`, `[N, 37, 37, 256]`,
        `[N, 19, 19, 728]` and `[N, 10, 10, 2048]`. 'pooled': `[N, 2048]`. 'logits'.
        """
        check_images(images, MIN_IMAGE_SIZE, "Xception")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = batch_norm(self, train=train)
        conv, pointwise = partial(Conv, padding="VALID", **dtypes), partial(PointwiseConv, **dtypes)
        layers = dict(sepconv=self.spatial_conv, pointwise=pointwise, norm=norm)
        common = layers | dict(padding=self.padding, residual=self.residual)

        def channels(*features: int) -> tuple[int, ...]:
            return tuple(scaled(f, self.width, self.width_multiple) for f in features)

        def block(i: int, *features: int, stride: int, pool: bool = False, **fields: bool) -> nn.Module:
            # `stride` is that of the block's input in the network without dilation, in pixels of the image.
            rate, strides = rate_at(stride, self.output_stride), (2, 2) if stride < self.output_stride else (1, 1)
            given = common | dict(pool_strides=strides if pool else None) | fields
            return add_block(self, Block, channels(*features), rate, **given, name=f"block{i}")

        # Entry flow. Shapes at the paper's 299 px and width 1.
        x = images.astype(self.dtype)  #                                               N x 299 x 299 x 3
        x = conv(*channels(32), strides=(2, 2), name="block1_conv1")(x)
        x = nn.relu(norm(name="block1_conv1_bn")(x))  #                                N x 149 x 149 x 32
        x = conv(*channels(64), name="block1_conv2")(x)
        x = nn.relu(norm(name="block1_conv2_bn")(x))
        x = stage1 = mark_stage(self, "stage1", x)  #                                  N x 147 x 147 x 64
        x = block(2, 128, 128, stride=2, pool=True, relu_first=False)(x)  #            N x 74 x 74 x 128
        x = mark_stage(self, "stage2", x)
        stage2 = nn.relu(x)
        x = block(3, 256, 256, stride=4, pool=True)(x)  #                              N x 37 x 37 x 256
        x = mark_stage(self, "stage3", x)
        stage3 = nn.relu(x)
        x = block(4, 728, 728, stride=8, pool=True)(x)  #                              N x 19 x 19 x 728

        # Middle flow: blocks 5 to 12 in the paper.
        for i in range(5, 5 + self.middle_repeats):
            x = block(i, 728, 728, 728, stride=16)(x)  #                               N x 19 x 19 x 728
        x = mark_stage(self, "stage4", x)
        stage4 = nn.relu(x)

        # Exit flow: blocks 13 and 14 in the paper. The backward pass begins with the last block, which is not computed
        # again: that would save no memory.
        i = 5 + self.middle_repeats
        x = block(i, 728, 1024, stride=16, pool=True)(x)  #                            N x 10 x 10 x 1024
        x = block(i + 1, 1536, 2048, stride=32, relu_first=False, residual=False, remat=False)(x)
        stage5 = mark_stage(self, "stage5", nn.relu(x))  #                             N x 10 x 10 x 2048

        pooled = ops.global_average_pool(stage5)  #                                    N x 2048
        options = dict(fc_layers=self.fc_layers, dropout_rate=self.dropout_rate, **dtypes)
        logits = classifier_head(pooled, self.num_classes, train=train, **options)  #  N x num_classes
        stages = dict(stage1=stage1, stage2=stage2, stage3=stage3, stage4=stage4, stage5=stage5)
        return stages | {"pooled": pooled, "logits": logits}
