"""Writing an image data set as TFDS does, without TensorFlow.

TFDS orders the images of a split by a hash of their keys and cuts this order into shards. Here the place of each image
is computed from the list of images, and each shard is written by itself, reading its images from their files. So every
byte depends only on the list, finished shards need not be written again, and the files and records are those that TFDS
itself writes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core import file_adapters, hashing
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.utils.shard_utils import ShardConfig, get_shard_boundaries

from xception_flax.data.sources.tfds import Reencoding
from xception_flax.host import files
from xception_flax.host.locks import try_lock
from xception_flax.prepare.encoding import reencode
from xception_flax.text import naming
from xception_flax.text.errors import UserError

# Largest image. A record must be below protobuf's 2 GiB; and with images of gigabytes, TFDS never finishes its search
# for a number of shards.
MAX_IMAGE_BYTES = 2**29

SAMPLE = 64  # images that are re-encoded to see how much room all of them need

PREPARED = "prepared.json"  # what the data set was made from (`Layout.made_of`); TFDS ignores this file


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImage:
    """An encoded image: `size` bytes at `offset` in the file `path`.

    Attributes:
      name: the feature `file_name`, and the key that decides its place in the order; unique in a split.
      label: number of its class, or numbers of its classes if an image may have several.
      path, offset, size: of its bytes.
      content: bytes to write in place of those in the file; None to write those.
    """

    name: str
    label: int | tuple[int, ...]
    path: str
    offset: int
    size: int
    content: bytes | None = None

    def read(self) -> bytes:
        """Returns the bytes of the image.

        Raises:
          UserError: the file has become shorter.
        """
        if self.content is not None:
            return self.content
        with open(self.path, "rb") as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) != self.size:
            raise UserError(f"{self.path} has changed while it was read: {self.name} is cut off.")
        return content

    @property
    def num_bytes(self) -> int:
        """Length of its record, a `tf.train.Example` of image, label and file_name, by protobuf's rules."""
        image_bytes = self.size if self.content is None else len(self.content)
        numbers = self.label if isinstance(self.label, tuple) else (self.label,)
        label_bytes = sum(map(_varint_bytes, numbers))
        values = {"image": image_bytes, "label": label_bytes, "file_name": len(self.name.encode())}
        # The fields are nested: an entry of the map has a key and a Feature, which has a list, with one value or, of
        # labels, with numbers in one field; a list of no numbers has no field.
        lists = {key: _field(n) if n or key != "label" else 0 for key, n in values.items()}
        entries = (_field(_field(len(key)) + _field(_field(n))) for key, n in lists.items())
        return _field(sum(entries))


def _field(num_bytes: int) -> int:
    return 1 + _varint_bytes(num_bytes) + num_bytes  # tag, length, content


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a split: its images in their order, and the total length of the originals' records in bytes."""

    path: Path
    images: Sequence[EncodedImage]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shards of a data set. They are written to `incomplete`, which becomes `directory` when all are there.

    Attributes:
      info: TFDS' description: name, version, features.
      splits: the shards of each split.
      directory: `DATA_DIR/NAME/VERSION`.
      origin: where the images are from, for messages.
      reencoding: what is done to the images; None to write their bytes. The shards are those of the originals.
    """

    info: tfds.core.DatasetInfo
    splits: Mapping[str, Sequence[Shard]]
    directory: Path
    origin: str
    reencoding: Reencoding | None = None

    @property
    def incomplete(self) -> Path:
        return self.directory.with_name(self.directory.name + ".incomplete")

    @property
    def shards(self) -> list[Shard]:
        return [shard for shards in self.splits.values() for shard in shards]

    @functools.cached_property
    def made_of(self) -> dict[str, Any]:
        """Where the images are from, a hash of their list with the modification times of their files, and how they are
        re-encoded, if they are.
        """
        digest = hashlib.sha256()
        modified = functools.cache(lambda path: os.stat(path).st_mtime_ns)
        for shard in self.shards:
            for image in shard.images:
                place = (
                    image.name,
                    image.label,
                    naming.decoded(image.path),
                    image.offset,
                    image.size,
                    modified(image.path),
                )
                digest.update(repr((shard.path.name, *place)).encode())
        how = {} if self.reencoding is None else self.reencoding._asdict()
        return {"origin": self.origin, "list": digest.hexdigest(), **how}


def create_layout(
    info: tfds.core.DatasetInfo,
    splits: Mapping[str, Sequence[EncodedImage]],
    data_dir: Path,
    origin: str,
    reencoding: Reencoding | None = None,
) -> Layout:
    """Returns the shards that TFDS would write for these images, in its order.

    Raises:
      UserError: a split is empty or has two images of one name, a file is too large for an image, or the name of the
        directory is not UTF-8.
    """
    directory = data_dir.expanduser().absolute() / info.name / str(info.version)
    if not naming.is_unicode(directory):
        raise UserError(f"{naming.shown(directory)}: TFDS takes no name of a folder that is not UTF-8; take another.")
    layout = Layout(info, {}, directory, origin, reencoding)
    shards = {}
    for split, images in splits.items():
        if not images:
            raise UserError(f"{origin}: there is no image for split {split!r}.")
        twice = [name for name, count in Counter(image.name for image in images).items() if count > 1]
        if twice:
            raise UserError(f"{origin}: {twice[0]} is there twice in split {split!r}; each image needs its own name.")
        large = [image for image in images if image.size > MAX_IMAGE_BYTES]
        if large:
            raise UserError(f"{large[0].path}: {large[0].name} has {large[0].size:,} bytes; that is no image.")
        hasher = hashing.Hasher(split)
        ordered = sorted(images, key=lambda image: hasher.hash_key(image.name))
        sizes = [image.num_bytes for image in ordered]
        number = ShardConfig.calculate_number_shards(sum(sizes), len(ordered))
        ends = [0, *get_shard_boundaries(len(ordered), number)]
        template = _template(info, split, layout.incomplete)
        shards[split] = [
            Shard(
                Path(template.sharded_filepath(shard_index=i, num_shards=number)),
                ordered[ends[i] : ends[i + 1]],
                sum(sizes[ends[i] : ends[i + 1]]),
            )
            for i in range(number)
        ]
    return dataclasses.replace(layout, splits=shards)


def _template(info: tfds.core.DatasetInfo, split: str, directory: Path) -> ShardedFileTemplate:
    return ShardedFileTemplate(
        data_dir=tfds.core.Path(directory), dataset_name=info.name, split=split, filetype_suffix="array_record"
    )


@contextlib.contextmanager
def claim(layout: Layout) -> Iterator[list[Shard]]:
    """Makes the incomplete directory, locks it against other processes, and yields the shards that it lacks.

    The lock is that of `host.locks`, on `PREPARED`.

    Raises:
      UserError: the data set exists, another one is or was being prepared in its place, or the disk is too full.
    """
    incomplete, made_of = layout.incomplete, naming.to_json(layout.made_of)
    _check_absent(layout)
    try:
        incomplete.mkdir(parents=True, exist_ok=True)
        file = (incomplete / PREPARED).open("a+")
    except OSError as error:
        raise UserError(f"{incomplete} cannot be written: {error.strerror}; take another --data-dir.") from None
    with file:
        if not try_lock(file):
            raise UserError(f"{incomplete} is being written by another process; wait for its end.")
        _check_absent(layout)  # once more: another process may have ended since
        file.seek(0)
        there = file.read()
        if there not in ("", made_of):
            raise UserError(
                f"{incomplete} was begun with other images, or they have changed since; remove it to begin anew."
            )
        missing = [shard for shard in layout.shards if not shard.path.exists()]
        needed, free = _bytes_needed(layout, missing), shutil.disk_usage(incomplete).free
        if needed > free:
            raise UserError(
                f"{incomplete.parent} has room for {free / 1e9:,.1f} GB, and {needed / 1e9:,.1f} GB are needed; "
                "make room, or take another --data-dir."
            )
        if not there:
            file.write(made_of)
            file.flush()
            os.fsync(file.fileno())
        yield missing


def _bytes_needed(layout: Layout, shards: Sequence[Shard]) -> int:
    """Returns the length of the shards' records; of images that are re-encoded about, by a sample."""
    total = sum(shard.num_bytes for shard in shards)
    if layout.reencoding is None or not shards:
        return total
    images = [image for shard in shards for image in shard.images]
    contents = [image.read() for image in images[:: -(-len(images) // SAMPLE)]]
    small = sum(len(reencode(content, layout.reencoding)) for content in contents)
    return total * small // max(1, sum(map(len, contents)))


def _check_absent(layout: Layout) -> None:
    if layout.directory.exists():
        raise UserError(f"{layout.directory} is there already; move it away, or take another --data-dir.")


def is_complete(layout: Layout) -> bool:
    """Whether this same data set has been written before."""
    path = layout.directory / PREPARED
    return path.exists() and path.read_text() == naming.to_json(layout.made_of)


def write(layout: Layout, shards: Sequence[Shard], num_threads: int, advance: Callable[[int], None]) -> dict[Path, int]:
    """Writes shards, and returns the length of the records in each.

    Args:
      layout: of the data set.
      shards: to write, from `claim`.
      num_threads: shards that are written at the same time.
      advance: called with the length of each original's record in bytes.

    Raises:
      UserError: the disk is full, or an image cannot be read.
    """
    serializer = ExampleSerializer(layout.info.features.get_serialized_info())

    def write_shard(shard: Shard) -> tuple[Path, int]:
        written = 0

        def records() -> Iterator[tuple[str, bytes]]:
            nonlocal written
            for image in shard.images:
                content = image.read()
                if layout.reencoding is not None:
                    content = reencode(content, layout.reencoding)
                label = np.array(image.label, np.int64) if isinstance(image.label, tuple) else image.label
                values = {"image": content, "label": label, "file_name": image.name}
                # Without `deterministic`, as in TFDS, protobuf's order of the three fields differs by process.
                record = serializer.get_tf_example(values).SerializeToString(deterministic=True)
                yield image.name, record
                written += len(record)
                advance(image.num_bytes)

        partial = shard.path.with_name(shard.path.name + ".partial")
        file_adapters.ArrayRecordFileAdapter.write_examples(partial, records())
        files.sync(partial)
        os.replace(partial, shard.path)
        return shard.path, written

    with futures.ThreadPoolExecutor(num_threads) as executor:
        running = [executor.submit(write_shard, shard) for shard in shards]
        try:
            return dict(future.result() for future in futures.as_completed(running))
        except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError
            executor.shutdown(cancel_futures=True)
            raise UserError(f"{layout.incomplete}: {error}; the same command goes on from there.") from None
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def complete(layout: Layout, written: Mapping[Path, int]) -> None:
    """Writes TFDS' descriptions beside the shards and gives the directory its name.

    Args:
      layout: of the data set.
      written: the length of the records in the shards that this process wrote, from `write`.
    """

    def num_bytes(shard: Shard) -> int:
        if layout.reencoding is None:
            return shard.num_bytes
        return written[shard.path] if shard.path in written else _record_bytes(shard.path)

    layout.info.set_file_format("array_record")
    layout.info.set_splits(
        tfds.core.splits.SplitDict(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.images) for shard in shards],
                num_bytes=sum(map(num_bytes, shards)),
                filename_template=_template(layout.info, split, layout.incomplete),
            )
            for split, shards in layout.splits.items()
        )
    )
    layout.info.write_to_directory(layout.incomplete)
    for path in layout.incomplete.iterdir():
        files.sync(path)
    files.sync(layout.incomplete)
    os.rename(layout.incomplete, layout.directory)
    files.sync(layout.directory.parent)


def _record_bytes(path: Path) -> int:
    """Returns the length of all records in a shard, which it reads."""
    with ArrayRecordDataSource(str(path)) as records:
        return sum(len(records[i]) for i in range(len(records)))
