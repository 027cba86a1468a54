"""Docstrings: their examples run, and where docs/api.md promises one there is one."""

import ast
import doctest
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import xception_flax
from xception_flax.weights import writing
from xception_flax.weights.pretrained import Pretrained

ROOT = Path(__file__).parents[1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


WITH_EXAMPLES = [name_of(path) for path in sorted(ROOT.glob("xception_flax/**/*.py")) if ">>> " in path.read_text()]


def examples_of(module: types.ModuleType) -> dict[str, doctest.DocTest]:
    """Returns the examples of a module's functions and classes by name, those under `jit` too."""
    finder = doctest.DocTestFinder()
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    found = [test for value in own for test in finder.find(value, value.__name__, module, globs={}) if test.examples]
    return {test.name: test for test in found}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    """The files that examples name, in the working directory: a network with three classes, and photos."""
    monkeypatch.chdir(tmp_path)
    fields = dict(name="lenet", num_classes=3)
    variables = xception_flax.create_model(**fields).init(jax.random.key(0), np.zeros([1, 28, 28, 3]), train=False)
    network = Pretrained("xception_flax", fields, jax.tree.map(np.asarray, variables), 3, image_size=28)
    writing.write(network, tmp_path / "network.safetensors")
    for name in ("garden.jpg", "street.jpg"):
        Image.new("RGB", (40, 30)).save(name)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name, folder, capsys):
    module = importlib.import_module(name)
    examples = examples_of(module)
    runner = doctest.DocTestRunner()
    for test in examples.values():
        runner.run(test)
    # All were found: also of what `jit` or another decorator wraps.
    written = Path(module.__file__).read_text().count(">>> ")
    assert (runner.failures, runner.tries) == (0, written), capsys.readouterr().out


def test_what_is_exported_has_examples():
    """Each name, or of a module some of its names."""
    for name in ("create_model", "fold_batch_norm", "load", "ops", "allocator"):
        value = getattr(xception_flax, name)
        module = value if isinstance(value, types.ModuleType) else importlib.import_module(value.__module__)
        examples = examples_of(module)
        assert examples if module is value else name in examples, name


@pytest.mark.parametrize("folder_of_page", sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md")))
def test_every_name_of_the_reference_is_documented(folder_of_page):
    """Functions, classes and their methods, but those with an underscore."""

    def bare(node: ast.AST, place: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                name = f"{place}.{child.name}"
                if ast.get_docstring(child) is None:
                    yield name
                if isinstance(child, ast.ClassDef):
                    yield from bare(child, name)

    files = sorted((ROOT / "xception_flax" / folder_of_page).rglob("*.py"))
    assert [name for file in files for name in bare(ast.parse(file.read_text()), name_of(file))] == []
