"""`explain` draws and prints what `inference.explaining` computes, and names what is wrong."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

import shell
import xception_flax
from golden.seeded import structured_images
from tests.weights.test_writing import random_network
from xception_flax.commands import explain
from xception_flax.display import pictures
from xception_flax.inference.explaining import Explainer
from xception_flax.weights import writing
from xception_flax.weights.source import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    writing.write(random_network(name="xception", num_classes=4, width=0.02, middle_repeats=0), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(structured_images(5, 80, 100)):
        cv2.imwrite(str(folder / f"{i}.png"), np.uint8((image + 1) * 127.5))
    cv2.imwrite(str(folder / "5 again.png"), cv2.imread(str(folder / "2.png")))
    return folder


def test_a_class_is_named_where_the_classes_have_no_names(source, photos, tmp_path, monkeypatch, capsys):
    network = open_source(str(source), None)._replace(class_names=())
    writing.write(network, path := tmp_path / "unnamed.npz")
    code, out, err = run(monkeypatch, capsys, path, photos, "--class", "fork", "--output", tmp_path / "x.png")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "error: unknown class 'fork'; there are: 0, 1, 2, 3. These are numbers, for want of names; --class-names FILE "
        "gives them."
    )


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    return shell.call(monkeypatch, capsys, explain.main, *arguments)


def test_it_prints_what_is_computed(source, photos, tmp_path, monkeypatch, capsys):
    loaded = xception_flax.load(source)
    name = loaded.class_names[2]
    output = tmp_path / "why.png"
    arguments = [source, photos, "--class", name, "--steps", 6, "--neighbours", photos, "--nearest", 2]
    code, out, err = run(monkeypatch, capsys, *arguments, "--output", output, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 6)
    assert "explaining: 6 images in" in err
    paths = sorted(photos.iterdir())
    for line, (path, found) in zip(lines, Explainer(loaded, steps=6).stream(paths, 2), strict=True):
        assert (line["image"], line["class"]) == (str(path), name)
        assert line["predicted"] == loaded.class_names[found.probabilities.argmax()]
        assert line["probability"] == pytest.approx(float(found.probabilities[2]), rel=1e-5)
        assert line["attributions"] == pytest.approx(float(found.attributions.sum()), rel=1e-3, abs=1e-6)
        assert line["logit_difference"] == pytest.approx(found.difference, rel=1e-4, abs=1e-6)
        near = [Path(neighbour["image"]).name for neighbour in line["neighbours"]]
        assert len(near) == 2
        assert path.name not in near
        twin = {"2.png": "5 again.png", "5 again.png": "2.png"}.get(path.name)
        assert twin in (None, near[0])
    code, out, _ = run(monkeypatch, capsys, source, paths[0], "--steps", 2, "--output", tmp_path / "one.png")
    assert code == 0
    assert re.search(r", attributions add up to -?\d+\.\d\d of the logit's change of -?\d+\.\d\d\n", out)
    picture = cv2.imread(str(output))
    assert picture.shape[0] > 6 * 150  # a row each
    assert picture.shape[1] > 5 * 150  # the image, two methods, two neighbours


def test_a_picture_for_each_image(source, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = [photos / "3.png", tmp_path / "broken.png", photos / "1.png"]
    folder = tmp_path / "explained"
    code, out, err = run(
        monkeypatch, capsys, source, *files, "--steps", 0, "--stage", "stage3", "--stage", "stage5", "--output", folder
    )
    assert code == 2
    assert "broken.png: the image cannot be decoded" in err
    assert sorted(path.name for path in folder.iterdir()) == ["0000_3.png", "0001_1.png"]
    assert f"see {folder}" in out
    assert "attributions" not in out


def test_each_image_has_the_neighbours_that_there_are(source, photos, tmp_path, monkeypatch, capsys):
    """The one image of the gallery has none; the other has it. The rows of the picture are as long as the longest."""
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    (gallery / "0.png").symlink_to(photos / "0.png")
    drawn = []
    monkeypatch.setattr(pictures, "draw_images", lambda *given, **options: drawn.append((given, options)))
    arguments = [source, photos / "0.png", photos / "1.png", "--steps", 0, "--neighbours", gallery, "--json"]
    code, out, err = run(monkeypatch, capsys, *arguments, "--output", tmp_path / "why.png")
    assert code == 0, err
    near = [[Path(n["image"]).name for n in json.loads(line)["neighbours"]] for line in out.splitlines()]
    assert near == [[], ["0.png"]]
    (images, captions, *_), options = drawn[0]
    assert len(images) == len(captions) == 6
    assert options["columns"] % 3 == 0
    assert (images[2] == 255).all()
    assert captions[2] == ""
    assert captions[5].startswith("0.png\nsimilarity")


def test_long_names_are_cut_to_what_a_file_may_have(source, photos, tmp_path, monkeypatch, capsys):
    """A name of 251 bytes, and a longer one that is not UTF-8; the number in front needs five more of 255."""
    names = ["a" + "é" * 123 + ".png", "b" * 246 + "\udce9\udce9.png"]
    for name in names:
        (tmp_path / name).write_bytes((photos / "1.png").read_bytes())
    folder = tmp_path / "explained"
    files = [tmp_path / name for name in names]
    code, _, err = run(monkeypatch, capsys, source, *files, "--steps", 0, "--output", folder)
    assert code == 0, err
    expected = ["0000_a" + "é" * 122 + ".png", "0001_" + "b" * 246 + ".png"]
    assert sorted(path.name for path in folder.iterdir()) == expected


def test_mistakes_are_named(source, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many = tmp_path / "many"
    many.mkdir()
    for i in range(31):
        (many / f"{i}.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for arguments, message in [
        ([photos, "--class", "nobody"], "unknown class 'nobody'; "),
        ([photos, "--stage", "stage9"], "unknown stage 'stage9'; "),
        ([photos, "--steps", -3], "steps of integrated gradients"),
        ([photos, "--output-stride", 12], "model.output_stride must be one of"),
        ([photos, "--output", ""], "must be a path, got ''"),
        ([photos, "--output", tmp_path / "why.txt"], "is no name of a picture"),
        ([photos, "--output", tmp_path / "none" / "why.png"], "cannot be written: No such file"),
        ([photos, "--output", tmp_path / "file"], "is no folder, expected a folder"),
        (
            [many],
            "31 images do not fit into one picture, 30 do; for a picture of each give a folder: --output explained",
        ),
        ([photos, "--neighbours", tmp_path / "nowhere"], "nowhere is not there"),
        ([photos, "--neighbours", tmp_path / "file"], "file is no folder; expected one with images"),
        ([], "there is no image"),
    ]:
        code, out, err = run(monkeypatch, capsys, source, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert not Path("explained.png").exists()
