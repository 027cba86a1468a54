"""From a source to batches: shuffle, repeat, augment, take this host's share, batch.

What a step sees is a pure function of (seed, step): neither the number of hosts nor that of
threads or worker processes changes an example, its augmentation or its place in the global batch,
and to resume at a step is arithmetic.
"""

import contextlib
import ctypes
import dataclasses
import signal
import sys
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from xception_flax.data.sources import Example, Source
from xception_flax.data.transforms import Transform, decode

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Split:
    """The batches of one split of one data set, for one host.

    Attributes:
      source: the examples.
      transforms: what makes them `image_shape`.
      image_shape: `(H, W, C)`.
      batch_size: of the global batch.
      train: shuffled and endless, or in order, once, padded.
      seed: of order and augmentation.
      process_index, process_count: which host of how many this is.
      num_threads: that read and decode, in each process; as many batches are kept ready.
      num_workers: processes beside this one; 0: threads of this one do it.
    """

    source: Source
    transforms: tuple[Transform, ...]
    image_shape: tuple[int, int, int]
    batch_size: int
    train: bool
    seed: int
    process_index: int
    process_count: int
    num_threads: int
    num_workers: int

    @property
    def num_images(self) -> int:
        return len(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def num_batches(self) -> int:
        """Batches of one pass, the last one padded."""
        return -(-self.num_images // self.batch_size)

    @property
    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each array of the *global* batch."""
        label = _label(self.source[0])
        shapes = {
            "images": ((self.batch_size, *self.image_shape), np.dtype(np.uint8)),
            "labels": ((self.batch_size, *label.shape), label.dtype),
        }
        return shapes | ({} if self.train else {"mask": ((self.batch_size,), np.dtype(np.float32))})

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields this host's share of batch `start_step`, `start_step + 1`, ...

        `images` `[batch_size / process_count, H, W, C]` uint8 and `labels` `[...]` int32, or
        `[..., num_classes]` uint8; in evaluation also `mask` `[...]` float32, 0 for padding. The
        generator must be closed (`contextlib.closing`) where it is not read to its end.
        """
        examples = grain.MapDataset.source(self.source if self.train else _Padded(self.source, self.batch_size))
        examples = examples.seed(self.seed)
        if self.train:
            examples = examples.shuffle().repeat()  # another order each epoch
        examples = examples.random_map(_Prepare(self.transforms, self.image_shape))
        # Hosts part after the random map, since an example's randomness comes from its place in the global
        # order, and in whole blocks, so that their shares make up the global batch in that order.
        shares = examples.batch(self.batch_size // self.process_count, drop_remainder=True)
        batches = shares[self.process_index :: self.process_count][start_step:]
        iterator = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=self.num_threads)
        )
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads a flag in its workers
            options = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=2)
            iterator = iterator.mp_prefetch(options, _start_worker)
        iterator = iter(iterator)
        with contextlib.closing(iterator):
            yield from iterator


class _Prepare(grain.transforms.RandomMap):
    """Decodes and augments one example."""

    def __init__(self, transforms: tuple[Transform, ...], image_shape: tuple[int, int, int]) -> None:
        self._transforms = transforms
        self._image_shape = image_shape

    def random_map(self, example: Example, rng: np.random.Generator) -> Batch:
        try:
            image = decode(example["image"], self._image_shape[-1])
        except ValueError as error:
            raise ValueError(f"{example['name']}: {error}" if "name" in example else str(error)) from None
        for transform in self._transforms:
            image = transform(image, rng)
        if image.shape != self._image_shape:
            raise ValueError(
                f"the transforms made an image of shape {image.shape}, but the recipe's image_size and channels "
                f"are {self._image_shape}; end the chain with one that resizes."
            )
        prepared = {"images": image, "labels": _label(example)}
        return prepared | ({"mask": example["mask"]} if "mask" in example else {})


def _label(example: Example) -> np.ndarray:
    """The label as int32 scalar, or as uint8 row of 0 and 1."""
    label = np.asarray(example["label"])
    return label.astype(np.uint8 if label.ndim else np.int32)


@dataclasses.dataclass(frozen=True)
class _Padded:
    """A source made longer to whole batches, by repeating example 0 with mask 0."""

    source: Source
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> Example:
        real = index < len(self.source)
        return self.source[index if real else 0] | {"mask": np.float32(real)}


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Ties a worker process to the trainer: it ends with it, and leaves signals to it.

    A signal to the whole group would otherwise end the workers before the trainer can save, and a
    killed trainer would leave them behind for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
