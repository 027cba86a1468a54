"""Xception (Chollet 2016, arXiv 1610.02357v3, figure 5)."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import add_block, batch_norm, check_fields, check_images, rate_at, scaled
from xception_flax.models.layers import Conv, ModuleDef, PointwiseConv, SeparableConv, classifier_head, separable_units
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

MIN_IMAGE_SIZE = 32  # pixels a side; five halvings leave one


class DownsamplingBlock(nn.Module):
    """Separable convolutions, max-pooling, and a 1x1 convolution as shortcut: entry and exit flow of figure 5.

    `[N, H, W, C]` -> `[N, H / 2, W / 2, features[-1]]`; H and W stay where `output_stride` is reached.

    Attributes:
      features: output channels of each separable convolution.
      stride: of the input in the network without dilation, in pixels of the image.
      output_stride: as in `Xception`.
      sepconv: makes a separable convolution from its features, dilation and name.
      pointwise: makes a 1x1 convolution from its features, strides and name.
      norm: makes a batch normalization from its name.
      relu_first: whether the first convolution has a ReLU before it, as the others do.
      residual: whether there is a shortcut.
      padding: of the max-pooling.
    """

    features: Sequence[int]
    stride: int
    output_stride: int
    sepconv: ModuleDef
    pointwise: ModuleDef
    norm: ModuleDef
    relu_first: bool = True
    residual: bool = True
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rate = rate_at(self.stride, self.output_stride)
        options = dict(rate=rate, relu_first=self.relu_first, name=f"{self.name}_sepconv")
        y = separable_units(x, self.features, self.sepconv, self.norm, **options)
        if self.stride < self.output_stride:
            strides, y = (2, 2), ops.max_pool(y, padding=self.padding)
        else:
            strides, y = (1, 1), ops.atrous_max_pool(y, rate=rate, padding=self.padding)
        if not self.residual:
            return y
        name = f"{self.name}_residual"
        return y + self.norm(name=f"{name}_bn")(self.pointwise(self.features[-1], strides=strides, name=name)(x))


class MiddleBlock(nn.Module):
    """Separable convolutions with an identity shortcut: middle flow of figure 5. `[N, H, W, C]` -> `[N, H, W, C]`.

    The attributes are those of `DownsamplingBlock`; `features[-1]` is C.
    """

    features: Sequence[int]
    stride: int
    output_stride: int
    sepconv: ModuleDef
    norm: ModuleDef
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = dict(rate=rate_at(self.stride, self.output_stride), name=f"{self.name}_sepconv")
        y = separable_units(x, self.features, self.sepconv, self.norm, **options)
        return y + x if self.residual else y


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
        common = dict(output_stride=self.output_stride, sepconv=self.spatial_conv, norm=norm, residual=self.residual)
        middle = partial(add_block, self, MiddleBlock, **common)
        down = partial(add_block, self, DownsamplingBlock, **common, pointwise=pointwise, padding=self.padding)

        def channels(*features: int) -> tuple[int, ...]:
            return tuple(scaled(f, self.width, self.width_multiple) for f in features)

        # Entry flow. Shapes at the paper's 299 px and width 1.
        x = images.astype(self.dtype)  #                                               N x 299 x 299 x 3
        x = conv(*channels(32), strides=(2, 2), name="block1_conv1")(x)
        x = nn.relu(norm(name="block1_conv1_bn")(x))  #                                N x 149 x 149 x 32
        x = conv(*channels(64), name="block1_conv2")(x)
        x = stage1 = nn.relu(norm(name="block1_conv2_bn")(x))  #                       N x 147 x 147 x 64
        x = down(channels(128, 128), stride=2, relu_first=False, name="block2")(x)  #  N x 74 x 74 x 128
        stage2 = nn.relu(x)
        x = down(channels(256, 256), stride=4, name="block3")(x)  #                    N x 37 x 37 x 256
        stage3 = nn.relu(x)
        x = down(channels(728, 728), stride=8, name="block4")(x)  #                    N x 19 x 19 x 728

        # Middle flow: blocks 5 to 12 in the paper.
        for i in range(5, 5 + self.middle_repeats):
            x = middle(channels(728, 728, 728), stride=16, name=f"block{i}")(x)  #     N x 19 x 19 x 728
        stage4 = nn.relu(x)

        # Exit flow: blocks 13 and 14 in the paper. The last has no pooling and no residual connection.
        i = 5 + self.middle_repeats
        x = down(channels(728, 1024), stride=16, name=f"block{i}")(x)  #               N x 10 x 10 x 1024
        options = dict(rate=rate_at(32, self.output_stride), relu_first=False, name=f"block{i + 1}_sepconv")
        x = separable_units(x, channels(1536, 2048), self.spatial_conv, norm, **options)
        stage5 = nn.relu(x)  #                                                         N x 10 x 10 x 2048

        pooled = ops.global_average_pool(stage5)  #                                    N x 2048
        options = dict(fc_layers=self.fc_layers, dropout_rate=self.dropout_rate, **dtypes)
        logits = classifier_head(pooled, self.num_classes, train=train, **options)  #  N x num_classes
        stages = dict(stage1=stage1, stage2=stage2, stage3=stage3, stage4=stage4, stage5=stage5)
        return stages | {"pooled": pooled, "logits": logits}
