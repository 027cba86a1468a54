"""`xception-flax VERB` and `python -m xception_flax VERB` are the same, list every verb, and report mistakes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xception_flax import __version__
from xception_flax.__main__ import VERBS

ROOT = Path(__file__).parents[1]
SCRIPT = str(Path(sys.executable).with_name("xception-flax"))


DOORS = {"script": [SCRIPT], "module": [sys.executable, "-m", "xception_flax"]}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_every_file_of_commands_is_a_verb():
    files = {path.stem for path in (ROOT / "xception_flax" / "commands").glob("*.py")} - {
        "__init__",
        "cli",
        "images",
        "completion",
    }
    assert files == {verb.replace("-", "_") for verb in VERBS} - {"train"}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_help_lists_the_verbs_with_a_line_each(door):
    result = run(*door, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.strip() for line in result.stdout.splitlines()]
    for verb, what in VERBS.items():
        assert f"{verb:<11} {what}" in lines
        assert len(f"  {verb:<11} {what}") <= 120


def test_help_that_nobody_reads_ends_without_a_traceback():
    """Its reader has gone, as with `| head`, or the disk is full."""
    with subprocess.Popen([SCRIPT, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
    for command, what in (["--help"], "standard output"), (["summary", "--help"], "a file or standard output"):
        for unbuffered in "", "1":  # '' is the same as unset: Python fails at its exit, not only at `print`
            environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            with open("/dev/full", "w") as full:
                result = subprocess.run(
                    [SCRIPT, *command], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
                )
            assert (result.returncode, result.stderr) == (2, f"error: {what}: No space left on device.\n")


def test_help_and_version_as_words():
    for command, beginning in [
        (["help"], "usage: xception-flax VERB ...\n"),
        (["help", "recipe"], "usage: xception-flax recipe [-h]"),
        (["--version"], f"xception-flax {__version__}\n"),
    ]:
        result = run(SCRIPT, *command)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(beginning)


def test_a_file_of_commands_is_no_program():
    result = run(sys.executable, "-m", "xception_flax.commands.evaluate", "--workdir", "w")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: a command is run as: xception-flax VERB")


def test_without_a_verb_the_help_is_an_error():
    result = run(SCRIPT)
    assert (result.returncode, result.stdout) == (2, "")
    assert "verbs:" in result.stderr


def test_a_misspelt_verb_is_a_line():
    result = run(SCRIPT, "evaluat", "--workdir", "w")
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == f"error: unknown verb 'evaluat'; did you mean 'evaluate'? There are: {', '.join(sorted(VERBS))}.\n"
    )


def test_the_usage_of_a_verb_names_the_script():
    for door in DOORS.values():
        assert run(*door, "summary", "--help").stdout.startswith("usage: xception-flax summary [-h]")


RECIPE = """
import importlib.util
from configs import digits
from experiment import changes
def get_config():
    assert importlib.util.find_spec("in_the_working_directory") is None
    import digits_too  # fails, in the last line
"""


@pytest.mark.parametrize(
    "command",
    [
        *([*door, "recipe"] for door in DOORS.values()),
        [sys.executable, str(ROOT / "train.py"), "--workdir", "w", "--config"],
    ],
    ids=[*DOORS, "train.py"],
)
def test_a_recipe_imports_the_same_by_every_door(command, tmp_path):
    """What is in the folder above its own, and the project's recipes; nothing by the working directory."""
    here, recipe = tmp_path / "here", tmp_path / "experiment" / "recipe.py"
    here.mkdir()
    recipe.parent.mkdir()
    (here / "in_the_working_directory.py").touch()
    recipe.with_name("changes.py").touch()
    recipe.write_text(RECIPE)
    result = run(*command, str(recipe), cwd=here)
    assert result.stderr == f"error: recipe {recipe}, line 7: ModuleNotFoundError: No module named 'digits_too'\n"
