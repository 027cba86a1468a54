"""Evaluates a trained network: a table, a picture of the mistakes, and one line of JSON."""

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli, images
from xception_flax.data.batch import Batch
from xception_flax.data.sources.folder import ALL
from xception_flax.display import console, pictures
from xception_flax.host import files, processes
from xception_flax.inference import evaluation as evaluations
from xception_flax.recipes import checking, overrides, reading
from xception_flax.recipes.comparing import alike
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import mistakes_picture, read_recipe
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.training import evaluation, sharding
from xception_flax.training.metrics import METRICS, SHARES
from xception_flax.training.program import make_evaluation
from xception_flax.weights import cards
from xception_flax.weights.pretrained import IMAGE_SIZE, formula
from xception_flax.weights.source import is_workdir

EXAMPLES = """\
  xception-flax evaluate runs/digits --split test --weights raw --checkpoint best
  xception-flax evaluate runs/imagenet --config.data.data_dir=/data/tfds
  xception-flax evaluate mine.keras photos/val
  xception-flax evaluate mine.keras --config.data.source=folder --config.data.data_dir=photos --split val"""

MAX_MISTAKES = 40  # images in the picture

# Keys of `data` that a network from elsewhere, or the user's word about it, says; and what says it.
SAID = {"image_size": "--image-size", "eval_transforms": "--transforms", "channels": "the weights"}


class Mistakes:
    """Counts the images whose most likely class is not the true one, and keeps the first of them.

    It is called with each batch and its logits. An image with a NaN or infinite logit is wrong, as in `metrics`.
    """

    def __init__(
        self, class_names: Sequence[str], activation: Callable[[jax.Array], jax.Array] = jax.nn.softmax
    ) -> None:
        self._class_names = class_names
        self._activation = activation
        self.count = 0
        self.images: list[np.ndarray] = []
        self.truths: list[str] = []
        self.predictions: list[str] = []
        self.confidences: list[float] = []

    def __call__(self, batch: Batch[np.ndarray], logits: jax.Array) -> None:
        scores, predicted = np.asarray(self._activation(logits)), np.asarray(logits).argmax(-1)
        wrong = (predicted != batch["labels"]) | ~np.isfinite(logits).all(-1)
        for i in np.flatnonzero(wrong & (batch["mask"] > 0)):
            self.count += 1
            if len(self.images) < MAX_MISTAKES:
                self.images.append(np.round(batch["images"][i]).astype(np.uint8))
                self.truths.append(self._class_names[batch["labels"][i]])
                self.predictions.append(self._class_names[predicted[i]])
                self.confidences.append(float(scores[i, predicted[i]]))


class Subject(NamedTuple):
    """What is evaluated, and on what.

    Attributes:
      eval_step, variables, split, mesh: as of `training.evaluation.evaluate`.
      class_names: of the logits.
      several_labels: whether an image may have several.
      rows: of the table, by name: of the network, and of the data.
      said: of the network, for the JSON.
      activation: from logits to probabilities.
      advice: as of `training.evaluation.evaluate`.
    """

    eval_step: Callable[..., Any]
    variables: Any
    split: data.Split
    mesh: Mesh
    class_names: Sequence[str]
    several_labels: bool
    rows: tuple[dict[str, str], dict[str, str]]
    said: dict[str, Any]
    activation: Callable[[jax.Array], jax.Array] = jax.nn.softmax
    advice: str = evaluation.RUN_ADVICE


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax evaluate", __doc__, EXAMPLES)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=images.SOURCE)
    parser.add_argument(
        "folder",
        nargs="?",
        type=cli.directory,
        metavar="FOLDER",
        help="of images, CLASS/*.jpg, all of which are taken; with --split also SPLIT/CLASS/*.jpg",
    )
    parser.add_argument("--workdir", type=cli.directory, help="instead of SOURCE: folder of a run of train.py")
    cli.add_checkpoint(parser, "latest")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="picture of the mistakes; default: mistakes_SPLIT.png, in the workdir or else here",
    )
    parser.add_argument("--split", help="split of the data set, default: the recipe's data.eval_split, or test")
    parser.add_argument(
        "--batch-size", type=cli.positive, metavar="N", help="default: the recipe's, or 32; it changes no result"
    )
    images.add_word(parser)
    cli.add_overrides(parser, what="say where the data is or how it is read (group data, mesh)")
    arguments, changes = parser.parse_known_args(argv)
    source, changes = _source(arguments), [*_of_folder(arguments, changes), *changes]
    if arguments.split is not None:
        changes.append(f"--config.data.eval_split={arguments.split!r}")
    is_run = arguments.workdir is not None or is_workdir(source)
    config = _recipe(Path(source), arguments, changes) if is_run else _settings(changes)
    cli.start(arguments)
    picture = _picture_path(arguments, Path(source) if is_run else Path(), config)
    with cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        subject = (_run if is_run else _elsewhere)(source, arguments, config)
        if subject.several_labels and arguments.picture is not None:
            raise UserError("--picture: no picture is drawn with several labels per image; leave it out.")
        results, rows, draw = _evaluate(subject, config, None if subject.several_labels else picture)
    if jax.process_index() == 0:
        console.show_table(naming.shown(Path(source)), rows)
        print(naming.to_json_line(results), flush=True)
        if draw is not None:  # last: if it fails, the results are already printed
            draw()
    return 0


# Arguments -----------------------------------------------------------------------------------------


def _source(arguments: argparse.Namespace) -> str:
    """Returns the network that is named; with --workdir the first of the others is the folder."""
    if arguments.workdir is not None:
        if arguments.folder is not None:
            raise UserError(f"--workdir {arguments.workdir} stands instead of SOURCE; give one of them.")
        try:
            arguments.folder = None if arguments.source is None else cli.directory(arguments.source)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"FOLDER: {error}.") from None
        return str(arguments.workdir)
    if not arguments.source:
        raise UserError(f"there is no SOURCE; expected a {images.SOURCE}.")
    return arguments.source


def _of_folder(arguments: argparse.Namespace, changes: Sequence[str]) -> list[str]:
    """Returns the overrides that FOLDER stands for."""
    if arguments.folder is None:
        return []
    for key in ("source", "data_dir"):
        if any(change.startswith(f"--config.data.{key}=") for change in changes):
            raise UserError(f"the data are given twice, by {arguments.folder} and by --config.data.{key}; give one.")
    values = {"source": "folder", "data_dir": os.fspath(arguments.folder.expanduser()), "eval_split": ALL}
    return [f"--config.data.{key}={value!r}" for key, value in values.items()]


def _recipe(workdir: Path, arguments: argparse.Namespace, changes: Sequence[str]) -> ConfigDict:
    """Returns the recipe of a run, with other data."""
    trained = read_recipe(workdir)
    if said := [name for name, value in images.word(arguments).items() if value is not None]:
        raise UserError(f"{', '.join(said)}: {workdir} is a run, which says this itself; leave it out.")
    channels = trained.data.channels
    config = reading.override(trained, changes, groups=("data", "mesh"))
    if config.data.channels != channels:
        raise UserError(
            f"{workdir} was trained on images of data.channels={channels}, got {config.data.channels}; "
            "leave out --config.data.channels."
        )
    return config


def _settings(changes: Sequence[str]) -> ConfigDict:
    """Returns the groups `data` and `mesh` for a network that is no run; what the network says of the data is open."""
    groups = ("data", "mesh")
    texts = overrides.split(changes, groups)["data"]
    for key, option in SAID.items():
        if key in texts:
            raise UserError(f"--config.data.{key} is what the network takes, and said by {option}; leave it out.")
    if "source" not in texts:
        raise UserError(
            "there are no data; give a folder of images (CLASS/*.jpg) behind the network, or a data set by "
            "--config.data.source=NAME."
        )
    given = {"data": {"image_size": IMAGE_SIZE, "source": ""}, "mesh": {}}
    return ConfigDict({name: checking.resolve_group(name, given[name], changes, groups) for name in groups})


def _picture_path(arguments: argparse.Namespace, folder: Path, config: ConfigDict) -> Path | None:
    """Returns the path of the picture, checked before there are results to lose; None if none is drawn."""
    if ("metrics" in config and METRICS[config.metrics.name].several_labels) or jax.process_count() > 1:
        if arguments.picture is not None:
            raise UserError(
                "--picture: no picture is drawn on several hosts or with several labels per image; leave it out."
            )
        return None
    # One file per split, so that evaluating one split does not overwrite the picture of another.
    split = config.data.eval_split
    if arguments.folder is not None and arguments.split is None:
        split = arguments.folder.name or split
    picture = arguments.picture or folder / mistakes_picture(naming.decoded(split))
    pictures.check_suffix(picture)
    files.check_writable(picture)
    return picture


# What is evaluated ---------------------------------------------------------------------------------


def _run(workdir: str, arguments: argparse.Namespace, config: ConfigDict) -> Subject:
    """A run at one of its checkpoints, on data as of its recipe."""
    processes.agree("recipe", lambda: alike(config) | processes.software())
    mesh = sharding.create_mesh(**config.mesh)
    split, rows = _data(config, mesh, _batch_size(arguments, config.batch_size, mesh), arguments)
    run = restore(Path(workdir), mesh, arguments.checkpoint, arguments.weights)
    processes.agree("checkpoint", lambda: {"the checkpoint": {"step": run.step, "meta": run.meta}})
    data.check_class_names(run.class_names, split)
    return Subject(
        make_evaluation(config, run.model, mesh),
        run.variables,
        split,
        mesh,
        run.class_names,
        METRICS[config.metrics.name].several_labels,
        ({"checkpoint": f"step {run.step}, {run.weights} weights"}, rows),
        {"step": run.step, "weights": run.weights},
    )


def _elsewhere(source: str, arguments: argparse.Namespace, config: ConfigDict) -> Subject:
    """A network from elsewhere, whose preprocessing is written into `config`."""
    processes.agree("settings", lambda: alike(config) | processes.software())
    mesh = sharding.create_mesh(**config.mesh)
    batch_size = arguments.batch_size = _batch_size(arguments, images.BATCH_SIZE, mesh)
    predictor = images.load(source, arguments, mesh)
    preprocessing = predictor.preprocessing
    processes.agree(
        "weights",
        lambda: {
            "the weights (SHA-256)": predictor.origin.get("sha256"),
            "the names of classes": predictor.class_names,
            "how images are prepared": str(preprocessing),
        },
    )
    config.data.image_size, config.data.channels = preprocessing.image_size, preprocessing.channels
    config.data.eval_transforms = preprocessing.transforms
    for name in ("min_decoded_side", "max_value"):  # what the user says of the data counts more
        config.data[name] = config.data[name] or getattr(preprocessing, name)
    split, rows = _data(config, mesh, batch_size, arguments)
    prepared = evaluations.prepare(predictor, split)
    size, recorded = preprocessing.image_size, cards.record(predictor.measured)
    return Subject(
        prepared.eval_step,
        predictor.variables,
        prepared.split,
        mesh,
        prepared.classes.names,
        prepared.several_labels,
        (
            {**({"recorded": recorded} if recorded else {}), "classes": prepared.classes.words},
            {**rows, "images": f"{size} x {size} pixels, {formula(preprocessing.mean, preprocessing.std)}"},
        ),
        {"source": naming.decoded(source), "sha256": predictor.origin.get("sha256")},
        prepared.activation,
        evaluations.ADVICE,
    )


def _batch_size(arguments: argparse.Namespace, default: int, mesh: Mesh) -> int:
    """Returns what the user says, or as much as the default or a little more: each device gets as many images."""
    batch_size = arguments.batch_size or -(-default // mesh.size) * mesh.size
    sharding.check_batch_size(batch_size, mesh)
    return batch_size


def _data(
    config: ConfigDict, mesh: Mesh, batch_size: int, arguments: argparse.Namespace
) -> tuple[data.Split, dict[str, str]]:
    """Returns the split, and the rows of the table about files that may be read wrong."""
    split = data.load(
        **config.data,
        train=False,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        processes_per_host=processes.per_host(),
    )
    processes.agree("data", lambda: {"--batch-size": batch_size, "--weights": arguments.weights} | split.identity())
    dark = split.check_max_value()  # the data may be others than in training
    unread = data.unread_of([split.source], whole=False)
    return split, {**({"not read": unread} if unread else {}), **({"16 bits": dark} if dark else {})}


# Results -------------------------------------------------------------------------------------------


def _evaluate(
    subject: Subject, config: ConfigDict, picture: Path | None
) -> tuple[dict, dict[str, str], Callable[[], None] | None]:
    """Returns the results, the rows of the table, and a function that draws the picture."""
    mistakes = Mistakes(subject.class_names, subject.activation) if picture is not None else None
    results = evaluation.evaluate(
        subject.eval_step, subject.variables, subject.split, subject.mesh, on_batch=mistakes, advice=subject.advice
    )
    of_network, of_data = subject.rows
    rows = {
        **of_network,
        "data": f"{config.data.source}, split {config.data.eval_split!r}, {counted(results['count'], 'image')}",
        **of_data,
        **({"bad images": f"{results['bad_images']:,}, left out"} if "bad_images" in results else {}),
        "transforms": config.data.eval_transforms,
        **{k: console.percent(v) for k, v in results.items() if k in SHARES},
        "loss": f"{results['loss']:.5f}",
    }
    draw = None
    if mistakes is not None:
        wrong, drawn = mistakes.count, len(mistakes.images)
        right = (results["count"] - wrong) / results["count"]
        which = f"the first {drawn} in" if drawn < wrong else "see"
        rows["wrong"] = f"{counted(wrong, 'image')}, {which} {naming.shown(picture)}" if wrong else "no image"
        title = (
            f"{wrong:,} of {results['count']:,} wrong ({console.percent(right)} right)"
            + (f", the first {drawn}" if drawn < wrong else "")
            + f"\n{config.data.source}, split {config.data.eval_split!r}\n"
            + (rows.get("checkpoint") or naming.shown(Path(subject.said["source"])))
        )
        draw = functools.partial(
            pictures.draw_mistakes,
            mistakes.images,
            mistakes.truths,
            mistakes.predictions,
            mistakes.confidences,
            title,
            picture,
        )
    return subject.said | {"split": config.data.eval_split, **results}, rows, draw
