"""The package: what it exports, and that the built one works outside of the clone, its recipes and training too."""

import ast
import email
import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import environments
import shell
import xception_flax
from golden.archives import unpacked
from xception_flax import data

ROOT = Path(__file__).parent.parent


def build(source: Path, kind: str, folder: Path) -> Path:
    """Builds a 'wheel' or an 'sdist' of the project in `source`, without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (built,) = folder.iterdir()
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_the_package_the_program_and_the_recipes(wheel):
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.splitlines()
    project = {f"xception_flax/project/{name}" for name in files if name == "train.py" or name.startswith("configs/")}
    assert len(project) >= 12
    assert names(wheel) == project | {name for name in files if name.startswith("xception_flax/")}
    assert "xception_flax/py.typed" in names(wheel)  # without it no type checker reads the annotations


def test_the_metadata_say_who_what_and_for_which_pythons(wheel):
    """The Pythons are those that the workflow tries."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    assert about["Author"] == "The xception_flax authors"
    assert "Xception" in about["Keywords"].split(",")
    classifiers = about.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    tried = re.findall(r'"(3\.\d+)"', re.search(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)[1])
    assert [line.split(" :: ")[-1] for line in classifiers if " :: Python :: 3." in line] == tried


def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    archive = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "tests" / "test_package.py").is_file()
    assert (source / "xception_flax" / "py.typed").is_file()
    assert names(build(source, "wheel", tmp_path / "wheel")) == names(wheel)


def test_a_network_is_trained_and_used_without_the_clone(wheel, tmp_path):
    """With the libraries of this environment; `--no-deps` leaves them out of the installation."""
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    environment = shell.environment(devices=1) | {"PYTHONPATH": str(site), "COLUMNS": "120"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-P", *arguments]
        result = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return result.stdout

    package = ["-m", "xception_flax"]
    assert (
        run("-c", "import xception_flax; print(xception_flax.__file__)").strip() == f"{site}/xception_flax/__init__.py"
    )
    assert run(*package, "train", "--help").startswith("usage: xception-flax train [-h] ")
    run(
        *package,
        "train",
        "--config",
        "digits:lenet",
        "--workdir",
        "run",
        "--config.epochs=0.1",
        "--config.schedule.warmup_epochs=0",
        "--restarts",
        "1",
    )
    config = json.loads((here / "run" / "config.json").read_text())
    assert (config["model"]["name"], config["epochs"]) == ("lenet", 0.1)
    last = json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2  # of 64 images of 1,257: a tenth of an epoch
    assert (here / "run" / "curves.png").is_file()
    assert '"top1": ' in run(*package, "evaluate", "run", "--split", "test")
    # A recipe that stands on one of the project's.
    (here / "mine.py").write_text(
        "from configs import digits\ndef get_config():\n    config = digits.get_config()\n    config.epochs = 3.0\n"
        "    return config\n"
    )
    assert json.loads(run(*package, "recipe", "mine.py", "--json"))["epochs"]["value"] == 3.0


@pytest.fixture(scope="module")
def without_training(wheel, tmp_path_factory) -> Path:
    """What `pip install xception_flax` makes: the package, and of this environment only what its metadata ask for."""
    site = tmp_path_factory.mktemp("base")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (about,) = site.glob("*.dist-info/METADATA")
    environments.restrict(site, email.message_from_bytes(about.read_bytes()).get_all("Requires-Dist"))
    return site


def test_a_network_is_used_without_what_training_needs(without_training, tmp_path):
    """A run of another machine is asked and converted; pictures and training say what they lack."""
    unpacked("workdir_0.1.tar.xz", tmp_path / "run")
    environment = shell.environment(devices=1) | {"PYTHONPATH": str(without_training), "COLUMNS": "120"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "xception_flax", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    digit = ROOT / "docs" / "images" / "digit.png"
    for command in (
        ("predict", "run", digit, "--json"),
        ("embed", "run", digit, "--output", "features.npy"),
        ("convert", "run", "--output", "weights.safetensors"),
        ("summary", "xception"),
        ("doctor",),
    ):
        result = run(*command)
        assert result.returncode == 0, (command, result.stderr)
    assert re.search(r"not tried +it needs grain, .*: pip install 'xception_flax\[train\]'", result.stdout)
    for arguments, what in (
        (("explain", "run", digit), "explain needs matplotlib: pip install 'xception_flax[plot]'"),
        (
            ("summary", "xception", "--picture", "x.png"),
            "--picture needs matplotlib: pip install 'xception_flax[plot]'",
        ),
        (("demo", "run"), "the page needs gradio and matplotlib: pip install 'xception_flax[demo]'"),
    ):
        result = run(*arguments)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {what}\n")
    for verb in ("explain", "demo", "train", "evaluate", "show-data", "replay", "reproduce", "precompile"):
        result = run(verb, "--help")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"usage: xception-flax {verb} ")
    result = run("--completion")  # of all verbs; the options of `prepare` are left out
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"^ +train\) words='.*--workdir", result.stdout, re.MULTILINE)
    assert re.search(r"^ +prepare\) words='' ;;$", result.stdout, re.MULTILINE)
    assert "--config.optimizer.momentum=" in result.stdout
    result = run("prepare", "--help")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(r"^error: .* lacks grain, .*\[train\]'.*\n\Z", result.stderr)
    for verb in ("train", "evaluate"):
        result = run(verb, "--config", "digits", "--workdir", "new")
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(
            r"error: \S+ lacks grain, array_record, imagehash and 6 more; activate .*, or: pip install "
            r"'xception_flax\[train\]' \(in a clone: pip install -r requirements.txt\)\n",
            result.stderr,
        )


@pytest.mark.parametrize("package", [xception_flax, data], ids=lambda package: package.__name__)
def test_names_imported_at_first_use_are_those_that_a_type_checker_sees(package):
    """`_HOMES` has them for Python and a block of imports for editors: each name is the same object by both."""
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert homes.keys() == set(package.__all__)
    for name, home in homes.items():
        module = importlib.import_module(home)
        there = getattr(module, name, None) or importlib.import_module(f"{home}.{name}")
        assert getattr(package, name) is there, name


def test_types_are_checked_strictly_where_exported_names_are_at_home():
    """What pyproject.toml switches off elsewhere is on there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyrefly"]
    kinds = {"bad-argument-type", "missing-attribute", "unsupported-operation", "unbound-name"}
    assert kinds <= settings["errors"].keys()
    strict = [
        each["matches"] for each in settings["sub-config"] if {k for k, on in each["errors"].items() if on} >= kinds
    ]
    for home in ["", *xception_flax._HOMES.values()]:
        file = Path(importlib.import_module(f"xception_flax.{home}".strip(".")).__file__).relative_to(ROOT)
        # pyrefly's `**/` is also no folder at all, which fnmatch does not know.
        assert any(fnmatch.fnmatch(file, each) or fnmatch.fnmatch(file, each.replace("**/", "")) for each in strict), (
            file
        )


HEAVY = {"jax", "flax", "grain", "matplotlib", "optax", "orbax", "scipy", "tensorboardX", "tensorflow_datasets"}
IMPORT = """
import json, sys, time
begin = time.perf_counter()
import {module}
{more}
print(json.dumps([time.perf_counter() - begin, list(sys.modules)]))
"""


def imported(module: str, more: str = "") -> tuple[float, set[str]]:
    """Returns how long `import module` takes in a new process, in seconds, and what is imported by it and by `more`."""
    command = [sys.executable, "-c", IMPORT.format(module=module, more=more)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    seconds, names = json.loads(result.stdout)
    return seconds, set(names)


def test_the_import_is_light():
    """And what it has is imported as it is asked for: no training for a network, no pictures for a prediction."""
    times, (names, *_) = zip(*(imported("xception_flax") for _ in range(3)), strict=True)
    assert not names & HEAVY
    assert min(times) < 0.3
    _, names = imported("xception_flax", "xception_flax.create_model")
    assert names & HEAVY == {"jax", "flax"}
    assert not [name for name in names if name.startswith(("xception_flax.training", "xception_flax.data"))]
    for verb in ("predict", "explain", "demo", "embed", "convert", "export", "summary", "evaluate"):
        _, names = imported(f"xception_flax.commands.{verb}")
        assert not names & {"grain", "matplotlib", "tensorboardX", "tensorflow_datasets"}, verb
