"""An environment without the libraries gets a line, not a traceback."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from xception_flax.host import libraries

ROOT = Path(__file__).parents[2]


def test_the_lists_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = importlib.metadata.packages_distributions()

    def normal(name: str) -> str:  # as package indexes compare names
        return re.sub(r"[-_.]+", "-", name).lower()

    for names, lines in (
        (libraries.LIBRARIES, project["dependencies"]),
        (libraries.TRAINING, project["optional-dependencies"]["train"]),
    ):
        provided = {normal(distribution) for name in names for distribution in distributions[name]}
        assert provided >= {normal(re.match(r"[\w-]+", line)[0]) for line in lines}
        assert len(names) == len(lines)


@pytest.mark.parametrize(
    "command", [["train.py", "--help"], ["-m", "xception_flax", "summary", "--help"]], ids=["train.py", "verb"]
)
def test_without_them_every_command_is_a_line(command):
    """`-S` leaves out site-packages, so Python has its own library only."""
    result = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {sys.executable} lacks jax, flax, optax and {len(libraries.LIBRARIES) - 3} more; activate the "
        "environment that has them (source .venv/bin/activate), or: pip install -r requirements.txt\n"
    )


def test_a_single_one_is_named(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "LIBRARIES", ("numpy", "no_such_library"))
    with pytest.raises(SystemExit, match="2"):
        libraries.check_libraries(training=False)
    assert "lacks no_such_library; activate" in capsys.readouterr().err


def test_using_a_network_needs_fewer(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "TRAINING", ("grain", "no_such_library"))
    libraries.check_libraries(training=False)
    with pytest.raises(SystemExit, match="2"):
        libraries.check_libraries(training=True)
    err = capsys.readouterr().err
    assert err.endswith("or: pip install 'xception_flax[train]' (in a clone: pip install -r requirements.txt)\n")
