"""docs/forking.md: its diffs apply to a copy of this project, their tests pass there, and their recipe trains."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import shell
import workdirs
from shell import ROOT

PAGE = (ROOT / "docs" / "forking.md").read_text()
FOLDERS, FILES = ("configs", "docs", "tests", "xception_flax"), ("train.py", "pyproject.toml")

# What the diffs add: the tests, and the rows of tables.
ADDED = (
    "tests/models/test_models.py::test_sizes[mobilenet]",
    "tests/models/test_models.py::test_contract[mobilenet]",
    "tests/models/test_models.py::test_the_docs_have_the_sizes",
    "tests/data/sources/test_noisy_digits.py",
    "tests/data/sources/test_sources.py::test_contract[noisy_digits]",
    "tests/commands/test_summary.py::test_all_from_the_shell",
    "tests/data/transforms/test_transforms.py::test_a_fifth_of_the_images_is_gray",
    "tests/data/transforms/test_transforms.py::test_every_transform_has_a_golden_image",
    "tests/data/transforms/test_transforms.py::test_golden_image[resize | random_gray(probability=1.0)]",
    "tests/recipes/test_ranges.py::test_extremes_in_a_chain[random_gray]",
    "tests/training/test_losses.py::test_generalized_cross_entropy_by_hand",
    "tests/training/test_metrics.py::test_reciprocal_rank_against_sorting",
    "tests/training/test_metrics.py::test_an_entry_names_what_its_function_computes[ranked]",
    "tests/recipes/test_configs.py::test_the_list_is_complete",
    "tests/recipes/test_configs.py::test_every_network_is_in_a_recipe",
    "tests/recipes/test_configs.py::test_recipe_fits_together[noisy_digits]",
    "tests/test_stability.py::test_what_is_new_is_promised_with_the_next_version",
)


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    root = tmp_path / "fork"
    root.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "found"))
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    blocks = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    # If there is a repository around the folder, git takes the paths as of that.
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    diffs = "".join(blocks)
    applied = subprocess.run(["git", "apply", "-"], input=diffs, text=True, cwd=root, env=alone, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    assert len(blocks) == 6
    return root


def test_a_fork_by_the_page(fork, tmp_path, monkeypatch):
    """One device, two steps of 64 images, two blocks of MobileNet. Beside it the tests that the diffs add."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    workdir = tmp_path / "run"
    small = ["--config.epochs=0.1", "--config.schedule.warmup_epochs=0", "--config.model.features=(64, 128)"]
    (command,) = re.findall(r"^\+ +python (train\.py --config \S+) --workdir \S+$", PAGE, re.MULTILINE)
    training = shell.start(*command.split(), "--workdir", workdir, *small, "--config.log_every_steps=1", root=fork)
    scripts = re.findall(r"`python (tests/golden/make_\w+\.py)", PAGE)
    assert len(scripts) == 2
    for script in scripts:
        code, _, err = shell.finish(shell.start(script, root=fork))
        assert code == 0, err
    options = ("-n0", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}")
    checking = shell.start("-m", "pytest", *options, *ADDED, root=fork)

    code, out, err = shell.finish(training)
    assert code == 0, err
    # Channels 1 -> 8 -> 16 -> 32 and 10 classes: each convolution and its normalization, then the classifier.
    parameters = 9 * 8 + 16 + (9 * 8 + 16 + 8 * 16 + 32) + (9 * 16 + 32 + 16 * 32 + 64) + 33 * 10
    assert f"mobilenet, {parameters:,} parameters, 1,257 images" in err
    config = json.loads((workdir / "config.json").read_text())
    assert (config["data"]["noise"], config["loss"]["q"]) == (0.4, 0.7)
    first, _, evaluated, _ = workdirs.records(workdir)
    # A new network gives each of 10 classes about 1/10. The cross-entropy would be 2.3.
    assert first["train/loss"] == pytest.approx((1 - 0.1**0.7) / 0.7, rel=0.05)
    assert evaluated["eval/loss"] == pytest.approx((1 - 0.1**0.7) / 0.7, rel=0.05)
    top1, mrr = evaluated["eval/top1"], evaluated["eval/mrr"]
    assert top1 + (1 - top1) / 10 < mrr < top1 + (1 - top1) / 2  # other ranks are from 2 to 10
    assert f"mrr        {100 * mrr:.2f} %" in out

    code, out, _ = shell.finish(checking)
    assert code == 0, out
    assert f"{len(ADDED)} passed" in out
