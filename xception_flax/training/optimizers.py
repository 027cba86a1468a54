"""Learning-rate schedules, optimizers, and the mask of parameters that weight decay touches.

A schedule is a *factor* of the learning rate, so that `learning_rate` stays one number of the recipe. Durations are in
epochs or in images, never in steps, so that a recipe keeps its meaning at another batch size.
"""

import re
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from xception_flax.models.layers import is_classifier
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, written
from xception_flax.text.ranges import check_range
from xception_flax.training.length import RunLength

PyTree = Any
Schedule = Callable[[jax.Array | int], jax.Array]


# Schedules -----------------------------------------------------------------------------------------


def constant(run: RunLength, /) -> Schedule:
    """Factor 1 at every step."""
    return lambda step: jnp.ones((), jnp.float32)


def exponential(
    run: RunLength,
    /,
    decay_rate: float,
    every_epochs: float | None = None,
    every_images: int | None = None,
    staircase: bool = True,
) -> Schedule:
    """Factor `decay_rate ** (images seen / every)`.

    Args:
      run: its length, which converts epochs and images to steps.
      decay_rate: factor of one decay, above 0 and at most 1; the paper: 0.94 on ImageNet, 0.9 on JFT (section 4.2).
      every_epochs: epochs between two decays (ImageNet: 2). Exactly one of this and `every_images` must be given.
      every_images: images between two decays (JFT: 3,000,000).
      staircase: decay at once after each interval, not a little at each step.

    Raises:
      UserError: both or none of `every_epochs` and `every_images` are given, or a value is out of its range.
    """
    if (every_epochs is None) == (every_images is None):
        raise UserError(
            "schedule 'exponential' takes exactly one of every_epochs and every_images, "
            f"got every_epochs={every_epochs}, every_images={every_images}."
        )
    check_range("schedule.decay_rate", decay_rate, 0, above=True)
    if every_images is None:
        check_range("schedule.every_epochs", every_epochs, 0, above=True)
        every = every_epochs * run.num_images
    else:
        check_range("schedule.every_images", every_images, 1)
        every = every_images
    interval_steps = every / run.batch_size

    def factor(step: jax.Array | int) -> jax.Array:
        # At whole intervals the division may be rounded down; half a step keeps that from changing `floor`.
        intervals = jnp.floor((step + 0.5) / interval_steps) if staircase else step / interval_steps
        return jnp.asarray(decay_rate, jnp.float32) ** intervals

    return factor


def cosine(run: RunLength, /, warmup_epochs: float = 0.0, final_factor: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to 1, then half a cosine down to `final_factor` (Loshchilov & Hutter 2017).

    Args:
      run: its length, which converts epochs to steps.
      warmup_epochs: length of the warm-up in epochs; 0 for none.
      final_factor: factor of the learning rate at the last step.

    Raises:
      UserError: a value is out of its range, or the warm-up takes the whole run.
    """
    check_range("schedule.warmup_epochs", warmup_epochs, 0)
    check_range("schedule.final_factor", final_factor, 0)
    warmup_steps = round(warmup_epochs * run.num_images / run.batch_size)
    if warmup_steps >= run.total_steps:
        raise UserError(
            f"schedule 'cosine': warmup_epochs={warmup_epochs:g} are {counted(warmup_steps, 'step')}, "
            f"but the whole run has {run.total_steps}; train longer, or set --config.schedule.warmup_epochs=0."
        )
    factor = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else 1.0,
        peak_value=1.0,
        warmup_steps=warmup_steps,
        decay_steps=run.total_steps,
        end_value=final_factor,
    )
    return cast("Schedule", factor)


#: The schedules by name, for `schedule.name` of a recipe.
SCHEDULES = {"constant": constant, "exponential": exponential, "cosine": cosine}


def create_schedule(name: str = "constant", *, run: RunLength, **options: Any) -> Schedule:
    """Returns the schedule `name`, a function from the step to a factor of the learning rate.

    Args:
      name: a key of `SCHEDULES`.
      run: its length, which converts epochs and images to steps.
      **options: the schedule's own keywords.

    Raises:
      UserError: unknown name, or a value out of its range.
    """
    return lookup(SCHEDULES, name, "schedule")(run, **options)


# Optimizers ----------------------------------------------------------------------------------------


def decay_mask(params: PyTree) -> PyTree:
    """Returns True for kernels, which weight decay touches, and False for biases and batch normalization's scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def backbone_mask(params: PyTree) -> PyTree:
    """Returns True for the backbone and False for the classifier; fine-tuning may treat them differently."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_classifier(path[0].key), params)


def factors_of(params: PyTree, backbone_factor: float, rules: str) -> PyTree:
    """Returns the factor of the learning rate of each array of `params`; 0 for those that stay as they are.

    Arguments as of `create_optimizer`, where `rules` are its `layer_factors`.

    Raises:
      UserError: a pattern fits no layer.
    """
    parsed = _parse_layer_factors(rules)
    for pattern, _ in parsed:
        if not any(map(pattern.match, params)):
            some = ", ".join(sorted(params)[:5])
            raise UserError(
                f"optimizer.layer_factors: no layer begins with {written(pattern.pattern)}; layers are {some}, ..."
            )

    def factor(layer: str) -> float:
        first = next((value for pattern, value in parsed if pattern.match(layer)), None)
        return first if first is not None else 1.0 if is_classifier(layer) else backbone_factor

    return jax.tree_util.tree_map_with_path(lambda path, _: factor(path[0].key), params)


def _parse_layer_factors(rules: str) -> list[tuple[re.Pattern[str], float]]:
    parsed = []
    for rule in rules.split(";") if rules.strip() else ():
        text, _, number = (part.strip() for part in rule.rpartition(":"))
        wrong = UserError(
            "optimizer.layer_factors must be PATTERN: NUMBER; PATTERN: NUMBER; ..., such as "
            f"'block1[34]_: 0.1; block: 0', got {written(rules)}."
        )
        if not text:
            raise wrong
        try:
            pattern, value = re.compile(text), float(number)
        except re.error as error:
            raise UserError(f"optimizer.layer_factors: {written(text)} is no regular expression: {error}.") from None
        except ValueError:
            raise wrong from None
        check_range("optimizer.layer_factors, each number,", value, 0)
        parsed.append((pattern, value))
    return parsed


def sgd(
    learning_rate: Schedule,
    /,
    momentum: float = 0.9,
    nesterov: bool = False,
    decoupled_weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum: `m = momentum * m + g; p -= learning_rate * m` (paper, section 4.2).

    Args:
      learning_rate: as a function of the step.
      momentum: share of the old `m` that a step keeps.
      nesterov: whether a step takes `momentum * m + g`, with the new `m`, in place of `m` (Nesterov's momentum).
      decoupled_weight_decay: a step also subtracts `learning_rate * decoupled_weight_decay * p`, beside the momentum
        (SGDW). The paper's weight decay is in the loss instead.
    """
    check_range("optimizer.momentum", momentum, 0, 1, below=True)
    check_range("optimizer.decoupled_weight_decay", decoupled_weight_decay, 0)
    return optax.chain(
        optax.trace(momentum, nesterov=nesterov),
        optax.add_decayed_weights(decoupled_weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def rmsprop(
    learning_rate: Schedule, /, decay: float = 0.9, momentum: float = 0.9, epsilon: float = 1.0
) -> optax.GradientTransformation:
    """RMSprop as in `tf.train.RMSPropOptimizer` (TF1), with which the paper trained on JFT.

        s = decay * s + (1 - decay) * g^2        s starts at 1
        m = momentum * m + learning_rate * g / sqrt(s + epsilon)
        p -= m

    Most other libraries start `s` at 0 and add epsilon outside the root. The paper does not give decay and epsilon; the
    defaults are Inception V3's.

    Args:
      learning_rate: as a function of the step.
      decay: share of the old `s`, the mean of squared gradients, that a step keeps.
      momentum: share of the old `m` that a step keeps.
      epsilon: added to `s` under the root.
    """
    check_range("optimizer.decay", decay, 0, 1, below=True)
    check_range("optimizer.momentum", momentum, 0, 1, below=True)
    check_range("optimizer.epsilon", epsilon, 0, above=True)
    return optax.rmsprop(
        learning_rate, decay=decay, eps=epsilon, initial_scale=1.0, eps_in_sqrt=True, momentum=momentum
    )


def adamw(
    learning_rate: Schedule,
    /,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    decoupled_weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019).

    Args:
      learning_rate: as a function of the step.
      beta1: share of the old mean of gradients that a step keeps.
      beta2: share of the old mean of squared gradients that a step keeps.
      epsilon: added to the root of the mean of squared gradients.
      decoupled_weight_decay: a step also subtracts `learning_rate * decoupled_weight_decay * p`.
    """
    check_range("optimizer.beta1", beta1, 0, 1, below=True)
    check_range("optimizer.beta2", beta2, 0, 1, below=True)
    check_range("optimizer.epsilon", epsilon, 0, above=True)
    check_range("optimizer.decoupled_weight_decay", decoupled_weight_decay, 0)
    return optax.adamw(learning_rate, beta1, beta2, epsilon, weight_decay=decoupled_weight_decay, mask=decay_mask)


#: The optimizers by name, for `optimizer.name` of a recipe.
OPTIMIZERS = {"sgd": sgd, "rmsprop": rmsprop, "adamw": adamw}


def create_optimizer(
    name: str,
    learning_rate: float,
    backbone_factor: float = 1.0,
    clip_norm: float | None = None,
    layer_factors: str = "",
    *,
    schedule: Schedule,
    **options: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Returns the optimizer and its learning rate as a function of the step.

    Args:
      name: a key of `OPTIMIZERS`.
      learning_rate: the learning rate where the schedule's factor is 1.
      backbone_factor: factor of the learning rate for all layers but the classifier (`layers.is_classifier`), for
        fine-tuning; 0 freezes them, and their gradients are not computed.
      layer_factors: other factors, 'PATTERN: NUMBER; PATTERN: NUMBER; ...', for the layers whose names begin with what
        a regular expression finds; the first that fits counts, before `backbone_factor`. 'block1[34]_: 0.1; block: 0'
        freezes all blocks of Xception but the last two. Moving statistics are frozen by `model.bn_frozen`.
      clip_norm: gradients longer than this (L2 norm over all parameters) are scaled down to it; None leaves them.
      schedule: factor of the learning rate; see `create_schedule`.
      **options: the optimizer's own keywords.

    Raises:
      UserError: unknown name, or a value out of its range.
    """
    check_range("optimizer.learning_rate", learning_rate, 0)
    check_range("optimizer.backbone_factor", backbone_factor, 0)
    if clip_norm is not None:
        check_range("optimizer.clip_norm (None: no clipping)", clip_norm, 0, above=True)

    def rate(step: jax.Array | int) -> jax.Array:
        return learning_rate * schedule(step)

    tx = lookup(OPTIMIZERS, name, "optimizer")(rate, **options)
    rules = layer_factors
    _parse_layer_factors(rules)
    if rules:

        def scale(updates: PyTree, _: PyTree) -> PyTree:
            return jax.tree.map(lambda u, factor: u * factor, updates, factors_of(updates, backbone_factor, rules))

        tx = optax.chain(tx, optax.stateless(scale))
    elif backbone_factor != 1:  # scales the whole update, like the learning rate, and so decoupled weight decay too
        tx = optax.chain(tx, optax.masked(optax.scale(backbone_factor), backbone_mask))
    if clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    return tx, rate
