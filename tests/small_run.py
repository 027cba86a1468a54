"""A small run on the digits."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import shell
from shell import ROOT

DIGITS = str(ROOT / "configs" / "digits.py")

# 157 steps of 16 images: a second or so of training, which is long enough to stop it.
SMALL = [
    "--config.model.width=0.02",
    "--config.model.middle_repeats=0",
    "--config.data.image_size=32",
    "--config.batch_size=16",
    "--config.epochs=2",
    "--config.schedule.warmup_epochs=0.5",
    "--config.eval_every_epochs=0.5",
    "--config.checkpoint_every_epochs=0.25",
    "--config.log_every_steps=5",
]


# The same for a narrow LeNet, which compiles fast, in tests for which any network will do.
LENET = [text for text in SMALL if "model." not in text] + ["--config.model.width=0.25"]


def start(
    workdir: Path,
    *arguments: str,
    devices: int = 2,
    lenet: bool = False,
    script: Sequence[str] = ("train.py",),
) -> subprocess.Popen:
    recipe, small = (f"{DIGITS}:lenet", LENET) if lenet else (DIGITS, SMALL)
    return shell.start(*script, "--config", recipe, "--workdir", workdir, *small, *arguments, devices=devices)
