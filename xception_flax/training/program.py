"""What a recipe computes: network, loss, optimizer and steps, put together for a mesh.

Only this module puts them together, so `train.py` runs, `xception-flax evaluate` scores, and `planning` compiles for
other machines, the same functions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import models
from xception_flax.models import ops
from xception_flax.text.errors import UserError
from xception_flax.text.sizes import sides
from xception_flax.training import losses, metrics, mixing, optimizers, probing, recalibration, state, steps
from xception_flax.training.length import RunLength, create_length


class Program(NamedTuple):
    """The functions of a run, not compiled yet.

    Attributes:
      model: the network.
      init: `init(key, pretrained={})` returns the initial state; see `state.make_init`.
      abstract_state: shape, type and sharding of each array of the state.
      train_step: see `steps.make_train_step`.
      eval_step: see `steps.make_eval_step`.
      learning_rate: returns the learning rate of a step, given its number.
      length: of the whole run.
      weights: which weights are evaluated; see `evaluated_weights`.
      frozen: whether some layers stay as they are, and have no backward pass.
    """

    model: nn.Module
    init: Callable[..., state.TrainState]
    abstract_state: state.TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    learning_rate: Callable[[int], jax.Array]
    length: RunLength
    weights: str
    frozen: bool


def create_program(
    config: ConfigDict,
    mesh: Mesh,
    image_shape: tuple[int, int, int],
    num_images: int,
    class_shares: Sequence[float] | None = None,
) -> Program:
    """Returns what a resolved recipe computes on `mesh`. It compiles nothing and creates no arrays.

    Args:
      config: the resolved recipe.
      mesh: of all devices; they may be only described.
      image_shape: `(H, W, C)` of one image.
      num_images: of the training split, which is one epoch.
      class_shares: see `losses.create_loss`; only 'balanced' class weights need it, and only to train.

    Raises:
      UserError: a value of the recipe is out of its range, or values do not fit together.
    """
    model = models.create_model(**config.model)
    length = create_length(config.epochs, config.batch_size, num_images)
    schedule = optimizers.create_schedule(**config.schedule, run=length)
    tx, learning_rate = optimizers.create_optimizer(**config.optimizer, schedule=schedule)
    weights = evaluated_weights(config)
    init, abstract_state = state.make_init(model, tx, image_shape, mesh, ema=weights == "ema")
    frozen = _frozen(config, abstract_state)
    train_step = steps.make_train_step(
        model,
        tx,
        losses.create_loss(**config.loss, class_shares=class_shares),
        metrics.create_metrics(**config.metrics),
        steps.create_normalizer(**config.normalize),
        abstract_state,
        mesh,
        seed=config.seed,
        mix=mixing.make_mixing(**config.mix),
        frozen=frozen,
        **config.step,
    )
    eval_step = make_evaluation(config, model, mesh)
    return Program(
        model, init, abstract_state, train_step, eval_step, learning_rate, length, weights, frozen is not None
    )


def _frozen(config: ConfigDict, abstract_state: state.TrainState) -> Callable[[Any], Any] | None:
    """Returns which parameters stay as they are, as `steps.make_train_step` takes it; None if all are trained."""
    options = config.optimizer.backbone_factor, config.optimizer.layer_factors

    def frozen(params: Any) -> Any:
        return jax.tree.map(lambda factor: factor == 0, optimizers.factors_of(params, *options))

    stay = jax.tree.leaves(frozen(abstract_state.params))
    if all(stay):
        raise UserError("optimizer.layer_factors freezes all layers; leave some to be trained.")
    return frozen if any(stay) else None


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns `(H, W, C)` of one image, by a resolved recipe."""
    return *sides(config.data.image_size), config.data.channels


def evaluated_weights(config: ConfigDict) -> str:
    """Returns which weights of a run are evaluated: 'ema' if its recipe keeps them, otherwise 'raw'."""
    return "ema" if config.step.ema_decay else "raw"


def make_evaluation(config: ConfigDict, model: nn.Module, mesh: Mesh) -> Callable[..., Any]:
    """Returns the evaluation step of a resolved recipe, not compiled yet; see `steps.make_eval_step`.

    Args:
      config: the resolved recipe.
      model: its network.
      mesh: of all devices.

    Raises:
      UserError: a value of the recipe is out of its range.
    """
    return steps.make_eval_step(
        model,
        losses.create_loss(**config.loss),
        metrics.create_metrics(**config.metrics),
        steps.create_normalizer(**config.normalize),
        mesh,
        compiler_options=ops.compiler_options(mesh.devices.flat[0].platform, *sides(config.data.image_size)),
    )


def make_probe(
    config: ConfigDict,
    program: Program,
    mesh: Mesh,
    class_shares: Sequence[float] | None = None,
) -> Callable[..., probing.Probed]:
    """Returns what looks at each layer in a training step of a resolved recipe; see `probing.make_probe`."""
    return probing.make_probe(
        program.model,
        losses.create_loss(**config.loss, class_shares=class_shares),
        steps.create_normalizer(**config.normalize),
        mesh,
        accumulation_steps=config.step.accumulation_steps,
        lowering=config.step.lowering,
        seed=config.seed,
        mix=mixing.make_mixing(**config.mix),
        frozen=_frozen(config, program.abstract_state),
    )


def make_statistics(config: ConfigDict, model: nn.Module, mesh: Mesh) -> Callable[..., Any]:
    """Returns the step of a resolved recipe that measures the statistics of a batch; as of `make_evaluation`.

    See `recalibration.make_statistics_step`.
    """
    normalize = steps.create_normalizer(**config.normalize)
    return recalibration.make_statistics_step(model, normalize, mesh, lowering=config.step.lowering)
