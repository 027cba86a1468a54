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


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint by its path."""
    leaves = {}
    for item in ("raw", "ema", "optimizer"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore((workdir / "checkpoints" / str(step) / item).absolute())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            leaves[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return leaves
