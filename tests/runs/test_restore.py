"""Runs are read back: one of version 0.1, which every later version must read, and damaged ones.

`golden/workdir_0.1.tar.xz` is a run that version 0.1 wrote, with what that version printed about it.
`golden/make_workdir.py` says how it was made. It is never made anew, since it stands for the runs that users have.
"""

import json
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

import train
from golden.archives import unpacked
from xception_flax.commands import evaluate, predict
from xception_flax.data.sources import digits
from xception_flax.runs import history
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import read_recipe
from xception_flax.text.errors import UserError
from xception_flax.weights import initial

STEPS = (40, 79)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    return unpacked("workdir_0.1.tar.xz", tmp_path_factory.mktemp("old"))


def said(capsys, command, *arguments) -> str:
    capsys.readouterr()
    assert command(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def images() -> np.ndarray:
    """The images of `logits.npz`: `[16, 32, 32, 1]`, normalized by the recipe."""
    pixels = digits.digits("test").images[:16, ..., None].astype(np.float32)
    return (pixels.repeat(4, 1).repeat(4, 2) - 127.5) / 127.5


def test_an_old_run_computes_what_it_did(old, one_device):
    with np.load(old / "logits.npz") as logits:
        for step in STEPS:
            run = restore(old, one_device, str(step))
            assert (run.step, run.weights, run.image_shape) == (step, "ema", (32, 32, 1))
            assert run.class_names == tuple("0123456789")
            found = jax.jit(lambda v, x, model=run.model: model.apply(v, x, train=False))(run.variables, images())
            assert np.ptp(logits[str(step)]) > 1
            np.testing.assert_allclose(found, logits[str(step)], atol=1e-4)
    assert restore(old, one_device, "latest").step == 79
    assert restore(old, one_device, "latest", "raw").weights == "raw"


def test_an_old_run_is_evaluated_as_before(old, capsys):
    for expected in json.loads((old / "said.json").read_text()):
        choice = ("--checkpoint", expected["step"], "--weights", expected["weights"], "--split", expected["split"])
        found = json.loads(said(capsys, evaluate.main, "--workdir", old, *choice).splitlines()[-1])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


def test_an_old_run_predicts(old, tmp_path, capsys):
    """evaluate counts exactly the predictions of predict as right: both prepare images as the run's recipe says."""
    test = digits.digits("test")
    for i, image in enumerate(test.images):
        cv2.imwrite(str(tmp_path / f"{i:03}.png"), image)
    out = said(capsys, predict.main, "--workdir", old, "--checkpoint", "latest", "--json", "--top", 1, tmp_path)
    right = [
        next(iter(json.loads(line)["classes"])) == str(label)
        for line, label in zip(out.splitlines(), test.labels, strict=True)
    ]
    expected = json.loads((old / "said.json").read_text())[-1]
    assert (expected["step"], expected["weights"]) == (79, "ema")
    assert np.mean(right) == pytest.approx(expected["top1"], abs=1e-9)


def test_an_old_run_goes_on(old, tmp_path, capsys):
    """From its first checkpoint, by its own recipe, to the result of the old version."""
    shutil.copytree(old, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "79")
    recipe = read_recipe(tmp_path / "w")
    assert train.train(recipe, tmp_path / "w") == 0
    assert "going on from the checkpoint of step 40" in capsys.readouterr().err
    (found,), (expected,) = (
        [r for r in history.read_metrics(folder / "metrics.jsonl") if r["step"] == 79 and "eval/top1" in r]
        for folder in (tmp_path / "w", old)
    )
    assert found["eval/loss"] == pytest.approx(expected["eval/loss"], rel=0.02)


def test_an_old_run_is_weights_to_begin_with(old, one_device):
    run = restore(old, one_device, "latest")
    given = dict(model=run.model, image_shape=run.image_shape, mesh=one_device, class_names=run.class_names)
    found = initial.load(str(old), "latest", mean=(127.5,), std=(127.5,), **given)
    assert (found.origin["step"], found.origin["weights"], found.random) == (79, "ema", ())
    assert len(found.arrays) == len(jax.tree.leaves(run.variables))


def test_without_averages_the_raw_weights_are_taken(old, tmp_path, one_device):
    """A run without averages has none in its checkpoints."""
    shutil.copytree(old, tmp_path / "w")
    recipe = json.loads((old / "config.json").read_text())
    (tmp_path / "w" / "config.json").write_text(json.dumps(recipe | {"step": recipe["step"] | {"ema_decay": 0.0}}))
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "79" / "ema")
    found, expected = restore(tmp_path / "w", one_device, "latest"), restore(old, one_device, "latest", "raw")
    assert found.weights == "raw"
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


# Mistakes ------------------------------------------------------------------------------------------


def test_a_mistake_is_a_line(old, tmp_path, one_device):
    recipe = json.loads((old / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(recipe | {"step": recipe["step"] | {"ema_decay": 0.0}}))
    with pytest.raises(UserError, match=rf"^{tmp_path} keeps no averaged weights \(step\.ema_decay is 0\)"):
        restore(tmp_path, one_device, "latest", "ema")
    with pytest.raises(UserError, match=rf"^{tmp_path}/checkpoints has no checkpoint yet\.$"):
        restore(tmp_path, one_device, "latest")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(recipe | {"data": recipe["data"] | {"image_size": 1}}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config\.json: Xception needs images of at least 32 x 32"):
        restore(tmp_path, one_device, "latest")
