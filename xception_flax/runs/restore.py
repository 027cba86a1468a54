"""Reads a run back from its workdir. All commands on a trained network use it."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import models
from xception_flax.runs import history
from xception_flax.runs.workdir import CHECKPOINTS, CONFIG, HISTORY, read_recipe
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.training import checkpoint as checkpoints
from xception_flax.training import losses, metrics, program, state


class Run(NamedTuple):
    """A run at one of its checkpoints.

    Attributes:
      recipe: resolved by this version.
      model: the network.
      variables: what `model.apply` takes, on the devices.
      class_names: the class of each logit.
      step: of the checkpoint.
      weights: which weights of the checkpoint `variables` are: 'raw' or 'ema'.
      meta: all JSON values of the checkpoint; see `training.checkpoint`.
      workdir: of the run.
    """

    recipe: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    step: int
    weights: str
    meta: dict[str, Any]
    workdir: Path

    def measured(self) -> dict[str, Any]:
        """Returns what the run itself measured of these weights at this step, and how; {} where it did not.

        Metrics and 'loss' by their names, 'count' (images); of the data 'source' and 'split'; 'step' and 'weights' of
        the checkpoint, and where it says them the 'date' of UTC and the 'version' of this program.

        Raises:
          UserError: the history cannot be read.
        """
        path = self.workdir / HISTORY
        records = history.read_kept(path)
        for record in reversed(records):
            if (record["step"], record.get("eval/weights")) == (self.step, self.weights):
                values = {name.removeprefix("eval/"): v for name, v in record.items() if name.startswith("eval/")}
                kept = {name: v for name, v in values.items() if name not in ("seconds", "weights") and v is not None}
                data = self.recipe.data
                name = f"{data.source} {data.name}" if data.get("name") else data.source
                saved = self.meta.get("saved")  # older checkpoints lack it
                saved = {key: str(v) for key, v in saved.items()} if isinstance(saved, dict) else {}
                how = {"source": name, "split": data.eval_split, "step": self.step, "weights": self.weights}
                return saved | kept | how
        return {}

    @property
    def activation(self) -> str:
        """From logits to probabilities: 'sigmoid' where an image has several labels, else 'softmax'."""
        return losses.LOSSES[self.recipe.loss.name].activation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the images that the run was trained on."""
        return program.image_shape(self.recipe)


def restore(workdir: Path, mesh: Mesh, checkpoint: str, weights: str | None = None) -> Run:
    """Reads a run from one of its checkpoints. The run may be going on meanwhile.

    Every process of `mesh` must call it with the same arguments.

    Args:
      workdir: of the run.
      mesh: where the variables go.
      checkpoint: 'latest', 'best' or the number of a step.
      weights: 'raw', 'ema', or None for 'ema' if the run keeps them and 'raw' if not.

    Raises:
      UserError: `workdir` has no recipe of this version, no such checkpoint or weights, or a damaged one.
    """
    recipe = read_recipe(workdir)
    try:
        model = models.create_model(**recipe.model)
        abstract_variables = state.abstract_variables(model, program.image_shape(recipe), mesh)
    except UserError as error:
        raise UserError(f"{workdir / CONFIG}: {error}") from None
    except Exception as error:  # the file may have been changed by hand, and Flax then raises anything
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"{workdir / CONFIG} is no recipe of a network: {type(error).__name__}: {reason}") from error
    if weights not in (None, "raw", "ema"):
        raise UserError(f"weights must be 'raw' or 'ema', got {written(weights)}.")
    kept = program.evaluated_weights(recipe)
    if weights == "ema" and kept != "ema":
        raise UserError(f"{workdir} keeps no averaged weights (step.ema_decay is 0); take raw.")
    weights = weights or kept
    best_metric = metrics.METRICS[recipe.metrics.name].best
    step, meta, variables = checkpoints.read_variables(
        workdir / CHECKPOINTS, checkpoint, weights, abstract_variables, best_metric=best_metric
    )
    return Run(recipe, model, variables, tuple(meta["class_names"]), step, weights, meta, workdir)
