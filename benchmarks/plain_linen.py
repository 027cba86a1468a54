"""Xception as anyone would write it in Flax, with linen's own modules only.

Its row of the benchmark shows what the lowerings of `xception_flax.models.ops` gain. Variables have the names of
`xception_flax`, so that one set of them serves both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike


class SeparableConv(nn.Module):
    """`[N, H, W, C]` -> `[N, H, W, features]`."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = conv(channels, (3, 3), feature_group_count=channels, name="depthwise")(x)
        return conv(self.features, (1, 1), name="pointwise")(x)


class Xception(nn.Module):
    """Figure 5 of the paper: images `[N, H, W, 3]` -> logits `[N, num_classes]`, float32.

    Attributes:
      middle_repeats: blocks of the middle flow.
      dtype: of the computation.
    """

    num_classes: int = 1000
    middle_repeats: int = 8
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, dtype=self.dtype, name=f"{name}_bn")(x)

        def sepconv(x: jax.Array, features: int, name: str) -> jax.Array:
            return norm(SeparableConv(features, self.dtype, name=name)(x), name)

        def downsampling_block(x: jax.Array, block: int, widths: tuple[int, int]) -> jax.Array:
            residual = conv(widths[1], (1, 1), (2, 2), name=f"block{block}_residual")(x)
            residual = norm(residual, f"block{block}_residual")
            x = sepconv(nn.relu(x), widths[0], f"block{block}_sepconv1")  # block 2 gets its ReLU twice: no difference
            x = sepconv(nn.relu(x), widths[1], f"block{block}_sepconv2")
            return nn.max_pool(x, (3, 3), (2, 2), "SAME") + residual

        for i, (features, stride) in enumerate(((32, 2), (64, 1)), start=1):
            name = f"block1_conv{i}"
            x = conv(features, (3, 3), (stride, stride), padding="VALID", name=name)(x)
            x = nn.relu(norm(x, name))
        for block, widths in ((2, (128, 128)), (3, (256, 256)), (4, (728, 728))):
            x = downsampling_block(x, block, widths)
        exit_flow = 5 + self.middle_repeats  # block 13
        for block in range(5, exit_flow):
            y = x
            for i in (1, 2, 3):
                y = sepconv(nn.relu(y), 728, f"block{block}_sepconv{i}")
            x = x + y
        x = downsampling_block(x, exit_flow, (728, 1024))
        for i, features in enumerate((1536, 2048), start=1):
            x = nn.relu(sepconv(x, features, f"block{exit_flow + 1}_sepconv{i}"))
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="predictions")(pooled)


def make_train_step(model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the compiled `(variables, opt_state, images, labels) -> (variables, opt_state, loss)`."""

    def objective(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates["batch_stats"]

    def train_step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array):
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, batch_stats), grads = gradient(variables["params"], variables["batch_stats"], images, labels)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": batch_stats}, opt_state, loss

    return jax.jit(train_step, donate_argnums=(0, 1))
