"""The order of examples, on any number of processes, threads and workers; what `load` refuses."""

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from xception_flax import data
from xception_flax.data import pipeline, sources
from xception_flax.data.transforms import geometry
from xception_flax.text.errors import UserError

BILINEAR = PIL.Image.Resampling.BILINEAR
LOAD = dict(image_size=32, channels=1, train_transforms="random_affine(max_shift=0.2) | resize")


def take(count: int, start: int = 0, **options) -> list[dict]:
    split = data.load(**(LOAD | dict(source="digits", train=True, batch_size=16) | options))
    with contextlib.closing(split.batches(start)) as batches:
        return [{k: np.array(v) for k, v in b.items()} for b in itertools.islice(batches, count)]


def assert_same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_the_identity_of_a_split_is_its_data():
    """It does not depend on how the data is read. It changes with a label, a pixel, or the order of classes."""
    split = data.load("digits", train=True, batch_size=8, image_size=8, channels=1)
    source, identity = split.source, split.identity()
    assert dataclasses.replace(split, num_threads=7, process_index=1, process_count=2).identity() == identity
    assert identity["the number of images of the training data"] == 1257
    labels, images = source.labels.copy(), source.images.copy()
    labels[-1] += 1
    images[0, 3, 3] ^= 1
    content, classes = (
        "the content of the training data (SHA-256 of samples)",
        "the list of classes of the training data",
    )
    for changed, key in (
        ({"labels": labels}, content),
        ({"images": images}, content),
        ({"class_names": source.class_names[::-1]}, classes),
    ):
        other = dataclasses.replace(split, source=dataclasses.replace(source, **changed)).identity()
        assert [k for k in identity if other[k] != identity[k]] == [key]


def test_a_square_pair_is_the_number_bit_for_bit():
    """In memory, in another process and in evaluation."""
    for options in (dict(), dict(num_workers=1), dict(train=False)):
        assert_same(take(3, image_size=(32, 32), **options), take(3, **options))


def test_a_batch_is_height_times_width():
    """Rows are height: the digits, scaled whole, are 24 x 40, as Pillow has it; half of the batch on each host."""
    load = dict(
        image_size=(24, 40), train_transforms="resize(antialias=True)", eval_transforms="resize(antialias=True)"
    )
    (batch,) = take(1, train=False, **load)
    source = sources.digits.digits("test")
    expected = [np.asarray(PIL.Image.fromarray(image).resize((40, 24), BILINEAR)) for image in source.images[:16]]
    difference = np.abs(batch["images"][..., 0].astype(int) - np.stack(expected))
    assert difference.max() <= 1  # nothing shrinks, where OpenCV scales
    shares = [take(2, process_index=i, process_count=2, **load) for i in range(2)]
    for whole, *parts in zip(take(2, **load), *shares, strict=True):
        assert whole["images"].shape == (16, 24, 40, 1)
        np.testing.assert_array_equal(whole["images"], np.concatenate([part["images"] for part in parts]))


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    options = dict(train_transforms="resize", image_size=8, batch_size=419)  # 3 batches an epoch
    epochs = [np.concatenate([b["images"] for b in take(3, start, **options)]) for start in (0, 3)]
    images = [sorted(row.tobytes() for row in epoch) for epoch in epochs]
    assert images[0] == images[1] == sorted(i.tobytes() for i in sources.digits.digits("train").images)
    assert (epochs[0] != epochs[1]).any()


def test_resuming_is_arithmetic():
    """Batch n is the same from a start at 0 or at n, also across the end of an epoch (78.6 batches)."""
    whole = take(85)
    for start in (1, 40, 78, 79, 84):
        assert_same(take(1, start), whole[start : start + 1])


def test_the_seed_decides():
    assert_same(take(2, seed=1), take(2, seed=1))
    assert (take(1, seed=1)[0]["labels"] != take(1, seed=2)[0]["labels"]).any()


def test_augmentation_differs_between_epochs():
    """The same image is augmented in another way in each epoch."""
    options = dict(batch_size=1257, train_transforms="random_affine(max_shift=0.3) | resize")
    first, second = take(1, 0, **options)[0], take(1, 1, **options)[0]
    a = {i.tobytes() for i in first["images"]}
    b = {i.tobytes() for i in second["images"]}
    assert len(a & b) < 10  # of 1,257


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_makes_the_same_global_batch(processes):
    whole = take(3, 77)
    parts = [take(3, 77, process_index=i, process_count=processes) for i in range(processes)]
    for step in range(3):
        for key in ("images", "labels"):
            merged = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(merged, whole[step][key])


@pytest.mark.parametrize(
    "options", [{"num_threads": 1}, {"num_threads": 7}, {"num_threads": 2, "num_workers": 2}], ids=str
)
def test_threads_and_workers_do_not_change_a_batch(options):
    assert_same(take(5, 76, **options), take(5, 76, num_threads=4, num_workers=0))


@pytest.mark.parametrize(
    ("given", "cpus", "chosen"),
    [  # (threads in each process, worker processes)
        ((-1, -1), 1, (1, 0)),
        ((-1, -1), 2, (2, 0)),
        ((-1, -1), 15, (15, 0)),
        ((-1, -1), 16, (8, 2)),
        ((-1, -1), 112, (8, 14)),
        ((-1, 4), 112, (8, 4)),
        ((-1, 4), 6, (1, 4)),
        ((3, -1), 112, (3, 14)),
        ((5, 0), 112, (5, 0)),
    ],
)
def test_threads_and_workers_suit_the_cpus(given, cpus, chosen):
    assert pipeline.choose_threads(*given, cpus) == chosen


def test_the_cpus_are_those_of_this_process():
    """With an affinity of one CPU, as a batch system may set. Processes that share a host share its CPUs."""
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from xception_flax import data\n"
        "split = data.load('digits', train=True, batch_size=8, image_size=8, channels=1)\n"
        "print(split.num_threads, split.num_workers)"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout == "1 0\n"
    assert pipeline.usable_cpus(1) == len(os.sched_getaffinity(0))
    assert pipeline.usable_cpus(10**6) == 1


class Counted:
    """A source that records which of its examples were read, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.class_names = ("one",)

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict:
        (self.folder / str(index)).touch()
        return {"image": np.zeros((8, 8), np.uint8), "label": 0}


@pytest.mark.parametrize(
    ("num_threads", "num_workers", "batches"),
    [(1, 0, 2), (4, 0, 2), (2, 2, 2 * 6)],
)
def test_a_bounded_number_of_batches_is_made_ahead(tmp_path, num_threads, num_workers, batches):
    """However long the reader waits, so that memory is bounded."""
    split = dataclasses.replace(
        data.load("digits", train=False, batch_size=10, image_size=8, channels=1, num_threads=num_threads),
        source=Counted(tmp_path),
        num_workers=num_workers,
    )
    with contextlib.closing(split.batches()) as iterator:
        next(iterator)
        (tmp_path / "0").touch()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 10 * batches:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
        assert len(list(tmp_path.iterdir())) <= 10 * (batches + 1)  # with the one that was taken


def test_shared_memory_outlives_nobody():
    """After SIGKILL of the whole group, Python's tracker, which is not in it, frees the shared memory."""
    script = """
import time
from multiprocessing import shared_memory
from xception_flax.data import pipeline
with pipeline._signals_held():
    memory = shared_memory.SharedMemory(create=True, size=10)
print(memory.name, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        memory = Path("/dev/shm", process.stdout.readline().strip())
        assert memory.is_file()
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while memory.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("batch_size", [16, 100, 360, 400])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_every_image_once(batch_size, processes):
    seen, counts = [], set()
    for index in range(processes):
        split = data.load(
            **LOAD | dict(source="digits", train=False, batch_size=batch_size),
            process_index=index,
            process_count=processes,
        )
        batches = list(split.batches())
        counts.add(len(batches))
        seen += [i.tobytes() for b in batches for i, m in zip(b["images"], b["mask"], strict=True) if m]
        assert {b["images"].shape[0] for b in batches} == {batch_size // processes}
    assert counts == {-(-360 // batch_size)}  # the same number on every host, or collectives would hang
    expected = [
        geometry.resize(i[..., None], None, image_size=32).tobytes() for i in sources.digits.digits("test").images
    ]
    assert sorted(seen) == sorted(expected)


def test_a_chain_that_ends_in_another_size_is_refused():
    with pytest.raises(UserError, match=r"made an image of shape \(8, 8, 1\).*are \(32, 32, 1\)"):
        take(1, train_transforms="flip_left_right")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "digitz"}, "unknown source 'digitz'; did you mean 'digits'"),
        ({"batch_size": 15, "process_count": 2}, "batch_size=15 must be a positive multiple of the 2 processes"),
        ({"batch_size": 1258}, "batch_size=1258 is more than the 1,257 images of split 'train'; take at most 1257"),
        ({"channels": 2}, r"data.channels must be 1 \(gray\), 3 \(RGB\) or 4 \(RGBA\), got 2"),
        ({"image_size": 0}, r"data.image_size must be in \[1, 10,000\], got 0"),
        ({"num_threads": 0}, r"data.num_threads .* must be in \[1, 1,024\], got 0"),
        ({"num_workers": -2}, r"data.num_workers .* must be in \[-1, 256\], got -2"),
        ({"min_decoded_side": -1}, r"data.min_decoded_side \(0: off\) must be in \[0, 10,000\], got -1"),
        ({"max_value": 254}, r"data.max_value must be in \[255, 65,535\], got 254"),
        ({"max_value": 65536}, r"data.max_value must be in \[255, 65,535\], got 65536"),
        ({"on_bad_image": "skip"}, "unknown data.on_bad_image 'skip'; there are: replace, stop"),
        ({"train_split": "tran"}, "unknown split of digits 'tran'; did you mean 'train'"),
        ({"source": "folder", "data_dir": "/nowhere"}, "/nowhere is no directory; expected the folders"),
        ({"source": "fashion_mnist", "data_dir": "/nowhere"}, "/nowhere is no directory"),
        ({"source": "arrays", "path": "/nowhere.npz"}, "is no file; expected an .npz file"),
        ({"source": "tfds"}, r"needs data\.name, data\.data_dir or both: --config\.data\.name=\w+ "),
        ({"source": "tfds", "name": "imagenet2012", "data_dir": "/nowhere"}, "/nowhere is no directory"),
        (
            {"source": "tfds", "data_dir": "gs://bucket/mnist/3.0.1"},
            "to read gs://bucket/mnist/3.0.1, pip install gcsfs",
        ),
        ({"source": "tfds", "name": "mnist", "data_dir": "gs://bucket"}, "to read gs://bucket, pip install gcsfs; or"),
        ({"source": "tfds", "name": "mnist", "data_dir": "s3://bucket"}, "of buckets only gs:// is read; mount others"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        data.load(**(LOAD | dict(source="digits", train=True, batch_size=16) | options))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(9) % 3, "labels from 0 to 2, but 2 classes in class_names"),
        (np.arange(9) % 2 - 1, "labels from -1 to 0, but 2 classes"),
        (np.zeros((9, 3), np.uint8), r"labels of shape \(9, 3\), but 2 classes"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels, message, monkeypatch):
    images = np.zeros((9, 8, 8), np.uint8)
    monkeypatch.setitem(sources.SOURCES, "new", lambda split, /: sources.source.Arrays(images, labels, ("a", "b")))
    with pytest.raises(UserError, match=f"source 'new' has {message}"):
        data.load("new", image_size=8, train=True, batch_size=8)


def test_splits_of_other_classes_are_refused():
    split = data.load(source="digits", train=False, batch_size=8, image_size=8)
    data.check_class_names(list("0123456789"), split)
    with pytest.raises(
        UserError, match=r"has 10 classes, and not the 10 that .*; another order: 0 where 1 is expected"
    ):
        data.check_class_names(list("1023456789"), split)
    accented = dataclasses.replace(split, source=dataclasses.replace(split.source, class_names=("caf\xe9", "x")))
    data.check_class_names(["cafe\u0301", "x"], accented)  # as an older checkpoint may have it
    with pytest.raises(
        UserError, match=r"has 10 classes, and not the 3 that are expected; missing: x; not expected: 2, 3"
    ):
        data.check_class_names(["0", "1", "x"], split)
