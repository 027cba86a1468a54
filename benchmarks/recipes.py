"""What recipes reach: accuracy on the test split with several seeds, not time.

Each run trains by the recipe as it is written but for its seed, and is tested as `xception-flax evaluate` does it: the
checkpoint that is best on the validation split, and averaged weights where the recipe keeps them. A run is a line of
the results, as it ends; runs that are there are not run again, and one that was stopped goes on. The table is of all
results of the recipes as they are now.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy, command
from benchmarks.worker import WorkerError
from xception_flax.models import create_model
from xception_flax.models.costs import list_layers
from xception_flax.recipes import reading
from xception_flax.reproduction.claims import interval
from xception_flax.reproduction.results import append, digest
from xception_flax.text.errors import UserError
from xception_flax.text.sizes import sides

EXAMPLES = """\
  python -m benchmarks.recipes
  python -m benchmarks.recipes digits:lenet fashion_mnist"""

SPLIT = "test"


def main(argv: list[str]) -> int:
    arguments = command.parser("recipes", __doc__, EXAMPLES, timed=False)
    arguments.add_argument("recipes", nargs="*", metavar="RECIPE", help="to run; without, nothing is run")
    arguments.add_argument(
        "--results", type=Path, default=Path("results/recipes.jsonl"), metavar="FILE", help="a JSON line for each run"
    )
    arguments.add_argument("--seeds", type=command.positive(int), default=5, metavar="N", help="runs of each (5)")
    arguments.add_argument("--data-dir", metavar="DIR", help="of the data, if not where the recipe says")
    arguments.add_argument(
        "--workdir", type=Path, default=Path("runs/recipes"), metavar="DIR", help="of runs that are not at their end"
    )
    options = arguments.parse_args(argv)
    for recipe in options.recipes:
        for seed in range(options.seeds):
            run(recipe, seed, options)
    rows = accuracy.read(options.results)
    current = [row for row in rows if row["digest"] == _digest(row["recipe"])]
    if not current:
        raise WorkerError(f"{options.results} has no run of a recipe as it is now; name a RECIPE to run it.")
    print(table(current))
    return 0


def run(recipe: str, seed: int, options: argparse.Namespace) -> None:
    """Trains and evaluates a recipe with one seed, unless the results have it, and writes its line."""
    key = {"recipe": recipe, "digest": digest(reading.as_written(recipe)), "seed": seed}
    if any(row.items() >= key.items() for row in accuracy.read(options.results)):
        return
    where = [] if options.data_dir is None else [f"--config.data.data_dir={options.data_dir!r}"]
    config = reading.load(recipe, where)
    progress = command.Progress(f"{recipe}, seed {seed}")
    workdir = options.workdir.absolute() / f"{recipe.replace(':', '-').replace('/', '-')}-{seed}-{key['digest']}"
    is_new = not workdir.exists()
    begin = time.monotonic()
    accuracy.follow(
        progress, "train.py", "--config", recipe, "--workdir", str(workdir), f"--config.seed={seed}", *where
    )
    seconds = time.monotonic() - begin
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder:
        accuracy.follow(
            progress, "-m", "xception_flax", "evaluate", str(workdir), "--split", SPLIT, "--output", folder, *where
        )
        tested = json.loads(Path(folder, f"evaluation_{SPLIT}.json").read_text())
    records = accuracy.read(workdir / "metrics.jsonl")
    weights = tested["of"]["weights"]
    validated = next(record for record in records if "eval/top1" in record and record["step"] == weights["step"])
    layers = list_layers(create_model(**config.model), (*sides(config.data.image_size), config.data.channels))
    row = key | {
        "steps": records[-1]["step"],
        "step": weights["step"],
        "validation": validated["eval/top1"],
        "test": tested["scores"]["top1"]["value"],
        "loss": tested["loss"],
        "images": tested["count"],
        "weights": weights["weights"],
        "parameters": sum(layer.parameters for layer in layers),
        "losses": [[r["step"], round(r["train/loss"], 6)] for r in records if r.get("train/loss") is not None],
        "accuracies": [[r["step"], r["eval/top1"]] for r in records if "eval/top1" in r],
        "seconds": round(seconds, 1) if is_new else None,  # of a run that was stopped nobody knows it
        "versions": accuracy.versions(),
        "machine": command.machine(),
    }
    progress.say(f"test {row['test']:.2%}, validation {row['validation']:.2%}, {seconds:.0f} s")
    append(options.results, row)
    shutil.rmtree(workdir, ignore_errors=True)


def _digest(recipe: str) -> str | None:
    """Returns the digest of a recipe as it is now; None if there is no such recipe any more."""
    try:
        return digest(reading.as_written(recipe))
    except UserError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a row for each recipe in Markdown; the interval is Student's t of the mean over the seeds.

    To each side it is at least half a test image.
    """
    cells = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        of = [row for row in rows if row["recipe"] == recipe]
        tests = [row["test"] for row in of]
        low, high = interval(tests, 0.5 / of[0]["images"])[1:] if len(tests) > 1 else (np.nan, np.nan)
        minutes = [row["seconds"] / 60 for row in of if row["seconds"]]
        cells.append(
            (
                f"`{recipe}`",
                f"{np.mean(tests):.2%}",
                f"{low:.2%} to {min(high, 1):.2%}" if len(tests) > 1 else "-",
                f"{min(tests):.2%} to {max(tests):.2%}",
                f"{len(tests)}",
                f"{of[0]['images']:,.0f}",
                f"{of[0]['parameters']:,}",
                f"{min(minutes):.1f}" if minutes else "-",
            )
        )
    header = ("recipe", "test top-1", "95 % interval", "of the seeds", "seeds", "images", "parameters", "minutes")
    return command.markdown(header, cells)


if __name__ == "__main__":
    try:
        command.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
