"""The training step and the evaluation step: pure functions, compiled with explicit shardings."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xception_flax.models import ops
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, written
from xception_flax.text.ranges import check_number, check_range
from xception_flax.training import sharding
from xception_flax.training.metrics import MetricFunction, Sum, masked_sum
from xception_flax.training.mixing import Mix, mixing_key, soft_labels
from xception_flax.training.optimizers import backbone_mask, decay_mask
from xception_flax.training.state import TrainState

PyTree = Any
Batch = dict[str, jax.Array]


# Losses --------------------------------------------------------------------------------------------


def softmax(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Cross-entropy of one label an image: `[N, C]`, `[N]` integers or `[N, C]` floating shares -> `[N]` (nats)."""
    soft = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.floating)  # rows of 0 and 1 are integers
    if labels.ndim != 1 and not soft:
        raise UserError(
            f"loss 'softmax' takes one label an image, got labels of shape {labels.shape}; for several labels "
            "set loss.name=sigmoid and metrics.name=multi_label."
        )
    targets = labels.astype(logits.dtype) if soft else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def sigmoid(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Binary cross-entropy summed over the classes, any number of labels an image (JFT).

    `[N, C]`, `[N, C]` of 0 and 1, or of shares between them -> `[N]` (nats). Smoothing draws each target towards 1/2.
    """
    if labels.shape != logits.shape:
        raise UserError(
            f"loss 'sigmoid' takes a row of 0 and 1 an image, got labels of shape {labels.shape} for logits of "
            f"shape {logits.shape}; for one label an image set loss.name=softmax and metrics.name=single_label."
        )
    targets = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


class Loss(NamedTuple):
    """What a run minimises: mean of `example` over the batch plus `penalty` of the parameters."""

    example: Callable[[jax.Array, jax.Array], jax.Array]  # logits, labels -> [N]; smoothed; labels may be soft
    plain: Callable[[jax.Array, jax.Array], jax.Array]  # the same without smoothing, for evaluation
    penalty: Callable[[PyTree], jax.Array]  # params -> scalar


def create_loss(name: str, *, label_smoothing: float = 0.0, weight_decay: float = 0.0) -> Loss:
    """Returns the loss `name`.

    Args:
      name: a key of `LOSSES`.
      label_smoothing: share of the target that is spread over all classes (Inception V3: 0.1).
      weight_decay: L2 in the loss, as the paper has it (section 4.3): `weight_decay / 2 * sum of
        squares` of all kernels, so that its gradient is `weight_decay * kernel`. It passes through
        momentum and clipping with the rest of the gradient; `optimizer.decoupled_weight_decay` is
        the other kind.

    Raises:
      ValueError: unknown name, or a value out of its range.
    """
    function = lookup(LOSSES, name, "loss.name")
    check_range("loss.label_smoothing", label_smoothing, 0, 1, below=True)
    check_range("loss.weight_decay", weight_decay, 0)

    def penalty(params: PyTree) -> jax.Array:
        squares = jax.tree.map(
            lambda p, decayed: jnp.sum(jnp.square(p.astype(jnp.float32))) if decayed else 0.0,
            params,
            decay_mask(params),
        )
        return weight_decay / 2 * jax.tree.reduce(jnp.add, squares, jnp.zeros((), jnp.float32))

    return Loss(
        example=partial(function, label_smoothing=label_smoothing),
        plain=partial(function, label_smoothing=0.0),
        penalty=penalty,
    )


# Normalisation -------------------------------------------------------------------------------------


def create_normalizer(mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from uint8 images to `(images - mean) / std`, float32.

    It runs inside the compiled step: a quarter of the bytes travels to the device, and a host
    core is spared. The published weights expect [-1, 1]: mean and std 127.5.

    Args:
      mean: a value a channel, or one for all; on the scale 0 to 255.
      std: the same, positive.

    Raises:
      ValueError: no value, not as many of both, or one out of its range.
    """
    if not mean or len(mean) != len(std):
        raise UserError(
            "normalize.mean and normalize.std need a value a channel (or one for all), std positive; "
            f"got mean={written(tuple(mean))}, std={written(tuple(std))}."
        )
    for average, deviation in zip(mean, std, strict=True):
        check_number("normalize.mean", average)
        check_range("normalize.std", deviation, 0, above=True)
        # Of the darkest and the brightest pixel: neither may be beyond float32.
        check_number(
            f"(255 - normalize.mean) / normalize.std, of {average} and {deviation},", (255 + abs(average)) / deviation
        )
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def normalize(images: jax.Array) -> jax.Array:
        if mean.size not in (1, images.shape[-1]):
            raise UserError(f"normalize.mean has {mean.size} values, but the images have {images.shape[-1]} channels.")
        return (images.astype(jnp.float32) - mean) / std

    return normalize


# Steps ---------------------------------------------------------------------------------------------


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss: Loss,
    metrics: MetricFunction,
    normalize: Callable[[jax.Array], jax.Array],
    abstract_state: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    mix: Mix | None = None,
    backbone_frozen: bool = False,
    ema_decay: float = 0.0,
    accumulation_steps: int = 1,
    lowering: str = "platform",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Sum]]]:
    """Returns the compiled `train_step(state, batch) -> (state, metrics)`; the old state is donated.

    A batch is `images` `[N, H, W, C]` uint8 and `labels`; it may have a `mask` `[N]`, 0 for images that loss,
    gradient and metrics leave out (batch statistics see them: they are black). The step is a pure function of state,
    batch and seed; dropout's and mixing's randomness comes from the seed and the step number,
    whatever the number of devices.

    Args:
      abstract_state: shapes and shardings, from `state.make_init`.
      seed: of dropout and mixing.
      mix: from `mixing.make_mixing`; it mixes the whole batch, before it is split into parts. The
        loss takes the soft labels, and the metrics the label with the larger share.
      backbone_frozen: whether `tx` leaves the backbone as it is: no gradient of it is computed, and
        `gradient_norm` is the classifier's.
      ema_decay: share of the old average that a step keeps (Polyak averaging, section 4.2). In
        the first steps less: min(ema_decay, (1 + step) / (10 + step)), as
        `tf.train.ExponentialMovingAverage(num_updates=step)`. 0 keeps no average.
      accumulation_steps: parts a batch is split into and computed one after the other, for batches
        that do not fit. The gradient is the mean over the parts; batch normalization sees, and
        its moving statistics follow, one part after the other.
      lowering: how operations are computed, see `ops.lowering`; 'fused' is for the Xception networks
        with a batch of which each TPU has a multiple of 16 images.
    """
    check_range("step.ema_decay, the share kept,", ema_decay, 0, 1, below=True)
    check_range("step.accumulation_steps", accumulation_steps, 1)
    ops.check_lowering(lowering, mesh.devices.flat[0].device_kind)

    def objective(params: PyTree, batch_stats: PyTree, part: Batch, key: jax.Array):
        if backbone_frozen:
            stop = jax.lax.stop_gradient
            params = jax.tree.map(lambda p, frozen: stop(p) if frozen else p, params, backbone_mask(params))
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(part["images"]),
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        targets = part["labels"] if mix is None else soft_labels(part, logits.shape[-1])
        losses, penalty = loss.example(logits, targets), loss.penalty(params)
        mask = part.get("mask", jnp.ones(logits.shape[0]))
        sums = {
            "loss": masked_sum(losses, mask),
            "penalty": Sum(penalty, jnp.ones(())),
            **metrics(logits, part["labels"], mask),
        }
        # `part["weight"]` makes the mean over parts of this mean that of all images that count.
        mean = jnp.mean(jnp.where(mask > 0, losses, 0) * part["weight"]) if "mask" in part else jnp.mean(losses)
        return mean + penalty, (updates.get("batch_stats", {}), sums)

    def gradient(*arguments):
        # A kernel that each chip runs on its share asks for the mesh in context; see `ops`.
        with ops.lowering(lowering), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(objective, has_aux=True)(*arguments)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)

    def accumulated_gradient(params: PyTree, batch_stats: PyTree, batch: Batch, key: jax.Array):
        def split(x: jax.Array) -> jax.Array:
            # Part i takes every accumulation_steps-th image, so that each image stays on its device.
            x = x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)
            spec = PartitionSpec(None, sharding.BATCH_AXES)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        def add(carry, part_and_key):
            batch_stats, total = carry
            grads, (batch_stats, sums) = gradient(params, batch_stats, *part_and_key)
            return (batch_stats, jax.tree.map(jnp.add, total, (grads, sums))), None

        parts = (jax.tree.map(split, batch), jax.random.split(key, accumulation_steps))
        first = jax.tree.map(lambda x: x[0], parts)
        grads, (_, sums) = jax.eval_shape(gradient, params, batch_stats, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
        # Gradients are added up in the carry, not stacked: memory for one more, not for all.
        (batch_stats, (grads, sums)), _ = jax.lax.scan(add, (batch_stats, zeros), parts)
        return jax.tree.map(lambda g: g / accumulation_steps, grads), (batch_stats, sums)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Sum]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if mix is not None:
            batch = mix(mixing_key(seed, state.step), batch)
        # What 'fsdp' splits is stored in shares and computed with whole; only the batch is split in
        # the network. Left to itself the compiler would split channels too, and copy back and forth.
        params = jax.lax.with_sharding_constraint(state.params, sharding.replicated(mesh))
        if "mask" in batch:
            mask = batch["mask"]
            weight = mask.size / jnp.maximum(jnp.sum(mask), 1)
            batch = {**batch, "weight": jnp.broadcast_to(weight, mask.shape)}
        if accumulation_steps == 1:
            grads, (batch_stats, sums) = gradient(params, state.batch_stats, batch, key)
        else:
            grads, (batch_stats, sums) = accumulated_gradient(params, state.batch_stats, batch, key)
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
        return new, sums

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _average(keep: jax.Array, old: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(lambda o, n: (keep * o + (1 - keep) * n).astype(o.dtype), old, new)


def make_eval_step(
    model: nn.Module,
    loss: Loss,
    metrics: MetricFunction,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
) -> Callable[[PyTree, Batch], tuple[dict[str, Sum], jax.Array]]:
    """Returns the compiled `eval_step(variables, batch) -> (metrics, logits)`.

    `variables` is what `TrainState.variables` gives. A batch also has `mask` `[N]`: 0 for padding.
    The loss is without smoothing and without penalty. Logits are `[N, num_classes]`, on the
    devices of their images.
    """

    def eval_step(variables: PyTree, batch: Batch) -> tuple[dict[str, Sum], jax.Array]:
        variables = jax.lax.with_sharding_constraint(variables, sharding.replicated(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # see `gradient`
            logits = model.apply(variables, normalize(batch["images"]), train=False)
        sums = metrics(logits, batch["labels"], batch["mask"])
        sums["loss"] = masked_sum(loss.plain(logits, batch["labels"]), batch["mask"])
        return sums, logits

    return jax.jit(eval_step, out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)))
