"""The site of `make docs`: every page at its place in the repository, so that a link leads to the same file on both.

What a page has on the site alone is added as it is read (`add_to_page`): the contents to the README, what the package
exports to docs/api.md, the modules of its folder to a page of docs/api/. Everything that cannot be found is a warning,
and `make docs` fails at a warning.
"""

import importlib
import inspect
import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import xception_flax
from xception_flax.text.ranges import LARGEST

ROOT = Path(__file__).parent.parent

# The order of the pages, and the only place that has it. A page that is missing here is a warning.
CONTENTS = {
    "Learn": ["docs/tutorials/xception_from_scratch", "docs/tutorials/xception_from_scratch_zh"],
    "Use": [
        "docs/networks",
        "docs/recipes",
        "docs/data",
        "docs/fine-tuning",
        "docs/explaining",
        "docs/export",
        "docs/weights",
        "docs/measuring",
    ],
    "At scale": ["docs/imagenet", "docs/pods", "docs/runs", "docs/reliability"],
    "Results": [
        "benchmarks/README",
        "docs/comparison",
        "docs/miniature",
        "docs/paper",
        "docs/design",
        "docs/proof",
    ],
    "Reference": ["docs/api", *(f"docs/api/{name}" for name in ("models", "data", "training", "recipes", "inference"))],
    "Project": ["docs/forking", "docs/nnx", "docs/stability", "CONTRIBUTING", "CHANGELOG", "SECURITY"],
}

# What the package exports (`check_public_names` sees that nothing is missing): Sphinx finds no table and no module.
EXPORTS = """
## xception_flax

```{eval-rst}
.. automodule:: xception_flax
   :imported-members:

.. autodata:: xception_flax.MODELS

   The networks by name, as `create_model` takes it.
```

## What load returns

```{eval-rst}
.. autoclass:: xception_flax.inference.predictor.Predictor()
   :no-index:
```

## xception_flax.allocator

```{eval-rst}
.. automodule:: xception_flax.host.allocator
```
"""

project = "xception_flax"
author = "The xception_flax authors"
version = release = xception_flax.__version__

root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/tutorials/*.ipynb", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "runs"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
# Names of other libraries are not looked up: the build needs no network. Nor are those of our folders without a page.
PAGES_OF_FOLDERS = "|".join(path.stem for path in (ROOT / "docs" / "api").glob("*.md"))
nitpick_ignore_regex = [("py:.*", rf"(?!xception_flax\.({PAGES_OF_FOLDERS})\b).*")]

# The notebooks are run by the build, and fail it as anything else does. The cache, which `make docs`
# empties first, knows a notebook by its code, so that a translation is not run again.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 600  # seconds a cell
NOTEBOOKS_SECONDS = 180  # all of them together, on two CPU cores
nb_execution_raise_on_error = True

myst_heading_anchors = 4  # as GitHub makes them
highlight_language = "text"  # of a block that names none

# Docstrings write `code`, as the pages do. So a name in them is no reference, and is not looked up.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
smartquotes_action = "D"  # dashes; 'stop' is a value, in the quotes of Python
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines what is imported
html_title = f"xception_flax {release}"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def modules_of(folder: str) -> Iterator[str]:
    """Yields the reference of a folder of the package, then that of each module in it, as Markdown."""
    package = importlib.import_module(f"xception_flax.{folder}")
    inside = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    for module in (package.__name__, *(module.name for module in inside)):
        if module != package.__name__:
            yield f"## {module.removeprefix('xception_flax.')}\n"
        # What `__all__` has of other modules stands there.
        yield f"```{{eval-rst}}\n.. automodule:: {module}\n   :ignore-module-all:\n```\n"


def add_to_page(app: Sphinx, name: str, text: list[str]) -> None:
    if name == root_doc:
        trees = (
            "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])
            for caption, pages in CONTENTS.items()
        )
        text[0] = "\n".join([text[0], *trees])
    elif name == "docs/api":
        text[0] += EXPORTS
    elif name.startswith("docs/api/"):
        text[0] = "\n".join([text[0], *modules_of(name.removeprefix("docs/api/"))])


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leaves out what every linen module takes; a class or function is its name, and the largest number inf."""
    # Otherwise Sphinx could not read the signature, and would show it as one line.
    signature = (signature or "").replace(repr(LARGEST), "inf")
    signature = re.sub(r"<(?:class|function) '?(?:\w+\.)*(\w+)'?>", r"\1", signature)
    if inspect.isclass(obj) and issubclass(obj, nn.Module):
        signature = re.sub(r"(, )?(\*, )?parent: .*\)$", ")", signature)
    return signature or None, returns


def name_entries(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Says which names a table has, such as `MODELS`."""
    if what == "data" and isinstance(obj, dict):
        comment = [] if "\n".join(lines).strip() == inspect.getdoc(dict) else lines
        lines[:] = [*comment, "", ", ".join(f"`{key}`" for key in obj)]


def leave_out_field(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leaves out a field of a NamedTuple, of which Sphinx knows its number alone: the class says what it is."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def leave_out_value(app: Sphinx, domain: str, kind: str, content: addnodes.desc_content) -> None:
    """Leaves out the value of a table: functions, at length. `autodoc` cannot, for the members of a module."""
    if kind == "data":
        for part in list(content.parent.findall(addnodes.desc_annotation)):
            if part.astext().lstrip().startswith("="):
                part.parent.remove(part)


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of a name that the package exports and no page has."""
    python = env.domains.python_domain
    for name in xception_flax.__all__:
        value = getattr(xception_flax, name)
        if inspect.ismodule(value):
            found = value.__name__ in python.modules
        else:
            found = f"xception_flax.{name}" in python.objects
        if not found:
            logging.getLogger(__name__).warning("no page of the reference has xception_flax.%s", name)


def check_notebooks_time(app: Sphinx, env: BuildEnvironment) -> None:
    """Says where the notebooks take too long: no warning, as a busy machine must not fail the build.

    A translation is in the cache, and its time is that of the run there.
    """
    found = (NbMetadataCollector.get_exec_data(env, name) for name in env.found_docs)
    seconds = sum({data["runtime"] or 0 for data in found if data})  # a set: one run, one time
    if seconds > NOTEBOOKS_SECONDS:
        print(f"the notebooks took {seconds:.0f} s; expected at most {NOTEBOOKS_SECONDS}", file=sys.stderr)


def add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", name_entries)
    app.connect("autodoc-skip-member", leave_out_field)
    app.connect("object-description-transform", leave_out_value)
    app.connect("env-check-consistency", check_public_names)
    app.connect("env-check-consistency", check_notebooks_time)
    app.connect("build-finished", add_index)
