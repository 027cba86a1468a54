"""`load`: the batches of a data set, from its source's name and the options of a recipe."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xception_flax.data.decoding import CHANNELS, ORIENTATIONS, WHITE
from xception_flax.data.pipeline import ON_BAD_IMAGE, Split, choose_threads, usable_cpus
from xception_flax.data.sampling import SAMPLINGS, Balanced
from xception_flax.data.sources import SOURCES
from xception_flax.data.sources.source import Source
from xception_flax.data.transforms import Transform, parse_transforms
from xception_flax.data.transforms.geometry import MAX_SIDE
from xception_flax.host import allocator
from xception_flax.host.libraries import check_extra
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, suggest, written
from xception_flax.text.naming import composed
from xception_flax.text.ranges import check_range
from xception_flax.text.sizes import ImageSize, check_size, sides, spelled

# A larger number is a mistake, and would fill the machine's memory before anybody notices.
MAX_THREADS, MAX_WORKERS = 1024, 256


def load(
    source: str,
    image_size: ImageSize,
    channels: int = 3,
    train_split: str = "train",
    eval_split: str = "test",
    train_transforms: str = "resize",
    eval_transforms: str = "resize",
    num_threads: int = -1,
    num_workers: int = -1,
    min_decoded_side: int = 0,
    on_bad_image: str = "stop",
    max_value: int | None = None,
    sampling: str = "shuffled",
    orientation: str = "ignore",
    *,
    train: bool,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    processes_per_host: int = 1,
    **options: Any,
) -> Split:
    """Returns the batches of a data set, for training or for evaluation.

    Args:
      source: a key of `SOURCES`.
      image_size: of the images that the network gets, in pixels, each side at most 10,000: a number for a square, or
        height x width, as 224x320 or (224, 320).
      channels: 1 for gray images, 3 for RGB, 4 for RGBA, in which images without alpha are opaque (255).
      train_split: name of the split to train on, as the source calls it.
      eval_split: name of the split to evaluate on.
      train_transforms: chain of augmentations, as `data.transforms` has them: 'random_resized_crop | flip_left_right'.
      eval_transforms: chain of transforms in evaluation.
      num_threads: threads that read and decode, in each process; -1 for as many as suit the CPUs
        (`pipeline.choose_threads`).
      num_workers: worker processes; with 0 the threads of this process do the work; -1 as for num_threads. Neither
        number changes a batch.
      min_decoded_side: if positive, JPEGs are decoded at 1/2, 3/8, 1/4 or 1/8 of their size, as long as both sides
        keep at least this many pixels. This is faster for large photos, and gives other values (`decoding.decode`).
      on_bad_image: what to do with an image that cannot be decoded: 'stop' names it and stops; 'replace' puts a
        black image with mask 0 in its place, which loss, gradient and metrics leave out and count.
      max_value: of images of 16 bits, the value that becomes 255: 4095 for a 12-bit camera or scanner. None means
        65,535; then a run does not begin if most of them have no value in the upper half.
      sampling: order of training: 'shuffled', each image once an epoch; or 'balanced', each class equally often, images
        of rare classes more than once (`sampling.Balanced`). An epoch has as many images in both.
      orientation: 'apply' turns images as their EXIF says, as phones write it; 'ignore' takes them as they are stored.
      train: if true, shuffled, endless and augmented; otherwise in order, once and padded.
      batch_size: of the global batch.
      seed: of order and augmentation.
      process_index: of this host.
      process_count: number of hosts.
      processes_per_host: number of processes that share this host's CPUs.
      **options: the source's own keywords, such as `data_dir`.

    Raises:
      UserError: a name, a number or a path is wrong, or the extra 'data' is missing; the message says what to do.
    """
    check_extra("data", ("grain",), "reading a data set")
    function = lookup(SOURCES, source, "source")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} must be a positive multiple of the {counted(process_count, 'process')}."
        )
    chains = check_options(
        image_size=image_size,
        channels=channels,
        train_transforms=train_transforms,
        eval_transforms=eval_transforms,
        num_threads=num_threads,
        num_workers=num_workers,
        min_decoded_side=min_decoded_side,
        on_bad_image=on_bad_image,
        max_value=max_value,
        sampling=sampling,
        orientation=orientation,
    )
    height, width = sides(image_size)
    batch_bytes = batch_size // process_count * height * width * channels
    if batch_bytes > (memory := allocator.free_memory_bytes()):
        raise UserError(
            f"batch_size={batch_size:,} of data.image_size={spelled(image_size)} takes {batch_bytes / 1e9:,.0f} GB, "
            f"but this host has {memory / 1e9:,.0f} GB of free memory; make either smaller."
        )
    examples = function(train_split if train else eval_split, **options)
    if not len(examples):
        raise UserError(f"source {source!r}: split {train_split if train else eval_split!r} has no images.")
    _check_labels(source, examples)
    if train and batch_size > len(examples):  # a batch would have images twice, and a step would be more than an epoch
        raise UserError(
            f"batch_size={batch_size} is more than the {counted(len(examples), 'image')} of split {train_split!r}; "
            f"take at most {len(examples)}: --config.batch_size={len(examples)}."
        )
    num_threads, num_workers = choose_threads(num_threads, num_workers, usable_cpus(processes_per_host))
    split = Split(
        source=examples,
        transforms=chains["train" if train else "eval"],
        image_shape=(height, width, channels),
        batch_size=batch_size,
        train=train,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        num_workers=num_workers,
        min_decoded_side=min_decoded_side,
        on_bad_image=on_bad_image,
        max_value=max_value,
        sampling=sampling,
        orientation=orientation,
    )
    if train and sampling == "balanced":
        Balanced(examples, seed)  # refuses what it cannot order
    split.check_transforms()
    return split


def _check_labels(source: str, examples: Source) -> None:
    """Raises UserError if the labels of a source that has them in one array are none of its classes.

    A loss would take them for no class at all, and would just be too low.
    """
    labels, count = getattr(examples, "labels", None), len(examples.class_names)
    if not isinstance(labels, np.ndarray):  # those of a table are checked where they are read
        return
    if labels.ndim == 1 and labels.size and not 0 <= labels.min() <= labels.max() < count:
        there = f"from {labels.min()} to {labels.max()}"
    elif labels.ndim == 2 and labels.shape[1] != count:
        there = f"of shape {labels.shape}"
    else:
        return
    raise UserError(
        f"source {source!r} has labels {there}, but {counted(count, 'class')} in class_names; "
        "labels must be numbers of classes from 0, or rows with a column for each."
    )


def check_options(
    *,
    image_size: ImageSize,
    channels: int,
    train_transforms: str,
    eval_transforms: str,
    num_threads: int,
    num_workers: int,
    min_decoded_side: int,
    on_bad_image: str,
    max_value: int | None,
    sampling: str,
    orientation: str,
    **others: Any,
) -> dict[str, tuple[Transform, ...]]:
    """Checks the options of `load` that need no data; `others` are those that do.

    Returns:
      The chains of transforms 'train' and 'eval'.

    Raises:
      UserError: a number is out of its range, or a chain is wrong.
    """
    if channels not in CHANNELS:
        raise UserError(f"data.channels must be 1 (gray), 3 (RGB) or 4 (RGBA), got {channels}.")
    check_size("data.image_size", image_size, MAX_SIDE)
    if num_threads != -1:
        check_range("data.num_threads (-1: what suits the CPUs)", num_threads, 1, MAX_THREADS)
    check_range("data.num_workers (-1: what suits the CPUs)", num_workers, -1, MAX_WORKERS)
    check_range("data.min_decoded_side (0: off)", min_decoded_side, 0, MAX_SIDE)
    if max_value is not None:
        check_range("data.max_value", max_value, 255, WHITE)
    if on_bad_image not in ON_BAD_IMAGE:
        raise UserError(f"unknown data.on_bad_image {written(on_bad_image)}; {suggest(on_bad_image, ON_BAD_IMAGE)}")
    if sampling not in SAMPLINGS:
        raise UserError(f"unknown data.sampling {written(sampling)}; {suggest(sampling, SAMPLINGS)}")
    if orientation not in ORIENTATIONS:
        raise UserError(f"unknown data.orientation {written(orientation)}; {suggest(orientation, ORIENTATIONS)}")
    chains = {}
    for name, text in {"train": train_transforms, "eval": eval_transforms}.items():
        try:
            chains[name] = parse_transforms(text, image_size)
        except UserError as error:
            raise UserError(f"data.{name}_transforms: {error}") from None
    return chains


def check_class_names(expected: Sequence[str], split: Split) -> None:
    """Raises UserError unless the classes of `split` are the expected ones, in the same order.

    Otherwise a label would mean another class: if a split lacks the folder of one class, the numbers of all later
    classes shift. Names are compared in Unicode's composed form, in which sources give them.
    """
    expected = tuple(map(composed, expected))
    if expected != split.class_names:
        missing = sorted(set(expected) - set(split.class_names))[:5]
        extra = sorted(set(split.class_names) - set(expected))[:5]
        moved = [pair for pair in zip(expected, split.class_names, strict=False) if pair[0] != pair[1]][:1]
        order = (
            "" if missing or extra or not moved else f"; another order: {moved[0][1]} where {moved[0][0]} is expected"
        )
        raise UserError(
            f"the data of {'training' if split.train else 'evaluation'} has "
            f"{counted(len(split.class_names), 'class')}, and not the {len(expected)} that are expected"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not expected: {', '.join(extra)}" if extra else "")
            + order
            + ". Training, evaluation and checkpoint must have the same classes in the same order."
        )
