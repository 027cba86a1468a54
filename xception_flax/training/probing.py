"""A training step seen from inside: what each layer gives and the gradient that comes back to it, as a few numbers.

The probe computes loss and gradients as the step itself does, in a program of its own. Compilers fuse operations
otherwise there, so its numbers may differ from the step's in the last bits.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from xception_flax.data.batch import Batch
from xception_flax.models import ops
from xception_flax.training import sharding, steps
from xception_flax.training.losses import Loss
from xception_flax.training.metrics import Sum
from xception_flax.training.mixing import Mix, mixing_key, soft_labels
from xception_flax.training.state import TrainState

PyTree = Any

_COUNTED = 2**16  # float32 counts no further than 2^24, so a count is two numbers: of these, and of those left


class Values(NamedTuple):
    """An array in a few numbers; of those that are finite, `norm` (L2), `low` and `high` (NaN where none is finite)."""

    norm: float
    low: float
    high: float
    not_finite: int


class Layer(NamedTuple):
    """What a layer does in a step.

    Attributes:
      name: its path in the network, such as 'block2_sepconv1/depthwise', or that of a block.
      output: what it gives.
      output_gradient: of the loss with respect to that.
      weight_gradient: of the loss with respect to its own parameters; None if it has none.
      images: `[N]`: whether some of its output for that image is not finite.
    """

    name: str
    output: Values
    output_gradient: Values
    weight_gradient: Values | None
    images: np.ndarray


class Probed(NamedTuple):
    """A step from inside.

    Attributes:
      layers: in the order of the forward pass.
      pixels: `[N]`: whether all pixels of an image, mixed and normalized, are finite.
      losses: `[N]`, of each image.
      loss: their mean over the images that count, as the step has it: 0 if none does.
      penalty: of the parameters.
      batch: as the network got it: mixed, but not normalized; with `mask` and, if mixed, `minor_labels` and `share`.
    """

    layers: list[Layer]
    pixels: np.ndarray
    losses: np.ndarray
    loss: float
    penalty: float
    batch: dict[str, np.ndarray]


def make_probe(
    model: nn.Module,
    loss: Loss,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    *,
    accumulation_steps: int,
    lowering: str,
    seed: int,
    mix: Mix | None,
    frozen: Callable[[PyTree], PyTree] | None,
) -> Callable[[TrainState, Batch[jax.Array]], Probed]:
    """Returns `probe(state, batch)`, which looks at the step that follows `state`, and changes nothing.

    Arguments are those of `steps.make_train_step`. Layers are computed one by one, also where kernels would compute
    several at once, and nothing is computed again to save memory.
    """
    if getattr(model, "remat", False):
        model = model.clone(remat=False)
    lowering = lowering if lowering == "stock" else "portable"
    objective = steps.make_objective(
        model, loss, lambda logits, *_: {"logits": Sum(logits, 1.0)}, normalize, mixed=mix is not None, frozen=frozen
    )

    names: list[str] = []  # of the layers, in the order of the forward pass; filled while it is traced

    def look(params: PyTree, slots: list[jax.Array], batch_stats: PyTree, batch: Batch[jax.Array], key: jax.Array):
        watch = _Watch(slots)
        with nn.intercept_methods(watch):
            total, (batch_stats, sums) = objective(params, batch_stats, batch, key)
        names[:] = watch.names
        logits = sums["logits"].total
        targets = batch["labels"] if mix is None else soft_labels(batch, logits.shape[-1])
        seen = {
            "outputs": watch.outputs,
            "images": watch.images,
            "losses": loss.example(logits, targets),
            "pixels": _finite_images(normalize(batch["images"])),
            "penalty": sums["penalty"].total,
        }
        return total, (batch_stats, seen)

    def one_part(params: PyTree, batch_stats: PyTree, batch: Batch[jax.Array], key: jax.Array):
        arguments = batch_stats, batch, key
        with ops.lowering(lowering), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            _, (_, shapes) = jax.eval_shape(lambda: look(params, [], *arguments))  # to count the layers
            slots = [jnp.zeros(x.shape) for x in shapes["outputs"]]
            (grads, back), (batch_stats, seen) = jax.grad(look, (0, 1), has_aux=True)(params, slots, *arguments)
        return grads, batch_stats, seen | {"gradients": back}

    def probe(state: TrainState, batch: Batch[jax.Array]):
        key = steps.step_key(seed, state.step)
        if mix is not None:
            batch = mix(mixing_key(seed, state.step), batch)
        params = jax.lax.with_sharding_constraint(state.params, sharding.replicated(mesh))
        batch = steps.complete(batch)
        if accumulation_steps == 1:
            grads, _, seen = one_part(params, state.batch_stats, batch, key)
            seen = jax.tree.map(lambda x: x[None], seen)
        else:
            parts = steps.split(batch, accumulation_steps, mesh), jax.random.split(key, accumulation_steps)

            def add(carry: PyTree, part_and_key: tuple[Batch[jax.Array], jax.Array]):
                batch_stats, total = carry
                grads, batch_stats, seen = one_part(params, batch_stats, *part_and_key)
                return (batch_stats, jax.tree.map(jnp.add, total, grads)), seen

            zeros = jax.tree.map(jnp.zeros_like, params)
            (_, grads), seen = jax.lax.scan(add, (state.batch_stats, zeros), parts)
            grads = jax.tree.map(lambda g: g / accumulation_steps, grads)
        return jax.tree.map(_measure, grads), seen, batch

    compiled = jax.jit(probe, out_shardings=sharding.replicated(mesh))

    def run(state: TrainState, batch: Batch[jax.Array]) -> Probed:
        weights, seen, batch = jax.device_get(compiled(state, batch))
        own: dict[str, list[np.ndarray]] = {}
        for (*path, _), measured in flatten_dict(weights).items():
            own.setdefault("/".join(path), []).append(measured)
        layers = [
            Layer(name, _values(output), _values(back), _values(own[name]) if name in own else None, _in_order(images))
            for name, output, back, images in zip(
                names, seen["outputs"], seen["gradients"], seen["images"], strict=True
            )
        ]
        losses, counts = _in_order(seen["losses"]), batch["mask"] > 0
        mean = float(losses[counts].mean(dtype=np.float64)) if counts.any() else 0.0  # as in the step
        return Probed(layers, _in_order(seen["pixels"]), losses, mean, float(seen["penalty"][0]), batch)

    return run


class _Watch:
    """An interceptor that measures what each module gives, in the order of the forward pass."""

    def __init__(self, slots: Sequence[jax.Array]) -> None:
        """Takes an array of zeros a layer, whose gradient becomes the measure of that layer's gradient; [] for none."""
        self._slots = slots
        self._last: jax.Array | None = None
        self.names: list[str] = []
        self.outputs: list[jax.Array] = []
        self.images: list[jax.Array] = []

    def __call__(self, next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        result = next_call(*args, **kwargs)
        given = isinstance(result, jax.Array) and jnp.issubdtype(result.dtype, jnp.inexact) and result.ndim
        # A module around one that was just seen gives the same, as dropout that is off gives its input.
        if context.method_name != "__call__" or not given or result is self._last or any(result is x for x in args):
            return result
        module, place = context.module, len(self.names)
        path = module.path
        if module.name is not None and path[-1:] != (module.name,):  # a block that shares the scope of its network
            path = (*path, module.name)
        name = "/".join(path) or type(module).__name__
        again = sum(other.partition(" (")[0] == name for other in self.names)
        self.names.append(f"{name} ({again + 1})" if again else name)
        self.outputs.append(_measure(result))
        self.images.append(~_finite_images(result))
        self._last = _tap(result, self._slots[place]) if self._slots else result
        return self._last


@jax.custom_vjp
def _tap(x: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns `x`; the gradient with respect to `slot` is the measure of that with respect to `x`."""
    del slot
    return x


_tap.defvjp(lambda x, slot: (x, None), lambda _, gradient: (gradient, _measure(gradient)))


def _measure(x: jax.Array) -> jax.Array:
    """Returns `Values` as `[5]`; the count of what is not finite is the last two numbers, see `_COUNTED`."""
    finite = jnp.isfinite(x)
    wide = jnp.where(finite, x, 0).astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    # Divided by the largest, since the square of a large number overflows.
    norm = largest * jnp.sqrt(jnp.sum(jnp.square(wide / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny))))
    count = jnp.sum(~finite, dtype=jnp.int32)
    any_finite = count < x.size
    low, high = (
        jnp.where(any_finite, function(jnp.where(finite, x, end).astype(jnp.float32)), jnp.nan)
        for function, end in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    )
    norm = jnp.where(any_finite, norm, jnp.nan)
    numbers = norm, low, high, count // _COUNTED, count % _COUNTED
    return jnp.stack([number.astype(jnp.float32) for number in numbers])


def _finite_images(x: jax.Array) -> jax.Array:
    """Returns whether all values of an image are finite, `[N, ...]` -> `[N]`."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def _values(measured: Iterable[np.ndarray]) -> Values:
    """Returns the values of several arrays together, each measured by `_measure`."""
    rows = np.stack(list(measured)).astype(np.float64)
    count = int(rows[:, 3].sum() * _COUNTED + rows[:, 4].sum())
    some = rows[~np.isnan(rows[:, 0])]
    if not len(some):
        return Values(math.nan, math.nan, math.nan, count)
    return Values(float(np.sqrt((some[:, 0] ** 2).sum())), float(some[:, 1].min()), float(some[:, 2].max()), count)


def _in_order(parts: np.ndarray) -> np.ndarray:
    """Returns `[N]` of the parts of a batch, `[parts, N / parts]`: the inverse of `steps.split`."""
    return np.asarray(parts).swapaxes(0, 1).reshape(-1)
