"""What a network said of each image of a split: collected batch by batch, kept as a Parquet file."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xception_flax.data.batch import Batch
from xception_flax.host import allocator, files
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training import sharding

if TYPE_CHECKING:
    import pyarrow

MAX_MISTAKES = 40  # images that are kept, of those that the network gets wrong

ALL_CLASSES, TOP = 1000, 100  # with more classes, a row of the file has only the `TOP` most likely

BLOCK = 1_000_000  # probabilities of which something is computed at a time, a bound on memory

KEY = b"xception_flax"  # of the metadata in the file


class Mistakes(NamedTuple):
    """The first images that a network gets wrong, `MAX_MISTAKES` at most.

    Attributes:
      images: uint8 `[H, W, C]` each, as the network sees them.
      truths, predictions: names of classes.
      confidences: probability of each prediction.
    """

    images: list[np.ndarray]
    truths: list[str]
    predictions: list[str]
    confidences: list[float]


class Predictions(NamedTuple):
    """What a network said of the images of a split, in the order of the split. Bad images are left out.

    Attributes:
      class_names: of the columns of `probabilities`.
      index: `[N]` int64, the place of each image in the split.
      labels: `[N]` int32, or `[N, num_classes]` uint8 if an image may have several.
      predicted: `[N]` int32, the class with the highest logit, of equal ones the first.
      probabilities: `[N, num_classes]` float32; NaN in all of a row with a NaN or infinite logit.
      mistakes: the first of them; none with several labels.
      all_labels: as `labels`, of every image of the split.
    """

    class_names: Sequence[str]
    index: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    mistakes: Mistakes
    all_labels: np.ndarray

    @property
    def several_labels(self) -> bool:
        return self.labels.ndim == 2

    @property
    def finite(self) -> np.ndarray:
        """Whether all logits of an image are finite, `[N]`."""
        return ~np.isnan(self.probabilities[:, 0])

    @property
    def correct(self) -> np.ndarray:
        """Whether the most likely class is the true one, `[N]`; never with a NaN or infinite logit."""
        return (self.predicted == self.labels) & self.finite


def blocks(num_images: int, num_classes: int) -> Iterator[slice]:
    """Returns slices of the rows, of `BLOCK` probabilities each: what is computed of one takes little memory."""
    step = max(1, BLOCK // num_classes)
    return (slice(start, start + step) for start in range(0, num_images, step))


class Collector:
    """Called with each batch and its logits; on several hosts by each, and the first keeps the predictions of all."""

    def __init__(
        self,
        class_names: Sequence[str],
        num_images: int,
        activation: Callable[[jax.Array], jax.Array],
        mesh: Mesh,
        *,
        several_labels: bool = False,
    ) -> None:
        """Takes the memory for all predictions.

        Raises:
          UserError: there is not as much.
        """
        num_bytes = 4 * num_images * len(class_names)
        if num_bytes > (free := allocator.free_memory_bytes()):
            raise UserError(
                f"the probabilities of {num_images:,} images and {len(class_names):,} classes take "
                f"{num_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free; take a part of the split, or "
                "--no-report."
            )
        self._class_names, self._several = class_names, several_labels
        here = num_images if jax.process_index() == 0 else 0
        self._probabilities = np.empty((here, len(class_names)), np.float32)
        self._predicted = np.zeros(here, np.int32)
        label_shape, label_type = ((len(class_names),), np.uint8) if several_labels else ((), np.int32)
        self._labels = np.zeros((here, *label_shape), label_type)
        self._counts = np.zeros(here, bool)
        self._mistakes = Mistakes([], [], [], [])
        everywhere = sharding.replicated(mesh)

        def said(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            finite = jnp.isfinite(logits).all(-1, keepdims=True)
            return jnp.where(finite, activation(logits.astype(jnp.float32)), jnp.nan), jnp.argmax(logits, -1)

        # Arrays of a batch are split over the devices of all hosts: the compiler gathers them.
        self._said = jax.jit(lambda logits, *others: (*said(logits), *others), out_shardings=everywhere)
        self._rows = jax.jit(lambda images, rows: jnp.take(images, rows, axis=0), out_shardings=everywhere)

    def __call__(self, batch: Batch[jax.Array], index: jax.Array, logits: jax.Array) -> None:
        gathered = self._said(logits, batch["labels"], batch["mask"], index)
        probabilities, predicted, labels, mask, places = map(np.asarray, gathered)
        counts = mask > 0
        if not self._several:
            wrong = ((predicted != labels) | np.isnan(probabilities[:, 0])) & counts
            self._keep(batch["images"], np.flatnonzero(wrong), labels, predicted, probabilities)
        if jax.process_index() == 0:
            there = places < len(self._counts)  # the others fill the last batch
            for whole, part in zip(
                (self._probabilities, self._predicted, self._labels, self._counts),
                (probabilities, predicted, labels, counts),
                strict=True,
            ):
                whole[places[there]] = part[there]

    def _keep(self, images: jax.Array, wrong: np.ndarray, *said: np.ndarray) -> None:
        kept = self._mistakes
        wrong = wrong[: MAX_MISTAKES - len(kept.images)]
        if not len(wrong):
            return
        rows = np.zeros(MAX_MISTAKES, np.int32)  # as many in each batch, for one program
        rows[: len(wrong)] = wrong
        labels, predicted, probabilities = said
        for row, image in zip(wrong, np.asarray(self._rows(images, rows)), strict=False):
            kept.images.append(np.round(image).astype(np.uint8))
            kept.truths.append(self._class_names[labels[row]])
            kept.predictions.append(self._class_names[predicted[row]])
            kept.confidences.append(float(probabilities[row, predicted[row]]))

    def predictions(self) -> Predictions:
        """Returns what was collected: on the first host that of all, on others nothing."""
        counts = self._counts
        labels, predicted, probabilities = self._labels, self._predicted, self._probabilities
        if not counts.all():
            labels, predicted, probabilities = labels[counts], predicted[counts], probabilities[counts]
        index = np.flatnonzero(counts)
        return Predictions(
            self._class_names, index, labels, predicted, probabilities, self._mistakes, all_labels=self._labels
        )


# As a file -----------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What another network said of the images of a split, as far as a comparison needs it.

    Attributes:
      path: of the file.
      about: what `write` was given.
      index: as of `Predictions`.
      names: of the files; None where the source has none.
      truths: the name of each image's true class; None if an image may have several labels.
      correct: `[N]` bool; None likewise.
    """

    path: Path
    about: dict[str, Any]
    index: np.ndarray
    names: list[str] | None
    truths: list[str] | None
    correct: np.ndarray | None


def write(predictions: Predictions, names: Sequence[str] | None, about: dict[str, Any], path: Path) -> None:
    """Writes a Parquet file with a row for each image, whole or not at all.

    The columns are `index`, `file` (null where the source has no names), `true`, `predicted`, `probability` and
    `probability_of_true`, `correct`, and float32 `probabilities` of all classes, in the order of `class_names` in the
    file's metadata (JSON below the key `xception_flax`). With more than `ALL_CLASSES` classes a row has `top_classes`
    and `top_probabilities` instead, the `TOP` most likely. With several labels `true` and `predicted` (0.5 or more) are
    lists, and the columns about one class are missing.

    Args:
      predictions: of the first host.
      names: of all images of the split, or None.
      about: JSON, kept in the file: what was evaluated, on what.
      path: of the file.

    Raises:
      UserError: it cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    p = predictions
    classes = pyarrow.array(naming.stored(list(p.class_names)), pyarrow.string())

    def named(numbers: np.ndarray) -> pyarrow.Array:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array(numbers, pyarrow.int32()), classes)

    def listed(rows: np.ndarray) -> pyarrow.Array:
        ends = np.concatenate([[0], np.cumsum(rows.sum(-1))])
        return pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), named(np.nonzero(rows)[1]))

    def fixed(values: np.ndarray) -> pyarrow.Array:
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])

    files_there = [None] * len(p.index) if names is None else naming.stored([names[i] for i in p.index])
    columns = {"index": p.index, "file": pyarrow.array(files_there, pyarrow.string())}
    if p.several_labels:
        columns |= {"true": listed(p.labels > 0), "predicted": listed(p.probabilities >= 0.5)}
    else:
        rows = np.arange(len(p.index))
        columns |= {
            "true": named(p.labels),
            "predicted": named(p.predicted),
            "probability": p.probabilities[rows, p.predicted],
            "probability_of_true": p.probabilities[rows, p.labels],
            "correct": p.correct,
        }
    if len(p.class_names) <= ALL_CLASSES:
        columns["probabilities"] = fixed(p.probabilities)
    else:
        parts = (p.probabilities[rows] for rows in blocks(*p.probabilities.shape))
        top = np.concatenate([np.argsort(-part, axis=-1, kind="stable")[:, :TOP].astype(np.int32) for part in parts])
        columns["top_classes"] = fixed(top)
        columns["top_probabilities"] = fixed(np.take_along_axis(p.probabilities, top, -1))
    about = about | {"class_names": list(p.class_names), "several_labels": p.several_labels}
    table = pyarrow.table(columns).replace_schema_metadata({KEY: naming.to_json(about)})
    content = io.BytesIO()
    parquet.write_table(table, content, use_dictionary=["true", "predicted"])
    files.write_whole(path, [content.getbuffer()])


def read(path: Path) -> Said:
    """Returns what `write` wrote.

    Raises:
      UserError: the file cannot be read, or is another one.
    """
    import pyarrow
    from pyarrow import parquet

    types = pyarrow.types
    try:
        with files.file_errors(path, "read"), path.open("rb") as content:
            file = parquet.ParquetFile(content)
            about = naming.restored(json.loads(file.schema_arrow.metadata[KEY]))
            several = about["several_labels"]
            table = file.read(["index", "file"] if several else ["index", "file", "true", "correct"])
        if not several and not all(isinstance(about[key], str) for key in ("title", "split", "fingerprint")):
            raise TypeError("what is compared is said in texts")
        index = _whole_column(table, "index", types.is_integer).to_numpy()
        names = table["file"].to_pylist()
        names = None if None in names else naming.restored(_texts(table, "file"))
        truths = None if several else naming.restored(_texts(table, "true"))
        correct = None if several else _whole_column(table, "correct", types.is_boolean).to_numpy()
    except UserError:
        raise
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{path} is no predictions of `xception-flax evaluate`; expected predictions_SPLIT.parquet."
        ) from None
    return Said(path, about, index, names, truths, correct)


def _whole_column(
    table: "pyarrow.Table", name: str, fits: "Callable[[pyarrow.DataType], bool]"
) -> "pyarrow.ChunkedArray":
    column = table[name]
    if not fits(column.type) or column.null_count:
        raise TypeError(f"{name} is {column.type}, or has nothing in some rows")
    return column


def _texts(table: "pyarrow.Table", name: str) -> list[str]:
    import pyarrow

    kinds = (pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    return _whole_column(table, name, kinds.__contains__).to_pylist()
