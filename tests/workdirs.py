"""Reads the files of a run without our own code."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def records(workdir: Path) -> list[dict]:
    """Returns the records of metrics.jsonl; none if there is no file yet."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluations(workdir: Path) -> list[dict]:
    """Returns the records of evaluations, without the time they took."""
    return [{k: v for k, v in r.items() if k != "eval/seconds"} for r in records(workdir) if "eval/loss" in r]


def best_evaluation(workdir: Path) -> dict:
    """Returns the record of the evaluation with the most right answers, of equal ones with the lower loss."""
    return max(evaluations(workdir), key=lambda record: (record["eval/top1"], -record["eval/loss"]))


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint by its path, whatever devices and processes have saved it."""
    leaves, handler = {}, ocp.StandardCheckpointHandler()
    for item in ("raw", "ema", "optimizer"):
        folder = (workdir / "checkpoints" / str(step) / item).absolute()
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), handler.metadata(folder).tree)
        tree = handler.restore(folder, args=ocp.args.StandardRestore(template))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            leaves[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return leaves
