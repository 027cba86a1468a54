"""Arrays of an .npz file."""

import math
import os
import zipfile
from collections.abc import Sequence

import numpy as np

from xception_flax.data.decoding import CHANNELS
from xception_flax.data.sources.source import Arrays, check_memory, check_num_classes, distinct
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, suggest

# Highest compression that an .npz file of gigabytes may have. Deflate reaches 1,030 for zeros, 2.5 for the digits.
MAX_RATIO = 500


def arrays(split: str, /, path: str) -> Arrays:
    """Arrays of an .npz file: `{split}_images` uint8, `{split}_labels` integers `[N]` or 0/1 `[N, classes]`.

    Labels may be whole numbers of any type, and may have shape `[N, 1]`. The array `class_names` is optional; without
    it classes are named by their numbers.

    Args:
      split: which of the arrays.
      path: of the .npz file.

    Raises:
      UserError: the file or an array is missing or not as expected, or the arrays do not fit into memory, which is
        checked by their headers before they are read.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, it is False for a path that is too long
        raise UserError(f"data.path: {path} is no file; expected an .npz file.")
    needed = (f"{split}_images", f"{split}_labels")
    found = _read_npz(path, needed, ("class_names",))
    images, labels = (found[key] for key in needed)
    wrong = images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]
    if wrong or images.shape[:1] != labels.shape[:1]:
        raise UserError(
            f"{path}: {split}_images must be uint8 [N, H, W] or [N, H, W, C], 0 to 255, with a label each, got "
            f"{images.dtype} {images.shape} and labels {labels.shape}."
        )
    if not len(images):
        raise UserError(f"{path}: {split}_images has no image; it must have some.")
    if images.ndim == 4 and images.shape[-1] not in CHANNELS:
        hint = "; their channels come last: np.moveaxis(images, 1, -1)" if images.shape[1] in CHANNELS else ""
        raise UserError(
            f"{path}: {split}_images [N, H, W, C] must have 1, 3 or 4 channels, got {images.shape[-1]} of "
            f"{images.shape}{hint}."
        )
    labels = _whole_numbers(f"{path}: {split}_labels", labels)
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        raise UserError(
            f"{path}: {split}_labels [N, classes] must be 0 or 1, got {labels.min()} to {labels.max()} of shape "
            f"{labels.shape}; if each image has one class, make them [N]."
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0:
        raise UserError(f"{path}: {split}_labels must be the numbers of classes, from 0 on, got {least}.")
    num_classes = labels.shape[1] if labels.ndim == 2 else most + 1
    names = _stated_names(path, found["class_names"]) if "class_names" in found else None
    if names is None:
        check_num_classes(num_classes, len(images), f"{path}: {split}_labels")
        names = tuple(map(str, range(num_classes)))
    if labels.ndim == 2 and len(names) != num_classes:
        raise UserError(
            f"{path}: {split}_labels [N, classes] must have a column for each of the {len(names)} class_names, got "
            f"{num_classes}."
        )
    if labels.ndim == 1 and most >= len(names):
        raise UserError(
            f"{path}: {split}_labels must be in 0 to {len(names) - 1}, got {least} to {most}; there are {len(names)} "
            "class_names."
        )
    return Arrays(images, labels.astype(np.int32 if labels.ndim == 1 else np.uint8), names)


def _whole_numbers(what: str, labels: np.ndarray) -> np.ndarray:
    """Returns labels `[N]` or `[N, classes]` as integers; `[N, 1]` becomes `[N]`."""
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "biuf" or not labels.size:
        raise UserError(f"{what} must be integers, [N] or [N, classes], got {labels.dtype} {labels.shape}.")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)  # float16 cannot be compared with 2**53
        if broken := labels[~(np.isfinite(labels) & (labels == np.round(labels)))].tolist()[:1]:
            raise UserError(f"{what} must be integers, [N] or [N, classes], got {broken[0]}.")
        if np.abs(labels).max(initial=0) >= 2**53:  # from here on float64 does not hold every integer
            raise UserError(f"{what} must be the numbers of classes, got {np.abs(labels).max():g}.")
        return labels.astype(np.int64)
    return labels.astype(np.uint8) if labels.dtype.kind == "b" else labels


def _stated_names(path: str, names: np.ndarray) -> tuple[str, ...]:
    names = np.atleast_1d(names)
    if names.ndim != 1 or not len(names) or names.dtype.kind not in "USiu":
        raise UserError(f"{path}: class_names must be a list of names, one a class, got {names.dtype} {names.shape}.")
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    return distinct(map(str, names.tolist()), f"{path}: class_names")


def _read_npz(path: str, needed: Sequence[str], optional: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads arrays of an .npz file, after checking that their headers are true and that they fit into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            keys = [key for key in (*needed, *optional) if key in files]
            declared = {key: _declared(archive, files[key]) for key in keys}
    # zipfile, and NumPy's parser of headers, raise any exception: MemoryError too, for a header that nests too deep.
    except Exception as error:
        raise UserError(f"{path} is not a readable .npz file ({cut(str(error))}).") from None
    for key in needed:
        if key not in files:
            raise UserError(f"{path} has no array {key!r}; {suggest(key, files)}")
    for key, (dtype, shape, num_bytes) in declared.items():
        if dtype.hasobject:
            raise UserError(
                f"{path}: {key} is an array of Python objects, which is not read, since they may be programs; make it "
                "an array of numbers, or of names."
            )
        if dtype.itemsize * math.prod(shape) != num_bytes:
            raise UserError(
                f"{path}: {key} is {dtype} {shape} by its header, {dtype.itemsize * math.prod(shape):,} bytes, and has "
                f"{num_bytes:,}; the file is damaged."
            )
    total, packed = sum(num_bytes for _, _, num_bytes in declared.values()), sum(files[k].compress_size for k in keys)
    if total > 2**30 and total > MAX_RATIO * packed:
        raise UserError(
            f"{path} holds {total / 2**30:,.1f} GiB by its header, in {packed:,} bytes, as no images do; it is "
            "damaged, or made to fill memory."
        )
    check_memory(path, total)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a readable .npz file ({cut(str(error))}).") from None


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[np.dtype, tuple[int, ...], int]:
    """Returns the type and shape in an array's header, and the bytes after it by the archive's directory."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of version {version}, expected 1.0 or 2.0")
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read_header(file)
        return dtype, shape, info.file_size - file.tell()
