"""`predict` prints what the network computes for images, and names files that are not images."""

import csv
import datetime
import io
import json
import re
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import PIL.Image
import pytest

import shell
import train
from tests.weights.test_writing import random_network
from workdirs import records
from xception_flax import __version__
from xception_flax.commands import convert, embed, evaluate, explain, predict
from xception_flax.data import sources
from xception_flax.display import heat
from xception_flax.inference import explaining, predictor, preprocessing
from xception_flax.recipes import reading
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import read_recipe
from xception_flax.weights import source, writing
from xception_flax.weights.word import told

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Some steps on digits: better than chance, far from perfect."""
    small = [
        "model.width=0.25",
        "data.image_size=32",
        "batch_size=64",
        "epochs=6",
        "data.max_value=4095",
        "data.min_decoded_side=16",
    ]
    small += ["schedule.warmup_epochs=0.2", "step.ema_decay=0.5", "eval_every_epochs=6", "checkpoint_every_epochs=6"]
    folder = tmp_path_factory.mktemp("run")
    with shell.on_one_device():
        assert train.train(reading.load(f"{DIGITS}:lenet", [f"--config.{text}" for text in small]), folder) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits of split 'validation' as files, with their classes; every second file has 12 bits in 16."""
    folder, source = tmp_path_factory.mktemp("digits"), sources.digits.digits("validation")
    for i, image in enumerate(source.images):
        cv2.imwrite(str(folder / f"{i:03}.png"), image.astype(np.uint16) * 16 + 9 if i % 2 else image)
    return folder, source.labels


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    return shell.call(monkeypatch, capsys, predict.main, *arguments)


def test_it_predicts_what_evaluate_counts(workdir, digits, monkeypatch, capsys):
    folder, labels = digits
    assert evaluate.main(["--workdir", str(workdir)]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    code, out, err = run(monkeypatch, capsys, "--workdir", workdir, folder, "--json", "--top", 10, "--batch-size", 50)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(folder / f"{i:03}.png") for i in range(180)]
    scores = np.array([[line["classes"][digit] for digit in "0123456789"] for line in lines])
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    assert [next(iter(line["classes"])) for line in lines] == [str(i) for i in scores.argmax(-1)]
    assert np.mean(scores.argmax(-1) == labels) == pytest.approx(expected["top1"], abs=1e-9)
    assert -np.mean(np.log(scores[np.arange(180), labels])) == pytest.approx(expected["loss"], rel=1e-4)
    assert expected["top1"] > 0.2  # twice chance


def test_images_that_are_not_square(digits, tmp_path, monkeypatch, capsys):
    """A run at 24 x 40: `evaluate` scores what `predict` says, so do its weights alone, and maps have its shape."""
    folder, labels = digits
    small = ["data.image_size=24x40", "batch_size=64", "epochs=4", "data.max_value=4095", "eval_every_epochs=4"]
    small += ["schedule.warmup_epochs=0.2", "step.ema_decay=0.5", "data.eval_transforms=center_crop(fraction=0.9)"]
    config = reading.load(f"{DIGITS}:lenet", [f"--config.{text}" for text in small])
    assert config.data.image_size == (24, 40)
    assert train.train(config, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["image_size"] == [24, 40]
    assert read_recipe(tmp_path / "run").data.image_size == (24, 40)
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(tmp_path / "run"), "--no-report"]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])

    def said(source: Path, *arguments) -> np.ndarray:
        code, out, _ = run(monkeypatch, capsys, source, folder, "--json", "--top", 10, *arguments)
        assert code == 0
        lines = [json.loads(line) for line in out.splitlines()]
        return np.array([[line["classes"][digit] for digit in "0123456789"] for line in lines])

    scores = said(tmp_path / "run")
    assert np.mean(scores.argmax(-1) == labels) == pytest.approx(expected["top1"], abs=1e-9)
    assert -np.mean(np.log(scores[np.arange(180), labels])) == pytest.approx(expected["loss"], rel=1e-4)
    assert expected["top1"] > 0.2  # twice chance

    assert convert.main([str(tmp_path / "run"), "--output", str(tmp_path / "w.npz")]) == 0
    capsys.readouterr()
    np.testing.assert_array_equal(said(tmp_path / "w.npz"), scores)
    found = predictor.load(tmp_path / "w.npz")
    assert found.preprocessing.image_size == (24, 40)
    code = evaluate.main(
        [
            str(tmp_path / "w.npz"),
            "--config.data.source=digits",
            "--split=validation",
            f"--output={tmp_path / 'report'}",
        ]
    )
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, again["top1"]) == (0, expected["top1"])
    assert again["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    # The square spelled as a pair is the number.
    np.testing.assert_array_equal(
        said(tmp_path / "w.npz", "--image-size", "32x32"), said(tmp_path / "w.npz", "--image-size", "32")
    )
    explainer = explaining.Explainer(found, steps=2)
    [(_, explanation)] = explainer.stream([folder / "000.png"])
    [grid] = explanation.maps.values()
    assert explanation.pixels.shape == explanation.attributions.shape == (24, 40, 1)
    assert grid.shape[1] > grid.shape[0]
    assert heat.warm(explanation.pixels, grid).shape == (24, 40, 3)
    assert explain.main([str(tmp_path / "w.npz"), str(folder / "000.png"), "--output", str(tmp_path / "why.png")]) == 0


def test_alpha_is_seen(tmp_path, rng, monkeypatch, capsys):
    """Classes that differ in alpha alone: a run on RGBA tells them apart, and `evaluate` scores what `predict` says."""
    for i in range(80):
        pixels = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
        pixels[..., 3] = 40 if i % 2 else 215
        path = tmp_path / "photos" / ("train" if i < 60 else "val") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    data = [
        "source=folder",
        f"data_dir={tmp_path / 'photos'}",
        "train_split=train",
        "eval_split=val",
        "image_size=16x24",
    ]
    data += ["channels=4", "train_transforms=random_affine(max_shift=0.1)|color_jitter(brightness=0.5)|resize"]
    small = [f"data.{text}" for text in data] + ["model.num_classes=2", "batch_size=16", "epochs=20"]
    small += ["normalize.mean=(0,0,0,127.5)", "normalize.std=(255,255,255,127.5)", "eval_every_epochs=20"]
    config = reading.load(f"{DIGITS}:lenet", [f"--config.{text}" for text in small])
    assert train.train(config, tmp_path / "run") == 0
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(tmp_path / "run"), "--no-report"]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert expected["top1"] == 1
    assert convert.main([str(tmp_path / "run"), "--output", str(tmp_path / "w.npz")]) == 0
    for network in (tmp_path / "run", tmp_path / "w.npz"):
        capsys.readouterr()
        code, out, _ = run(monkeypatch, capsys, network, tmp_path / "photos" / "val", "--json")
        lines = [json.loads(line) for line in out.splitlines()]
        right = [line["classes"][Path(line["image"]).parent.name] for line in lines]
        assert (code, len(lines)) == (0, 20)
        assert -np.mean(np.log(right)) == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
    network = predictor.load(tmp_path / "w.npz")
    with PIL.Image.open(lines[0]["image"]) as image:
        np.testing.assert_array_equal(network.predict(image), network.predict(lines[0]["image"]))
        np.testing.assert_array_equal(
            network.preprocessing.prepare(image.convert("RGB")), network.preprocessing.prepare(as_opaque(image))
        )
    out = str(tmp_path / "why.png")
    assert explain.main([str(tmp_path / "run"), lines[0]["image"], "--output", out, "--steps", "2"]) == 0


def as_opaque(image: PIL.Image.Image) -> np.ndarray:
    return np.dstack([np.asarray(image)[..., :3], np.full(image.size[::-1], 255, np.uint8)])


def test_images_that_may_be_black_by_mistake_are_counted(workdir, digits, monkeypatch, capsys):
    def unsaid(*arguments):
        run = restore(*arguments)
        run.recipe.data.max_value = None
        return run

    monkeypatch.setattr(source, "restore", unsaid)
    files = [digits[0] / f"{i:03}.png" for i in range(6)]
    code, out, err = run(monkeypatch, capsys, "--workdir", workdir, *files, "--json", "--batch-size", 2)
    assert (code, out.count("\n")) == (0, 6)
    assert err == (
        f"3 of 6 files, the first {files[1]}, are of 16 bits and have no value in the upper half; "
        "if white is less than 65535 there, the run needs data.max_value.\n"
    )


def test_a_bad_file_is_named_and_the_others_are_predicted(workdir, digits, tmp_path, monkeypatch, capsys):
    folder, _ = digits
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    (empty := tmp_path / "empty").mkdir()
    (empty / "a.psd").touch()
    shutil.copytree(empty, some := tmp_path / "some")
    good = shutil.copy(folder / "000.png", some)
    code, out, err = run(monkeypatch, capsys, "--workdir", workdir, bad, some, "--top", 2)
    assert code == 2
    said, err = err.split("\n", 1)
    assert said == f"{some}: 1 of 2 files is not read: 1 .psd (some/a.psd)."
    assert f"{workdir}, step 118, ema weights" in out
    (row,) = (line for line in out.splitlines() if str(good) in line)
    assert row.count(" %") == 2
    assert err.startswith(f"error: {bad}: the image cannot be decoded: 8 bytes that are no JPEG")
    for arguments, message in [
        ([tmp_path / "no.jpg"], r"no.jpg is not there; expected an image or a folder"),
        ([empty], r".hif). 1 of 1 file is not read: 1 .psd (empty/a.psd)."),
        ([good, "--weights", "raw", "--checkpoint", "3"], "no checkpoint '3' in"),
        ([good, "--top", "0"], "must be a positive integer"),
    ]:
        code, out, err = run(monkeypatch, capsys, "--workdir", workdir, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message.replace("\\", "") in err
    code, _, err = run(monkeypatch, capsys, "--workdir", tmp_path, good)
    assert (code, err) == (2, f"error: {tmp_path} is no workdir of a run: it has no config.json.\n")


def test_an_output_that_is_not_finite_is_an_error_of_its_image(workdir, digits, one_device):
    """Weights can be finite and still so large that the output is not."""
    run = restore(workdir, one_device, "latest")
    run = run._replace(variables=jax.tree.map(lambda array: array * 1e30, run.variables))
    path = digits[0] / "000.png"
    ((found, error),) = predictor.from_run(run, one_device, batch_size=1).stream([path], ("probabilities",))
    assert (found, str(error)) == (path, "the network's output for it is not finite.")
    assert isinstance(error, ValueError)


# Weights from elsewhere ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file that says nothing of its classes."""
    network = random_network(name="xception", num_classes=4, width=0.02, middle_repeats=0)
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    writing.write(network._replace(class_names=(), activation="softmax"), path)
    return path


def test_weights_from_elsewhere_predict(weights, digits, tmp_path, monkeypatch, capsys):
    """The user's word for what the file does not say; CSV of RFC 4180."""
    names = tmp_path / "classes.txt"
    names.write_text('a\nb, c\n"d"\né\n')
    files = [digits[0] / "000.png", digits[0] / "002.png"]
    code, out, err = run(monkeypatch, capsys, weights, *files, "--csv", "--top", 4, "--class-names", names)
    assert (code, err) == (0, "")
    rows = list(csv.reader(io.StringIO(out, newline="")))
    assert rows[0] == ["image", "rank", "class", "probability"]
    assert [row[:2] for row in rows[1:]] == [[str(file), str(rank)] for file in files for rank in (1, 2, 3, 4)]
    assert {row[2] for row in rows[1:5]} == {"a", "b, c", '"d"', "é"}
    assert sum(float(row[3]) for row in rows[1:5]) == pytest.approx(1, abs=1e-4)
    assert out.count("\r\n") == 9
    code, out, err = run(monkeypatch, capsys, weights, *files, "--json", "--image-size", 40)
    assert code == 0
    numbers = "classes are known by their numbers (--class-names FILE gives them names)"
    assert err == f"the source does not say, and so assumed: {numbers}\n"
    assert {"0", "1", "2", "3"} == json.loads(out.splitlines()[0])["classes"].keys()


def test_codes_of_classes_are_in_words_in_the_table(weights, digits, tmp_path, monkeypatch, capsys):
    network = source.open_source(str(weights), None)
    codes = {"class_names": ("n0", "n1", "n2", "n3"), "class_descriptions": ("tench", "goldfish", "crane", "crane")}
    writing.write(network._replace(**codes), tmp_path / "w.npz")
    file = digits[0] / "000.png"
    _, out, _ = run(monkeypatch, capsys, tmp_path / "w.npz", file)
    assert sorted(re.findall("[a-z]+(?= [0-9.]+ %)", out)) == ["crane", "crane", "goldfish", "tench"]
    _, out, _ = run(monkeypatch, capsys, tmp_path / "w.npz", file, "--json")
    assert sorted(json.loads(out)["classes"]) == ["n0", "n1", "n2", "n3"]


def test_features_are_written_with_the_files_names(weights, workdir, digits, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_text("no image")
    output = tmp_path / "features.npy"
    files = [digits[0] / f"{i:03}.png" for i in range(5)]
    code, out, err = shell.call(
        monkeypatch, capsys, embed.main, weights, files[0], tmp_path / "bad.png", *files[1:], "--output", output
    )
    assert code == 2
    assert f"error: {tmp_path}/bad.png: the image cannot be decoded" in err
    assert "5 x 40" in out
    assert (tmp_path / "features.files.txt").read_text().splitlines() == list(map(str, files))
    np.testing.assert_array_equal(np.load(output), predictor.load(weights).embed(files))
    for arguments, message in [
        (["--output", tmp_path / "f.csv"], "f.csv must end in .npy or .parquet"),
        (["--output", tmp_path / "no" / "f.npy"], "cannot be written: No such file or directory"),
    ]:
        code, out, err = shell.call(monkeypatch, capsys, embed.main, weights, files[0], *arguments)
        assert (code, out) == (2, "")
        assert message in err


def test_mistakes_with_weights_from_elsewhere(weights, workdir, digits, tmp_path, monkeypatch, capsys):
    file = digits[0] / "000.png"
    (tmp_path / "latin").write_bytes(b"\xe9\n")
    (tmp_path / "three").write_text("a\nb\nc\n")
    (tmp_path / "twice").write_text("a\nb\nc\na\n")
    for arguments, message in [
        ([weights], f"there is no image; give files or folders behind {weights}."),
        ([file], f"{file} is an image; expected the network before it: a workdir of a run, file or folder of weights"),
        ([weights, file, "--class-names", tmp_path / "three"], "got 3 names of classes for 4 logits; give"),
        (
            [weights, file, "--class-names", tmp_path / "twice"],
            "two classes are named 'a'; give each a name of its own.",
        ),
        ([weights, file, "--class-names", tmp_path / "latin"], "latin are no text in UTF-8; expected a name in each"),
        ([weights, file, "--mean", "0"], "mean and std go together; give both or neither."),
        ([weights, file, "--json", "--csv"], "not allowed with argument"),
        ([workdir, file, "--image-size", "32"], f"image_size: the recipe of {workdir} says this; leave it out."),
        (["xecption.h5", file], "xecption.h5 is neither a file nor a folder; expected a file of weights, the workdir"),
    ]:
        code, out, err = run(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err


def test_a_run_is_converted_and_predicts_the_same(workdir, digits, tmp_path, monkeypatch, capsys):
    """With its classes, its size, its normalization, its white of 16 bits: nothing is to be said again."""
    code, out, _ = shell.call(monkeypatch, capsys, convert.main, workdir, "--output", tmp_path / "w.safetensors")
    assert code == 0
    assert "lenet, 10 classes" in out
    files = [digits[0] / f"{i:03}.png" for i in range(8)]
    expected = run(monkeypatch, capsys, workdir, *files, "--json")
    assert run(monkeypatch, capsys, tmp_path / "w.safetensors", *files, "--json") == expected
    assert expected[0] == 0
    converted, _ = preprocessing.of_pretrained(source.open_source(str(tmp_path / "w.safetensors"), None))
    assert converted == preprocessing.of_recipe(read_recipe(workdir))
    assert (converted.max_value, converted.min_decoded_side) == (4095, 16)
    code, _, err = shell.call(monkeypatch, capsys, convert.main, workdir, "--output", tmp_path / "w.safetensors")
    assert (code, err) == (
        2,
        f"error: {tmp_path}/w.safetensors is there already; nothing was written. Remove it, or take another name.\n",
    )


def test_what_is_said_is_written(weights, digits, tmp_path, monkeypatch, capsys):
    """The user's word about a file goes with its weights: nothing is to be said again, to us or to timm."""
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    word = ["--class-names", tmp_path / "names.txt", "--mean", 10, "--std", 200, "--image-size", 40]
    word += ["--transforms", "center_crop(fraction=0.5)"]
    files = [digits[0] / f"{i:03}.png" for i in range(0, 8, 2)]
    expected = run(monkeypatch, capsys, weights, *files, "--json", *word)
    for name in ("w.safetensors", "folder"):
        assert shell.call(monkeypatch, capsys, convert.main, weights, "--output", tmp_path / name, *word)[0] == 0
        assert run(monkeypatch, capsys, tmp_path / name, *files, "--json") == expected
    said = json.loads((tmp_path / "folder" / "config.json").read_text())["xception_flax"]
    assert (said["class_names"], said["image_size"]) == (["a", "b", "c", "d"], 40)
    assert (said["normalize"], said["transforms"]) == ({"mean": [10], "std": [200]}, "center_crop(fraction=0.5)")
    assert "measured" in said
    card = (tmp_path / "folder" / "README.md").read_text()
    for words in ("4: a, b, c, d", "40 x 40 pixels", "(x - 10) / 200", "`center_crop(fraction=0.5)`", "not measured"):
        assert f"| {words} |" in card
    network = source.open_source(str(weights), None)
    assert network.measured
    assert told(network, class_names=tuple("abcd")).measured == network.measured
    assert told(network, image_size=40).measured == {}


def test_the_card_says_what_the_run_measured(workdir, tmp_path, monkeypatch, capsys):
    """Of the weights at a step that it evaluated, by its history; of others nothing."""
    record = [line for line in records(workdir) if "eval/top1" in line][-1]
    folder, raw = tmp_path / "hub", tmp_path / "raw.npz"
    assert shell.call(monkeypatch, capsys, convert.main, workdir, "--output", folder)[0] == 0
    today, count = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", record["eval/count"]
    assert count == 180
    how = f"on {count} images, of digits, split 'validation', by the run itself at step 118, ema weights, {today}, "
    shares = f"top1 {100 * record['eval/top1']:.2f} %, top5 {100 * record['eval/top5']:.2f} %"
    card = (folder / "README.md").read_text()
    assert f"| accuracy | {shares}, loss {record['eval/loss']:.4g}, {how}xception_flax {__version__} |" in card
    found = source.open_source(str(folder), None).measured
    assert found["top1"] == record["eval/top1"]
    assert (found["date"], found["step"]) == (today, 118)
    assert shell.call(monkeypatch, capsys, convert.main, workdir, "--output", raw, "--weights", "raw")[0] == 0
    assert source.open_source(str(raw), None).measured == {}
    digits = ["--config.data.source=digits", "--split", "validation", "--output", tmp_path]
    code, out, _ = shell.call(monkeypatch, capsys, evaluate.main, folder, "--config.data.max_value=4095", *digits)
    assert code == 0
    assert f"{shares}, loss" in out
    assert json.loads(out.splitlines()[-1])["top1"] == pytest.approx(record["eval/top1"], abs=1e-9)
    code, _, err = shell.call(
        monkeypatch, capsys, convert.main, workdir, "--output", tmp_path / "no.npz", "--mean", 1, "--std", 2
    )
    assert (code, err) == (2, f"error: mean, std: the recipe of {workdir} says this; leave it out.\n")
