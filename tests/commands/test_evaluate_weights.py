"""`evaluate` on weights from elsewhere: what it counts is what `predict` says of the same files, class by class."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import keras
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import safetensors.numpy
import sklearn.metrics
from flax.traverse_util import flatten_dict

import shell
from golden.seeded import structured_images
from tests.weights.test_writing import FULL, random_network
from xception_flax import create_model
from xception_flax.commands import evaluate, predict
from xception_flax.inference import class_names, evaluation
from xception_flax.text.errors import UserError
from xception_flax.weights import timm, writing
from xception_flax.weights.pretrained import Pretrained

NARROW = dict(name="xception", num_classes=3, width=0.02, middle_repeats=0)
FOLDERS = ("cat", "cow", "dog")
ORIENTATION = 0x0112  # EXIF


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twenty-one images of three sizes and classes, of which one kind is bright, as a folder CLASS/*.png."""
    folder = tmp_path_factory.mktemp("photos") / "val"
    for i, image in enumerate(structured_images(21, 120, 96)):
        pixels = np.uint8((image + 1) * 127.5)[: 80 + 20 * (i % 3)] // (1 + i % 2)
        path = folder / FOLDERS[i % 3 if i < 18 else 0] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    return folder


def balanced(network: Pretrained) -> Pretrained:
    """The same network, whose classes are about as likely as each other."""
    model, images = create_model(**network.model), structured_images(21, 71, 71)
    logits = np.asarray(model.apply(network.variables, images, train=False))
    flat = flatten_dict(network.variables)
    flat["params", "predictions", "bias"] -= np.median(logits - logits.mean(-1, keepdims=True), axis=0)
    return network


@pytest.fixture(scope="module")
def network() -> Pretrained:
    """Its classes have another order than the folders."""
    return balanced(random_network(**NARROW))._replace(class_names=("dog", "cat", "cow"), activation="softmax")


@pytest.fixture(scope="module")
def named(network, tmp_path_factory) -> Path:
    writing.write(network, path := tmp_path_factory.mktemp("weights") / "named.npz")
    return path


def scored(monkeypatch, capsys, *arguments) -> tuple[dict, str, str]:
    """The JSON of `evaluate`, its table, and what it says beside."""
    code, out, err = shell.call(monkeypatch, capsys, evaluate.main, *arguments)
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), out, err


def predicted(monkeypatch, capsys, source, folder, *arguments) -> tuple[list[str], list[dict[str, float]]]:
    """The folder of each image, and what `predict` says of it."""
    code, out, err = shell.call(monkeypatch, capsys, predict.main, source, folder, "--json", "--top", "9", *arguments)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    return [Path(line["image"]).parent.name for line in lines], [line["classes"] for line in lines]


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def hub_folder(network: Pretrained, folder: Path) -> Path:
    """As timm writes it: its names, its config.json."""
    folder.mkdir()
    state = {name: np.ascontiguousarray(array) for name, array in timm.to_timm(network.variables).items()}
    safetensors.numpy.save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architecture": "legacy_xception",
        "num_classes": 3,
        "label_names": ["d", "c", "w"],
        "label_descriptions": {"c": "a cat", "d": "a dog", "w": "a cow"},
        "pretrained_cfg": {"input_size": [3, 71, 71], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.4] * 3}
        | {"std": [0.3] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["named", "user", "unnamed", "hub"])
def test_it_counts_what_predict_says(kind, network, named, photos, tmp_path, monkeypatch, capsys):
    """By the names of the file, or the user's; by order where there are none; of timm's folder as timm crops."""
    arguments, source, names, words = [], named, network.class_names, "by their names"
    if kind == "hub":
        deep = balanced(random_network(**NARROW | {"middle_repeats": 8}))  # the one depth that timm has
        source, names = hub_folder(deep, tmp_path / "hub"), ("d", "c", "w")
        (tmp_path / "val").mkdir()
        for ours, theirs in zip(names, network.class_names, strict=True):
            (tmp_path / "val" / ours).symlink_to(photos / theirs)
        photos = tmp_path / "val"
    elif kind != "named":
        writing.write(network._replace(class_names=()), source := tmp_path / "unnamed.npz")
        names, words = FOLDERS, "by their order, as the network has no names of them"
    if kind == "user":
        (tmp_path / "names.txt").write_text("dog\ncat\ncow\n")
        arguments, names, words = ["--class-names", "names.txt", "--mean", 100, "--std", 90], network.class_names, words
        arguments += ["--image-size", 75, "--transforms", "center_crop(fraction=0.7)"]
        words = "by their names"
    found, out, _ = scored(monkeypatch, capsys, source, photos, *arguments)
    truths, said = predicted(monkeypatch, capsys, source, photos, *arguments)
    labels = {"0": 0, "1": 1, "2": 2} if kind == "unnamed" else {name: i for i, name in enumerate(names)}
    scores = np.array([[line[name] for name in labels] for line in said])
    truth = np.array([list(names).index(name) for name in truths])
    assert found["count"] == len(truths) == 21
    assert found["top1"] == np.mean(scores.argmax(-1) == truth)
    assert len(set(scores.argmax(-1))) > 1
    assert 0 < found["top1"] < 1
    assert found["loss"] == pytest.approx(-np.mean(np.log(scores[np.arange(21), truth])), rel=1e-4)
    assert re.search(rf"^  classes +{re.escape(words)}$", out, re.MULTILINE)
    assert found["split"] == "all"
    assert found["source"] == str(source)
    assert (tmp_path / "mistakes_val.png").exists()

    # The same data by the recipe's keys, in other batches.
    keys = ["--config.data.source=folder", f"--config.data.data_dir={photos.parent}", "--split", "val"]
    (photos.parent / "train").mkdir(exist_ok=True)
    if not (photos.parent / "train" / "cat").exists():
        (photos.parent / "train" / "cat").symlink_to(photos / next(iter(set(truths))))
    again, _, _ = scored(
        monkeypatch, capsys, source, *keys, *arguments, "--batch-size", 8, "--picture", "m.svg", "--no-report"
    )
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert {k: v for k, v in again.items() if k != "loss"} == {k: v for k, v in found.items() if k != "loss"} | {
        "split": "val"
    }
    wrong = 21 - round(21 * found["top1"])
    assert f"{wrong} of 21 wrong" in (tmp_path / "m.svg").read_text()


def test_a_table_scores_as_its_folder(named, photos, tmp_path, monkeypatch, capsys):
    """The same numbers and fingerprint, in another order too: both may be compared. Files are named after the table."""
    lines = [f"{path.relative_to(photos)},{path.parent.name}" for path in sorted(photos.rglob("*.png"), reverse=True)]
    (photos.parent / "labels.csv").write_text("file,label\n" + "".join(f"val/{line}\n" for line in lines))
    expected, _, _ = scored(monkeypatch, capsys, named, photos)
    found, out, _ = scored(
        monkeypatch, capsys, named, photos.parent / "labels.csv", "--compare", "predictions_val.parquet"
    )
    assert found == expected | {"loss": pytest.approx(expected["loss"])}
    assert "0 images here, 0 there; McNemar's exact test: p = 1" in out
    assert "table, split 'all', 21 images" in out
    records = [json.loads((tmp_path / f"evaluation_{name}.json").read_text()) for name in ("val", "labels")]
    assert records[0]["of"]["data"]["fingerprint"] == records[1]["of"]["data"]["fingerprint"]


def test_a_table_says_where_to_say_where_its_images_are(named, photos, tmp_path, monkeypatch, capsys):
    table = tmp_path / "elsewhere.csv"
    table.write_text("file,label\n" + "".join(f"{path.name},{path.parent.name}\n" for path in photos.rglob("*.png")))
    code, _, err = shell.call(monkeypatch, capsys, evaluate.main, named, table)
    assert code == 2
    assert "Say where the images are by --config.data.data_dir=DIR, or remove" in err
    found, _, _ = scored(monkeypatch, capsys, named, table, f"--config.data.data_dir={photos}")
    expected, _, _ = scored(monkeypatch, capsys, named, "--no-report", photos)
    assert found == expected | {"loss": pytest.approx(expected["loss"])}
    code, _, err = shell.call(monkeypatch, capsys, evaluate.main, named, table, "--config.data.path=x")
    assert "the data are given twice, by" in err


def test_phones_turn_their_photos_by_exif(network, photos, tmp_path, monkeypatch, capsys):
    """A network of images that were turned is asked about turned ones, by `predict` and by `evaluate`."""
    turned = tmp_path / "turned"
    for path in photos.rglob("*.png"):
        place = turned / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        with PIL.Image.open(path) as image:
            exif = image.getexif()
            exif[ORIENTATION] = 6  # stored on its side: a quarter turn to the right makes it upright
            image.transpose(PIL.Image.Transpose.ROTATE_90).save(place, exif=exif)
    for orientation in ("apply", "ignore"):
        writing.write(network._replace(orientation=orientation), tmp_path / f"{orientation}.npz")
    upright, *found = (
        scored(monkeypatch, capsys, tmp_path / f"{name}.npz", folder, "--no-report")[0]
        for name, folder in (("ignore", photos), ("apply", turned), ("ignore", turned))
    )
    assert found[0]["loss"] == upright["loss"] != found[1]["loss"]
    said = [
        predicted(monkeypatch, capsys, tmp_path / f"{n}.npz", f) for n, f in (("apply", turned), ("ignore", photos))
    ]
    assert said[0] == said[1]


def test_a_model_of_keras_scores_as_keras_says(photos, tmp_path, monkeypatch, capsys):
    """Keras' own file, its own resizing of whole images, its accuracy; the loss is the mean of its cross-entropy."""
    model = writing.keras_model(balanced(random_network(**FULL))._replace(activation="softmax"))
    inputs = keras.Input((71, 71, 3))
    model = keras.Model(inputs, model(keras.layers.Rescaling(1 / 255)(inputs)))
    model.save(tmp_path / "mine.keras")
    files = sorted(photos.glob("*/*.png"))
    images = [np.asarray(PIL.Image.open(file), np.float32) for file in files]
    resized = [np.asarray(keras.ops.image.resize(image, (71, 71), "bilinear")) for image in images]
    theirs = np.asarray(model(np.stack(resized)))
    labels = np.array([FOLDERS.index(file.parent.name) for file in files])
    found, out, err = scored(monkeypatch, capsys, tmp_path / "mine.keras", photos, "--no-report")
    assert found["top1"] == np.mean(theirs.argmax(-1) == labels)
    assert len(set(theirs.argmax(-1))) > 1
    expected = np.mean(keras.losses.sparse_categorical_crossentropy(labels, theirs))
    assert found["loss"] == pytest.approx(float(expected), rel=1e-3)
    assert "resized as Keras does, by 'resize'" in err
    assert "71 x 71 pixels, (x - 0) / 255" in out


@pytest.mark.parametrize("name", ["", "cat", "dog"])
def test_one_logit_chooses_between_two_classes(name, photos, tmp_path, monkeypatch, capsys):
    """As Keras has it: more than 0.5 is the second class, or the one whose name the network has."""
    network = balanced(random_network(**NARROW | {"num_classes": 1}))
    bias = flatten_dict(network.variables)["params", "predictions", "bias"]
    writing.write(network._replace(class_names=(name,) if name else ()), tmp_path / "w.npz")
    for folder in ("cat", "dog"):
        (tmp_path / "two" / folder).mkdir(parents=True)
        for file in (photos / folder).iterdir():
            (tmp_path / "two" / folder / file.name).symlink_to(file)
    truths, said = predicted(monkeypatch, capsys, tmp_path / "w.npz", tmp_path / "two")
    p = np.array([line[name or "0"] for line in said])
    bias -= np.median(np.log(p / (1 - p)))  # so that it says both
    writing.write(network._replace(class_names=(name,) if name else ()), tmp_path / "v.npz")
    truths, said = predicted(monkeypatch, capsys, tmp_path / "v.npz", tmp_path / "two")
    p = np.array([line[name or "0"] for line in said])
    right = np.array([truth == (name or "dog") for truth in truths])
    found, out, _ = scored(monkeypatch, capsys, tmp_path / "v.npz", tmp_path / "two")
    assert found["top1"] == np.mean((p > 0.5) == right)
    assert 0 < np.mean(p > 0.5) < 1
    assert found["loss"] == pytest.approx(-np.mean(np.log(np.where(right, p, 1 - p))), rel=1e-4)
    assert ("taken to be for the second, dog" in out) == (not name)
    record = json.loads((tmp_path / "evaluation_two.json").read_text())
    truth = np.array([truth == (name or "dog") for truth in truths])
    assert [row["name"] for row in record["classes"]][1] == (name or "dog")
    for row in record["classes"]:
        assert row["roc_auc"]["value"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, p), abs=1e-6)
    code, _, err = shell.call(monkeypatch, capsys, evaluate.main, tmp_path / "v.npz", photos)
    assert code == 2
    assert "one logit, for one of two classes; the data has 3: cat, cow, dog." in err


def test_independent_classes_have_a_loss_each(network, photos, tmp_path, monkeypatch, capsys):
    """A sigmoid's loss is the sum over classes of the binary cross-entropies; the best class counts."""
    writing.write(network._replace(activation="sigmoid"), tmp_path / "w.npz")
    found, _, _ = scored(monkeypatch, capsys, tmp_path / "w.npz", photos, "--picture", "m.png", "--no-report")
    truths, said = predicted(monkeypatch, capsys, tmp_path / "w.npz", photos)
    scores = np.array([[line[name] for name in network.class_names] for line in said])
    rows = np.array([[truth == name for name in network.class_names] for truth in truths])
    assert found["top1"] == np.mean(scores.argmax(-1) == rows.argmax(-1))
    each = -np.log(np.where(rows, scores, 1 - scores))
    assert found["loss"] == pytest.approx(each.sum(-1).mean(), rel=1e-4)

    images = np.stack([np.asarray(PIL.Image.open(file))[:80] for file in sorted(photos.glob("*/*.png"))])
    several = {"test_images": images, "test_labels": rows[:, [1, 2, 0]], "class_names": np.array(FOLDERS)}
    np.savez(tmp_path / "data.npz", **several)
    keys = ["--config.data.source=arrays", "--config.data.path=data.npz"]
    found, out, _ = scored(monkeypatch, capsys, tmp_path / "w.npz", *keys)
    assert set(found) == {"source", "sha256", "split", "loss", "map", "count"}
    assert "wrong" not in out
    record = json.loads((tmp_path / "evaluation_test.json").read_text())
    table = pyarrow.parquet.read_table(tmp_path / "predictions_test.parquet")
    expected = sklearn.metrics.average_precision_score(rows, np.array(table["probabilities"].to_pylist()))
    assert record["scores"]["mean_average_precision"]["value"] == pytest.approx(expected)
    assert record["map"] == found["map"]
    code, _, err = shell.call(monkeypatch, capsys, evaluate.main, tmp_path / "w.npz", *keys, "--picture", "n.png")
    assert (code, "no picture is drawn with several labels" in err) == (2, True)
    writing.write(network, tmp_path / "one.npz")
    code, _, err = shell.call(monkeypatch, capsys, evaluate.main, tmp_path / "one.npz", *keys)
    assert (code, "several labels; the network chooses one class an image" in err) == (2, True)


def test_what_was_measured_is_named(network, photos, tmp_path, monkeypatch, capsys):
    measured = {"top1": 0.5, "count": 8, "source": "folder", "split": "val", "step": 7, "weights": "ema"}
    writing.write(network._replace(measured=measured), tmp_path / "w.safetensors")
    _, out, _ = scored(monkeypatch, capsys, tmp_path / "w.safetensors", photos)
    recorded = re.search("recorded +(.*)", out)[1]
    assert recorded.startswith("top1 50.00 %, on 8 images, of folder, split 'val', by the run itself at step 7, ema we")


def test_classes_are_matched():
    """By names in any order, also where the data lacks some; ImageNet's where the data has no others; else by order."""

    def match(network, there, **options):
        return evaluation.match(network, there, **{"names_assumed": False} | options)

    assert match("bca", "abc")[:2] == (("b", "c", "a"), (2, 0, 1))
    assert match("bca", "ab").words == "by their names; no images of 1 of the network's 3: c"
    assert match(["e\u0301", "a"], ["a", "\xe9"]).numbers == (1, 0)  # the same letter, written in two ways
    numbers = [str(i) for i in range(11)]  # as text, '10' comes before '2'
    assert match(numbers[:10], "012", names_assumed=True).numbers == (0, 1, 2)
    imagenet = class_names.of(1000)
    found = match(imagenet, ["tabby", "tench"], names_assumed=True)
    assert found.numbers == (281, 0)
    assert found.words.startswith("by their names, which are assumed; no images of 998 of the network's 1000: goldfish")
    synsets = [f"n{i:08}" for i in range(1000)]
    assert match(imagenet, synsets, names_assumed=True)[:2] == (tuple(synsets), tuple(range(1000)))
    after = match(class_names.of(1001), synsets, names_assumed=True)  # as DeepLab has them
    assert after[:2] == (("background", *synsets), tuple(range(1, 1001)))
    assert match(class_names.of(1001), ["tabby"], names_assumed=True).numbers == (282,)
    many = [f"c{i}" for i in range(30)]
    for network, there, options, message in [
        (
            numbers,
            sorted(numbers),
            {"names_assumed": True},
            r"classes are numbers \(0, 1, 10 and 8 more\), sorted as text",
        ),
        ("abc", "abd", {}, r"^the data has classes that the network has not: d, and none of c\. Rename them, or name"),
        ("abc", many, {}, r"not: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 20 more\. Rename"),
        (many, "ab", {}, r"not: a, b, and none of c0, c1, c2, c3, c4, c5, c6, c7 and 22 more\. Rename"),
        ("012", ["images"], {"names_assumed": True}, r"has 1 class \(images\), and the network 3, without names\. N"),
        ("012", "ab", {"names_assumed": True}, r"has 2 classes \(a, b\), and the network 3, without names\. Name the"),
        (
            imagenet,
            [name.lower() for name in imagenet],
            {"names_assumed": True},
            r"has classes that the network has not: ",
        ),
        ("aba", "ab", {}, r"two classes of the network are named a; name all by --class-names FILE"),
        ("a", "bc", {"single_logit": True}, r"the network's one class is a; the data has b, c\."),
    ]:
        with pytest.raises(UserError, match=message):
            match(network, there, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"there is no SOURCE; expected a workdir of a run, file or folder of weights"),
        (["runs/none"], r"runs/none is neither a file nor a folder; expected"),
        (["{named}"], r"there are no data; give a folder of images \(CLASS/\*\.jpg\) behind the network, or"),
        (["{named}", "/nowhere/photos"], r"data\.data_dir: /nowhere/photos is no directory"),
        (
            ["{named}", "{photos}", "--config.data.source=digits"],
            r"the data are given twice, by .*val and by --config\.d",
        ),
        (
            ["{named}", "{photos}", "--config.data.image_size=9"],
            r"image_size is what the network takes, and said by --im",
        ),
        (["{named}", "{photos}", "--config.model.width=1"], r"--config\.model\.width cannot be changed here"),
        (["{named}", "{photos}", "--split", "test"], r"unknown split of a folder of classes 'test'; .*all, train, val"),
        (["{named}", "{photos}", "--bath-size=8"], r"unknown option '--bath-size'; did you mean '--batch-size'"),
        (["{named}", "{photos}", "--mean", "0"], r"mean and std go together"),
        (
            ["{named}", "--config.data.source=digits"],
            r"the data has classes that the network has not: 0, 1, 2, 3, 4, 5",
        ),
        (["{backbone}", "{photos}"], r"this network has no classifier; its features can be had"),
        (["/nowhere/w.npz", "{photos}"], r"/nowhere/w\.npz is neither a file nor a folder"),
        (["--workdir", "w", "a", "b"], r"--workdir w stands instead of SOURCE; give one of them"),
        (["{named}", "/nowhere/photos", "--output", "new/folder"], r"data\.data_dir: /nowhere/photos is no directory"),
        (["{backbone}", "{photos}", "--output", "new/folder"], r"this network has no classifier"),
        (["{named}", "{photos}/.."], r"has folders of splits, train"),
        (["{named}", "{photos}", "--picture", "m.doc"], r"m\.doc is no name of a picture"),
    ],
)
def test_mistakes(arguments, message, named, photos, tmp_path, monkeypatch, capsys):
    backbone = tmp_path / "backbone.npz"
    writing.write(random_network(**NARROW | {"num_classes": 0}), backbone)
    (photos.parent / "train" / "cat").mkdir(parents=True, exist_ok=True)
    if not any((photos.parent / "train" / "cat").iterdir()):
        PIL.Image.new("RGB", (80, 80)).save(photos.parent / "train" / "cat" / "a.png")
    words = [word.format(named=named, photos=photos, backbone=backbone) for word in arguments]
    code, out, err = shell.call(monkeypatch, capsys, evaluate.main, *words)
    assert (code, out) == (2, "")
    assert re.search(f"error: .*{message}", err), err
    assert {path.name for path in tmp_path.iterdir()} == {"backbone.npz"}


def test_a_folder_of_somebody_else_is_a_line(tmp_path, monkeypatch, capsys):
    """It may be a run, which has its own data; for root every folder is open."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    code, out, err = shell.call(monkeypatch, capsys, evaluate.main, tmp_path)
    assert (code, out, err) == (2, "", f"error: {tmp_path} cannot be read: Permission denied.\n")


def test_a_folder_that_cannot_be_written_is_a_line_before_anything_is_evaluated(named, photos, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    code, out, err = shell.call(monkeypatch, capsys, evaluate.main, named, photos)
    said = "error: . cannot be written by this user; give another folder by --output DIR."
    assert (code, out, err.splitlines()[-1]) == (2, "", said)


def test_a_run_without_its_recipe_is_still_a_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    code, out, err = shell.call(monkeypatch, capsys, evaluate.main, tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {tmp_path} is no workdir of a run: it has no config.json. The command that began the run writes "
        "config.json anew in another workdir; copy it from there.\n"
    )


def test_two_hosts_are_one(network, photos, tmp_path, monkeypatch, capsys):
    """Each reads a file of its own, the same, and puts its share of the arrays on its device."""
    paths = [tmp_path / "w.npz", tmp_path / "same.npz", tmp_path / "other.npz"]
    for path, size in zip(paths, (71, 71, 75), strict=True):
        writing.write(network._replace(image_size=size), path)
    shutil.copyfile(paths[0], paths[1])

    def together(*paths, output=tmp_path / "none"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = ["-m", "xception_flax", "evaluate"]
        hosts = [*("--config.mesh.fsdp=2", "--coordinator", address, "--num-processes", "2", "--process-id")]
        to = ["--output", output]
        started = [shell.start(*command, path, photos, *to, *hosts, i, devices=1) for i, path in enumerate(paths)]
        return [shell.finish(process) for process in started]

    alone, _, _ = scored(monkeypatch, capsys, paths[0], photos, "--output", "one")
    (code, out, err), (other_code, other_out, _) = together(*paths[:2], output=tmp_path / "two")
    assert (code, other_code) == (0, 0), err
    assert "top1" not in other_out  # where Gloo alone has something to say
    found = json.loads(out.splitlines()[-1])
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found | {"loss": 0} == alone | {"loss": 0}
    one, two = (pyarrow.parquet.read_table(tmp_path / name / "predictions_val.parquet") for name in ("one", "two"))
    assert one.schema.equals(two.schema, check_metadata=True)  # the fingerprint of the data too
    for name in ("index", "file", "true", "predicted", "correct"):
        assert one[name].equals(two[name]), name
    values = [np.array(table["probabilities"].to_pylist()) for table in (one, two)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)
    records = [json.loads((tmp_path / name / "evaluation_val.json").read_text()) for name in ("one", "two")]
    assert records[0]["of"]["weights"] == records[1]["of"]["weights"]
    assert records[0]["confusion_matrix"] == records[1]["confusion_matrix"]
    assert records[1]["of"]["processes"] == 2
    pictures = [PIL.Image.open(tmp_path / name / "mistakes_val.png") for name in ("one", "two")]
    assert np.mean(np.abs(np.subtract(*(np.asarray(p.convert("RGB"), int) for p in pictures)))) < 0.1
    for code, out, err in together(paths[0], paths[2]):
        assert (code, "top1" in out) == (2, False)
        assert "the processes of this run are not alike: the weights (SHA-256)" in err
