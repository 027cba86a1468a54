"""What a recipe computes: network, loss, optimizer and steps, put together for a mesh.

Here and nowhere else: what `train.py` runs, what `xception-flax evaluate` scores and what `planning` compiles for a
machine that is not there are the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import models
from xception_flax.training import losses, metrics, mixing, optimizers, state, steps
from xception_flax.training.length import RunLength, create_length


class Program(NamedTuple):
    """The functions of a run, none of them compiled yet.

    Attributes:
      model: the network.
      init: `init(key)` makes the state; see `state.make_init`.
      abstract_state: shape, type and sharding of each array of the state.
      train_step: see `steps.make_train_step`.
      eval_step: see `steps.make_eval_step`.
      learning_rate: a step's number -> the learning rate of that step.
      length: of the whole run.
      weights: which weights are evaluated, 'ema' where the recipe keeps them, else 'raw'.
    """

    model: nn.Module
    init: Callable[[jax.Array], state.TrainState]
    abstract_state: state.TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    learning_rate: Callable[[int], jax.Array]
    length: RunLength
    weights: str


def create_program(config: ConfigDict, mesh: Mesh, image_shape: tuple[int, int, int], num_images: int) -> Program:
    """Returns what a resolved recipe computes on `mesh`; nothing is compiled and no array is made.

    Args:
      image_shape: `(H, W, C)` of one image.
      num_images: of the training split: an epoch.

    Raises:
      ValueError: values of the recipe that do not go together.
    """
    model = models.create_model(**config.model)
    length = create_length(config.epochs, config.batch_size, num_images)
    schedule = optimizers.create_schedule(**config.schedule, run=length)
    tx, learning_rate = optimizers.create_optimizer(**config.optimizer, schedule=schedule)
    weights = "ema" if config.step.ema_decay else "raw"
    init, abstract_state = state.make_init(model, tx, image_shape, mesh, ema=weights == "ema")
    train_step = steps.make_train_step(
        model,
        tx,
        losses.create_loss(**config.loss),
        metrics.create_metrics(**config.metrics),
        steps.create_normalizer(**config.normalize),
        abstract_state,
        mesh,
        seed=config.seed,
        mix=mixing.make_mixing(**config.mix),
        backbone_frozen=config.optimizer.backbone_factor == 0,
        **config.step,
    )
    eval_step = make_evaluation(config, model, mesh)
    return Program(model, init, abstract_state, train_step, eval_step, learning_rate, length, weights)


def make_evaluation(config: ConfigDict, model: nn.Module, mesh: Mesh) -> Callable[..., Any]:
    """Returns the evaluation step of a resolved recipe, see `steps.make_eval_step`; it is not compiled yet.

    Args:
      model: the recipe's network.

    Raises:
      ValueError: a value of the recipe that is out of its range.
    """
    return steps.make_eval_step(
        model,
        losses.create_loss(**config.loss),
        metrics.create_metrics(**config.metrics),
        steps.create_normalizer(**config.normalize),
        mesh,
    )
