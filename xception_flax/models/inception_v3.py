"""Inception V3 (Szegedy et al. 2015, arXiv 1512.00567), the network that the Xception paper compares with."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import check_fields, check_images, scaled
from xception_flax.models.layers import Conv, classifier_head
from xception_flax.text.errors import UserError

MIN_IMAGE_SIZE = 75  # pixels a side, as Keras has it; the last stage is then 1 x 1
MIN_AUXILIARY_MAP = 17  # pixels a side of stage 4: what 299 px give, and the auxiliary tower needs

Steps = Sequence[tuple[int, tuple[int, int]]]  # (features, kernel size) of convolutions one after the other


class InceptionV3(nn.Module):
    """Inception V3 as Keras Applications has it: 23,817,352 trainable parameters at 1000 classes.

    The Xception paper's table 3 says 23,626,728 and not what it counts; Keras' network, whose weights
    are published, is by the same author and has the modules of the Inception V3 paper (figures 5, 6
    and 7), so its number is the one held to here. Normalization has no scale, as the ReLU behind it
    and the next convolution make one superfluous. Images, collections and `train` as for `Xception`,
    but H and W at least 75.

    Attributes:
      num_classes: width of the logits; 0 for no classifier: the pooled features `[N, 2048]` instead.
      dropout_rate: share of the pooled features that is dropped in training (Xception paper, section
        4.3: 0.5 on ImageNet, none on JFT).
      fc_layers: widths of hidden layers before the classifier (Xception paper, table 2).
      auxiliary: build the auxiliary tower on the 17 x 17 features too: `endpoints` then has
        'auxiliary_logits'. It is in no loss here; the Xception paper trains without (section 4.3).
      width: multiplies every number of channels but the classifiers' (then rounded to a multiple of 8).
      remat: compute the inside of each module again in the backward pass instead of keeping it.
      bn_decay: share of the old moving statistic that a step keeps.
      bn_frozen: training too normalizes by the moving statistics, and leaves them as they are.
      bn_epsilon: added to the variance.
      dtype: of the computation; batch statistics and logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      ValueError: a field out of its range, images that are not `[N, H, W, C]` or too small, weights
        for another number of channels.
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
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if self.auxiliary and not self.num_classes:
            raise UserError("model.auxiliary=True builds a classifier, so model.num_classes must be at least 1, got 0.")

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image to a pixel of each stage; without padding, so that borders are lost besides."""
        return {f"stage{i}": 2**i for i in range(1, 6)}

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns what a detector, a segmentation or a probe takes from the network, by name.

        `model.apply(variables, images, train=False, method="endpoints")`. 'stage1' to 'stage5': the
        last features at strides 2, 4, 8, 16 and 32, after a ReLU; at 299 px `[N, 147, 147, 64]`,
        `[N, 71, 71, 192]`, `[N, 35, 35, 288]`, `[N, 17, 17, 768]` and `[N, 8, 8, 2048]`. 'pooled':
        `[N, 2048]`. 'logits', and with `auxiliary` 'auxiliary_logits'.
        """
        check_images(images, MIN_IMAGE_SIZE, "Inception V3")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def conv(
            x: jax.Array,
            features: int,
            kernel_size: tuple[int, int],
            name: str,
            *,
            strides: int = 1,
            padding: str = "SAME",
        ) -> jax.Array:
            options = dict(strides=(strides, strides), padding=padding, **dtypes)
            x = Conv(scaled(features, self.width), kernel_size, **options, name=name)(x)
            options = dict(momentum=self.bn_decay, epsilon=self.bn_epsilon, use_scale=False, **dtypes)
            return nn.relu(nn.BatchNorm(not train or self.bn_frozen, **options, name=f"{name}_bn")(x))

        def tower(x: jax.Array, steps: Steps, name: str, *, reduce: bool = False) -> jax.Array:
            """Convolutions one after the other, `name_1`, `name_2`, ...; with `reduce` the last has stride 2."""
            for i, (features, kernel_size) in enumerate(steps, start=1):
                last = dict(strides=2, padding="VALID") if reduce and i == len(steps) else {}
                x = conv(x, features, kernel_size, f"{name}_{i}", **last)
            return x

        def fan(x: jax.Array, name: str) -> jax.Array:
            """The 1x3 and 3x1 convolutions side by side that a 3x3 of the last modules is spread over."""
            return _concatenate([conv(x, 384, (1, 3), f"{name}a"), conv(x, 384, (3, 1), f"{name}b")])

        def mixed_35(_: nn.Module, x: jax.Array, name: str, pool_features: int) -> jax.Array:
            """Figure 5 of the Inception V3 paper, with one 5x5 left whole."""
            return _concatenate(
                [
                    conv(x, 64, (1, 1), f"{name}_1x1"),
                    tower(x, [(48, (1, 1)), (64, (5, 5))], f"{name}_5x5"),
                    tower(x, [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))], f"{name}_3x3dbl"),
                    conv(ops.average_pool(x), pool_features, (1, 1), f"{name}_pool"),
                ]
            )

        def reduce_35(_: nn.Module, x: jax.Array, name: str) -> jax.Array:
            return _concatenate(
                [
                    conv(x, 384, (3, 3), f"{name}_3x3", strides=2, padding="VALID"),
                    tower(x, [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))], f"{name}_3x3dbl", reduce=True),
                    ops.max_pool(x, padding="VALID"),
                ]
            )

        def mixed_17(_: nn.Module, x: jax.Array, name: str, f: int) -> jax.Array:
            """Figure 6: 7x7 as 1x7 and 7x1."""
            single = [(f, (1, 1)), (f, (1, 7)), (192, (7, 1))]
            double = [(f, (1, 1)), (f, (7, 1)), (f, (1, 7)), (f, (7, 1)), (192, (1, 7))]
            return _concatenate(
                [
                    conv(x, 192, (1, 1), f"{name}_1x1"),
                    tower(x, single, f"{name}_7x7"),
                    tower(x, double, f"{name}_7x7dbl"),
                    conv(ops.average_pool(x), 192, (1, 1), f"{name}_pool"),
                ]
            )

        def reduce_17(_: nn.Module, x: jax.Array, name: str) -> jax.Array:
            return _concatenate(
                [
                    tower(x, [(192, (1, 1)), (320, (3, 3))], f"{name}_3x3", reduce=True),
                    tower(
                        x, [(192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))], f"{name}_7x7x3", reduce=True
                    ),
                    ops.max_pool(x, padding="VALID"),
                ]
            )

        def mixed_8(_: nn.Module, x: jax.Array, name: str) -> jax.Array:
            """Figure 7: the 3x3 spread over 1x3 and 3x1 side by side."""
            return _concatenate(
                [
                    conv(x, 320, (1, 1), f"{name}_1x1"),
                    fan(conv(x, 384, (1, 1), f"{name}_3x3_1"), f"{name}_3x3_2"),
                    fan(tower(x, [(448, (1, 1)), (384, (3, 3))], f"{name}_3x3dbl"), f"{name}_3x3dbl_3"),
                    conv(ops.average_pool(x), 192, (1, 1), f"{name}_pool"),
                ]
            )

        if self.remat:
            mixed_35, mixed_17 = (nn.remat(f, static_argnums=(2, 3)) for f in (mixed_35, mixed_17))
            reduce_35, reduce_17, mixed_8 = (nn.remat(f, static_argnums=(2,)) for f in (reduce_35, reduce_17, mixed_8))

        # Shapes at 299 px and width 1.
        x = images.astype(self.dtype)  #                                             [N, 299, 299, 3]
        x = conv(x, 32, (3, 3), "stem_conv1", strides=2, padding="VALID")  #         [N, 149, 149, 32]
        x = conv(x, 32, (3, 3), "stem_conv2", padding="VALID")  #                    [N, 147, 147, 32]
        stage1 = conv(x, 64, (3, 3), "stem_conv3")  #                                [N, 147, 147, 64]
        x = ops.max_pool(stage1, padding="VALID")  #                                 [N, 73, 73, 64]
        x = conv(x, 80, (1, 1), "stem_conv4", padding="VALID")  #                    [N, 73, 73, 80]
        stage2 = conv(x, 192, (3, 3), "stem_conv5", padding="VALID")  #              [N, 71, 71, 192]
        x = ops.max_pool(stage2, padding="VALID")  #                                 [N, 35, 35, 192]
        x = mixed_35(self, x, "mixed0", 32)  #                                       [N, 35, 35, 256]
        x = mixed_35(self, x, "mixed1", 64)  #                                       [N, 35, 35, 288]
        stage3 = mixed_35(self, x, "mixed2", 64)  #                                  [N, 35, 35, 288]
        x = reduce_35(self, stage3, "mixed3")  #                                     [N, 17, 17, 768]
        for name, f in (("mixed4", 128), ("mixed5", 160), ("mixed6", 160), ("mixed7", 192)):
            x = mixed_17(self, x, name, f)  #                                        [N, 17, 17, 768]
        stage4 = x
        x = reduce_17(self, stage4, "mixed8")  #                                     [N, 8, 8, 1280]
        x = mixed_8(self, x, "mixed9")  #                                            [N, 8, 8, 2048]
        stage5 = mixed_8(self, x, "mixed10")  #                                      [N, 8, 8, 2048]

        pooled = ops.global_average_pool(stage5)  #                                  [N, 2048]
        logits = classifier_head(  #                                                 [N, num_classes]
            pooled,
            self.num_classes,
            train=train,
            fc_layers=self.fc_layers,
            dropout_rate=self.dropout_rate,
            **dtypes,
        )
        endpoints = dict(stage1=stage1, stage2=stage2, stage3=stage3, stage4=stage4, stage5=stage5)
        endpoints |= {"pooled": pooled, "logits": logits}
        if self.auxiliary:  # as TF-slim builds it, on the features before the second reduction
            if min(stage4.shape[1:3]) < MIN_AUXILIARY_MAP:
                raise UserError(
                    f"the auxiliary tower needs 'stage4' features of {MIN_AUXILIARY_MAP} x {MIN_AUXILIARY_MAP}, "
                    f"which 299 pixels give, got {stage4.shape[1]} x {stage4.shape[2]}; "
                    "take larger images or auxiliary=False."
                )
            x = ops.average_pool(stage4, window=(5, 5), strides=(3, 3), padding="VALID")  # [N, 5, 5, 768]
            x = conv(x, 128, (1, 1), "auxiliary_conv1")  #                           [N, 5, 5, 128]
            x = conv(x, 768, (5, 5), "auxiliary_conv2", padding="VALID")  #          [N, 1, 1, 768]
            dense = nn.Dense(
                self.num_classes,
                dtype=logits.dtype,
                param_dtype=self.param_dtype,
                name="auxiliary_predictions",
            )
            endpoints["auxiliary_logits"] = dense(ops.global_average_pool(x))  #     [N, num_classes]
        return endpoints


def _concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)
