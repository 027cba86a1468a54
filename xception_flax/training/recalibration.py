"""Moving statistics of batch normalization, computed anew for other images than those that the weights were trained on.

This is 'precise BN' of Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3: with the
weights as they are, the network runs in training mode over some batches, and the statistics become the moments of all
their activations. No average decays, so every batch counts alike.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from xception_flax.data.batch import Batch
from xception_flax.models import ops
from xception_flax.text.errors import UserError
from xception_flax.training import sharding
from xception_flax.training.state import TrainState

PyTree = Any

MAX_BATCHES = 1_000_000  # a larger number is a mistake


def make_statistics_step(
    model: nn.Module, normalize: Callable[[jax.Array], jax.Array], mesh: Mesh, *, lowering: str = "platform"
) -> Callable[[dict[str, PyTree], Batch[jax.Array]], PyTree]:
    """Returns the compiled `statistics_step(variables, batch) -> batch_stats`: mean and variance of this batch alone.

    They are of the global batch, whatever the number of devices. Images are normalized by their batch, as in training;
    nothing is dropped out, and no gradient is computed. Images whose `mask` is 0 are black, and would count: leave such
    batches out.

    Args:
      model: a network with the fields `bn_frozen` and `bn_decay`.
      normalize: from `steps.create_normalizer`.
      mesh: of all devices.
      lowering: as of `steps.make_train_step`.
    """
    # With a decay of 0, what training keeps of the old statistics is nothing.
    model = model.clone(bn_frozen=False, bn_decay=0.0, dropout_rate=0.0)

    def statistics_step(variables: dict[str, PyTree], batch: Batch[jax.Array]) -> PyTree:
        variables = jax.lax.with_sharding_constraint(variables, sharding.replicated(mesh))
        with ops.lowering(lowering), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as `steps` has it
            _, updates = model.apply(variables, normalize(batch["images"]), train=True, mutable=["batch_stats"])
        return updates["batch_stats"]

    return jax.jit(statistics_step, out_shardings=sharding.replicated(mesh))


def recalibrate(
    state: TrainState,
    statistics_step: Callable[[dict[str, PyTree], Batch[jax.Array]], PyTree],
    batches: Iterable[Batch[jax.Array]],
) -> TrainState:
    """Returns the state with the moments of all `batches` as its moving statistics, the averaged ones too.

    The mean of a layer is the mean over the batches of their means. Its variance is the mean of their variances plus
    the variance of their means, which is that of all activations together, in float64.

    Args:
      state: of a run that has not begun.
      statistics_step: from `make_statistics_step`.
      batches: of equal size.

    Raises:
      UserError: there is none, or a statistic is not finite.
    """
    count, sums = 0, {}
    for batch in batches:
        found = flatten_dict(jax.device_get(statistics_step(state.variables("raw"), batch)))
        for place, value in found.items():
            value = np.asarray(value, np.float64)
            sums[place] = sums.get(place, 0) + value
            if place[-1] == "mean":
                square = (*place[:-1], "square")
                sums[square] = sums.get(square, 0) + value**2
        count += 1
    if not count:
        raise UserError("init.bn_batches: each of the batches has a bad image; look at the data.")
    means = {place: total / count for place, total in sums.items()}
    for place in [place for place in means if place[-1] == "mean"]:
        spread = means.pop((*place[:-1], "square")) - means[place] ** 2
        means[(*place[:-1], "var")] += np.maximum(spread, 0)  # rounding
    for place, value in means.items():
        if not np.isfinite(value).all():
            layer = "/".join(place[:-1])
            raise UserError(f"init.bn_batches: the {place[-1]} of {layer} is not finite; look at init.weights.")

    def placed(old: jax.Array, new: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new.astype(old.dtype)[index])

    new = unflatten_dict(means)
    state = state.replace(batch_stats=jax.tree.map(placed, state.batch_stats, new))
    if state.ema_batch_stats is None:
        return state
    # Copies: the state is donated, and one buffer cannot be donated twice.
    return state.replace(ema_batch_stats=jax.tree.map(placed, state.ema_batch_stats, new))
