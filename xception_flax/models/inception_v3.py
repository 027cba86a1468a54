"""Inception V3 (Szegedy et al. 2015, arXiv 1512.00567), the network that the Xception paper compares with."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import add_block, batch_norm, check_fields, check_images, mark_stage, scaled
from xception_flax.models.layers import Conv, ModuleDef, classifier_head
from xception_flax.text.errors import UserError

MIN_IMAGE_SIZE = 75  # pixels a side, as in Keras; the last stage is then 1 x 1
MIN_AUXILIARY_MAP = 17  # pixels a side of stage 4 that the auxiliary tower needs; images of 299 px have them

HALVE = dict(strides=2, padding="VALID")

Pool = Callable[[jax.Array], jax.Array]  # 3x3 average pooling of a network, to the same size
Unit = Callable[..., jax.Array]  # `conv_unit` of a network: (x, features, kernel size, name, *, strides, padding)
Steps = Sequence[tuple[int, tuple[int, int]]]  # (features, kernel size) of units one after the other


def conv_unit(
    x: jax.Array,
    features: int,
    kernel_size: tuple[int, int],
    name: str,
    *,
    conv: ModuleDef,
    norm: ModuleDef,
    width: float,
    strides: int = 1,
    padding: str = "SAME",
) -> jax.Array:
    """Convolution, batch normalization, ReLU: `[N, H, W, C]` -> `[N, H', W', width * features]`.

    To be called inside a module's compact `__call__`: its layers become that module's `NAME` and `NAME_bn`.
    """
    options = dict(strides=(strides, strides), padding=padding, name=name)
    x = conv(scaled(features, width), kernel_size, **options)(x)
    return nn.relu(norm(name=f"{name}_bn")(x))


def tower(unit: Unit, x: jax.Array, steps: Steps, name: str, *, reduce: bool = False) -> jax.Array:
    """Applies units one after the other, `NAME_1`, `NAME_2`, ...; with `reduce` the last has stride 2."""
    for i, (features, kernel_size) in enumerate(steps, start=1):
        options = HALVE if reduce and i == len(steps) else {}
        x = unit(x, features, kernel_size, f"{name}_{i}", **options)
    return x


# The blocks: parallel towers on the same input. Their layers become layers of the network, see
# `fields.add_block`. Numbers of channels are those at width 1.


class Mixed35(nn.Module):
    """Figure 5 of the Inception V3 paper, but with one 5x5: N x 35 x 35 x C -> N x 35 x 35 x (224 + pool_features)."""

    unit: Unit
    pool: Pool
    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit, name = self.unit, self.name
        return _concatenate(
            unit(x, 64, (1, 1), f"{name}_1x1"),
            tower(unit, x, [(48, (1, 1)), (64, (5, 5))], f"{name}_5x5"),
            tower(unit, x, [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))], f"{name}_3x3dbl"),
            unit(self.pool(x), self.pool_features, (1, 1), f"{name}_pool"),
        )


class Reduce35(nn.Module):
    """N x 35 x 35 x C -> N x 17 x 17 x (480 + C)."""

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            self.unit(x, 384, (3, 3), f"{self.name}_3x3", **HALVE),
            tower(self.unit, x, [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))], f"{self.name}_3x3dbl", reduce=True),
            ops.max_pool(x, padding="VALID"),
        )


class Mixed17(nn.Module):
    """Figure 6, each 7x7 split into 1x7 and 7x1: N x 17 x 17 x C -> N x 17 x 17 x 768.

    Attributes:
      unit: `conv_unit` of the network.
      features: channels inside the towers.
    """

    unit: Unit
    pool: Pool
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit, name, f = self.unit, self.name, self.features
        single = [(f, (1, 1)), (f, (1, 7)), (192, (7, 1))]
        double = [(f, (1, 1)), (f, (7, 1)), (f, (1, 7)), (f, (7, 1)), (192, (1, 7))]
        return _concatenate(
            unit(x, 192, (1, 1), f"{name}_1x1"),
            tower(unit, x, single, f"{name}_7x7"),
            tower(unit, x, double, f"{name}_7x7dbl"),
            unit(self.pool(x), 192, (1, 1), f"{name}_pool"),
        )


class Reduce17(nn.Module):
    """N x 17 x 17 x C -> N x 8 x 8 x (512 + C)."""

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        seven = [(192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))]
        return _concatenate(
            tower(self.unit, x, [(192, (1, 1)), (320, (3, 3))], f"{self.name}_3x3", reduce=True),
            tower(self.unit, x, seven, f"{self.name}_7x7x3", reduce=True),
            ops.max_pool(x, padding="VALID"),
        )


class Mixed8(nn.Module):
    """Figure 7, a 3x3 split into parallel 1x3 and 3x1: N x 8 x 8 x C -> N x 8 x 8 x 2048."""

    unit: Unit
    pool: Pool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit, name = self.unit, self.name
        single = unit(x, 384, (1, 1), f"{name}_3x3_1")
        double = tower(unit, x, [(448, (1, 1)), (384, (3, 3))], f"{name}_3x3dbl")
        return _concatenate(
            unit(x, 320, (1, 1), f"{name}_1x1"),
            unit(single, 384, (1, 3), f"{name}_3x3_2a"),
            unit(single, 384, (3, 1), f"{name}_3x3_2b"),
            unit(double, 384, (1, 3), f"{name}_3x3dbl_3a"),
            unit(double, 384, (3, 1), f"{name}_3x3dbl_3b"),
            unit(self.pool(x), 192, (1, 1), f"{name}_pool"),
        )


class Auxiliary(nn.Module):
    """The auxiliary tower, as in TF-slim: N x 17 x 17 x 768 -> logits `[N, num_classes]`.

    Attributes:
      unit: `conv_unit` of the network.
      dense: makes the classifier from its name.

    Raises:
      UserError: the features are smaller than 17 x 17.
    """

    unit: Unit
    dense: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        if min(height, width) < MIN_AUXILIARY_MAP:
            raise UserError(
                f"the auxiliary tower needs 'stage4' features of {MIN_AUXILIARY_MAP} x {MIN_AUXILIARY_MAP}, "
                f"which 299 pixels give, got {height} x {width}; take larger images or auxiliary=False."
            )
        x = ops.average_pool(x, window=(5, 5), strides=(3, 3), padding="VALID")  #   N x 5 x 5 x 768
        x = self.unit(x, 128, (1, 1), f"{self.name}_conv1")  #                       N x 5 x 5 x 128
        x = self.unit(x, 768, (5, 5), f"{self.name}_conv2", padding="VALID")  #      N x 1 x 1 x 768
        return self.dense(name=f"{self.name}_predictions")(ops.global_average_pool(x))


def _concatenate(*towers: jax.Array) -> jax.Array:
    return jnp.concatenate(towers, axis=-1)


class InceptionV3(nn.Module):
    """Inception V3 as in Keras Applications: 23,817,352 trainable parameters at 1000 classes.

    The Xception paper's table 3 says 23,626,728, without saying what it counts. This is Keras' network
    instead: its weights are published, it is by the same author, and it has the modules of the
    Inception V3 paper (figures 5, 6 and 7). Normalization has no scale: with a ReLU and a convolution
    after it, a scale is superfluous. The network of torchvision and timm is this one with
    `bn_scale=True, count_include_pad=True`. Images, collections and `train` as for `Xception`, but H and
    W are at least 75.

    Attributes:
      num_classes: width of the logits; 0 for no classifier: the pooled features `[N, 2048]` instead.
      dropout_rate: share of the pooled features that is dropped in training (Xception paper, section
        4.3: 0.5 on ImageNet, none on JFT).
      fc_layers: widths of hidden layers before the classifier (Xception paper, table 2).
      auxiliary: also build the auxiliary tower on the 17 x 17 features; `endpoints` then has
        'auxiliary_logits'. No loss here uses them; the Xception paper trains without (section 4.3).
      width: multiplies every number of channels but the classifiers'; the results are rounded to a
        multiple of 8.
      remat: recompute the inside of each module in the backward pass, which saves memory.
      bn_decay: share of the old moving statistic that a step keeps.
      bn_frozen: normalize by the moving statistics in training too, and leave them unchanged.
      bn_epsilon: added to the variance.
      bn_scale: give each normalization a scale.
      count_include_pad: the 3x3 average pooling counts the zeros around the image too. Weights fit both.
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      UserError: a field is out of its range, the images are not `[N, H, W, C]` or too small, or the
        weights are for another number of channels.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.5
    fc_layers: Sequence[int] = ()
    auxiliary: bool = False
    width: float = 1.0
    remat: bool = False
    bn_decay: float = 0.99
    bn_frozen: bool = False
    bn_epsilon: float = 1e-3
    bn_scale: bool = False
    count_include_pad: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if self.auxiliary and not self.num_classes:
            raise UserError("model.auxiliary=True builds a classifier, so model.num_classes must be at least 1, got 0.")

    @property
    def strides(self) -> dict[str, int]:
        """Stride of each stage, in pixels of the image. Convolutions without padding lose borders as well."""
        return {f"stage{i}": 2**i for i in range(1, 6)}

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns the features for detection, segmentation or probes, and the logits, by name.

        `model.apply(variables, images, train=False, method="endpoints")`. 'stage1' to 'stage5': the
        last features at strides 2, 4, 8, 16 and 32, after a ReLU; at 299 px `[N, 147, 147, 64]`,
        `[N, 71, 71, 192]`, `[N, 35, 35, 288]`, `[N, 17, 17, 768]` and `[N, 8, 8, 2048]`. 'pooled':
        `[N, 2048]`. 'logits', and with `auxiliary` 'auxiliary_logits'.
        """
        check_images(images, MIN_IMAGE_SIZE, "Inception V3")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = batch_norm(self, train=train, use_scale=self.bn_scale)
        unit = partial(conv_unit, conv=partial(Conv, **dtypes), norm=norm, width=self.width)
        reduce = partial(add_block, self, unit=unit)
        block = partial(reduce, pool=partial(ops.average_pool, count_include_pad=self.count_include_pad))

        # Stem. Shapes at 299 px and width 1.
        x = images.astype(self.dtype)  #                                             N x 299 x 299 x 3
        x = unit(x, 32, (3, 3), "stem_conv1", **HALVE)  #                            N x 149 x 149 x 32
        x = unit(x, 32, (3, 3), "stem_conv2", padding="VALID")  #                    N x 147 x 147 x 32
        x = unit(x, 64, (3, 3), "stem_conv3")  #                                     N x 147 x 147 x 64
        x = stage1 = mark_stage(self, "stage1", x)
        x = ops.max_pool(x, padding="VALID")  #                                      N x 73 x 73 x 64
        x = unit(x, 80, (1, 1), "stem_conv4", padding="VALID")  #                    N x 73 x 73 x 80
        x = unit(x, 192, (3, 3), "stem_conv5", padding="VALID")  #                   N x 71 x 71 x 192
        x = stage2 = mark_stage(self, "stage2", x)
        x = ops.max_pool(x, padding="VALID")  #                                      N x 35 x 35 x 192

        # Blocks.
        x = block(Mixed35, pool_features=32, name="mixed0")(x)  #                    N x 35 x 35 x 256
        x = block(Mixed35, pool_features=64, name="mixed1")(x)  #                    N x 35 x 35 x 288
        x = block(Mixed35, pool_features=64, name="mixed2")(x)  #                    N x 35 x 35 x 288
        x = stage3 = mark_stage(self, "stage3", x)
        x = reduce(Reduce35, name="mixed3")(x)  #                                    N x 17 x 17 x 768
        x = block(Mixed17, features=128, name="mixed4")(x)  #                        N x 17 x 17 x 768
        x = block(Mixed17, features=160, name="mixed5")(x)  #                        N x 17 x 17 x 768
        x = block(Mixed17, features=160, name="mixed6")(x)  #                        N x 17 x 17 x 768
        x = block(Mixed17, features=192, name="mixed7")(x)  #                        N x 17 x 17 x 768
        x = stage4 = mark_stage(self, "stage4", x)
        x = reduce(Reduce17, name="mixed8")(x)  #                                    N x 8 x 8 x 1280
        x = block(Mixed8, name="mixed9")(x)  #                                       N x 8 x 8 x 2048
        x = block(Mixed8, name="mixed10")(x)  #                                      N x 8 x 8 x 2048
        x = stage5 = mark_stage(self, "stage5", x)

        pooled = ops.global_average_pool(x)  #                                       N x 2048
        options = dict(fc_layers=self.fc_layers, dropout_rate=self.dropout_rate, **dtypes)
        logits = classifier_head(pooled, self.num_classes, train=train, **options)  # N x num_classes
        endpoints = dict(stage1=stage1, stage2=stage2, stage3=stage3, stage4=stage4, stage5=stage5)
        endpoints |= {"pooled": pooled, "logits": logits}
        if self.auxiliary:
            dense = partial(nn.Dense, self.num_classes, dtype=logits.dtype, param_dtype=self.param_dtype)
            auxiliary = Auxiliary(unit, dense, name="auxiliary")
            nn.share_scope(self, auxiliary)
            endpoints["auxiliary_logits"] = auxiliary(stage4)  #                     N x num_classes
        return endpoints
