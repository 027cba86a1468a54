"""Scores a finished run on the test split, as a process: `python -m xception_flax.reproduction.scoring RUN FILE`.

So an accelerator's memory is free for the next run, and each of several runs at once has its share of the CPUs.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xception_flax.host import compilation_cache, files, parents
from xception_flax.inference import subject as subjects
from xception_flax.runs.workdir import read_recipe
from xception_flax.text.errors import UserError
from xception_flax.training import evaluation

SPLIT = "test"  # in every data set; rates are chosen on that of the recipe
WEIGHTS = ("ema", "raw")
METRICS = ("top1", "loss")


def score(workdir: Path) -> dict[str, Any]:
    """Returns the scores of both weights at the last step, whatever the validation says, and the number of images.

    Raises:
      UserError: the run or the data cannot be read, or a loss is not finite.
    """
    config = read_recipe(workdir)
    config.data.eval_split = SPLIT
    found: dict[str, Any] = {}
    for weights in WEIGHTS:
        subject = subjects.of_run(str(workdir), config, checkpoint="latest", weights=weights, batch_size=None)
        results = evaluation.evaluate(subject.eval_step, subject.variables, subject.split, subject.mesh)
        found[weights] = chosen(results)
        found["images"] = results["count"]
    return found


def chosen(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns what a row of the results has of an evaluation."""
    return {name: values[f"{prefix}{name}"] for name in METRICS}


def main(workdir: Path, file: Path) -> None:
    """Writes `score` as JSON."""
    parents.end_with_named()
    compilation_cache.enable()
    files.write_whole(file, [json.dumps(score(workdir)).encode()])


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
