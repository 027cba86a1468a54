"""Evaluates a checkpoint: a table, a picture of the mistakes, and one line of JSON."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli
from xception_flax.data.batch import Batch
from xception_flax.display import console, pictures
from xception_flax.host import files, processes
from xception_flax.recipes import reading
from xception_flax.recipes.comparing import alike
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import mistakes_picture, read_recipe
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.training import sharding
from xception_flax.training.evaluation import evaluate
from xception_flax.training.metrics import METRICS, SHARES
from xception_flax.training.program import make_evaluation

EXAMPLES = """\
  xception-flax evaluate --workdir runs/digits
  xception-flax evaluate --workdir runs/digits --split test --weights raw --checkpoint best
  xception-flax evaluate --workdir runs/imagenet --config.data.data_dir=/data/tfds"""

MAX_MISTAKES = 40  # images in the picture


class Mistakes:
    """Counts the images whose most likely class is not the true one, and keeps the first of them.

    It is called with each batch and its logits. An image with a NaN or infinite logit is wrong, as in `metrics`.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._class_names = class_names
        self.count = 0
        self.images: list[np.ndarray] = []
        self.truths: list[str] = []
        self.predictions: list[str] = []
        self.confidences: list[float] = []

    def __call__(self, batch: Batch[np.ndarray], logits: jax.Array) -> None:
        scores, predicted = np.asarray(jax.nn.softmax(logits)), np.asarray(logits).argmax(-1)
        wrong = (predicted != batch["labels"]) | ~np.isfinite(logits).all(-1)
        for i in np.flatnonzero(wrong & (batch["mask"] > 0)):
            self.count += 1
            if len(self.images) < MAX_MISTAKES:
                self.images.append(np.array(batch["images"][i]))
                self.truths.append(self._class_names[batch["labels"][i]])
                self.predictions.append(self._class_names[predicted[i]])
                self.confidences.append(float(scores[i, predicted[i]]))


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax evaluate", __doc__, EXAMPLES)
    cli.add_run(parser, checkpoint="latest")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="picture of the mistakes; default: WORKDIR/mistakes_SPLIT.png"
    )
    parser.add_argument("--split", help="split of the data set, default: the recipe's data.eval_split")
    parser.add_argument(
        "--batch-size", type=cli.positive, metavar="N", help="default: the recipe's; the result does not depend on it"
    )
    cli.add_overrides(parser, what="override where the data is or how it is read (group data, mesh)")
    arguments, overrides = parser.parse_known_args(argv)
    trained = read_recipe(arguments.workdir)
    channels = trained.data.channels
    config = reading.override(trained, overrides, groups=("data", "mesh"))
    if config.data.channels != channels:
        raise UserError(
            f"{arguments.workdir} was trained on images of data.channels={channels}, got {config.data.channels}; "
            "leave out --config.data.channels."
        )
    if arguments.split is not None:
        config.data.eval_split = arguments.split
    cli.start(arguments)
    picture = _picture_path(arguments, config)
    with cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        results, rows, draw = _evaluate_checkpoint(arguments, config, picture)
    if jax.process_index() == 0:
        console.show_table(naming.shown(arguments.workdir), rows)
        print(naming.to_json_line(results), flush=True)
        if draw is not None:  # last: if it fails, the results are already printed
            draw()
    return 0


def _picture_path(arguments: argparse.Namespace, config: ConfigDict) -> Path | None:
    """Returns the path of the picture, checked before there are results to lose; None if none is drawn."""
    if METRICS[config.metrics.name].several_labels or jax.process_count() > 1:
        if arguments.picture is not None:
            raise UserError(
                "--picture: no picture is drawn on several hosts or with several labels per image; leave it out."
            )
        return None
    # One file per split, so that evaluating one split does not overwrite the picture of another.
    picture = arguments.picture or arguments.workdir / mistakes_picture(config.data.eval_split)
    pictures.check_suffix(picture)
    files.check_writable(picture)
    return picture


def _evaluate_checkpoint(
    arguments: argparse.Namespace, config: ConfigDict, picture: Path | None
) -> tuple[dict, dict[str, str], Callable[[], None] | None]:
    """Returns the results, the rows of the table, and a function that draws the picture."""
    processes.agree("recipe", lambda: alike(config) | processes.software())
    mesh = sharding.create_mesh(**config.mesh)
    batch_size = arguments.batch_size
    if batch_size is None:
        batch_size = -(-config.batch_size // mesh.size) * mesh.size
    sharding.check_batch_size(batch_size, mesh)
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
    run = restore(arguments.workdir, mesh, arguments.checkpoint, arguments.weights)
    processes.agree("checkpoint", lambda: {"the checkpoint": {"step": run.step, "meta": run.meta}})
    data.check_class_names(run.class_names, split)
    eval_step = make_evaluation(config, run.model, mesh)
    mistakes = Mistakes(run.class_names) if picture is not None else None
    results = evaluate(eval_step, run.variables, split, mesh, on_batch=mistakes)
    rows = {
        "checkpoint": f"step {run.step}, {run.weights} weights",
        "data": f"{config.data.source}, split {config.data.eval_split!r}, {counted(results['count'], 'image')}",
        **({"not read": unread} if (unread := data.unread_of([split.source], whole=False)) else {}),
        **({"16 bits": dark} if dark else {}),
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
            + f"\n{config.data.source}, split {config.data.eval_split!r}\n{rows['checkpoint']}"
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
    return {"step": run.step, "weights": run.weights, "split": config.data.eval_split, **results}, rows, draw
