"""An environment without the libraries gets a line, not a traceback."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from xception_flax.export.writing import FORMATS
from xception_flax.host import libraries

ROOT = Path(__file__).parents[2]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(extra: str) -> list[str]:
    """Returns what an extra requires, with that of the extras that it includes."""
    lines = []
    for line in PROJECT["optional-dependencies"][extra]:
        included = re.fullmatch(r"xception-flax\[(.*)\]", line)
        lines += [each for name in included[1].split(",") for each in required(name)] if included else [line]
    return lines


def test_the_lists_are_those_of_the_project():
    distributions = importlib.metadata.packages_distributions()

    def normal(name: str) -> str:  # as package indexes compare names
        return re.sub(r"[-_.]+", "-", name).lower()

    for names, lines in (
        (libraries.LIBRARIES, PROJECT["dependencies"]),
        (libraries.TRAINING, required("train")),
    ):
        provided = {normal(distribution) for name in names for distribution in distributions[name]}
        assert provided >= {normal(re.match(r"[\w-]+", line)[0]) for line in lines}
        assert len(names) == len(lines)


def test_extras_have_what_their_names_say():
    """And docs/api.md has a line for each."""
    extras = PROJECT["optional-dependencies"]
    assert set(required("export")) == {line for form in FORMATS for line in required(form)}
    for extra in ("plot", "data", "train"):
        assert set(required(extra)) <= set(required("train")) <= set(required("dev"))
    assert "matplotlib>=3.10" in required("demo")
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert [name for cell in listed for name in re.findall(r"\w+", cell)] == list(extras)


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
