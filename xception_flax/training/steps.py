"""The training step and the evaluation step: pure functions, compiled with explicit shardings."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xception_flax.data.batch import Batch
from xception_flax.models import ops
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.ranges import check_number, check_range
from xception_flax.training import sharding
from xception_flax.training.losses import Loss
from xception_flax.training.metrics import MetricFunction, Sum, masked_sum
from xception_flax.training.mixing import Mix, mixing_key, soft_labels
from xception_flax.training.state import TrainState

PyTree = Any
Sums = dict[str, Sum]
# (params, batch_stats, batch, key) -> (gradient, (new batch_stats, sums)): what `jax.grad(..., has_aux=True)` returns.
Gradient = Callable[[PyTree, PyTree, Batch[jax.Array], jax.Array], tuple[PyTree, tuple[PyTree, Sums]]]


# Normalisation -------------------------------------------------------------------------------------


def create_normalizer(mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from uint8 images to `(images - mean) / std`, float32.

    It runs inside the compiled step: a quarter of the bytes travels to the device, and the host's cores are spared. The
    published weights expect [-1, 1]: mean and std 127.5.

    Args:
      mean: a value for each channel, or one for all; on the scale 0 to 255.
      std: divisor of each channel, or one for all; positive, on the scale 0 to 255.

    Raises:
      UserError: no values, different numbers of values in both, or a value out of its range.
    """
    if not mean or len(mean) != len(std):
        raise UserError(
            "normalize.mean and normalize.std need a value a channel (or one for all), std positive; "
            f"got mean={written(tuple(mean))}, std={written(tuple(std))}."
        )
    for average, deviation in zip(mean, std, strict=True):
        check_number("normalize.mean", average)
        check_range("normalize.std", deviation, 0, above=True)
        # A bound on the normalized values of all pixels, which must fit into float32.
        check_number(
            f"(255 - normalize.mean) / normalize.std, of {average} and {deviation},", (255 + abs(average)) / deviation
        )
    center, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))

    def normalize(images: jax.Array) -> jax.Array:
        if center.size not in (1, images.shape[-1]):
            raise UserError(
                f"normalize.mean has {center.size} values, but the images have {images.shape[-1]} channels."
            )
        return (images.astype(jnp.float32) - center) / scale

    return normalize


ON_NONFINITE = ("stop", "skip")


# Steps ---------------------------------------------------------------------------------------------


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss: Loss,
    metrics: MetricFunction,
    normalize: Callable[[jax.Array], jax.Array],
    abstract_state: TrainState,
    mesh: Mesh,
    /,
    ema_decay: float = 0.0,
    accumulation_steps: int = 1,
    lowering: str = "platform",
    on_nonfinite: str = "stop",
    *,
    seed: int,
    mix: Mix | None = None,
    frozen: Callable[[PyTree], PyTree] | None = None,
) -> Callable[[TrainState, Batch[jax.Array]], tuple[TrainState, Sums]]:
    """Returns the compiled `train_step(state, batch) -> (state, metrics)`; the old state is donated.

    Batches are `data.batch.Batch`. Images whose `mask` is 0 are black, and batch statistics include them. The step is a
    pure function of state, batch and seed: the randomness of dropout and mixing comes from the seed and the number of
    the step, whatever the number of devices.

    Args:
      model: the network.
      tx: the optimizer.
      loss: from `losses.create_loss`.
      metrics: from `metrics.create_metrics`.
      normalize: from `create_normalizer`.
      abstract_state: shapes and shardings, from `state.make_init`.
      mesh: of all devices.
      ema_decay: share of the old average that a step keeps (Polyak averaging, section 4.2). The first steps keep less:
        min(ema_decay, (1 + step) / (10 + step)), as `tf.train.ExponentialMovingAverage(num_updates=step)`. 0 keeps no
        average.
      accumulation_steps: number of parts that a batch is split into, which are computed one after the other, for
        batches that do not fit into memory. The gradient is the mean over the parts. Batch normalization sees one part
        at a time, and each updates its moving statistics.
      lowering: how operations are computed: one of `ops.LOWERINGS`, see `ops.lowering`.
      on_nonfinite: what happens to a step whose loss, gradient or new state is NaN or infinite: 'stop' ends the run at
        the next record, before anything is saved; 'skip' leaves weights, statistics, averages and moments as they were,
        and counts the step in `skipped_steps`. Counters go on: the next batch comes, and the schedule. A run ends after
        100 of them in a row. It takes the memory of one more state.
      seed: of dropout and mixing.
      mix: from `mixing.make_mixing`; mixes the whole batch before it is split into parts. The loss takes the soft
        labels, and the metrics take the label with the larger share.
      frozen: a function from the parameters to True for those that `tx` does not change, else False. No gradient of
        them is computed, and `gradient_norm` is that of the others. None: it changes all.

    Raises:
      UserError: a value is out of its range, or the devices have no such lowering. The step raises it while it is
        traced if the network does not return `[N, model.num_classes]`, or the loss or a metric no value for each image.
    """
    check_range("step.ema_decay, the share kept,", ema_decay, 0, 1, below=True)
    check_range("step.accumulation_steps", accumulation_steps, 1)
    if on_nonfinite not in ON_NONFINITE:
        raise UserError(f"unknown step.on_nonfinite {written(on_nonfinite)}; {suggest(on_nonfinite, ON_NONFINITE)}")
    ops.check_lowering(lowering, mesh.devices.flat[0].device_kind)

    objective = make_objective(model, loss, metrics, normalize, mixed=mix is not None, frozen=frozen)
    gradient = _make_gradient(objective, mesh, accumulation_steps, lowering)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)

    def train_step(state: TrainState, batch: Batch[jax.Array]) -> tuple[TrainState, Sums]:
        key = step_key(seed, state.step)
        if mix is not None:
            batch = mix(mixing_key(seed, state.step), batch)
        # Arrays that 'fsdp' splits are stored in shares and gathered for the computation, so that the network splits
        # only the batch. Otherwise the compiler would split channels too, and copy back and forth.
        params = jax.lax.with_sharding_constraint(state.params, sharding.replicated(mesh))
        grads, (batch_stats, sums) = gradient(params, state.batch_stats, complete(batch), key)
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        sums["gradient_norm"] = Sum(optax.tree.norm(grads), jnp.ones(()))

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        if ema_decay:
            keep = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            new = new.replace(
                ema_params=_average(keep, state.ema_params, params),
                ema_batch_stats=_average(keep, state.ema_batch_stats, batch_stats),
            )
        if on_nonfinite == "skip":
            # What a checkpoint refuses too: see `checkpoint.WEIGHTS` about single numbers of the optimizer.
            arrays = [x for x in jax.tree.leaves(new) if x.ndim and jnp.issubdtype(x.dtype, jnp.inexact)]
            values = (sums["loss"].total, sums["gradient_norm"].total, *arrays)
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in values]))
            new = jax.tree.map(
                lambda n, o: n if jnp.issubdtype(n.dtype, jnp.integer) else jnp.where(finite, n, o), new, state
            )
            sums = jax.tree.map(lambda x: jnp.where(finite, x, 0), sums)
            sums["skipped_steps"] = Sum(1.0 - finite, jnp.ones(()))
        return new, sums

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """Returns the key of dropout in step `step`, counted from 0."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_objective(
    model: nn.Module,
    loss: Loss,
    metrics: MetricFunction,
    normalize: Callable[[jax.Array], jax.Array],
    *,
    mixed: bool,
    frozen: Callable[[PyTree], PyTree] | None,
) -> Callable[[PyTree, PyTree, Batch[jax.Array], jax.Array], tuple[jax.Array, tuple[PyTree, Sums]]]:
    """Returns `objective(params, batch_stats, batch, key) -> (mean loss + penalty, (new batch_stats, sums))`.

    It raises UserError while it is traced if the network or the loss returns another shape than it must.
    """

    def objective(params: PyTree, batch_stats: PyTree, batch: Batch[jax.Array], key: jax.Array):
        if frozen is not None:
            stop = jax.lax.stop_gradient
            params = jax.tree.map(lambda p, still: stop(p) if still else p, params, frozen(params))
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(batch["images"]),
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        check_logits(model, logits, batch)
        targets = soft_labels(batch, logits.shape[-1]) if mixed else batch["labels"]
        losses, penalty = loss.example(logits, targets), loss.penalty(params)
        sums = {
            "loss": masked_sum(losses, batch["mask"]),
            "penalty": Sum(penalty, jnp.ones(())),
            **metrics(logits, batch["labels"], batch["mask"]),
        }
        # `weight` makes the mean of this over the parts of a batch the mean over all images that count.
        mean = jnp.mean(jnp.where(batch["mask"] > 0, losses, 0) * batch["weight"])
        return mean + penalty, (updates.get("batch_stats", {}), sums)

    return objective


def check_logits(model: nn.Module, logits: jax.Array, batch: Batch[jax.Array]) -> None:
    """Checks what a network returns, where a step is traced: with too few logits a loss would just be too low.

    Raises:
      UserError: it is not `[N, model.num_classes]`, of N images.
    """
    expected, shape = (len(batch["images"]), model.num_classes), getattr(logits, "shape", type(logits).__name__)
    if shape != expected:
        raise UserError(
            f"network {type(model).__name__} must return logits [N, model.num_classes], here {expected}, got {shape}; "
            "pool the features, and return the classifier's logits alone."
        )


def complete(batch: Batch[jax.Array]) -> Batch[jax.Array]:
    """Returns the batch with a `mask`, of ones if it has none, and with `weight`. The compiler folds the ones away."""
    mask = batch.get("mask", jnp.ones(batch["labels"].shape[0]))
    weight = mask.size / jnp.maximum(jnp.sum(mask), 1)
    return {**batch, "mask": mask, "weight": jnp.broadcast_to(weight, mask.shape)}


def split(batch: Batch[jax.Array], accumulation_steps: int, mesh: Mesh) -> Batch[jax.Array]:
    """Returns the parts of a batch, `[accumulation_steps, N / accumulation_steps, ...]`.

    Part i takes every accumulation_steps-th image, so that each image stays on its device.
    """

    def parts(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, sharding.BATCH_AXES)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(parts, batch)


def _make_gradient(objective: Callable[..., Any], mesh: Mesh, accumulation_steps: int, lowering: str) -> Gradient:
    """Returns the gradient of `objective`: of a whole batch, or the mean over its parts, one after the other."""

    def at_once(*arguments: Any):
        # A kernel that each device runs on its share needs the mesh in context; see `ops`.
        with ops.lowering(lowering), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(objective, has_aux=True)(*arguments)

    def accumulated(params: PyTree, batch_stats: PyTree, batch: Batch[jax.Array], key: jax.Array):
        def add(carry: PyTree, part_and_key: tuple[Batch[jax.Array], jax.Array]):
            batch_stats, total = carry
            grads, (batch_stats, sums) = at_once(params, batch_stats, *part_and_key)
            return (batch_stats, jax.tree.map(jnp.add, total, (grads, sums))), None

        parts = (split(batch, accumulation_steps, mesh), jax.random.split(key, accumulation_steps))
        first = jax.tree.map(lambda x: x[0], parts)
        grads, (_, sums) = jax.eval_shape(at_once, params, batch_stats, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
        # Gradients are added up in the carry: this takes the memory of one more gradient, not of one for each part.
        (batch_stats, (grads, sums)), _ = jax.lax.scan(add, (batch_stats, zeros), parts)
        return jax.tree.map(lambda g: g / accumulation_steps, grads), (batch_stats, sums)

    return at_once if accumulation_steps == 1 else accumulated


def _average(keep: jax.Array, old: PyTree, new: PyTree) -> PyTree:
    # In this form, that of `tf.train.ExponentialMovingAverage`, the average of what does not change is itself.
    return jax.tree.map(lambda o, n: (o + (1 - keep) * (n - o)).astype(o.dtype), old, new)


def make_eval_step(
    model: nn.Module,
    loss: Loss,
    metrics: MetricFunction,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    *,
    head: Callable[[jax.Array], jax.Array] = lambda logits: logits,
    compiler_options: dict[str, str] | None = None,
) -> Callable[[PyTree, Batch[jax.Array]], tuple[Sums, jax.Array]]:
    """Returns the compiled `eval_step(variables, batch) -> (metrics, logits)`.

    `variables` are those of `TrainState.variables`. A batch (`data.batch.Batch`) must have a `mask`. The loss has no
    smoothing and no penalty. Logits are `[N, num_classes]`, on the devices of their images; `head` makes them of what
    the network returns, `[N, model.num_classes]`; another shape raises UserError while the step is traced.
    `compiler_options` are those of `ops.compiler_options`.
    """

    def eval_step(variables: PyTree, batch: Batch[jax.Array]) -> tuple[Sums, jax.Array]:
        variables = jax.lax.with_sharding_constraint(variables, sharding.replicated(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as in `_make_gradient`
            logits = model.apply(variables, normalize(batch["images"]), train=False)
            check_logits(model, logits, batch)
            logits = head(logits)
        sums = metrics(logits, batch["labels"], batch["mask"])
        sums["loss"] = masked_sum(loss.plain(logits, batch["labels"]), batch["mask"])
        return sums, logits

    shardings = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(eval_step, out_shardings=shardings, compiler_options=compiler_options)
