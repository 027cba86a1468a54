"""Calls `prepare`, and writes ImageNet's two tars with a few photographs."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

import shell
from xception_flax.commands import prepare

# Class numbers are the usual ones, by sorted synsets: tench, vine snake, Shetland sheepdog, toilet tissue.
SYNSETS = {"n15075141": 999, "n01440764": 0, "n02105855": 230, "n01739381": 59}
PATH = "imagenet2012/5.1.0"
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"


def cmyk(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(file, "JPEG", quality=95)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(directory: Path, train: dict[str, bytes], validation: dict[str, bytes]) -> Path:
    """Writes tars in the published layout: a tar with one tar per synset, and a flat tar."""
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in dict.fromkeys(name.partition("_")[0] for name in train):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for name in train:
                    if name.startswith(synset):
                        add(inner, name, train[name])
            add(outer, f"{synset}.tar", file.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in reversed(validation):  # not in the order of the names
            add(tar, name, validation[name])
    return directory


def run(*arguments: str | Path) -> None:
    assert prepare.main([*map(str, arguments)]) == 0


def fail(capsys, monkeypatch, *arguments: str | Path) -> str:
    """The message of a command that ends with code 2."""
    code, _, err = shell.call(monkeypatch, capsys, prepare.main, *arguments)
    assert code == 2, err
    return err.splitlines()[-1]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
