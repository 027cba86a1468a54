"""Writes workdir_0.1.tar.xz: a small run of the version before modules had folders, and what that version said of it.

    git worktree add /tmp/old 995551f && cd /tmp/old
    JAX_PLATFORMS=cpu PYTHONPATH=. python NEW/tests/golden/make_workdir.py NEW/tests/golden

The run is one of `configs/digits.py`: 79 steps, a checkpoint in the middle and at the end. Beside its files are
`said.json`, what `evaluate` says of both checkpoints and of both weights, and `logits.npz`, the logits of the averaged
weights. Left out are the curves, and what names the machine: `.lock` and `tensorboard/`.
"""

import contextlib
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

import train
from xception_flax import evaluate, pretrained, recipe, sharding
from xception_flax.data.sources import digits

OVERRIDES = {
    "model.width": 0.02,
    "model.middle_repeats": 1,
    "data.image_size": 32,
    "data.train_transforms": "resize",
    "epochs": 4,
    "eval_every_epochs": 2,
    "checkpoint_every_epochs": 2,
    "optimizer.learning_rate": 0.01,
    "schedule.warmup_epochs": 0.5,
    "step.ema_decay": 0.8,
}
NAMES = ("config.json", "metrics.jsonl", "checkpoints")


def said(workdir: Path, checkpoint: str, weights: str) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.main(["--workdir", str(workdir), "--checkpoint", checkpoint, "--weights", weights, "--split", "test"])
    return json.loads(out.getvalue().splitlines()[-1])


def main(folder: Path) -> None:
    config = recipe.load("configs/digits.py", [f"--config.{key}={value}" for key, value in OVERRIDES.items()])
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary) / "workdir"
        train.train(config, workdir)
        steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
        results = [said(workdir, str(step), weights) for step in steps for weights in ("raw", "ema")]
        (workdir / "said.json").write_text(json.dumps(results, indent=1) + "\n")
        images = digits("test").images[:16, ..., None].astype(np.float32).repeat(4, 1).repeat(4, 2)
        logits = {}
        for step in steps:
            run = pretrained.restore_run(workdir, sharding.create_mesh(), str(step))
            logits[str(step)] = np.asarray(run.model.apply(run.variables, (images - 127.5) / 127.5, train=False))
        np.savez(workdir / "logits.npz", **logits)
        with tarfile.open(folder / "workdir_0.1.tar.xz", "w:xz", preset=9) as archive:
            for name in (*NAMES, "said.json", "logits.npz"):
                archive.add(workdir / name, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
