"""Training on ImageNet as it was prepared."""

import contextlib
import itertools
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import shell
import workdirs
from shell import finish, pause, wait_until
from xception_flax import data
from xception_flax.commands import evaluate

# The paper's recipe, made small: 6 steps of 8 of the 45 images, then an evaluation on 11 images in two batches.
SMALL = [
    "--config.model.width=0.02",
    "--config.model.middle_repeats=0",
    "--config.model.dtype=float32",
    "--config.batch_size=8",
    "--config.epochs=1",
    "--config.log_every_steps=1",
    "--config.checkpoint_every_epochs=0.17",  # about every step
    "--config.checkpoint.keep_latest=6",
]


def start(workdir: Path, data_dir: Path, *arguments: str) -> subprocess.Popen:
    where = ["--workdir", workdir, f"--config.data.data_dir={data_dir}"]
    return shell.start("train.py", "--config", "configs/imagenet.py", *where, *SMALL, *arguments)


def test_an_epoch_of_the_papers_recipe(data_dir, tmp_path, capsys):
    """At 299 pixels, on eight devices: a copy of the workdir in mid-epoch is resumed with two worker processes.

    It ends bit for bit as the run that went on, and the evaluation counts each of the 11 images once.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(whole, data_dir)
    wait_until(lambda: any(record["step"] == 3 for record in workdirs.records(whole)), process)
    pause(process)
    shutil.copytree(whole, stopped)  # as if it had been killed here
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == 0, err

    code, _, err = finish(start(stopped, data_dir, "--config.data.num_workers=2"))
    assert code == 0, err
    step = int(re.search(r"going on from the checkpoint of step (\d+)", err)[1])
    assert 1 <= step < 6

    expected, result = workdirs.arrays(whole, 6), workdirs.arrays(stopped, 6)
    assert expected.keys() == result.keys()
    assert len(expected) > 200
    for path, value in expected.items():
        np.testing.assert_array_equal(result[path], value, err_msg=path)
    metrics = [
        [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in workdirs.records(w)]
        for w in (whole, stopped)
    ]
    losses = [{r["step"]: r["train/loss"] for r in of_run if "train/loss" in r} for of_run in metrics]
    assert losses[0].keys() == set(range(1, 7))
    assert losses[0] == losses[1]
    (evaluation,) = (record for record in metrics[0] if "eval/loss" in record)
    assert evaluation in metrics[1]
    assert evaluation["eval/count"] == 11

    assert evaluate.main(["--workdir", str(stopped)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["count"], last["split"], last["step"]) == (11, "validation", 6)
    assert last["top1"] == evaluation["eval/top1"]
    assert last["loss"] == pytest.approx(evaluation["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_two_hosts_see_the_batches_of_one(data_dir, train):
    options = dict(source="tfds", name="imagenet2012", data_dir=str(data_dir), image_size=299, eval_split="validation")
    options |= dict(train_transforms="random_resized_crop(min_area=0.08) | flip_left_right", train=train, batch_size=8)

    def batches(**host):
        with contextlib.closing(data.load(**options, **host).batches()) as all_batches:
            return [{k: np.array(v) for k, v in batch.items()} for batch in itertools.islice(all_batches, 3)]

    one, two = batches(), [batches(process_index=i, process_count=2) for i in range(2)]
    assert len(one) == (3 if train else 2)
    for step, batch in enumerate(one):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([host[step][key] for host in two]), value)
    if not train:
        assert sum(batch["mask"].sum() for batch in one) == 11
