"""From a source to batches: shuffle, repeat, augment, take this host's share, batch.

What a step sees is a pure function of (seed, step). The number of hosts, threads or worker processes changes neither
an example, nor its augmentation, nor its place in the global batch. To resume at a step, its number is enough.
"""

import contextlib
import dataclasses
import errno
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker, util
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from absl import flags

from xception_flax.data.batch import Batch, Shapes, label_dtype, shapes
from xception_flax.data.decoding import WHITE, BadImageError, decode, is_dark, largest_value, white
from xception_flax.data.sampling import Balanced
from xception_flax.data.sources.folder import Files
from xception_flax.data.sources.source import Example, InputError, Source, WorkerEnded
from xception_flax.data.transforms import Transform, made
from xception_flax.host import allocator, parents, signals
from xception_flax.text import naming
from xception_flax.text.errors import UserError

if TYPE_CHECKING:
    import grain

ON_BAD_IMAGE = ("stop", "replace")

# Batches that a process makes ahead of the one last yielded. Two, so that threads with no work left in one batch begin
# the next.
BATCHES_AHEAD = 2

# Of each worker process. More threads in one process wait for each other: Python code runs between two images.
THREADS_PER_PROCESS = 8

# What `Split.check_max_value` looks at: images spread over the split and, in a folder, one image each of some classes.
IMAGES_LOOKED_AT, CLASSES_LOOKED_AT = 32, 900

NO_SHARED_MEMORY = (
    "/dev/shm is full, through which processes that read give their batches. Give it more (docker run --shm-size=8g), "
    "or read in threads by --config.data.num_workers=0."
)

NUM_SAMPLES = 16  # of a split, by which data are known again

READ_AGAIN_SECONDS = 5.0  # before a second try: a network file system may fail for a moment


@dataclasses.dataclass(frozen=True)
class Split:
    """The batches of one split of one data set, for one host.

    Attributes:
      source: the examples.
      transforms: what turns each image into `image_shape`.
      image_shape: `(H, W, C)`.
      batch_size: of the global batch.
      train: if true, shuffled and endless; otherwise in order, once, the last batch padded.
      seed: of order and augmentation.
      process_index, process_count: the number of this host, and how many there are.
      num_threads: that read and decode, in each process.
      num_workers: worker processes; with 0 the threads of this process read and decode.
      min_decoded_side: see `decoding.decode`; with 0 images are decoded whole.
      on_bad_image: 'stop' or 'replace'.
      max_value: see `decoding.decode`.
      rounded: see `prepare_image`.
      sampling: of training: one of `sampling.SAMPLINGS`.
      orientation: see `decoding.decode`.
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
    rounded: bool = True
    sampling: str = "shuffled"
    orientation: str = "ignore"

    @property
    def num_images(self) -> int:
        """Images of the source."""
        return len(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, ..., in their order."""
        return self.source.class_names

    @property
    def num_batches(self) -> int:
        """Batches of one pass, the last one padded."""
        return -(-self.num_images // self.batch_size)

    @property
    def batch_shapes(self) -> Shapes:
        """Shape and type of each array of the *global* batch; see `batch.Batch`.

        Raises:
          InputError: example 0, which gives the shape of labels, cannot be read.
        """
        try:
            label = _label(self.source[0])
        except OSError as error:
            raise InputError(f"the data cannot be read: {error}.") from error
        return shapes(self.batch_size, self.image_shape, label.shape, masked=self.masked, rounded=self.rounded)

    def identity(self, order: Sequence[int] | None = None) -> dict[str, Any]:
        """Returns values by which hosts can check that they have the same data.

        They cover 16 examples, spread over the split.

        Args:
          order: of all examples, from which the 16 are taken; default: their own.

        Raises:
          InputError: one of these examples cannot be read.
        """
        digest = hashlib.sha256(b"".join(self._samples(order)))
        split = "the training data" if self.train else "the evaluation data"
        return {
            f"the number of images of {split}": self.num_images,
            f"the list of classes of {split}": self.class_names,
            f"the content of {split} (SHA-256 of samples)": digest.hexdigest()[:16],
        }

    def samples(self) -> list[str]:
        """Returns a digest of each of 16 examples, spread over the split, by which a run knows its data again.

        Raises:
          InputError: one of these examples cannot be read.
        """
        return [hashlib.sha256(content).hexdigest()[:8] for content in self._samples()]

    def _samples(self, order: Sequence[int] | None = None) -> Iterator[bytes]:
        for index in np.linspace(0, self.num_images - 1, NUM_SAMPLES).astype(int):
            try:
                example = self.source[int(index if order is None else order[index])]
            except OSError as error:
                raise InputError(f"the data cannot be read: {error}.") from error
            yield bytes(example["image"]) + np.asarray(example["label"]).tobytes()

    def check_transforms(self) -> None:
        """Checks on example 0 that the transforms make images of `image_shape`.

        Raises:
          UserError: they make another shape or type.
        """
        try:
            image, rng = self.source[0]["image"], np.random.default_rng(self.seed)
            options = dict(orientation=self.orientation)
            prepare_image(
                image, self.transforms, self.image_shape, self.min_decoded_side, rng, self.max_value, **options
            )
        except (BadImageError, InputError, OSError):  # `batches` reports it, as `on_bad_image` says
            pass
        except UserError as error:
            raise UserError(f"data.{'train' if self.train else 'eval'}_transforms: {error}") from None

    def check_max_value(self) -> str:
        """Checks the largest values of 16-bit images in a sample of the split, unless `max_value` is set.

        A 12-bit scanner writes values of 0 to 4,095 into 16 bits. Without `max_value` they become 0 to 15 of 255.

        Returns:
          A warning if some of the 16-bit images have no value in the upper half, else ''.

        Raises:
          UserError: most of them have none.
        """
        if self.max_value is not None:
            return ""
        with ThreadPoolExecutor(self.num_threads) as pool:
            found = [largest for largest in pool.map(self._largest_value, self._sample()) if largest is not None]
        dark = [largest for largest in found if is_dark(largest)]
        if len(dark) > len(found) / 2:  # a few bright images do not make the others right
            raise UserError(
                f"the images of 16 bits have values up to {max(dark):,} of {WHITE:,} (in {len(dark)} of {len(found)} "
                f"that were looked at), which would become at most {max(dark) >> 8} of 255. Set the value of white by "
                f"--config.data.max_value={white(max(dark))}, or by {WHITE} if the images are that dark. "
                "`xception-flax prepare check` shows the largest value of all."
            )
        if not dark:
            return ""
        return (
            f"the {'training' if self.train else 'evaluation'} data: {len(dark)} of {len(found)} images of 16 bits "
            f"looked at have no value in the upper half; if white is less than {WHITE} there, set data.max_value."
        )

    def _sample(self) -> list[int]:
        """Returns images spread evenly over the split and, since a folder is sorted by class, the first of a class."""
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
        except (BadImageError, InputError, OSError):  # `batches` reports it, as `on_bad_image` says
            return None

    @property
    def masked(self) -> bool:
        """Whether batches have a `mask`: in evaluation, and where bad images are replaced."""
        return not self.train or self.on_bad_image == "replace"

    def indices(self, step: int) -> np.ndarray:
        """Returns which examples of the source are in the global batch `step` of training, `[batch_size]` in its order.

        It reads no image.
        """
        if self.sampling == "balanced":
            index_at = Balanced(self.source, self.seed).index
        else:
            index_at = self._shuffled(self.num_images).__getitem__
        first = step * self.batch_size
        return np.array([index_at(place) for place in range(first, first + self.batch_size)])

    def _shuffled(self, number: int) -> "grain.MapDataset":
        """Returns the numbers from 0 to `number` - 1 in the endless order of training, another in each epoch."""
        import grain  # of the extra 'train': a network is used without it

        return grain.MapDataset.range(number).seed(self.seed).shuffle().repeat()

    def batches(self, start_step: int = 0) -> Generator[Batch[np.ndarray]]:
        """Yields this host's share of batch `start_step`, `start_step + 1`, ...

        It has `batch_size / process_count` examples: `images`, `labels` and, if `masked`, `mask`; see `batch.Batch`.
        The image in place of a bad one is black. Close the generator (`contextlib.closing`) unless you read it to its
        end.

        Besides the batch last yielded, memory holds at most `BATCHES_AHEAD`. With worker processes it holds at most six
        for each of them: two being made, and on each side of the queue one in it and one that waits.

        Raises:
          InputError: an image is bad and `on_bad_image` is 'stop', a file cannot be read, or a worker process has
            ended.
        """
        import grain

        # What grain orders are numbers, by which `_Prepare` reads.
        if not self.train:
            read = _Padded(self.source, self.batch_size)
            places = grain.MapDataset.range(len(read)).seed(self.seed)
        elif self.sampling == "balanced":
            read = Balanced(self.source, self.seed)
            places = grain.MapDataset.range(len(read)).seed(self.seed)
        else:
            read, places = self.source, self._shuffled(self.num_images)
        prepare = _Prepare(
            read,
            self.transforms,
            self.image_shape,
            self.min_decoded_side,
            self.max_value,
            replace=self.on_bad_image == "replace",
            rounded=self.rounded,
            orientation=self.orientation,
        )
        # The hosts' shares are taken after the random map, since an example's randomness comes from its place in the
        # global order. They are whole blocks, so that together they make up the global batch in that order.
        shares = grain.MapDataset.source(_Shares(places.random_map(_with_rng), prepare, self))
        batches = shares[self.process_index :: self.process_count][start_step:]
        ahead = min(BATCHES_AHEAD, self.num_threads)
        iterator = batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=BATCHES_AHEAD))
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read an absl flag
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
                except signals.Stopped:
                    stack.pop_all()  # closing would wait for the reads that stand still
                    raise
                except InputError as error:  # from a worker process it comes with the tracebacks of both
                    raise InputError(str(error)) from None
                except BadImageError as error:
                    removing = " Removing it changes the data, which needs a new workdir." if self.train else ""
                    raise InputError(
                        f"{error} Repair it, or go on without it by --config.data.on_bad_image=replace.{removing}"
                    ) from None
                except OSError as error:
                    full = error.errno == errno.ENOSPC and self.num_workers  # reading alone writes nothing
                    raise InputError(NO_SHARED_MEMORY if full else f"the data cannot be read: {error}.") from error
                except RuntimeError as error:
                    if (code := re.search(r"Worker process was terminated .* exit code (-?\d+)", str(error))) is None:
                        raise
                    raise WorkerEnded(_worker_ended(int(code[1]))) from None
                held.close()  # the first batch is there: all workers have started
                yield batch


def _worker_ended(code: int) -> str:
    by = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return (
        f"a worker process that reads the data was ended {by}{hint}. Take fewer by --config.data.num_workers=N; "
        "with 0 an error in the reading code itself is shown."
    )


def _with_rng(number: int, rng: np.random.Generator) -> tuple[int, np.random.Generator]:
    """Returns the number with a copy of the generator, which grain uses for the next number."""
    own = np.random.Philox(key=0)
    own.state = rng.bit_generator.state
    return number, np.random.Generator(own)


class _Shares:
    """A source of the hosts' shares of batches, each filled in place by `num_threads` threads.

    Order and randomness of a batch are drawn before its images are read. Between two images the same code takes four
    times as long: a decoder leaves nothing of it in the caches.

    The threads share the images of one batch. So the first batch is ready sooner than with a batch a thread, and two
    batches ahead are enough for any number of threads.
    """

    def __init__(self, drawn: "grain.MapDataset", prepare: "_Prepare", split: Split) -> None:
        self._drawn, self._prepare = drawn, prepare
        self._size = split.batch_size // split.process_count
        self._num_threads = min(split.num_threads, self._size)
        self._arrays = {name: (shape[1:], dtype) for name, (shape, dtype) in split.batch_shapes.items()}

    def __len__(self) -> int:
        return len(self._drawn) // self._size

    def __repr__(self) -> str:
        return f"shares of {self._size} images"

    def __getitem__(self, index: int) -> Batch[np.ndarray]:
        batch = cast(
            "Batch[np.ndarray]", {name: np.empty((self._size, *s), t) for name, (s, t) in self._arrays.items()}
        )
        drawn: list[Any] = [self._drawn[place] for place in range(index * self._size, (index + 1) * self._size)]
        rows = iter(range(self._size))  # shared by the threads: its `next` is atomic

        def fill() -> None:
            for row in rows:
                example = self._prepare(*drawn[row])
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
    *,
    rounded: bool = True,
    orientation: str = "ignore",
) -> np.ndarray:
    """Decodes one image and applies the transforms; returns uint8 of `image_shape`.

    Args:
      image, min_side, max_value, orientation: see `decoding.decode`.
      chain: transforms, applied in this order.
      image_shape: `(H, W, C)` of the result.
      rng: for the transforms.
      rounded: False to apply the transforms to float32, in 0 to 255, which then is what is returned: no pixel is
        rounded to a whole number. Only some transforms take that: those of `geometry`, without antialiasing.

    Raises:
      BadImageError: the image cannot be decoded, or a transform does not accept it.
      UserError: the transforms make another shape or type.
    """
    image = decode(image, image_shape[-1], min_side, max_value, orientation)
    if not rounded:
        image = image.astype(np.float32)
    dtype = image.dtype
    for transform in chain:
        try:
            image = transform(image, rng)
        except UserError as error:  # the image is too small for a crop, say
            raise BadImageError(str(error)) from None
        if getattr(image, "dtype", None) != dtype:  # in a batch of uint8 it would be wrapped modulo 256
            raise UserError(f"a transform made {made(image)}, expected an image of {dtype}; round and clip it there.")
    if image.shape != image_shape:
        raise UserError(
            f"the transforms made an image of shape {image.shape}, but the recipe's image_size and channels "
            f"are {image_shape}; end the chain with one that scales to this size."
        )
    return image


class _Prepare:
    """Reads, decodes and augments one example: a row of each array of a batch."""

    def __init__(
        self,
        examples: Sequence[Example],
        transforms: tuple[Transform, ...],
        image_shape: tuple[int, int, int],
        min_side: int,
        max_value: int | None,
        *,
        replace: bool,
        rounded: bool,
        orientation: str,
    ) -> None:
        self._examples = examples
        self._transforms = transforms
        self._image_shape = image_shape
        self._min_side = min_side
        self._max_value = max_value
        self._replace = replace
        self._rounded = rounded
        self._orientation = orientation

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        try:
            example = self._examples[index]
        except OSError:
            time.sleep(READ_AGAIN_SECONDS)
            example = self._examples[index]
        prepared: dict[str, Any] = {"labels": _label(example), "mask": example.get("mask", np.float32(1))}
        try:
            image = prepare_image(
                example["image"],
                self._transforms,
                self._image_shape,
                self._min_side,
                rng,
                self._max_value,
                rounded=self._rounded,
                orientation=self._orientation,
            )
        except BadImageError as error:
            if self._replace:
                return prepared | {"images": np.zeros(self._image_shape, np.uint8), "mask": np.float32(0)}
            raise BadImageError(
                f"{naming.shown(example['name'])}: {error}" if "name" in example else str(error)
            ) from None
        return prepared | {"images": image}


def _label(example: Example) -> np.ndarray:
    """Returns the label as an int32 scalar, or as a uint8 row of 0 and 1."""
    label = np.asarray(example["label"])
    return label.astype(label_dtype(label.shape))


@dataclasses.dataclass(frozen=True)
class _Padded:
    """A source padded to whole batches: example 0 repeated, with mask 0."""

    source: Source
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> Example:
        real = index < len(self.source)
        return self.source[index if real else 0] | {"mask": np.float32(real)}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks signals in worker processes that are started in this block, until they run `_start_worker`.

    Processes and threads inherit the mask of the thread that starts them. This process still handles signals, which
    its other threads receive.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    _start_tracker()  # before the mask is set: Python would unblock the signals when it starts the tracker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Starts Python's tracker of shared memory in its own session, with its warnings of leaks turned off.

    At the end the tracker removes what is left in the queues, which it would call a leak. If Python started it in the
    trainer's session, SIGKILL of the whole process group would end the tracker too, and leave the shared memory in
    /dev/shm for good.
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
    util.spawnv_passfds = start_apart  # pyrefly: ignore[bad-assignment]  # Python has no option for this
    try:
        resource_tracker.ensure_running()
    finally:
        util.spawnv_passfds = start
        sys.warnoptions.pop()


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Ties a worker process to the trainer: the worker ignores signals, and ends when the trainer does.

    Otherwise a signal to the whole process group would end the workers before the trainer can save, and workers of a
    killed trainer would live on for ever.
    """
    for number in signals.REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.REQUESTS)
    parents.end_with(multiprocessing.parent_process().pid, signal.SIGKILL)
    allocator.keep_freed_memory()  # each batch needs as much memory as the last


def choose_threads(num_threads: int, num_workers: int, cpus: int) -> tuple[int, int]:
    """Returns the numbers of threads in each process and of worker processes; -1 becomes a number that suits `cpus`.

    Below 16 CPUs that is a thread a CPU, in this process. From 16 on it is a worker process of 8 threads for every 8.
    """
    if num_workers == -1:
        num_workers = cpus // THREADS_PER_PROCESS if cpus >= 2 * THREADS_PER_PROCESS else 0
    if num_threads == -1:
        num_threads = max(1, cpus // max(1, num_workers))
        num_threads = min(num_threads, THREADS_PER_PROCESS) if num_workers else num_threads
    return num_threads, num_workers


def usable_cpus(processes_per_host: int = 1) -> int:
    """Returns the CPUs that this process may use, divided by the processes that share this host; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // processes_per_host)
