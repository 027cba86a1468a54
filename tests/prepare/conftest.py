"""ImageNet's two tars, the data set made of them, and a folder of photographs: all small."""

from pathlib import Path

import cv2
import pytest

from benchmarks import photos
from preparing import CMYK, PNG, SYNSETS, cmyk, run, write_tars


@pytest.fixture(scope="session")
def images() -> dict[str, dict[str, bytes]]:
    """45 images for training, two of them a CMYK and a PNG under the names known for that; 11 for validation."""
    encoded = photos.jpegs(54, width=160, height=120, quality=90)
    names = [f"{synset}_{100 * i + 26}.JPEG" for i in range(11) for synset in SYNSETS]
    train = dict(zip(names[:43], encoded, strict=False))
    photo = photos.photo("chelsea.png")[:120, :160]
    train[CMYK] = cmyk(photo)
    train[PNG] = cv2.imencode(".png", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()
    numbered = enumerate(encoded[43:], start=1)
    return {"train": train, "validation": {f"ILSVRC2012_val_{i:08}.JPEG": image for i, image in numbered}}


@pytest.fixture(scope="session")
def tars(images, tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"), **images)


@pytest.fixture(scope="session")
def data_dir(tars, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    run("imagenet", "--tars", tars, "--data-dir", directory, "--subset")
    return directory


@pytest.fixture
def folder(images, tmp_path) -> Path:
    """40 photographs of four classes."""
    directory = tmp_path / "My Photos"
    for name, content in list(images["train"].items())[:40]:
        path = directory / name.partition("_")[0] / name.replace("JPEG", "jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory
