"""Completion, by bash itself: what it offers at the end of a command line."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import shell
from xception_flax.__main__ import VERBS

ASK = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_xception_flax
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "xception-flax"
    result = shell.run("-m", "xception_flax", "--completion")
    assert result.returncode == 0, result.stderr
    path.write_text(result.stdout)
    return path


def offered(script: Path, *words: str) -> list[str]:
    ask = ASK.format(script=script, words=" ".join(map(shlex.quote, ("xception-flax", *words))))
    result = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["evaluate"]),
        (["show-data", "--ba"], ["--batches"]),
        (["train", "--config", "imagenet_"], ["imagenet_aligned", "imagenet_modern"]),
        (["recipe", "dig"], ["digits"]),
        (["train", "--config.model.wid"], ["--config.model.width=", "--config.model.width_multiple="]),
        (["train", "--config.data.data_d"], ["--config.data.data_dir="]),
        # bash makes a word of each =
        (["train", "--config.schedule.name", "=", "co"], ["constant", "cosine"]),
        (["train", "--config.loss.name", "="], ["softmax", "sigmoid"]),
        (["train", "--config", "=", "dig"], ["digits"]),
        (["prepare", "im"], ["imagenet"]),
        (["prepare", "folder", "--max-s"], ["--max-side"]),
        (["predict", "runs/"], []),  # `complete -o default` offers files
    ],
    ids=" ".join,
)
def test_it_offers_what_may_come_next(script, words, expected):
    assert offered(script, *words) == expected


SHELLS = {"bash": ("--norc",), "zsh": ("-f",)}  # with no files of the user


@pytest.mark.parametrize("name", [name for name in SHELLS if shutil.which(name)])
def test_each_shell_takes_the_options_of_complete_as_words(script, name):
    """zsh makes one word of an expansion. There no space follows a key; bash is told so where keys are offered."""
    ask = f"complete() {{ printf '%s\\n' \"$@\"; }}; source {script}"
    result = subprocess.run([name, *SHELLS[name], "-c", ask], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    nospace = ["-o", "nospace"] if name == "zsh" else []
    assert result.stdout.split("\n") == ["-o", "default", *nospace, "-F", "_xception_flax", "xception-flax", ""]


def test_it_has_every_verb_and_key(script):
    assert offered(script, "") == list(VERBS)
    keys = offered(script, "train", "--config.")
    assert {"--config.epochs=", "--config.optimizer.name=", "--config.optimizer.momentum="} <= set(keys)
    assert len(keys) == len(set(keys)) > 100
