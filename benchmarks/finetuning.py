"""What fine-tuning reaches on few images, beside the same network from random weights: accuracy, not time.

Trains by `configs/finetune_folder.py` on a few images a class of Fashion-MNIST (72 px), each setting on the same images
and seeds, and evaluates on 1,000 of its test images. Each run is a line of the results, as it ends; runs that are there
are not run again. The picture is drawn from all of them.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import accuracy, command
from benchmarks.worker import WorkerError
from xception_flax.data.sources.fashion_mnist import fashion_mnist
from xception_flax.host import files
from xception_flax.reproduction.claims import interval
from xception_flax.reproduction.results import append
from xception_flax.text.errors import UserError

EXAMPLES = """\
  python -m benchmarks.finetuning --weights keras --results mine.jsonl --seeds 5
  python -m benchmarks.finetuning --results results/finetuning.jsonl --picture docs/images/finetuning.png"""

SIZE = 72  # pixels; the network needs 71
EVALUATED = 100  # test images a class


class Setting(NamedTuple):
    """A way to train: what a picture calls it, and what it changes in the recipe."""

    title: str
    changes: Mapping[str, object]


# bn_decay is for runs of a hundred steps: moving statistics must forget where they began.
_NORMALIZATION = {"model.bn_frozen": False, "model.bn_decay": 0.9}
_TRAINED = {"optimizer.backbone_factor": 1, **_NORMALIZATION}

SETTINGS = {
    "recipe": Setting("the recipe: layers at 0.01 of the rate, normalization frozen", {}),
    "classifier": Setting("classifier alone (backbone_factor=0)", {"optimizer.backbone_factor": 0}),
    # 2.5 times the recipe's epochs, since an epoch takes 0.4 of its time.
    "classifier_longer": Setting(
        "classifier alone for as long as the recipe takes", {"optimizer.backbone_factor": 0, "epochs": 50}
    ),
    "recalibrated": Setting("the recipe with recalibrated normalization", {"init.bn_batches": 25}),
    "slowed_trained": Setting("layers at 0.01 of the rate, normalization trained", _NORMALIZATION),
    "full_frozen": Setting("all layers at one rate, normalization frozen", {"optimizer.backbone_factor": 1}),
    "full": Setting("all layers at one rate, normalization trained", _TRAINED),
    "scratch": Setting("from random weights", {"init.weights": "random", **_TRAINED}),
}


def main(argv: list[str]) -> int:
    arguments = command.parser("finetuning", __doc__, EXAMPLES, timed=False)
    arguments.add_argument("--weights", metavar="SOURCE", help="to start from: keras, a file; without, nothing is run")
    arguments.add_argument("--results", type=Path, required=True, metavar="FILE", help="a JSON line for each run")
    arguments.add_argument("--picture", type=Path, metavar="FILE", help="draw the results")
    arguments.add_argument("--images", type=command.positive(int), default=20, metavar="N", help="a class (20)")
    arguments.add_argument("--seeds", type=command.positive(int), default=3, metavar="N", help="runs of each (3)")
    arguments.add_argument("--data-dir", metavar="DIR", help="with the four IDX files (Debian: dataset-fashion-mnist)")
    command.add_only(arguments)
    options = arguments.parse_args(argv)
    names = command.chosen(arguments, options, SETTINGS)
    check_alike(options, names)
    if options.picture:
        if options.picture.suffix != ".png":
            raise WorkerError(f"--picture must be a .png, got {options.picture}.")
        files.check_writable(options.picture)
    if options.weights:
        for seed in range(options.seeds):
            for name in names:
                run(name, seed, options)
    rows = [row for row in accuracy.read(options.results) if row.get("images_per_class") == options.images]
    if not rows:
        raise WorkerError(f"{options.results} has no run with {options.images} images a class; run some by --weights.")
    print(table(rows))
    if options.picture:
        draw(rows, options.picture)
    return 0


def check_alike(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises WorkerError, before anything is run, if a setting would have runs of several kinds: each is one number."""
    for name in SETTINGS:
        rows = [row for row in accuracy.read(options.results) if row.get("setting") == name]
        if options.weights and name in names:
            rows.append(identity(name, 0, options))
        kinds = {json.dumps([row["changes"] | {"seed": 0}, row["weights_sha256"]], sort_keys=True) for row in rows}
        if len(kinds) > 1:
            raise WorkerError(
                f"{options.results} has runs of '{name}' of several kinds, or would have; give --results another file: "
                f"{'; '.join(sorted(kinds))}."
            )


def identity(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a run is found again by: its setting, and the weights that it starts from."""
    weights = Path(_weights(name, options))
    changes = {"init.weights": weights.name, "seed": seed, "data.image_size": SIZE}
    return {
        "setting": name,
        "seed": seed,
        "images_per_class": options.images,
        "changes": {**SETTINGS[name].changes, **changes},
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
    }


def _weights(name: str, options: argparse.Namespace) -> str:
    return str(SETTINGS[name].changes.get("init.weights", options.weights))


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains and evaluates one setting with one seed, unless the results have it, and writes its line."""
    key = identity(name, seed, options)
    if any(row.items() >= key.items() for row in accuracy.read(options.results)):
        return
    progress = command.Progress(f"{name}, seed {seed}")
    never = {"checkpoint_every_epochs": "inf", "eval_every_epochs": "inf"}
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder:
        write_images(Path(folder, "images"), seed, options.images, options.data_dir)
        workdir = Path(folder, "run")
        recipe = ["--config", f"configs/finetune_folder.py:{folder}/images", "--workdir", str(workdir)]
        changes = key["changes"] | {"init.weights": _weights(name, options)} | never
        overrides = [f"--config.{option}={value}" for option, value in changes.items()]
        begin = time.monotonic()
        accuracy.follow(progress, "train.py", *recipe, *overrides)
        records = accuracy.read(workdir / "metrics.jsonl")
    evaluation = next(record for record in reversed(records) if "eval/top1" in record)
    row = key | {
        "steps": evaluation["step"],
        "top1": evaluation["eval/top1"],
        "loss": evaluation["eval/loss"],
        "evaluated": evaluation["eval/count"],
        "train_losses": [[r["step"], r["train/loss"]] for r in records if "train/loss" in r],
        "seconds": round(time.monotonic() - begin, 1),
        "versions": accuracy.versions(),
        "machine": command.machine(),
    }
    progress.say(f"top1 {row['top1']:.1%} after {row['steps']} steps")
    append(options.results, row)


def write_images(folder: Path, seed: int, per_class: int, data_dir: str | None) -> None:
    """Writes the images of one seed as a folder of classes: 'train', drawn by the seed, and 'val', always the same."""
    where = {} if data_dir is None else {"data_dir": data_dir}
    rng = np.random.default_rng(seed)
    for split, of, count in (("train", "train", per_class), ("val", "test", EVALUATED)):
        source = fashion_mnist(of, **where)
        for label, class_name in enumerate(source.class_names):
            place = folder / split / class_name.replace("/", " or ")
            place.mkdir(parents=True)
            of_class = np.flatnonzero(np.asarray(source.labels) == label)
            for i in (rng.permutation(of_class) if split == "train" else of_class)[:count]:
                cv2.imwrite(str(place / f"{i:05}.png"), source.images[i])


def by_setting(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Returns the accuracies of each setting that was run, by seed."""
    of = {name: {row["seed"]: row["top1"] for row in rows if row["setting"] == name} for name in SETTINGS}
    return {name: dict(sorted(runs.items())) for name, runs in of.items() if runs}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a row for each setting in Markdown.

    A difference is that to the recipe, paired by seed, in points, with the 95 % interval of its mean (Student's t).
    """
    settings = by_setting(rows)
    cells = []
    for name, of in settings.items():
        top1 = list(of.values())
        pairs = [100 * (of[seed] - recipe) for seed, recipe in settings.get("recipe", {}).items() if seed in of]
        known = name != "recipe" and len(pairs) > 1
        beside = "{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(pairs, 50 / rows[0]["evaluated"])) if known else ""
        spread = f"{min(top1):.1%} to {max(top1):.1%}"
        cells.append((SETTINGS[name].title, f"{np.mean(top1):.1%}", spread, beside, str(len(top1))))
    header = (f"{rows[0]['images_per_class']} images a class", "top-1", "of the seeds", "beside the recipe", "seeds")
    return command.markdown(header, cells)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a point for each run and a line at the mean of each setting."""
    settings = by_setting(rows)
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.45 * len(settings)), layout="constrained")
    for place, (name, of) in enumerate(settings.items()):
        top1 = list(of.values())
        color = "#c8553d" if name.startswith("scratch") else "#2f5d8a"
        axes.plot(np.array(top1) * 100, [place] * len(top1), "o", color=color, alpha=0.6, markeredgewidth=0)
        axes.plot([100 * np.mean(top1)] * 2, [place - 0.3, place + 0.3], color=color)
        axes.annotate(f"{np.mean(top1):.1%}", (100 * np.mean(top1), place - 0.32), ha="center", fontsize=8)
    axes.set_yticks(range(len(settings)), [SETTINGS[name].title for name in settings])
    axes.set(xlim=(0, 100), ylim=(len(settings) - 0.5, -0.7))
    axes.set_xlabel(
        f"top-1 in %, {rows[0]['evaluated']:,.0f} test images, {rows[0]['images_per_class']} a class to train on"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e3e5e8")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    try:
        command.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
