"""Evaluates a checkpoint: a table, a picture of what the network got wrong, and one line of JSON."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xception_flax import checkpoint, cli, data, metrics, models, pictures, progress, recipe, sharding, state, steps

EXAMPLES = """\
  python -m xception_flax.evaluate --workdir runs/digits
  python -m xception_flax.evaluate --workdir runs/digits --split test --weights raw --checkpoint best
  python -m xception_flax.evaluate --workdir runs/imagenet --config.data.data_dir=/data/tfds"""

MAX_MISTAKES = 40  # images in the picture

BatchCallback = Callable[[data.pipeline.Batch, jax.Array], None]


def evaluate(
    eval_step: Callable[..., tuple[dict[str, metrics.Sum], jax.Array]],
    variables: Any,
    split: data.Split,
    mesh: Mesh,
    on_batch: BatchCallback | None = None,
) -> dict[str, float]:
    """Returns the means over every image of the split, each counted once, and their `count`.

    Args:
      eval_step: from `steps.make_eval_step`.
      variables: what it takes.
      split: loaded with `train=False`.
      mesh: the mesh of the variables.
      on_batch: called with each local batch and the global logits.
    """
    totals = metrics.Accumulator()
    for batch in split.batches():
        sums, logits = eval_step(variables, sharding.global_batch(mesh, batch))
        totals.add(sums)
        if on_batch is not None:
            on_batch(batch, logits)
    return totals.means() | {"count": round(totals.count("loss"))}


class Mistakes:
    """Collects the first images whose most likely class is not the true one."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._class_names = class_names
        self.images: list[np.ndarray] = []
        self.truths: list[str] = []
        self.predictions: list[str] = []
        self.confidences: list[float] = []

    def __call__(self, batch: data.pipeline.Batch, logits: jax.Array) -> None:
        scores = np.asarray(jax.nn.softmax(logits))
        predicted = scores.argmax(-1)
        for i in np.flatnonzero((predicted != batch["labels"]) & (batch["mask"] > 0)):
            if len(self.images) < MAX_MISTAKES:
                self.images.append(np.array(batch["images"][i]))
                self.truths.append(self._class_names[batch["labels"][i]])
                self.predictions.append(self._class_names[predicted[i]])
                self.confidences.append(float(scores[i, predicted[i]]))


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--workdir", type=cli.directory, required=True, help="folder of a run of train.py")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="WHICH", help="latest (default), best, or the number of a step"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="default: ema where the recipe keeps them, else raw")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of what is wrong; default: WORKDIR/mistakes.png")
    parser.add_argument("--split", help="split of the data set, default: the recipe's data.eval_split")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's; the result does not depend on it")
    parser.add_argument(
        "--config.KEY=VALUE",
        dest="ignored",
        metavar="",
        help="override where the data is or how it is read (group data, mesh)",
    )
    arguments, overrides = parser.parse_known_args(argv)
    config = recipe.override(recipe.read(arguments.workdir), overrides, groups=("data", "mesh"))
    if arguments.split is not None:
        config.data.eval_split = arguments.split
    cli.start(arguments)
    results, rows = _evaluate_checkpoint(arguments, config)
    if jax.process_index() == 0:
        progress.show_table(f"{arguments.workdir}", rows)
        print(progress.to_json(results))
    return 0


def _evaluate_checkpoint(arguments: argparse.Namespace, config: recipe.ConfigDict) -> tuple[dict, dict[str, str]]:
    mesh = sharding.create_mesh(**config.mesh)
    batch_size = arguments.batch_size
    if batch_size is None:
        batch_size = -(-config.batch_size // mesh.size) * mesh.size
    sharding.check_batch_size(batch_size, mesh)
    weights = arguments.weights or ("ema" if config.step.ema_decay else "raw")
    if weights == "ema" and not config.step.ema_decay:
        raise ValueError("--weights ema: this run keeps no averaged weights (step.ema_decay is 0); take raw.")
    model = models.create_model(**config.model)
    split = data.load(
        **config.data,
        train=False,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    eval_step = steps.make_eval_step(
        model,
        steps.create_loss(**config.loss),
        metrics.create_metrics(**config.metrics),
        steps.create_normalizer(**config.normalize),
        mesh,
    )
    best_metric = metrics.BEST[config.metrics.name]
    with checkpoint.open_manager(
        arguments.workdir, best_metric=best_metric, **config.checkpoint, read_only=True
    ) as manager:
        step = checkpoint.find_step(manager, arguments.checkpoint)
        class_names = checkpoint.read_meta(manager, step)["class_names"]
        data.check_class_names(class_names, split)
        abstract = state.abstract_variables(model, split.image_shape, mesh)
        variables = checkpoint.restore_variables(manager, abstract, weights, step)

    single_label, one_host = config.metrics.name == "single_label", jax.process_count() == 1
    mistakes = Mistakes(class_names) if single_label and one_host else None
    results = evaluate(eval_step, variables, split, mesh, on_batch=mistakes)
    rows = {
        "checkpoint": f"step {step}, {weights} weights",
        "data": f"{config.data.source}, split {config.data.eval_split!r}, {results['count']:,} images",
        **{k: progress.percent(v) for k, v in results.items() if k not in ("loss", "count")},
        "loss": f"{results['loss']:.5f}",
    }
    if mistakes is not None:
        path = arguments.picture or arguments.workdir / "mistakes.png"
        wrong = round((1 - results["top1"]) * results["count"])
        title = f"{wrong} of {results['count']:,} wrong ({progress.percent(results['top1'])} right)"
        try:
            pictures.draw_mistakes(
                mistakes.images, mistakes.truths, mistakes.predictions, mistakes.confidences, title, path
            )
        except (OSError, ValueError) as error:  # matplotlib raises the second for a suffix it does not know
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} cannot be written: {reason}; name another by --picture.") from None
        rows["wrong"] = f"{wrong} images, see {path}"
    return {"step": step, "weights": weights, "split": config.data.eval_split, **results}, rows


if __name__ == "__main__":
    cli.run(main)
