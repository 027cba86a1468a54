"""A LeNet-style network (LeCun et al. 1998): the convolutions and max-pooling from which the paper's history starts."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xception_flax.models import ops
from xception_flax.models.fields import check_fields, check_images, check_widths, mark_stage, scaled
from xception_flax.models.layers import Conv, classifier_head
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

MAX_CONVOLUTIONS = 13  # each halves the image, and no image has more than 10,000 pixels a side


class LeNet(nn.Module):
    """Convolutions 5x5 with a ReLU, each followed by max-pooling 2x2, then fully connected layers.

    LeNet-5 with today's parts: ReLU, max-pooling, and global average pooling instead of flattening, so
    that any image size works. No batch normalization: the only collection is `params`. The baseline of
    the small recipes. Images and `train` as for `Xception`.

    Attributes:
      num_classes: width of the logits; 0 for no classifier: the pooled features instead.
      features: output channels of the convolutions, before `width`.
      fc_layers: widths of hidden layers before the classifier.
      dropout_rate: share of the last hidden features that is dropped in training.
      width: multiplies the channels of the convolutions, which are then rounded to a multiple of 8.
      dtype: of the computation; logits are float32 in any case.
      param_dtype: of the parameters.

    Raises:
      UserError: a field is out of its range, the images are not `[N, H, W, C]` or too small, or the
        weights are for another number of channels.
    """

    num_classes: int = 1000
    features: Sequence[int] = (32, 64, 128)
    fc_layers: Sequence[int] = (128,)
    dropout_rate: float = 0.0
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        check_widths("model.features", self.features)
        if not 1 <= len(self.features) <= MAX_CONVOLUTIONS:
            raise UserError(f"model.features must be 1 to {MAX_CONVOLUTIONS} widths, got {written(self.features)}.")

    @property
    def strides(self) -> dict[str, int]:
        """Stride of each stage, in pixels of the image."""
        return {f"stage{i}": 2**i for i in range(1, len(self.features) + 1)}

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.endpoints(images, train=train)["logits"]

    @nn.compact
    def endpoints(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns 'stage1', ... (after each pooling, at strides 2, 4, ...), 'pooled' and 'logits' by name.

        `model.apply(variables, images, train=False, method="endpoints")`; at 32 px `[N, 16, 16, 32]`,
        `[N, 8, 8, 64]`, `[N, 4, 4, 128]`; `[N, 128]`.
        """
        check_images(images, 2 ** len(self.features), "LeNet")
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x, stages = images.astype(self.dtype), {}
        for i, features in enumerate(self.features, start=1):
            x = nn.relu(Conv(scaled(features, self.width), kernel_size=(5, 5), **dtypes, name=f"conv{i}")(x))
            x = ops.max_pool(x, window=(2, 2))
            x = stages[f"stage{i}"] = mark_stage(self, f"stage{i}", x)
        pooled = ops.global_average_pool(x)
        logits = classifier_head(
            pooled,
            self.num_classes,
            train=train,
            fc_layers=self.fc_layers,
            dropout_rate=self.dropout_rate,
            **dtypes,
        )
        return stages | {"pooled": pooled, "logits": logits}
