"""`replay` computes the run's own step again, and names what was planted there."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import shell
import train
from small_run import DIGITS, LENET
from workdirs import records
from xception_flax import data
from xception_flax.commands import replay
from xception_flax.data.sources.source import Arrays
from xception_flax.runs import progress, replaying
from xception_flax.training.metrics import Sum
from xception_flax.training.state import TrainState

# 24 steps of 16 images, each recorded, with all that is random: crops, dropout, mixing. The batch is computed in parts.
RUN = [text for text in LENET if "epochs" not in text and "log_every" not in text]
RUN += [f"--config.{text}" for text in ("epochs=0.306", "log_every_steps=1", "eval_every_epochs=inf")]
RUN += [f"--config.{text}" for text in ("checkpoint_every_epochs=0.1", "checkpoint.keep_latest=9")]
RUN += ["--config.schedule.warmup_epochs=0"]
RANDOM = ["--config.model.dropout_rate=0.5", "--config.step.accumulation_steps=2"]
RANDOM += ["--config.mix.mixup_alpha=0.4", "--config.mix.cutmix_alpha=1.0", "--config.mix.probability=0.6"]


def run(monkeypatch, capsys, main, *arguments) -> tuple[int, str, str]:
    return shell.call(monkeypatch, capsys, main, *arguments)


def train_digits(monkeypatch, capsys, workdir: Path, *arguments: str) -> tuple[int, str]:
    config = () if "--config" in arguments else ("--config", f"{DIGITS}:lenet")
    code, _, err = run(monkeypatch, capsys, train.main, *config, "--workdir", workdir, *RUN, *arguments)
    return code, err


def replayed(monkeypatch, capsys, workdir: Path, *arguments: object, output: Path | None = None) -> tuple[dict, str]:
    """Returns the table and what was printed, on standard error first."""
    output = workdir.parent / "replayed" if output is None else output
    shutil.rmtree(output, ignore_errors=True)
    code, out, err = run(monkeypatch, capsys, replay.main, workdir, "--output", output, *arguments)
    assert code == 0, err
    return json.loads((output / "step.json").read_text()), err + out


def refused(monkeypatch, capsys, *arguments: object) -> str:
    code, out, err = run(monkeypatch, capsys, replay.main, *arguments)
    assert (code, out) == (2, "")
    return err.splitlines()[-1]


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted((folder, *folder.rglob("*")))
    }


@pytest.fixture(scope="module")
def random_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "random"
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", str(workdir), *RUN, *RANDOM]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        assert train.main(arguments) == 0
    return workdir


# The same step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 13, 16])
def test_it_is_the_step_of_the_run_bit_for_bit(random_run, tmp_path, monkeypatch, capsys, step):
    """From the initial weights, between two checkpoints, and at one. Nothing in the workdir is touched."""
    before = snapshot(random_run)
    table, out = replayed(monkeypatch, capsys, random_run, "--step", step, output=tmp_path / "out")
    assert snapshot(random_run) == before
    start = step - 1 - (step - 1) % 8
    assert (table["step"], table["from_checkpoint"], table["devices"]) == (step, start, "8 x cpu")
    origin = f"the checkpoint of step {start}" if start else "the initial weights"
    announced, compiling, _ = out.partition("compiling the step")
    assert (announced, compiling) == (
        f"from {origin}, {step - start} step{'s' * (step - start > 1)}\n",
        "compiling the step",
    )
    notes = [f"{step - start} record{'s' * (step - start > 1)} of the run: equal, to the last digit"]
    notes += ["checkpoint of step 16: the state has its checksums, bit for bit"] if step == 16 else []
    assert table["notes"] == notes
    record = next(r for r in records(random_run) if r["step"] == step)
    for name, value in table["values"].items():
        assert record[f"train/{name}"] == value
    assert {"loss", "gradient_norm", "top1"} <= table["values"].keys()
    assert table["first_not_finite"] == ""
    assert "first not finite  nothing: all is finite" in out
    assert [layer["layer"] for layer in table["layers"]] == [
        *("conv1", "conv2", "conv3", "fc1", "Dropout_0", "predictions")
    ]


def test_the_batch_is_saved_by_name_and_says_what_was_mixed(random_run, tmp_path, monkeypatch, capsys):
    """The images of CutMix are of pixels of both, those of mixup are between them, by the shares that are said."""
    for step, kind in {1: "CutMix", 2: "mixup", 6: "this batch was not mixed"}.items():  # by the seed of the run
        table, out = replayed(monkeypatch, capsys, random_run, "--step", step, output=tmp_path / "out")
        assert f"mixing            {table['mixing']}" in out
        with np.load(tmp_path / "out" / "batch.npz") as batch:
            images, mixed, share = (np.float32(batch[name]) for name in ("images", "mixed_images", "mixed_share"))
            assert batch["names"].tolist() == [f"image {index}" for index in batch["index"]]
            labels = [image["labels"] for image in table["images"]]
            assert labels == [[str(label)] for label in batch["labels"]]
            source = data.SOURCES["digits"]("train")
            assert batch["labels"].tolist() == [source.labels[index] for index in batch["index"]]
        others = images.reshape(8, 2, *images.shape[1:])[:, ::-1].reshape(images.shape)
        assert table["mixing"].partition(":")[0] == kind
        with_whom = [image["mixed_with"] for image in table["images"]]
        if kind == "this batch was not mixed":
            np.testing.assert_array_equal(mixed, images)
            assert with_whom == [None] * 16
            continue
        assert with_whom == [row ^ 1 for row in range(16)]
        first = float(table["mixing"].partition("shares ")[2].partition(" ")[0])
        assert first == pytest.approx(share[0], abs=5e-4)
        of_both = (mixed == images) | (mixed == others)
        assert of_both.all() == (kind == "CutMix")
        if kind == "mixup":
            near = [np.abs(s * images + (1 - s) * others - mixed).max() for s in (share[0], 1 - share[0])]
            assert min(near) <= 0.51


def test_the_run_of_a_user_is_replayed_bit_for_bit(whole, tmp_path):
    """Of an Xception with batch normalization and averages, in processes of two devices that compile as a user's do."""
    output = tmp_path / "out"
    code, _, err = shell.finish(
        shell.start("-m", "xception_flax", "replay", whole, "--step", 157, "--output", output, devices=2)
    )
    assert code == 0, err
    table = json.loads((output / "step.json").read_text())
    assert (table["from_checkpoint"], table["devices"]) == (138, "2 x cpu")
    assert table["notes"] == [
        "4 records of the run: equal, to the last digit",
        "checkpoint of step 157: the state has its checksums, bit for bit",
    ]


def test_a_run_of_eight_devices_is_replayed_on_one(random_run, tmp_path, monkeypatch, capsys):
    """It says so, and what it computes differs from the run's records and checkpoint by rounding alone."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    table, _ = replayed(monkeypatch, capsys, random_run, "--step", 16, output=tmp_path / "out")
    assert (table["devices"], table["from_checkpoint"]) == ("1 x cpu", 8)
    assert table["notes"][0] == "the run computed on 8 devices, this is on 1: sums may be rounded otherwise"
    said = table["notes"][1].removeprefix("8 records of the run: ")
    assert said == "equal, to the last digit" or float(said.split()[2]) < 1e-4
    where, _, share = table["notes"][2].partition(", by ")
    assert where.startswith("checkpoint of step 16: the state differs from it in raw['params']")
    assert float(share.removesuffix(" of an array's largest value at most")) < 1e-3


def test_another_record_and_another_checksum_are_noticed(random_run, tmp_path, monkeypatch, capsys):
    """A loss that was twice as large, and the checksum of one array."""
    workdir = shutil.copytree(random_run, tmp_path / "w")
    changed = records(workdir)
    changed[15]["train/loss"] *= 2
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    path = workdir / "checkpoints" / "16" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["checksums"]["raw"]["['params']['conv1']['kernel']"] += 1
    path.write_text(json.dumps(meta))
    table, _ = replayed(monkeypatch, capsys, workdir, "--step", 16)
    assert table["notes"] == [
        "8 records of the run: differ by 0.5 of a value, at most",
        f"checkpoint of step 16: was not compared, checkpoint {workdir}/checkpoints/16 cannot be used: the values of "
        "raw['params']['conv1']['kernel'] have changed on disk",
    ]


def test_the_largest_difference_is_a_share_of_the_largest_value():
    def state(*values):
        return TrainState(np.int32(3), {"x": np.float32(values), "y": np.float32([7.0])}, {}, ())

    assert replaying._largest_difference(state(1, -4), state(1, -4)) == 0
    assert replaying._largest_difference(state(1, -4), state(1.5, -4)) == 0.5 / 4
    assert replaying._largest_difference(state(1, np.nan), state(1, -4)) == math.inf


@pytest.mark.parametrize(
    ("run", "here", "said"),
    [
        (2.0, 2.0, "equal, to the last digit"),
        (2.0, 2.5, "differ by 0.2 of a value, at most"),
        (2.0, math.nan, "differ: a value is finite in the run and not here, or the reverse"),
        (math.inf, 2.0, "differ: a value is finite in the run and not here, or the reverse"),
        (math.nan, math.nan, "equal, to the last digit"),
    ],
)
def test_a_record_is_compared_also_where_it_is_not_finite(run, here, said):
    """0.5 of 2 is a quarter, which one digit rounds to 0.2."""
    sums = [{"loss": Sum(4 * here, 4.0), "top1": Sum(2.0, 4.0)}]
    record = {"step": 1, "train/loss": run, "train/top1": 0.5}
    assert replaying._compared([record], 0, sums) == [f"1 record of the run: {said}"]


# Planted ---------------------------------------------------------------------------------------------


def test_a_layer_that_explodes_is_named(tmp_path, monkeypatch, capsys):
    """The first update gives conv2 weights of about 1e38, so that in step 2 the sums of its 200 products overflow."""
    factors = ["--config.optimizer.name=adamw", "--config.optimizer.learning_rate=1"]
    factors += ["--config.optimizer.layer_factors=conv2: 1e38", "--config.step.ema_decay=0"]
    factors += ["--config.optimizer.clip_norm=None", "--config.optimizer.decoupled_weight_decay=0"]
    code, err = train_digits(monkeypatch, capsys, tmp_path / "w", *factors, "--config.log_every_steps=4")
    assert code == 2
    assert "at step 4; no checkpoint was written yet" in err  # the first step that is looked at
    table, out = replayed(monkeypatch, capsys, tmp_path / "w")
    assert table["step"] == 2
    assert table["first_not_finite"].startswith("forward, the output of conv2: ")
    counts = {layer["layer"]: layer["output"]["not_finite"] for layer in table["layers"]}
    assert counts["conv1"] == 0 < counts["conv2"]
    assert table["state_before_not_finite"] == []
    assert "first not finite  forward, the output of conv2: " in out

    table, out = replayed(monkeypatch, capsys, tmp_path / "w", "--step", 4)
    assert (table["earlier_step_not_finite"], table["earlier_update_not_finite"]) == (2, False)
    assert "before it         step 2 was not finite already: look at --step 2" in out
    assert table["first_not_finite"].startswith("the state before the step: raw['params']['conv1']['kernel']")


def test_an_update_that_overflows_is_named(tmp_path, monkeypatch, capsys):
    """Loss and gradient of the step are finite; its new weights are not."""
    rate = ["--config.optimizer.name=adamw", "--config.optimizer.learning_rate=3e38", "--config.step.ema_decay=0"]
    rate += ["--config.optimizer.decoupled_weight_decay=1e4", "--config.optimizer.clip_norm=None"]
    rate += ["--config.schedule.warmup_epochs=0.0127", "--config.checkpoint_every_epochs=0.0127"]
    code, err = train_digits(monkeypatch, capsys, tmp_path / "w", *rate)
    assert code == 2
    assert "other arrays are not finite after step 2" in err
    table, _ = replayed(monkeypatch, capsys, tmp_path / "w")
    assert (table["step"], table["from_checkpoint"]) == (2, 1)
    assert table["first_not_finite"].startswith("the update: the new values of raw['params']['conv1']['kernel'], ")
    assert np.isfinite([table["values"]["loss"], table["values"]["gradient_norm"]]).all()
    assert all(layer["output"]["not_finite"] == 0 for layer in table["layers"])
    for later in (3, 4):  # the loss of step 3 is the first that is not finite
        table, out = replayed(monkeypatch, capsys, tmp_path / "w", "--step", later)
        assert (table["earlier_step_not_finite"], table["earlier_update_not_finite"]) == (2, True)
        assert "the update of step 2 was not finite already: look at --step 2" in out


@dataclasses.dataclass
class Plant:
    """A transform that makes one pixel of a certain image NaN, and changes no other image."""

    image: np.ndarray

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if np.array_equal(image[..., 0], self.image):
            image = image.copy()
            image[2, 3, 0] = np.nan
        return image


def test_a_nan_image_is_named(tmp_path, monkeypatch, capsys):
    """No file has one: images are whole numbers. With a pipeline of float images it is the one with a NaN pixel.

    Its loss is NaN, and no other's, for LeNet has no batch normalization.
    """
    load = data.load

    def planted(*args, **kwargs):
        split = load(*args, **kwargs)
        if not split.train:
            return split
        index = split.indices(5)[7]
        whole = dataclasses.replace(split, rounded=False)
        image = split.transforms[-1](whole.source[int(index)]["image"][..., None].astype(np.float32), None)
        return dataclasses.replace(whole, transforms=(*split.transforms, Plant(np.squeeze(image))))

    monkeypatch.setattr(data, "load", planted)
    chain = "--config.data.train_transforms=resize(antialias=False)"
    code, err = train_digits(monkeypatch, capsys, tmp_path / "w", chain)
    assert code == 2
    assert "at step 6; no checkpoint was written yet" in err
    table, out = replayed(monkeypatch, capsys, tmp_path / "w")
    assert (table["step"], table["first_not_finite"]) == (6, "the input: pixels of 1 image")
    wrong = [image for image in table["images"] if not image["pixels_finite"] or image["loss"] is None]
    assert [image["row"] for image in wrong] == [7]
    split = load(source="digits", image_size=32, channels=1, train=True, batch_size=16, seed=0)
    index = int(split.indices(5)[7])
    assert (wrong[0]["index"], wrong[0]["name"]) == (index, f"image {index}")
    assert f"image {index}" in out.partition("images to look at")[2]


def test_a_nan_in_a_file_is_refused_by_its_name(tmp_path, monkeypatch, capsys):
    """By training and by replay alike: a TIFF of float pixels is no image of 8 or 16 bits."""
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (photos / "train" / name).mkdir(parents=True)
        (photos / "val" / name).mkdir(parents=True)
        for i in range(16):
            image = Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8))
            image.save(photos / "train" / name / f"{i}.tif")
            image.save(photos / "val" / name / f"{i}.tif")
    options = ["--config", f"{DIGITS}:lenet", "--config.data.source=folder", f"--config.data.data_dir={photos}"]
    options += ["--config.data.eval_split=val", "--config.model.num_classes=2", "--config.epochs=2"]
    options += ["--config.checkpoint_every_epochs=1", "--config.data.train_split=train"]
    code, err = train_digits(monkeypatch, capsys, tmp_path / "w", *options)
    assert code == 0, err
    table, _ = replayed(monkeypatch, capsys, tmp_path / "w", "--step", 4)
    assert {image["name"] for image in table["images"]} <= set(map(str, (photos / "train").glob("*/*.tif")))
    assert all([Path(image["name"]).parent.name] == image["labels"] for image in table["images"])
    bad = Path(table["images"][3]["name"])
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(bad)
    said = refused(monkeypatch, capsys, tmp_path / "w", "--step", "4", "--output", tmp_path / "other")
    assert said.startswith(f"error: {bad}: an image of 32 bits a channel, or of negative values (Pillow's mode 'F')")


def test_a_label_of_no_class(tmp_path, monkeypatch, capsys):
    """A file with one is refused before any step; where code of one's own lets one pass, its image is named."""
    digits = {split: data.SOURCES["digits"](split) for split in ("train", "validation")}
    path = tmp_path / "digits.npz"

    def write(labels: np.ndarray) -> None:
        arrays = {f"{split}_images": source.images for split, source in digits.items()}
        named = {"train_labels": labels, "validation_labels": digits["validation"].labels}
        np.savez(path, **arrays, **named, class_names=np.array(list("0123456789")))

    labels = digits["train"].labels.copy()
    write(labels)
    options = ["--config.data.source=arrays", f"--config.data.path={path}"]
    assert train_digits(monkeypatch, capsys, tmp_path / "w", *options)[0] == 0
    split = data.load("arrays", 32, 1, path=str(path), train=True, batch_size=16)
    index = int(split.indices(9)[4])
    labels[index] = 99
    write(labels)
    said = refused(monkeypatch, capsys, tmp_path / "w", "--step", "10", "--output", tmp_path / "out")
    assert said.startswith(f"error: {path}: train_labels must be in 0 to 9, got 0 to 99")
    code, err = train_digits(monkeypatch, capsys, tmp_path / "other", *options)
    assert (code, "train_labels must be in 0 to 9, got 0 to 99" in err) == (2, True)

    write(digits["train"].labels)
    load = data.load

    def planted(*args, **kwargs):
        split = load(*args, **kwargs)
        return dataclasses.replace(split, source=Arrays(split.source.images, labels, split.class_names))

    monkeypatch.setattr(data, "load", planted)
    table, out = replayed(monkeypatch, capsys, tmp_path / "w", "--step", 10)
    wrong = [image for image in table["images"] if image["no_class"]]
    assert [(image["row"], image["index"], image["no_class"], image["labels"]) for image in wrong] == [
        (4, index, [99], [])
    ]
    assert "99, which is no class" in out.partition("images to look at")[2]


# Which step ------------------------------------------------------------------------------------------


def test_a_finished_run_and_one_that_was_stopped_need_a_step(random_run, tmp_path, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, random_run, "--output", tmp_path / "out")
    assert said == f"error: the run in {random_run} has 24 steps, and it is finished; give --step 1 to 24."
    said = refused(monkeypatch, capsys, random_run, "--step", "25", "--output", tmp_path / "out")
    assert said == f"error: the run in {random_run} has 24 steps, and there is no step 25; give --step 1 to 24."

    advance = progress.RunProgress.advance

    def stop(report: progress.RunProgress, step: int) -> None:
        advance(report, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress.RunProgress, "advance", stop)
    code, _ = train_digits(monkeypatch, capsys, tmp_path / "w", "--config.log_every_steps=4")
    assert code == 128 + signal.SIGTERM
    said = refused(monkeypatch, capsys, tmp_path / "w", "--output", tmp_path / "out")
    assert said == (
        f"error: all steps from 6 to 8 of {tmp_path / 'w'} are finite, where it would have recorded next; give the "
        "step to look at by --step."
    )
    assert not (tmp_path / "out").exists()


def test_skipped_steps_are_found(tmp_path, monkeypatch, capsys):
    """A run with on_nonfinite=skip is not stopped by them; replay says why each was left out."""
    options = ["--config.step.on_nonfinite=skip", "--config.optimizer.name=adamw", "--config.step.ema_decay=0"]
    options += ["--config.optimizer.learning_rate=3e38", "--config.optimizer.decoupled_weight_decay=1e4"]
    options += ["--config.optimizer.clip_norm=None"]
    code, err = train_digits(monkeypatch, capsys, tmp_path / "w", *options)
    assert (code, "nothing was learned there" in err) == (0, True)
    table, _ = replayed(monkeypatch, capsys, tmp_path / "w", "--step", 10)
    assert (table["skipped"], table["from_checkpoint"]) == (True, 8)
    assert table["first_not_finite"] == "the update, which was left out (step.on_nonfinite=skip)"
    assert table["state_after_not_finite"] == []


def test_a_damaged_checkpoint_is_no_start_and_not_compared(random_run, tmp_path, monkeypatch, capsys):
    """Steps up to its own can be computed from an older one."""
    workdir = shutil.copytree(random_run, tmp_path / "w")
    folder = workdir / "checkpoints" / "16"
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["checksums"]["raw"]["['params']['conv1']['kernel']"] += 1
    path.write_text(json.dumps(meta))
    reason = "the values of raw['params']['conv1']['kernel'] have changed on disk"
    said = refused(monkeypatch, capsys, workdir, "--step", "17", "--output", tmp_path / "out")
    assert (
        said
        == f"error: checkpoint {folder} cannot be used: {reason}; give --step 16 or less, which begins at an older one."
    )
    path.write_text("{")
    said = refused(monkeypatch, capsys, workdir, "--step", "17", "--output", tmp_path / "out")
    assert said.startswith(f"error: checkpoint {folder} cannot be used: ")
    assert said.endswith("; give --step 16 or less, which begins at an older one.")
    table, _ = replayed(monkeypatch, capsys, workdir, "--step", 16)
    assert (table["from_checkpoint"], table["notes"][0]) == (8, "8 records of the run: equal, to the last digit")
    assert table["notes"][1].startswith(
        f"checkpoint of step 16: was not compared, checkpoint {folder} cannot be used: "
    )


# Refused ---------------------------------------------------------------------------------------------


def test_mistakes_are_refused_and_write_nothing(random_run, tmp_path, monkeypatch, capsys):
    before = snapshot(random_run)
    (tmp_path / "there").mkdir()
    rows = [
        ([tmp_path / "none"], f"error: there is no {tmp_path / 'none'}; expected the workdir of a run."),
        ([random_run, "--output", tmp_path / "there"], f"error: {tmp_path / 'there'} is there already; nothing was "),
        (
            [random_run, "--output", random_run / "x"],
            f"error: --output {random_run / 'x'} lies in {random_run}, which ",
        ),
        ([random_run, "--step", "0"], "error: argument --step: must be a positive integer, got '0'; --help shows "),
        ([random_run, "--config.model.width=1"], "error: --config.model.width cannot be changed here; only keys of: "),
        ([random_run, "--config.data.channels=3"], "  data.channels: 1 -> 3"),
        ([random_run, "--step", "3", "--config.mesh.data=3"], "error: mesh: data=3 x fsdp=1 must cover the 8 devices "),
    ]
    for arguments, expected in rows:
        arguments = arguments if "--output" in arguments else [*arguments, "--output", tmp_path / "out"]
        assert refused(monkeypatch, capsys, *arguments).startswith(expected)
    assert snapshot(random_run) == before
    assert not (tmp_path / "out").exists()
