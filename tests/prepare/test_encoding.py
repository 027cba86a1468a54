"""Images that `--max-side` scales down: which do, what they become, and who is told."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

import shell
import small_run
from benchmarks import photos
from preparing import CMYK, SYNSETS, cmyk, contents, fail, run
from xception_flax.commands import evaluate, prepare
from xception_flax.data import decoding, sources
from xception_flax.data.sources.tfds import Reencoding
from xception_flax.prepare import records
from xception_flax.prepare.encoding import reencode
from xception_flax.text.errors import UserError

PHOTO = photos.photo("chelsea.png")[:300, :400]
TO_200 = Reencoding(max_side=200, quality=90)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def turned_by_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return encoded(PHOTO, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "CMYK", "portrait", "opaque alpha"])
def test_a_large_image_becomes_a_jpeg_of_that_size(kind):
    """200 x 150 pixels with 4:2:0 chroma, near Pillow's own scaling: above 30 dB."""
    content, pixels = {
        "CMYK": lambda: (cmyk(PHOTO), PHOTO),
        "portrait": lambda: (encoded(PHOTO.swapaxes(0, 1), "PNG"), PHOTO.swapaxes(0, 1)),
        "opaque alpha": lambda: (encoded(Image.fromarray(PHOTO).convert("RGBA"), "PNG"), PHOTO),
    }.get(kind, lambda: (encoded(PHOTO, kind), PHOTO))()
    small = reencode(content, TO_200)
    size = (150, 200) if kind == "portrait" else (200, 150)
    assert simplejpeg.decode_jpeg_header(small) == (*size[::-1], "YCbCr", "420")
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC), float)
    error = np.mean((decoding.decode(small, 3) - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    assert len(small) < len(reencode(content, TO_200._replace(quality=95)))


def test_gray_stays_gray():
    gray = np.asarray(Image.fromarray(PHOTO).convert("L"))
    for content in (encoded(gray, "JPEG"), encoded(gray, "PNG"), encoded(np.stack([gray] * 3, -1), "PNG")):
        small = reencode(content, TO_200)
        assert simplejpeg.decode_jpeg_header(small)[2:] == ("Gray", "Gray")
        np.testing.assert_array_equal(decoding.decode(small, 3)[..., :1], decoding.decode(small, 1))


def test_what_would_lose_more_than_size_stays_byte_for_byte():
    alpha = Image.fromarray(PHOTO).convert("RGBA")
    alpha.putpixel((3, 3), (1, 2, 3, 254))
    whole = encoded(PHOTO, "JPEG")
    for content in (
        encoded(PHOTO[:150, :200], "JPEG"),  # no larger
        encoded(PHOTO[:150, :200], "PNG"),
        encoded(alpha, "PNG"),
        encoded(np.full((300, 400), 40_000, np.uint16), "PNG"),
        whole[: len(whole) // 2],  # cannot be decoded, of which training and `check` speak
        b"no image",
        b"",
    ):
        assert reencode(content, TO_200) == content


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_still_turns_it(orientation):
    """As the original's: stored pixels with 'ignore', turned ones with 'apply'."""
    small = reencode(turned_by_exif(orientation), TO_200)
    stored, shown = (decoding.decode(small, 3, orientation=how) for how in ("ignore", "apply"))
    assert stored.shape == (150, 200, 3)
    np.testing.assert_array_equal(shown, decoding.turned(stored, orientation))
    assert (Image.open(io.BytesIO(small)).getexif().get(0x0112, 1)) == orientation
    assert b"a camera" not in small


def test_tiff_and_png_keep_how_they_are_turned():
    """Pillow turns a TIFF by itself, so its pixels are turned already; a PNG's orientation is in its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoding.decode(reencode(encoded(PHOTO, "TIFF", exif=exif), TO_200), 3, orientation="apply").shape == (
        200,
        150,
        3,
    )
    small = reencode(encoded(PHOTO, "PNG", exif=exif), TO_200)
    shapes = [decoding.decode(small, 3, orientation=how).shape for how in ("ignore", "apply")]
    assert shapes == [(150, 200, 3), (200, 150, 3)]


def read_all(directory: Path) -> dict[str, bytes]:
    source = sources.tfds.tfds("all", data_dir=str(directory))
    return {example["name"].split(" ")[-1]: example["image"] for example in map(source.__getitem__, range(len(source)))}


def test_imagenet_has_a_name_of_its_own_beside_the_originals(tars, images, tmp_path, capsys):
    """Photographs of 160 x 120 pixels; the CMYK and the PNG too. What is written down is what was done."""
    arguments = ["imagenet", "--tars", tars, "--subset", "--data-dir", tmp_path]
    run(*arguments, "--max-side", "80", "--quality", "85")
    said = capsys.readouterr().out
    assert re.search(r"re-encoded +at most 80 pixels a side, JPEG quality 85: 0\.\d MB of 0\.\d", said)
    assert "--config.data.name=imagenet2012_80px_q85:5.1.0" in said
    run(*arguments)
    original = read_all(tmp_path / "imagenet2012/5.1.0")
    directory = tmp_path / "imagenet2012_80px_q85/5.1.0"
    found = read_all(directory)
    assert found == {name: reencode(content, Reencoding(80, 85)) for name, content in original.items()}
    assert {decoding.decode(content, 3).shape for content in found.values()} == {(60, 80, 3)}
    assert CMYK in found
    source = sources.tfds.tfds("train", name="imagenet2012_80px_q85", data_dir=str(tmp_path))
    assert source.reencoding == sources.tfds.reencoding_of(source) == Reencoding(80, 85)
    assert sources.tfds.reencoding_of(sources.tfds.tfds("train", name="imagenet2012", data_dir=str(tmp_path))) is None
    assert source.class_names[0] == "n01440764"
    described = json.loads((directory / "dataset_info.json").read_text())
    assert "at most 80 pixels a side, JPEG quality 85" in described["description"]
    assert json.loads((directory / "metadata.json").read_text()) == {"reencoded": {"max_side": 80, "quality": 85}}
    # TFDS counts the records' bytes, and so do we.
    files = records.ArrayRecordDataSource([str(path) for path in sorted(directory.glob("*.array_record-*"))])
    assert sum(int(split["numBytes"]) for split in described["splits"]) == sum(len(files[i]) for i in range(len(files)))


def test_begun_and_gone_on_with_it_is_the_same(folder, tmp_path, capsys, monkeypatch):
    """Some shards from before; other settings in the same place are refused."""
    arguments = ["folder", folder, "--name", "same", "--max-side", "100", "--data-dir"]
    run(*arguments, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    incomplete = tmp_path / "begun/same/1.0.0.incomplete"
    shutil.copytree(tmp_path / "whole/same/1.0.0", incomplete)
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        (incomplete / name).unlink()
    next(incomplete.glob("*-val.array_record-*")).unlink()
    assert "was begun with other images" in fail(capsys, monkeypatch, *arguments, tmp_path / "begun", "--quality", "80")
    run(*arguments, tmp_path / "begun")
    assert "going on from shard 1 of 2" in capsys.readouterr().err
    assert contents(tmp_path / "begun") == whole
    run(*arguments, tmp_path / "begun")
    assert "is prepared; nothing to do" in capsys.readouterr().out


def test_check_finds_copies_and_bad_images_as_before(folder, tmp_path, capsys):
    """A copy, one written anew with another quality, and one that is cut off."""
    photo = next((folder / "n01440764").glob("*.jpg")).read_bytes()
    for split in ("train", "val"):
        for i, synset in enumerate(SYNSETS):
            path = folder / split / synset / f"{split}_{i}.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(photos.photo(photos.PHOTOS[i + 4 * (split == "val")])[:400, :400], "JPEG"))
    for synset in SYNSETS:
        shutil.rmtree(folder / synset)
    for split, quality in (("train", 95), ("val", 70)):
        (folder / split / "n01440764" / f"{split}_copy.jpg").write_bytes(photo)
        again = encoded(photos.photo("rocket.jpg"), "JPEG", quality=quality)
        (folder / split / "n01440764" / f"{split}_again.jpg").write_bytes(again)
    (folder / "train" / "n01440764" / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    run("folder", folder, "--max-side", "120", "--data-dir", tmp_path)
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert prepare.main(["check", str(tmp_path / "my_photos_120px_q90/1.0.0"), "--json", str(report)]) == 1
    assert "re-encoded: at most 120 pixels a side, JPEG quality 90" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["reencoded"] == {"max_side": 120, "quality": 90}
    assert [name.split("/")[-1] for name in found["splits"]["train"]["undecodable"]] == ["cut.jpg"]
    assert [{name.split("/")[-1] for name in names} for names in found["repeated"]] == [
        {"train_copy.jpg", "val_copy.jpg"}
    ]
    assert {"train_again.jpg", "val_again.jpg"} in [
        {name.split("/")[-1] for name in pair["images"]} for pair in found["alike"]
    ]


def test_mistakes_with_it(folder, tmp_path, capsys, monkeypatch):
    def message(*arguments):
        return fail(capsys, monkeypatch, "folder", folder, "--data-dir", tmp_path, *arguments)

    assert "--quality is of images that --max-side scales; give both" in message("--quality", "90")
    assert "--quality: must be at most 100, got 101" in message("--max-side", "400", "--quality", "101")
    assert "--max-side: must be at most 10,000, got 10001" in message("--max-side", "10001")
    assert "--max-side" in message("--max-side", "0")
    run("folder", folder, "--data-dir", tmp_path, "--max-side", "100")
    path = tmp_path / "my_photos_100px_q90/1.0.0/metadata.json"
    for damaged in ('{"reencoded": {"max_side": 1', '{"reencoded": {"side": 1}}', '{"reencoded": 3}', "7"):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"1\.0\.0: metadata\.json is damaged"):
            sources.tfds.tfds("train", data_dir=str(path.parent))
    path.write_text('{"reencoded": {"max_side": "100", "quality": 90}}')
    with pytest.raises(UserError, match="expected a whole number, got '100'"):
        sources.tfds.tfds("train", data_dir=str(path.parent))
    path.write_text('{"of another": 1}')
    assert sources.tfds.tfds("train", data_dir=str(path.parent)).reencoding is None


def test_room_is_asked_for_what_is_written(tmp_path, monkeypatch):
    """By a sample: photographs of 400 x 300 at 100 pixels take less than a quarter of their room."""
    folder = tmp_path / "photos"
    for i, content in enumerate(photos.jpegs(48, width=400, height=300)):
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    size = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    usage = shutil.disk_usage(tmp_path)._replace(free=size // 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB are needed; make room"):
        run("folder", folder, "--data-dir", tmp_path / "tfds")
    run("folder", folder, "--data-dir", tmp_path / "tfds", "--max-side", "100")


def test_a_run_says_so_and_keeps_it(folder, tmp_path, capsys):
    """At its start and in its checkpoints; it goes on with no other images; an evaluation on originals shows both."""
    for arguments in (["--max-side", "100"], []):
        run("folder", folder, "--data-dir", tmp_path, "--val-fraction", "0.3", "--name", "photos", *arguments)
        (tmp_path / "photos").rename(tmp_path / ("small" if arguments else "whole"))
    workdir = tmp_path / "run"

    def train(name: str) -> tuple[int, str]:
        data = {
            "source": "tfds",
            "data_dir": tmp_path / name / "1.0.0",
            "channels": 3,
            "eval_split": "val",
            "train_transforms": "resize",
        }
        options = [f"--config.data.{key}={value}" for key, value in data.items()]
        process = small_run.start(workdir, *options, "--config.model.num_classes=4", lenet=True)
        code, _, err = shell.finish(process)
        return code, err

    code, err = train("small")
    assert code == 0, err
    assert "re-encoded images: at most 100 pixels a side, JPEG quality 90" in err
    code, err = train("whole")
    assert code == 2
    assert "the data has changed since" in err
    assert "reencoded was {'max_side': 100, 'quality': 90}, now it is None" in err

    capsys.readouterr()
    with shell.on_one_device():
        for name, expected, absent in (
            ("small", r"re-encoded +at most 100 pixels a side, JPEG quality 90", "trained on"),
            ("whole", r"trained on +re-encoded images: at most 100 pixels", r"(?m)^ +re-encoded"),
        ):
            output = tmp_path / f"of_{name}"
            directory = f"--config.data.data_dir={tmp_path / name / '1.0.0'}"
            assert evaluate.main([str(workdir), directory, "--output", str(output)]) == 0
            said = capsys.readouterr()
            assert re.search(expected, said.out + said.err), said
            assert not re.search(absent, said.out + said.err), said
            written = json.loads((output / "evaluation_val.json").read_text())["of"]["data"]
            assert written.get("reencoded") == (
                "at most 100 pixels a side, JPEG quality 90" if name == "small" else None
            )
