"""A run read back from its workdir: the one way, for all who do something with a trained network."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import models
from xception_flax.runs.workdir import CHECKPOINTS, CONFIG, read_recipe
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint as checkpoints
from xception_flax.training import metrics, state


class Run(NamedTuple):
    """A run as one of its checkpoints has it.

    Attributes:
      recipe: resolved, of the version that reads it.
      model: the network.
      variables: what `model.apply` takes, on the devices.
      class_names: what the logits stand for.
      step: of the checkpoint.
      weights: which of its weights `variables` are: 'raw' or 'ema'.
      meta: all the JSON values of the checkpoint; see `training.checkpoint`.
    """

    recipe: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    step: int
    weights: str
    meta: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the images that the run was trained on."""
        return image_shape(self.recipe)


def image_shape(recipe: ConfigDict) -> tuple[int, int, int]:
    """Returns `(H, W, C)` of one image, as a recipe has it."""
    return (recipe.data.image_size, recipe.data.image_size, recipe.data.channels)


def restore(workdir: Path, mesh: Mesh, checkpoint: str, weights: str | None = None) -> Run:
    """Reads a run, which may be going on, from one of its checkpoints.

    Every process of `mesh` must call it with the same arguments.

    Args:
      workdir: of the run.
      mesh: where the variables go.
      checkpoint: 'latest', 'best' or the number of a step.
      weights: 'raw', 'ema', or None for 'ema' where the run keeps them.

    Raises:
      ValueError: `workdir` has no recipe of this version, no such checkpoint or weights, or a damaged one.
    """
    recipe = read_recipe(workdir)
    try:
        model = models.create_model(**recipe.model)
        abstract_variables = state.abstract_variables(model, image_shape(recipe), mesh)
    except Exception as error:  # the file may have been changed by hand, and what Flax then raises has no end
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"{workdir / CONFIG} is no recipe of a network: {type(error).__name__}: {reason}") from error
    kept = recipe.step.ema_decay > 0
    if weights == "ema" and not kept:
        raise UserError(f"{workdir} keeps no averaged weights (step.ema_decay is 0); take raw.")
    weights = weights or ("ema" if kept else "raw")
    step, meta, variables = checkpoints.read_variables(
        workdir / CHECKPOINTS, checkpoint, weights, abstract_variables, best_metric=metrics.BEST[recipe.metrics.name]
    )
    return Run(recipe, model, variables, tuple(meta["class_names"]), step, weights, meta)
