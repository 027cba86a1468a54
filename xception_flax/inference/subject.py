"""What is evaluated, and on what: a run at one of its checkpoints, or a network from elsewhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.data.sources.tfds import REENCODED, Reencoding
from xception_flax.host import processes
from xception_flax.inference import evaluation as evaluations
from xception_flax.inference import preprocessing as preprocessings
from xception_flax.inference.predictor import ACTIVATIONS, BATCH_SIZE, Predictor
from xception_flax.inference.preprocessing import Preprocessing
from xception_flax.recipes.comparing import alike
from xception_flax.runs.restore import restore
from xception_flax.text import naming
from xception_flax.text.sizes import shown
from xception_flax.training import sharding
from xception_flax.training.metrics import METRICS
from xception_flax.training.program import make_evaluation
from xception_flax.weights import cards
from xception_flax.weights.pretrained import formula


class Subject(NamedTuple):
    """What is evaluated, and on what.

    Attributes:
      title: of the network, in words.
      network: its name.
      eval_step, variables, split, mesh: as of `training.evaluation.evaluate`.
      data: the same split with the data's own numbers of the classes.
      class_names: of the logits.
      several_labels: whether an image may have several.
      preprocessing: of the images.
      rows: of the table, by name: of the network, and of the data.
      said: of the network, for the JSON.
      activation: from logits to probabilities.
      advice: what to do where the loss is not finite, as a sentence.
    """

    title: str
    network: str
    eval_step: Callable[..., Any]
    variables: Any
    split: data.Split
    mesh: Mesh
    data: data.Split
    class_names: Sequence[str]
    several_labels: bool
    preprocessing: Preprocessing
    rows: tuple[dict[str, str], dict[str, str]]
    said: dict[str, Any]
    activation: Callable[[jax.Array], jax.Array]
    advice: str


def of_run(
    workdir: str, config: ConfigDict, *, checkpoint: str, weights: str | None, batch_size: int | None
) -> Subject:
    """Returns a run at one of its checkpoints, on data as of its recipe. Each process must call it.

    Args:
      workdir: of the run.
      config: its recipe, with the data to evaluate on.
      checkpoint, weights: as of `runs.restore.restore`.
      batch_size: None for the recipe's.

    Raises:
      UserError: the run or the data cannot be read, or do not go together.
    """
    processes.agree("recipe", lambda: alike(config) | processes.software())
    mesh = sharding.create_mesh(**config.mesh)
    split, rows = _data(config, _batch_size(batch_size, config.batch_size, mesh), weights)
    run = restore(Path(workdir), mesh, checkpoint, weights)
    processes.agree("checkpoint", lambda: {"the checkpoint": {"step": run.step, "meta": run.meta}})
    data.check_class_names(run.class_names, split)
    rows |= _trained_on(run.meta.get(REENCODED), split)
    what = f"step {run.step}, {run.weights} weights"
    return Subject(
        f"{naming.shown(Path(workdir))}, {what}",
        type(run.model).__name__,
        make_evaluation(config, run.model, mesh),
        run.variables,
        split,
        mesh,
        split,
        run.class_names,
        METRICS[config.metrics.name].several_labels,
        preprocessings.of_recipe(config),
        ({"checkpoint": what}, rows),
        {"step": run.step, "weights": run.weights},
        ACTIVATIONS[run.activation],
        "Take another step (--checkpoint), or look at the images.",
    )


def elsewhere(
    source: str,
    config: ConfigDict,
    load: Callable[[Mesh, int], Predictor],
    *,
    weights: str | None,
    batch_size: int | None,
) -> Subject:
    """Returns a network from elsewhere, whose preprocessing is written into `config`. Each process must call it.

    Args:
      source: what the user calls it.
      config: the groups `data` and `mesh`.
      load: makes the network, for a mesh and a batch size.
      weights: as the user chose them.
      batch_size: None for `BATCH_SIZE`, or a little more.

    Raises:
      UserError: the network or the data cannot be read, or do not go together.
    """
    processes.agree("settings", lambda: alike(config) | processes.software())
    mesh = sharding.create_mesh(**config.mesh)
    batch_size = _batch_size(batch_size, BATCH_SIZE, mesh)
    predictor = load(mesh, batch_size)
    preprocessing = predictor.preprocessing
    processes.agree(
        "weights",
        lambda: {
            "the weights (SHA-256)": predictor.origin.get("sha256"),
            "the names of classes": predictor.class_names,
            "how images are prepared": str(preprocessing),
        },
    )
    with config.data.ignore_type():  # a number or a pair
        config.data.image_size = preprocessing.image_size
    config.data.channels = preprocessing.channels
    config.data.eval_transforms = preprocessing.transforms
    for name in ("min_decoded_side", "max_value"):  # what the user says of the data counts more
        config.data[name] = config.data[name] or getattr(preprocessing, name)
    if config.data.orientation == "ignore":
        config.data.orientation = preprocessing.orientation
    split, rows = _data(config, batch_size, weights)
    prepared = evaluations.prepare(predictor, split)
    size, recorded = shown(preprocessing.image_size), cards.record(predictor.measured)
    return Subject(
        naming.shown(Path(source)),
        type(predictor.model).__name__,
        prepared.eval_step,
        predictor.variables,
        prepared.split,
        mesh,
        split,
        prepared.classes.names,
        prepared.several_labels,
        preprocessing._replace(
            **{name: config.data[name] for name in ("min_decoded_side", "max_value", "orientation")}
        ),
        (
            {**({"recorded": recorded} if recorded else {}), "classes": prepared.classes.words},
            {**rows, "images": f"{size} pixels, {formula(preprocessing.mean, preprocessing.std)}"},
        ),
        {"source": naming.decoded(source), "sha256": predictor.origin.get("sha256")},
        prepared.activation,
        evaluations.ADVICE,
    )


def _trained_on(trained: dict[str, int] | None, split: data.Split) -> dict[str, str]:
    """Returns a row about the images of training, if these are encoded otherwise; `trained` is of its checkpoint."""
    how = data.reencoding_of(split.source)
    if trained == (None if how is None else how._asdict()):
        return {}
    return {"trained on": "original images" if trained is None else f"re-encoded images: {Reencoding(**trained)}"}


def _batch_size(batch_size: int | None, default: int, mesh: Mesh) -> int:
    """Returns what the user says, or as much as the default or a little more: each device gets as many images."""
    batch_size = batch_size or -(-default // mesh.size) * mesh.size
    sharding.check_batch_size(batch_size, mesh)
    return batch_size


def _data(config: ConfigDict, batch_size: int, weights: str | None) -> tuple[data.Split, dict[str, str]]:
    """Returns the split, and the rows of the table about files that may be read wrong."""
    split = data.load(
        **config.data,
        train=False,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        processes_per_host=processes.per_host(),
    )
    processes.agree("data", lambda: {"--batch-size": batch_size, "--weights": weights} | split.identity())
    dark = split.check_max_value()  # the data may be others than in training
    unread = data.unread_of([split.source], whole=False)
    reencoding = data.reencoding_of(split.source)
    rows = {"re-encoded": str(reencoding or ""), "not read": unread, "16 bits": dark}
    return split, {name: text for name, text in rows.items() if text}
