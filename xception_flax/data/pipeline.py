"""From a source to batches: shuffle, repeat, augment, take this host's share, batch.

What a step sees is a pure function of (seed, step): neither the number of hosts nor that of
threads or worker processes changes an example, its augmentation or its place in the global batch,
and to resume at a step is arithmetic.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker, util
from typing import Any

import grain
import numpy as np
from absl import flags

from xception_flax.data.decoding import WHITE, BadImageError, decode, is_dark, largest_value, white
from xception_flax.data.sources.folder import Files
from xception_flax.data.sources.source import Example, InputError, Source
from xception_flax.data.transforms import Transform
from xception_flax.host import allocator
from xception_flax.text import naming
from xception_flax.text.errors import UserError

Batch = dict[str, np.ndarray]

ON_BAD_IMAGE = ("stop", "replace")

# Batches that a process has ready or under way, besides the one that it has given away: two, so that
# threads that find no more of one begin the next.
BATCHES_AHEAD = 2

# From here on a host has worker processes, one for so many threads: in one process more than that wait for
# each other, for what Python does between two images.
THREADS_PER_PROCESS = 8

# By `Split.check_max_value`: so many, and one of each class where that costs no reading, of so many classes at most.
IMAGES_LOOKED_AT, CLASSES_LOOKED_AT = 32, 900

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that a terminal or a batch system sends to a whole group


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
      num_threads: that read and decode, in each process.
      num_workers: processes beside this one; 0: threads of this one do it.
      min_decoded_side: see `decoding.decode`; 0: images are decoded whole.
      on_bad_image: 'stop' or 'replace'.
      max_value: see `decoding.decode`.
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
    min_decoded_side: int = 0
    on_bad_image: str = "stop"
    max_value: int | None = None

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
        """Shape and type of each array of the *global* batch.

        Raises:
          InputError: example 0, whose label tells, cannot be read.
        """
        try:
            label = _label(self.source[0])
        except OSError as error:
            raise InputError(f"the data cannot be read: {error}.") from error
        shapes = {
            "images": ((self.batch_size, *self.image_shape), np.dtype(np.uint8)),
            "labels": ((self.batch_size, *label.shape), label.dtype),
        }
        return shapes | ({"mask": ((self.batch_size,), np.dtype(np.float32))} if self.masked else {})

    def identity(self) -> dict[str, Any]:
        """What two hosts have in common that have the same data; of the examples 16, spread over the split.

        Raises:
          InputError: one of them cannot be read.
        """
        digest = hashlib.sha256()
        for index in np.linspace(0, self.num_images - 1, 16).astype(int):
            try:
                example = self.source[int(index)]
            except OSError as error:
                raise InputError(f"the data cannot be read: {error}.") from error
            digest.update(bytes(example["image"]))
            digest.update(np.asarray(example["label"]).tobytes())
        split = "the training data" if self.train else "the evaluation data"
        return {
            f"the number of images of {split}": self.num_images,
            f"the list of classes of {split}": self.class_names,
            f"the content of {split} (SHA-256 of samples)": digest.hexdigest()[:16],
        }

    def check_transforms(self) -> None:
        """Prepares example 0.

        Raises:
          UserError: the transforms make another shape of it than `image_shape`.
        """
        try:
            image, rng = self.source[0]["image"], np.random.default_rng(self.seed)
            prepare_image(image, self.transforms, self.image_shape, self.min_decoded_side, rng, self.max_value)
        except (BadImageError, InputError, OSError):  # said where it is read, by the recipe's policy
            pass
        except ValueError as error:
            raise UserError(f"data.{'train' if self.train else 'eval'}_transforms: {error}") from None

    def check_max_value(self) -> str:
        """Looks at some images of the split, where nobody has said which value of 16 bits is white.

        A scanner of 12 bits writes 0 to 4,095 into 16, of which 0 to 15 of 255 would be left.

        Returns:
          A line for people where some of those of 16 bits have no value of the upper half, else ''.

        Raises:
          UserError: most of them have none.
        """
        if self.max_value is not None:
            return ""
        with ThreadPoolExecutor(self.num_threads) as pool:
            found = [largest for largest in pool.map(self._largest_value, self._sample()) if largest is not None]
        dark = [largest for largest in found if is_dark(largest)]
        if len(dark) > len(found) / 2:  # one that is bright is no word for all others
            raise UserError(
                f"the images of 16 bits have values up to {max(dark):,} of {WHITE:,} (in {len(dark)} of {len(found)} "
                f"that were looked at), so that no more than {max(dark) >> 8} of 255 would be left. Say which value is "
                f"white by --config.data.max_value={white(max(dark))}; by {WHITE} if they are that dark. "
                "`xception-flax prepare check` says the largest value of all."
            )
        if not dark:
            return ""
        return (
            f"the {'training' if self.train else 'evaluation'} data: {len(dark)} of {len(found)} images of 16 bits "
            f"looked at use no upper half; if white is less than {WHITE} there, set data.max_value."
        )

    def _sample(self) -> list[int]:
        """Images evenly spread over the split; and as a folder is sorted by classes, of each the first."""
        chosen = set(np.linspace(0, self.num_images - 1, IMAGES_LOOKED_AT).astype(int).tolist())
        if isinstance(self.source, Files):
            _, firsts = np.unique(self.source.labels, return_index=True)
            spread = np.linspace(0, len(firsts) - 1, min(len(firsts), CLASSES_LOOKED_AT)).astype(int)
            chosen.update(firsts[spread].tolist())
        return sorted(chosen)

    def _largest_value(self, index: int) -> int | None:
        try:
            image = self.source[index]["image"]
            return largest_value(image) if isinstance(image, bytes) else None
        except (BadImageError, InputError, OSError):  # said where it is read, by the recipe's policy
            return None

    @property
    def masked(self) -> bool:
        """Whether batches have a `mask`: in evaluation, and where bad images are replaced."""
        return not self.train or self.on_bad_image == "replace"

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields this host's share of batch `start_step`, `start_step + 1`, ...

        `images` `[batch_size / process_count, H, W, C]` uint8 and `labels` `[...]` int32, or
        `[..., num_classes]` uint8; where `masked`, also `mask` `[...]` float32: 0 for padding and for what
        stands for a bad image, which is black. The generator must be closed (`contextlib.closing`)
        where it is not read to its end.

        In memory are, besides the batch last yielded, at most `BATCHES_AHEAD`; with worker processes at most
        six for each of them: two in the making, and in the queues of either side one and one that waits.

        Raises:
          InputError: a bad image and `on_bad_image='stop'`, a file that cannot be read, a worker
            process that has ended.
        """
        examples = grain.MapDataset.source(self.source if self.train else _Padded(self.source, self.batch_size))
        examples = examples.seed(self.seed)
        if self.train:
            examples = examples.shuffle().repeat()  # another order each epoch
        prepare = _Prepare(
            self.transforms,
            self.image_shape,
            self.min_decoded_side,
            self.max_value,
            replace=self.on_bad_image == "replace",
        )
        examples = examples.random_map(prepare)
        # Hosts part after the random map, since an example's randomness comes from its place in the global
        # order, and in whole blocks, so that their shares make up the global batch in that order.
        shares = grain.MapDataset.source(_Shares(examples, self))
        batches = shares[self.process_index :: self.process_count][start_step:]
        ahead = min(BATCHES_AHEAD, self.num_threads)
        iterator = batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=BATCHES_AHEAD))
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads a flag in its workers
            options = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=1)
            iterator = iterator.mp_prefetch(options, _start_worker)
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(contextlib.ExitStack())
            if self.num_workers:
                held.enter_context(_signals_held())
            iterator = stack.enter_context(contextlib.closing(iter(iterator)))
            while True:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                except InputError as error:  # of a worker process it has the traceback of both
                    raise InputError(str(error)) from None
                except BadImageError as error:
                    raise InputError(
                        f"{error} Repair it, or go on without it by --config.data.on_bad_image=replace; where it "
                        "is taken away the data is another, for a new workdir."
                    ) from None
                except OSError as error:
                    raise InputError(f"the data cannot be read: {error}.") from error
                except RuntimeError as error:
                    if (code := re.search(r"Worker process was terminated .* exit code (-?\d+)", str(error))) is None:
                        raise
                    raise InputError(_worker_ended(int(code[1]))) from None
                held.close()  # the first batch is there: all workers have started
                yield batch


def _worker_ended(code: int) -> str:
    by = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    hint = ", as the system does to whom memory runs out" if code == -signal.SIGKILL else ""
    return (
        f"a worker process that reads the data was ended {by}{hint}. Take fewer by --config.data.num_workers=N; "
        "0 for none, which shows an error of their own."
    )


class _Shares:
    """The source of whole batches, or of a host's shares of them: each made by `num_threads` threads in its place.

    Threads share the images of one batch rather than make one each: the first is there sooner, and
    two batches ahead are enough for any number of threads.
    """

    def __init__(self, examples: grain.MapDataset, split: Split) -> None:
        self._examples = examples
        self._size = split.batch_size // split.process_count
        self._num_threads = min(split.num_threads, self._size)
        self._arrays = {name: (shape[1:], dtype) for name, (shape, dtype) in split.batch_shapes.items()}

    def __len__(self) -> int:
        return len(self._examples) // self._size

    def __repr__(self) -> str:
        return f"shares of {self._size} images"

    def __getitem__(self, index: int) -> Batch:
        batch = {name: np.empty((self._size, *shape), dtype) for name, (shape, dtype) in self._arrays.items()}
        rows = iter(range(self._size))  # each thread takes the next: `next` of it is one step for Python

        def fill() -> None:
            for row in rows:
                example = self._examples[index * self._size + row]
                for name, array in batch.items():
                    array[row] = example[name]

        if self._num_threads == 1:
            fill()
            return batch
        with ThreadPoolExecutor(self._num_threads) as pool:
            for done in [pool.submit(fill) for _ in range(self._num_threads)]:
                done.result()
        return batch


def prepare_image(
    image: bytes | np.ndarray,
    chain: Sequence[Transform],
    image_shape: tuple[int, int, int],
    min_side: int,
    rng: np.random.Generator,
    max_value: int | None,
) -> np.ndarray:
    """Decodes one image and applies the transforms; returns uint8 of `image_shape`.

    Args:
      image: see `decoding.decode`, as for `min_side` and `max_value`.

    Raises:
      BadImageError: it cannot be decoded, or a transform does not take it.
      UserError: the transforms make another shape of it.
    """
    image = decode(image, image_shape[-1], min_side, max_value)
    for transform in chain:
        try:
            image = transform(image, rng)
        except ValueError as error:  # it is too small for a crop, say
            raise BadImageError(str(error)) from None
    if image.shape != image_shape:
        raise UserError(
            f"the transforms made an image of shape {image.shape}, but the recipe's image_size and channels "
            f"are {image_shape}; end the chain with one that scales to this size."
        )
    return image


class _Prepare(grain.transforms.RandomMap):
    """Decodes and augments one example."""

    def __init__(
        self,
        transforms: tuple[Transform, ...],
        image_shape: tuple[int, int, int],
        min_side: int,
        max_value: int | None,
        *,
        replace: bool,
    ) -> None:
        self._transforms = transforms
        self._image_shape = image_shape
        self._min_side = min_side
        self._max_value = max_value
        self._replace = replace

    def random_map(self, example: Example, rng: np.random.Generator) -> Batch:
        prepared = {"labels": _label(example), "mask": example.get("mask", np.float32(1))}
        try:
            image = prepare_image(
                example["image"], self._transforms, self._image_shape, self._min_side, rng, self._max_value
            )
        except BadImageError as error:
            if self._replace:
                return prepared | {"images": np.zeros(self._image_shape, np.uint8), "mask": np.float32(0)}
            raise BadImageError(
                f"{naming.shown(example['name'])}: {error}" if "name" in example else str(error)
            ) from None
        return prepared | {"images": image}


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


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Has worker processes that are started within begin without signals, until `_start_worker` is there for them.

    They inherit the mask of the thread that starts them, and so do threads. This process' own handlers are run
    for signals that its other threads get.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    _start_tracker()  # which would lift the mask, were it first started within
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Starts Python's tracker of shared memory, in a session of its own.

    What is in the queues at the end it removes, and would call that a leak. SIGKILL of the trainer's whole group would
    take it along, where Python starts it, and leave all of that in /dev/shm for good.
    """
    start = util.spawnv_passfds

    def start_apart(path: str, arguments: list[str], files: list[int]) -> int:
        inheritable = {file: os.get_inheritable(file) for file in files}
        try:
            for file in files:
                os.set_inheritable(file, True)
            return os.posix_spawn(path, arguments, os.environ, setsid=True)
        except NotImplementedError:  # an old C library
            return start(path, arguments, files)
        finally:
            for file, before in inheritable.items():
                os.set_inheritable(file, before)

    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    util.spawnv_passfds = start_apart  # Python has no option for it
    try:
        resource_tracker.ensure_running()
    finally:
        util.spawnv_passfds = start
        sys.warnoptions.pop()


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Ties a worker process to the trainer: it ends with it, and leaves signals to it.

    A signal to the whole group would otherwise end the workers before the trainer can save, and a
    killed trainer would leave them behind for ever.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:  # it has died before it could be told
            os._exit(1)
    allocator.keep_freed_memory()  # every image and every batch is as large as the last


def choose_threads(num_threads: int, num_workers: int, cpus: int) -> tuple[int, int]:
    """Returns the number of threads (in each process) and of worker processes, with -1 made what suits `cpus`.

    Below 16 CPUs a thread for each, in this process. From 16 on a worker process for every 8, of 8 threads.
    """
    if num_workers == -1:
        num_workers = cpus // THREADS_PER_PROCESS if cpus >= 2 * THREADS_PER_PROCESS else 0
    if num_threads == -1:
        num_threads = max(1, cpus // max(1, num_workers))
        num_threads = min(num_threads, THREADS_PER_PROCESS) if num_workers else num_threads
    return num_threads, num_workers


def usable_cpus(processes_per_host: int = 1) -> int:
    """CPUs of this host that this process may use, divided by the processes that share it; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // processes_per_host)
