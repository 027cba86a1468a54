"""README and docs: every command and program in them runs, in the order of the pages, in one folder.

A ```bash block is run command by command with a small network; a ```console block has one command and what it
prints; the ```python blocks of a page are one program, with shallow networks; test_forking.py applies the ```diff
blocks. Two comments above a block change that:

  <!-- not run: REASON -->         its arguments are checked, and nothing runs
  <!-- run with: ARGUMENTS -->     of `train.py`: arguments that the test adds
"""

import contextlib
import importlib
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import train
import xception_flax
from xception_flax.__main__ import VERBS
from xception_flax.recipes import reading

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    *(f"docs/{page}.md" for page in ("networks", "recipes", "data", "fine-tuning", "weights", "explaining", "export")),
    *(
        f"docs/{page}.md"
        for page in ("imagenet", "measuring", "runs", "reliability", "pods", "proof", "paper", "design", "comparison")
    ),
    *(f"docs/{page}.md" for page in ("miniature", "forking", "nnx", "stability", "api")),
    "benchmarks/README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]

SMALL = [
    "--config.data.image_size=32",
    "--config.batch_size=32",
    "--config.epochs=0.5",
    "--config.schedule.warmup_epochs=0",
]
NARROW = ["--config.model.width=0.02", "--config.model.middle_repeats=0"]
LENET = ["--config.model.name=lenet", "--config.model.width=0.1"]  # a fifth of the time to compile
# Pages whose commands say nothing about the network.
WITH_LENET = ("docs/recipes.md", "docs/data.md", "docs/runs.md", "docs/measuring.md")

# Commands that prepare a machine. They are not run, but the files that they name must exist.
SETUP = ("make", "pip", "curl", "git", "source", "cd", "gcloud", "aws")
LAUNCHERS = ("srun", "mpirun")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    comment: str


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    assert text.count("```") % 2 == 0, page
    pattern = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[2], match[3], match[1] or "")
        for match in pattern.finditer(text)
    ]


pytestmark = pytest.mark.usefixtures("on_one_device")

BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """A reader's working directory: a clone, with images of two classes in `photos`."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "docs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name, level in (("cat", 0), ("dog", 128)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(40):
            image = rng.integers(level, level + 128, (40, 48, 3), np.uint8)
            Image.fromarray(image).save(folder / "photos" / name / f"{i}.jpg")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, object]]:
    """The names that the programs of each page have defined."""
    return {page: {} for page in PAGES}


def commands(text: str) -> list[list[str]]:
    """Returns the commands of a block, split into words."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words for words in split if words]


def our_main(words: list[str]) -> tuple[Callable[[list[str]], int] | None, list[str]]:
    """Returns the function behind a command of ours, or None if it prepares a machine, and its arguments."""
    if words[0] in LAUNCHERS:
        words = words[words.index("python") :]
    program, *arguments = words
    if program == "xception-flax":
        verb, *arguments = arguments
        assert verb in VERBS, f"no verb {verb!r}"
        if verb == "train":
            return train.main, arguments
        return importlib.import_module(f"xception_flax.commands.{verb.replace('-', '_')}").main, arguments
    if program.endswith(("python", "python3")):
        if arguments[0] == "train.py":
            return train.main, arguments[1:]
        if arguments[0] == "-m" and arguments[1].startswith("benchmarks."):
            return importlib.import_module(arguments[1]).main, arguments[2:]
        if arguments[0] == "-m" and arguments[1].startswith("tests."):
            return importlib.import_module(f"{arguments[1]}.__main__").main, arguments[2:]
        if arguments[0] == "-c":
            compile(arguments[1], "<docs>", "exec")
        else:
            assert arguments[:2] in (["-m", "venv"], ["-m", "pip"], ["-m", "zipfile"]), words
        return None, arguments
    assert program in SETUP, f"{program!r} is no command that this test knows"
    return None, arguments


def check_setup(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    for option, value in itertools.pairwise(words):
        if option == "-r":
            assert (ROOT / value).is_file(), value


def check_arguments(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    """Checks that the command has every flag, and the recipe every key with such a value."""
    sub_command = [word for word in arguments[:1] if not word.startswith("-")] if "prepare" in main.__module__ else []
    with pytest.raises(SystemExit, match="0"):
        main([*sub_command, "--help"])
    flags_there = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert {flag for flag in flags if not flag.startswith("--config.")} <= flags_there
    if "--config" in flags:
        overrides = [word for word in arguments if word.startswith("--config.")]
        reading.load(arguments[arguments.index("--config") + 1], overrides)


def run(block: Block, words: list[str], capsys: pytest.CaptureFixture) -> str:
    """Runs a command, or checks its arguments if it is not to be run, and returns its output."""
    main, arguments = our_main(words)
    if main is None:
        check_setup(words)
        return ""
    if block.comment.startswith("not run: ") or main.__module__.startswith("benchmarks."):
        if inspect.signature(main).parameters:
            check_arguments(main, arguments, capsys)
        return ""
    if main is train.main:
        with_ = block.comment.removeprefix("run with: ") if block.comment.startswith("run with: ") else ""
        network = LENET if block.page in WITH_LENET else NARROW
        arguments = [*arguments, *SMALL, *network, *shlex.split(with_)]
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_what_a_page_says_to_do(block, names, capsys, monkeypatch):
    if block.language in ("bash", "sh"):
        for words in commands(block.text):
            run(block, words, capsys)
    elif block.language == "python":
        shallow = partial(xception_flax.create_model, middle_repeats=1)  # a fifth of the time to compile
        monkeypatch.setattr(xception_flax, "create_model", shallow, raising=False)
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names[block.page])
    elif block.language == "console":
        command, _, shown = block.text.partition("\n")
        printed = run(block, shlex.split(command.removeprefix("$ ")), capsys)
        if not block.comment.startswith("not run: "):
            assert shown.strip("\n") in printed
    else:
        known = ("text", "diff") if block.page == "docs/forking.md" else ("text",)
        assert block.language in known, "a block is bash, console, python or text"
    assert block.comment == "" or block.comment.startswith(("not run: ", "run with: "))


def test_keys_in_the_text_are_keys_of_recipes(folder):
    """Also keys that a sentence names: `--config.GROUP.KEY=...`."""
    recipes = ["digits.py", "imagenet.py", f"folder.py:{folder / 'photos'}"]
    configs = [reading.load(f"configs/{recipe}") for recipe in recipes]
    for name, path in (("arrays", "mine.npz"), ("table", "labels.csv")):
        overrides = [f"--config.data.source={name}", f"--config.data.path={path}"]
        configs.append(reading.load("configs/digits.py", overrides))
    keys = {"GROUP.KEY", "KEY"}
    for config in configs:
        for key, value in config.to_dict().items():
            keys |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    for page in PAGES:
        named = set(re.findall(r"--config\.([\w.]+)=", (ROOT / page).read_text()))
        assert named <= keys, page


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"^```\w*\n.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), (page, link)
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, (page, link)


def test_no_wrapped_line_begins_a_list():
    """Below a line of prose, '1. ', '- ', '+ ' or '* ' makes an item of what was meant as the sentence's next word.

    A list that is meant has an empty line above it, or a line that ends in a colon.
    """
    for page in (*PAGES, "CHANGELOG.md"):
        text = (ROOT / page).read_text()
        prose = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        for number, (above, line) in enumerate(itertools.pairwise(prose.splitlines()), start=2):
            begins = re.match(r" *(?=(1[.)]|[-+*]) )", line)
            if begins and above.strip() and not above.endswith(":"):
                content = re.match(r" *(?:(?:\d+[.)]|[-+*]) +)?", above)  # of the paragraph above, or of its item
                assert begins.end() != content.end(), f"{page}:{number}: {line}"


def test_the_places_of_new_things_are_there():
    """Every path and every dotted name in the page, but for files that are to come: `models/NAME.py`, `export/`."""
    folders = {path.name for path in (ROOT / "xception_flax").iterdir() if path.is_dir()}
    for name in set(re.findall(r"`([\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text())):
        if "export" in name:
            continue
        folder, _, last = name.rpartition("/")
        stem, _, ending = last.partition(".")
        if ending not in ("", "py", "md", "in", "toml", "npz", "json") and (folder or stem).split("/")[0] in folders:
            *module, attribute = ["xception_flax", *name.replace("/", ".").split(".")]
            if (ROOT / Path(*module, attribute)).with_suffix(".py").exists():
                continue
            assert hasattr(importlib.import_module(".".join(module)), attribute), name
        elif folder:
            path = folder if re.fullmatch(r"(\w+_)?[A-Z]+", stem) else name
            assert any((ROOT / above / path).exists() for above in (".", "xception_flax")), name


def test_notebooks_have_no_outputs_and_their_translations_the_same_code():
    """`make docs` runs them."""
    code = {}
    for path in (ROOT / "docs" / "tutorials").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), path
        code[path.stem] = ["".join(cell["source"]) for cell in cells]
    assert len(code["xception_from_scratch"]) > 10
    for name, cells in code.items():
        assert cells == code[name.removesuffix("_zh")], name


def test_no_page_is_forgotten():
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} <= set(PAGES)


def test_the_readme_is_short_and_complete():
    readme, recipes = (ROOT / "README.md").read_text(), (ROOT / "docs" / "recipes.md").read_text()
    assert len(readme.split()) <= 900
    for path in (ROOT / "configs").glob("*.py"):
        assert re.search(rf"^\| `configs/{path.name}[:`]", recipes, re.MULTILINE), path
    for verb in VERBS:
        assert re.search(rf"^\| `xception-flax {verb}[ `]", readme, re.MULTILINE), verb
    assert re.search(r"!\[[^\]]+\]\(docs/images/demo.png\)", readme)
