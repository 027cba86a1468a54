"""The two published tars of ILSVRC2012, read in place: nothing is unpacked."""

import contextlib
import dataclasses
import hashlib
import re
import tarfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import cv2
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as tfds_imagenet

from xception_flax.data.decoding import decode
from xception_flax.data.sources.tfds import Reencoding
from xception_flax.prepare import encoding
from xception_flax.prepare.records import EncodedImage
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError


class Tar(NamedTuple):
    """A published file."""

    name: str
    num_bytes: int
    md5: str
    num_images: int


# Bytes: TFDS' datasets/imagenet2012/checksums.tsv. MD5: image-net.org's download page, and torchvision's
# datasets/imagenet.py. Images: Russakovsky et al. 2015, arXiv 1409.0575, table 2.
TARS = {
    "train": Tar("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e", 1_281_167),
    "validation": Tar("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622", 50_000),
}

# A tar ends with blocks of 512 zeros: two by POSIX (one is accepted), and then as many as fill a record. GNU tar's
# records have 10 KiB by default, and at most this with a usual blocking factor.
MAX_END_BYTES = 2**20

Advance = Callable[[int], None]


def create_info(data_dir: Path, reencoding: Reencoding | None = None) -> tfds.core.DatasetInfo:
    """Returns TFDS' own description of `imagenet2012`, not yet prepared; of re-encoded images by a name of their own.

    Args:
      data_dir: the folder of data sets.
      reencoding: what is done to the images; None for originals.
    """
    version = tfds_imagenet.Builder.VERSION
    info = tfds.builder(f"imagenet2012:{version}", data_dir=data_dir, file_format="array_record").info
    if reencoding is None:
        return info
    name = encoding.name_of(info.name, reencoding)
    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name=name, version=version, data_dir=str(data_dir), module_name=""),
        description=f"{info.description}\n\nThe images: {reencoding}.",
        features=info.features,
        supervised_keys=info.supervised_keys,
        homepage=info.homepage,
        citation=info.citation,
        metadata=encoding.metadata(reencoding),
    )


def find(directory: Path, *, subset: bool) -> dict[str, Path]:
    """Returns the tar of each split.

    Args:
      directory: with the two tars.
      subset: accept tars of any size.

    Raises:
      UserError: a tar is missing, or does not have the published size.
    """
    paths = {split: directory.expanduser().absolute() / tar.name for split, tar in TARS.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{directory} has no {' and no '.join(missing)}; download from https://image-net.org/download-images "
            "(an account is needed)."
        )
    for split, path in paths.items():
        size, expected = path.stat().st_size, TARS[split].num_bytes
        if size != expected and not subset:
            raise UserError(
                f"{path} has {size:,} bytes, and {expected:,} are published: download it anew, or take a part of "
                "ImageNet by --subset."
            )
    return paths


def check_hash(path: Path, expected: str, advance: Advance) -> None:
    """Reads a file and raises UserError unless its MD5 is `expected`."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != expected:
        raise UserError(f"{path} has MD5 {digest.hexdigest()}, and {expected} is published; download it anew.")


def list_images(
    paths: dict[str, Path], info: tfds.core.DatasetInfo, advance: Advance, *, subset: bool
) -> dict[str, list[EncodedImage]]:
    """Returns the images of both splits. The few CMYK and PNG images become RGB JPEGs, as in TFDS.

    Args:
      paths: from `find`.
      info: from `create_info`; its labels are in TFDS' order.
      advance: called with the number of bytes read since the last call, of both files.
      subset: accept any number of images.

    Raises:
      UserError: a file is not a tar, is cut off or damaged, or does not have the published names and number of images.
    """
    images = {
        "train": list(_train(paths["train"], info.features["label"].names, advance)),
        "validation": list(_validation(paths["validation"], info.features["label"], advance)),
    }
    for split, tar in TARS.items():
        if len(images[split]) != tar.num_images and not subset:
            raise UserError(
                f"{paths[split]} has {counted(len(images[split]), 'image')}, and {tar.num_images:,} are published."
            )
    return images


def _members(
    path: Path, pattern: str, advance: Advance | None = None, start: int = 0, size: int = 0
) -> Generator[tuple[re.Match[str], int, int]]:
    """Yields name, offset in the file and size of each member of a tar, or of the tar inside it at `start`."""
    with path.open("rb") as file:
        try:
            part = _Part(file, start, size or path.stat().st_size)
            with tarfile.open(fileobj=cast("BinaryIO", part), mode="r:") as tar:
                behind = 0
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep them all, a kilobyte each
                    match = re.fullmatch(pattern, member.name) if member.isfile() else None
                    if match is None:
                        raise UserError(
                            f"{path}: {member.name} is not expected there; names must match {pattern}, as published."
                        )
                    yield match, start + member.offset_data, member.size
                    if advance is not None:
                        advance(tar.offset - behind)
                        behind = tar.offset
                # tarfile ends at a damaged header just as at the zeros after the last member.
                part.seek(tar.offset)
                end = part.read(MAX_END_BYTES + 1)
                if not 512 <= len(end) <= MAX_END_BYTES or any(end):
                    raise UserError(
                        f"{path} is damaged at byte {start + tar.offset:,}, where neither a member nor the end of "
                        "a tar is; download it anew."
                    )
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path} is not a whole tar ({error}); download it anew.") from None


class _Part:
    """A part of a file, read as if it were a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        self._at = position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def _train(path: Path, synsets: list[str], advance: Advance) -> Iterator[EncodedImage]:
    """Yields the training images. The tar holds a tar a synset, 'n01440764.tar', of images 'n01440764_10026.JPEG'."""
    labels = {synset: label for label, synset in enumerate(synsets)}
    with contextlib.closing(_members(path, r"(n\d{8})\.tar", advance)) as tars:
        for synset, start, size in tars:
            if synset[1] not in labels:
                raise UserError(f"{path}: {synset[0]} is none of the {len(labels)} synsets of ILSVRC2012.")
            for image, offset, num_bytes in _members(path, rf"{synset[1]}_\d+\.JPEG", start=start, size=size):
                yield _repaired(EncodedImage(image[0], labels[synset[1]], str(path), offset, num_bytes))


def _validation(path: Path, classes: tfds.features.ClassLabel, advance: Advance) -> Iterator[EncodedImage]:
    """Yields the validation images, 'ILSVRC2012_val_00000001.JPEG' and so on. TFDS has a file of their synsets."""
    synsets = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with contextlib.closing(_members(path, r"ILSVRC2012_val_(\d{8})\.JPEG", advance)) as images:
        for image, offset, num_bytes in images:
            number = int(image[1])
            if not 1 <= number <= len(synsets):
                raise UserError(f"{path}: {image[0]} is not one of the {len(synsets):,} images of validation.")
            yield EncodedImage(image[0], classes.str2int(synsets[number - 1]), str(path), offset, num_bytes)


def _repaired(image: EncodedImage) -> EncodedImage:
    """Returns the image, as an RGB JPEG if it is one of the 22 CMYK images or the one PNG (TFDS' list).

    The JPEG has quality 100 and 4:2:0 chroma, as TFDS makes it (`_fix_image`). Compared with TFDS' own preparation by
    TensorFlow 2.21, the PNG was equal, and a CMYK image differed by 1.6 of 255 on average.
    """
    if image.name not in (*tfds_imagenet.CMYK_IMAGES, *tfds_imagenet.PNG_IMAGES):
        return image
    try:
        pixels = cv2.cvtColor(decode(image.read(), 3), cv2.COLOR_RGB2BGR)
    except UserError as error:
        raise UserError(f"{image.path}: {image.name}: {error}") from None
    options = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    return dataclasses.replace(image, content=cv2.imencode(".jpg", pixels, options)[1].tobytes())
