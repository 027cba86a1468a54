"""Sources, transforms and the order of examples."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from xception_flax import data
from xception_flax.data import decoding, pipeline, sources, transforms
from xception_flax.data.transforms import geometry
from xception_flax.host import allocator


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, dict]:
    """For each source, a small data set on disk and the keywords that `data.load` needs for it."""
    root = tmp_path_factory.mktemp("data")
    digits = sources.digits.digits("train")
    images, labels = digits.images, digits.labels

    (root / "idx").mkdir()
    for prefix, part in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        x, y = images[part], labels[part].astype(np.uint8)
        x_header, y_header = struct.pack(">HBB3I", 0, 8, 3, *x.shape), struct.pack(">HBBI", 0, 8, 1, len(y))
        (root / "idx" / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(x_header + x.tobytes()))
        (root / "idx" / f"{prefix}-labels-idx1-ubyte").write_bytes(y_header + y.tobytes())  # plain is read too

    for split, part in (("train", slice(0, 40)), ("test", slice(40, 60))):
        for i, (image, label) in enumerate(zip(images[part], labels[part], strict=True)):
            path = root / "folder" / split / str(label) / f"{i:03}.{('png', 'jpg', 'PNG')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".jpg" if i % 3 == 1 else ".png", image)[1].tobytes())
            (path.parent / "notes.txt").write_text("no image")

    np.savez(
        root / "arrays.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:60],
        test_labels=labels[40:60],
        class_names=list("0123456789"),
    )
    return {
        "digits": {},
        "fashion_mnist": {"data_dir": str(root / "idx")},
        "folder": {"data_dir": str(root / "folder")},
        "arrays": {"path": str(root / "arrays.npz")},
        "tfds": {"data_dir": prepare_tfds(root / "tfds", images[:60], labels[:60], "array_record")},
    }


def prepare_tfds(root: Path, images: np.ndarray, labels: np.ndarray, file_format: str, several: bool = False) -> str:
    """Writes a real TFDS data set, without TensorFlow, and returns the directory of its version."""

    class SmallDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")
        pkg_dir_path = root

        def _info(self):
            label = tfds.features.ClassLabel(names=list("0123456789"))
            features = {"image": tfds.features.Image(shape=(None, None, 1)), "label": label}
            if several:
                features["labels"] = tfds.features.Sequence(label)
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(40)), "test": self._generate_examples(range(40, 60))}

        def _generate_examples(self, indices):
            for i in indices:
                example = {"image": io.BytesIO(png(images[i])), "label": int(labels[i])}
                yield i, example | ({"labels": sorted({int(labels[i]), i % 10})} if several else {})

    builder = SmallDigits(data_dir=root, file_format=file_format)
    builder.download_and_prepare()
    return str(builder.data_dir)


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


# The contract of every source ----------------------------------------------------------------------


def test_the_contract_covers_every_source(prepared):
    assert set(prepared) == set(data.SOURCES)


@pytest.mark.parametrize("name", data.SOURCES)
def test_contract(prepared, name):
    """Sources have random access and classes, and pickle. Batches have their shapes; evaluation has each image once."""
    source = data.SOURCES[name]("train", **prepared[name])
    assert isinstance(source, sources.Source)
    assert len(source.class_names) == 10
    for i in (len(source) - 1, 0):
        example = source[i]
        assert isinstance(example["image"], bytes) or example["image"].dtype == np.uint8
        assert 0 <= int(example["label"]) < 10
        again = pickle.loads(pickle.dumps(source))[i]
        assert int(again["label"]) == int(example["label"])
        assert np.array_equal(again["image"], example["image"])

    train = data.load(source=name, train=True, batch_size=8, **LOAD, **prepared[name])
    assert (train.num_images, train.image_shape) == (len(source), (32, 32, 1))
    with contextlib.closing(train.batches()) as batches:
        batch = next(batches)
    assert (batch["images"].shape, batch["images"].dtype) == ((8, 32, 32, 1), np.uint8)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((8,), np.int32)

    test = data.load(source=name, train=False, batch_size=7, **LOAD, **prepared[name])
    batches = list(test.batches())
    assert len(batches) == test.num_batches == -(-test.num_images // 7)
    assert sum(b["mask"].sum() for b in batches) == test.num_images
    seen = np.concatenate([b["labels"][b["mask"] > 0] for b in batches])
    np.testing.assert_array_equal(seen, [test.source[i]["label"] for i in range(test.num_images)])


# Digits --------------------------------------------------------------------------------------------


def test_digits_are_the_published_ones():
    """1,797 images; scikit-learn's documentation of the same file has the class counts and the mean."""
    whole = sources.digits.digits("train+validation+test")
    assert np.bincount(whole.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with np.load(Path(data.__file__).with_name("digits.npz")) as file:
        assert file["images"].shape == (1797, 8, 8)
        assert file["images"].max() == 16
        assert file["images"].mean() == pytest.approx(4.8842, abs=1e-4)
        assert file["labels"][:10].tolist() == list(range(10))


def test_digits_splits_are_fixed_and_apart():
    parts = {name: sources.digits.digits(name) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert parts["test"].labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    rows = [{image.tobytes() for image in part.images} for part in parts.values()]
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows))


# Order ---------------------------------------------------------------------------------------------


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
        seen = -1
        while seen != (seen := len(list(tmp_path.iterdir()))):
            time.sleep(1.0)
        assert 10 * batches <= seen <= 10 * (batches + 1)  # with the one that was taken


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


# Transforms ----------------------------------------------------------------------------------------


@pytest.fixture
def photo(rng) -> np.ndarray:
    return rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_resize_is_half_pixel_bilinear():
    """2 -> 4 pixels of a ramp: samples at -0.25, 0.25, 0.75, 1.25, clamped to the edge."""
    image = np.array([[[0], [100]]], np.uint8).repeat(2, 0)
    assert geometry.resize(image, None, image_size=4)[0, :, 0].tolist() == [0, 25, 75, 100]


def test_center_crop_takes_the_centre(photo):
    np.testing.assert_array_equal(geometry.center_crop(photo, None, image_size=20, fraction=0.5), photo[10:30, 20:40])
    assert geometry.center_crop(photo[:1, :1], None, image_size=4).shape == (4, 4, 3)


def test_random_resized_crop_has_the_promised_areas_and_aspects():
    """The pixels are their own coordinates, which shows the rectangle that was taken."""
    y, x = np.mgrid[0:200, 0:250].astype(np.uint8)
    coordinates = np.stack([y, x, 0 * x], -1)
    areas, aspects = [], []
    for seed in range(300):
        crop = geometry.random_resized_crop(coordinates, np.random.default_rng(seed), image_size=100, min_area=0.2)
        h = np.ptp(crop[..., 0].astype(int)) * 100 / 99
        w = np.ptp(crop[..., 1].astype(int)) * 100 / 99
        areas.append(h * w / (200 * 250))
        aspects.append(w / h)
    assert 0.18 < min(areas) < 0.25
    assert 0.85 < max(areas) <= 1.03
    assert np.mean(areas) == pytest.approx(0.55, abs=0.06)  # less than 0.6, since large ones fit less often
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4


def test_flip_mirrors_half_of_the_images(photo):
    results = [geometry.flip_left_right(photo, np.random.default_rng(seed)) for seed in range(200)]
    flipped = [np.array_equal(r, photo[:, ::-1]) for r in results]
    assert all(f or np.array_equal(r, photo) for f, r in zip(flipped, results, strict=True))
    assert 75 < sum(flipped) < 125


def test_random_affine_moves_within_its_bounds():
    image = np.zeros((101, 101, 1), np.uint8)
    image[48:53, 48:53] = 255
    centres = []
    for seed in range(100):
        moved = geometry.random_affine(image, np.random.default_rng(seed), max_degrees=20, max_shift=0.1)
        weights = moved[..., 0].astype(float)
        centres.append([(weights.sum(axis) * np.arange(101)).sum() / weights.sum() - 50 for axis in (0, 1)])
    assert 8 < np.abs(centres).max() <= 10.2
    unmoved = geometry.random_affine(image, np.random.default_rng(0))
    np.testing.assert_array_equal(unmoved, image)


def test_chains_are_parsed():
    chain = transforms.parse_transforms("random_affine(max_degrees=5, max_shift=0.1) | resize", 24)
    assert [f.func.__name__ for f in chain] == ["random_affine", "resize"]
    assert chain[0].keywords == {"max_degrees": 5, "max_shift": 0.1}
    assert chain[1].keywords == {"image_size": 24}
    assert transforms.parse_transforms("resize(image_size=7)", 24)[0].keywords == {"image_size": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rezise", "unknown transform 'rezise'; did you mean 'resize'"),
        ("resize(size=3)", "transform 'resize' takes no 'size'; .*image_size"),
        ("resize(", "must be written as name or name"),
        ("resize(3)", "must be written as name or name"),
        ("resize | ", "must be written as name or name"),
        ("__import__('os').system('true')", "must be written as name or name"),
    ],
)
def test_bad_chains_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        transforms.parse_transforms(text, 24)


def test_a_chain_that_ends_in_another_size_is_refused():
    with pytest.raises(ValueError, match=r"made an image of shape \(8, 8, 1\).*are \(32, 32, 1\)"):
        take(1, train_transforms="flip_left_right")


# Mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "digitz"}, "unknown source 'digitz'; did you mean 'digits'"),
        ({"batch_size": 15, "process_count": 2}, "batch_size=15 must be a positive multiple of the 2 processes"),
        ({"batch_size": 1258}, "batch_size=1258 is more than the 1257 images of split 'train'; take at most 1257"),
        ({"channels": 2}, "data.channels must be 1 or 3, got 2"),
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
    with pytest.raises(ValueError, match=message):
        data.load(**(LOAD | dict(source="digits", train=True, batch_size=16) | options))


def test_mistakes_in_a_folder_are_refused(prepared, tmp_path):
    root = prepared["folder"]["data_dir"]
    with pytest.raises(ValueError, match=r"no folder for split 'val'; there are: test, train"):
        sources.folder.folder("val", data_dir=root)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"has no folders of classes in it; expected .*train/CLASS"):
        sources.folder.folder("train", data_dir=str(tmp_path))
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="cat has no image"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def test_a_folder_of_classes_alone_is_split_by_names(tmp_path):
    """By SHA-256 of the file's name. Other files, the class and the folder do not matter."""

    def split(root, name, **options):
        files = sources.folder.folder(name, data_dir=str(root), **options)
        assert files.class_names == ("cat", "dog")
        return [(Path(path).name, label) for path, label in zip(files.paths, files.labels, strict=True)]

    for i in range(40):
        path = tmp_path / "a" / ("cat", "dog")[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "a" / ".hidden").mkdir()
    (tmp_path / "a" / "cat" / ".hidden.jpg").touch()
    train, val = split(tmp_path / "a", "train"), split(tmp_path / "a", "val")
    below = [f"{i:02}.jpg" for i in range(40) if hashlib.sha256(f"{i:02}.jpg".encode()).hexdigest() < "19" + 62 * "9"]
    assert sorted(val) == sorted((name, int(name[:2]) % 2) for name in below)  # 0x19.99... of 0x100 is a tenth
    assert 0 < len(val) < 10
    assert sorted(train + val) == [(f"{i:02}.jpg", i % 2) for i in range(40)]
    half = split(tmp_path / "a", "val", val_fraction=0.5)
    assert set(val) < set(half)
    assert 12 <= len(half) <= 28

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "cat" / "00.jpg").rename(tmp_path / "b" / "dog" / "00.jpg")
    (tmp_path / "b" / "cat" / "new.jpg").touch()
    old = {name for name, _ in split(tmp_path / "b", "val")} - {"new.jpg"}
    assert old == {name for name, _ in val}


def test_mistakes_in_a_folder_of_classes_are_refused(tmp_path):
    for path in ("cat/a.jpg", "dog/b.jpg"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()

    def load(split, **options):
        sources.folder.folder(split, data_dir=str(tmp_path), **options)

    with pytest.raises(ValueError, match=r"unknown split of a folder of classes 'test'; there are: train, val"):
        load("test")
    with pytest.raises(ValueError, match=r"data\.val_fraction must be in \(0, 1\), got 1\.0\."):
        load("train", val_fraction=1.0)
    with pytest.raises(
        ValueError, match=r"cat: by their names all 1 images are of split 'val' \(data\.val_fraction=0\.999"
    ):
        load("train", val_fraction=0.999)
    with pytest.raises(
        ValueError, match=r"no image is of split 'val' by the hash of its name.*folders train/CLASS and"
    ):
        load("val", val_fraction=0.001)
    (tmp_path / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird has no image"):
        load("train")
    (tmp_path / "bird" / "more").mkdir()  # neither one layout nor the other
    for split in ("cat", "dog", "train"):
        with pytest.raises(
            ValueError, match=r"images in cat, dog, and a folder in bird \(more\); expected either CLASS"
        ):
            load(split)


def test_a_folder_in_a_class_is_named(tmp_path):
    for path in ("cat/a.jpg", "dog/b.jpg", "cat/c.jpg/d.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for call in (sources.folder.folder_splits, lambda data_dir: sources.folder.folder("train", data_dir=data_dir)):
        with pytest.raises(ValueError, match=r"images in cat, dog, and a folder in cat \(c\.jpg\); expected either"):
            call(str(tmp_path))
    for i in range(9):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"images in 0, 1, 2, 3, 4 and 6 more, and a folder in cat"):
        sources.folder.folder_splits(str(tmp_path))


def test_links_to_images_are_followed_and_broken_ones_named(tmp_path):
    for path in ("train/cat/a.jpg", "elsewhere"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "train" / "cat" / "b.jpg").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "cat" / ".#a.jpg").symlink_to("an editor's lock")
    (tmp_path / "train" / "cat" / "d.jpg").mkdir()
    paths = sources.folder.folder("train", data_dir=str(tmp_path)).paths
    assert [Path(path).name for path in paths] == ["a.jpg", "b.jpg"]
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(ValueError, match=r"cat/b\.jpg is a link to .*elsewhere, which is not there; remove or mend it"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def test_every_suffix_of_what_decodes_is_read(tmp_path):
    """Pillow's own list for these formats, also in capitals, except .pfm, which has 32 bits."""
    PIL.Image.init()
    formats = {"JPEG", *decoding.FORMATS}
    suffixes = {suffix for suffix, form in PIL.Image.registered_extensions().items() if form in formats} - {".pfm"}
    assert {".jpe", ".jfif", ".ppm", ".apng"} <= suffixes <= set(sources.folder.IMAGE_SUFFIXES)
    touch(tmp_path, *(f"train/cat/{i}{s}" for i, s in enumerate([*suffixes, *map(str.upper, suffixes)])))
    files = sources.folder.folder("train", data_dir=str(tmp_path))
    assert (len(files), files.unread) == (2 * len(suffixes), ())


def test_what_is_not_read_is_counted_and_named(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(20)))
    touch(tmp_path, *(f"cat/{i}.heic" for i in range(9)), "dog/a.AVIF", "dog/b.avif", "dog/label", "about.txt")
    touch(tmp_path, "stray.png", "cat/.b.jpg", ".cache/cat/c.png")
    touch(tmp_path, ".DS_Store", "cat/._0.jpg", "cat/Thumbs.db", ".git/config", "dog/desktop.ini")  # not reported
    touch(tmp_path, "__MACOSX/cat/._0.jpg", "lost+found/0")
    (tmp_path / "cat" / ".all").symlink_to(tmp_path / "dog")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    train, val = (sources.folder.folder(split, data_dir=str(tmp_path), val_fraction=0.5) for split in ("train", "val"))
    assert len(train) + len(val) == 40
    assert train.unread == val.unread
    expected = (
        "17 of 57 files are not read: 9 .heic (cat/0.heic), 2 hidden (cat/.b.jpg), 2 .avif (dog/a.AVIF), 1 no regular "
        f"file (cat/pipe.jpg), 1 without a suffix (dog/label), 1 .txt ({tmp_path.name}/about.txt), 1 outside of a "
        f"class ({tmp_path.name}/stray.png)."
    )
    assert data.unread_of([train, val]) == data.unread_of([val, train]) == expected
    assert data.unread_of([sources.digits.digits("train")]) == ""
    of_one = "17 files are not read: 9 .heic (cat/0.heic), 2 hidden"  # one split does not know the total
    assert data.unread_of([val], whole=False).startswith(of_one)
    assert sources.folder.describe_unread(train.unread[:1], None) == "1 file is not read: 1 hidden (cat/.b.jpg)."
    assert pickle.loads(pickle.dumps(train)) == dataclasses.replace(train, unread=())  # as workers get it
    touch(tmp_path, "cat/@eaDir/0.jpg/small.jpg")  # a NAS of Synology
    assert "3 hidden" in data.unread_of([sources.folder.folder("train", data_dir=str(tmp_path))])
    shutil.rmtree(tmp_path / "cat" / "@eaDir")
    touch(tmp_path, *(f"cat/a.{kind}" for kind in ("b", "c", "d")))
    assert data.unread_of([sources.folder.folder("train", data_dir=str(tmp_path)), val]).endswith(", 2 of other kinds.")

    for name in ("cat", "dog"):
        for path in (tmp_path / name).glob("*.jpg"):
            path.unlink()
    with pytest.raises(
        ValueError, match=r"neither CLASS/\*\.jpg nor train/.* \.pnm\. 18 of 18 files are not .*9 \.heic"
    ):
        sources.folder.folder("train", data_dir=str(tmp_path))
    touch(tmp_path, "dog/0.jpg")
    with pytest.raises(ValueError, match=r"cat has no image .*its folder must go\. 12 of 12 files are not .*9 \.heic"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def test_names_that_break_lines_are_spelled():
    unread = [
        sources.folder.Unread("cat/a\n.jpg\n", ".jpg\n"),
        sources.folder.Unread(os.fsdecode(b"cat/\xe9.txt"), ".txt"),
    ]
    expected = r"2 of 5 files are not read: 1 .jpg\n (cat/a\n.jpg\n), 1 .txt (cat/\xe9.txt)."
    assert sources.folder.describe_unread(unread, 3) == expected


def test_an_example_is_made_of_shown_kinds_only(monkeypatch):
    """With a million other files beside the images, this would take seconds at each start."""
    taken = []
    monkeypatch.setattr(sources.folder, "Path", lambda path: taken.append(path) or Path(path))
    unread = [sources.folder.Unread(f"cat/{i}.{i % 20}", f".{i % 20}") for i in range(2000)]
    assert sources.folder.describe_unread(unread, 0).endswith("100 .7 (cat/7.7), 1,200 of other kinds.")
    assert taken == [f"cat/{i}.{i}" for i in range(8)]


def test_splits_that_are_not_used_are_named(tmp_path):
    """They are folders of images that look like splits, but may be something else."""
    touch(tmp_path, *(f"{split}/{c}/{c}.jpg" for split in ("train", "val", "test") for c in ("cat", "dog")))
    touch(tmp_path, "docs/img/fig.png", "unlabelled/part1/a.jpg", "notes/1/a.md")
    splits = [sources.folder.folder(split, data_dir=str(tmp_path)) for split in ("train", "val")]
    others = "Other splits there, which are not used: docs, test, unlabelled."
    assert data.unread_of(splits) == f"1 of 5 files is not read: 1 .md (1/a.md). {others}"
    assert data.unread_of(splits[1:], whole=False) == "1 file is not read: 1 .md (1/a.md)."
    (tmp_path / "notes" / "1" / "a.md").unlink()
    assert (
        data.unread_of([sources.folder.folder(split, data_dir=str(tmp_path)) for split in ("train", "val")]) == others
    )
    every = [
        sources.folder.folder(split, data_dir=str(tmp_path)) for split in sources.folder.folder_splits(str(tmp_path))
    ]
    assert data.unread_of(every) == ""
    touch(tmp_path, *(f"{i}/a/a.jpg" for i in range(9)))
    said = data.unread_of([sources.folder.folder("train", data_dir=str(tmp_path))])
    assert said == "Other splits there, which are not used: 0, 1, 2, 3, 4, 5, 6, 7 and 5 more."


def test_a_folder_without_classes_beside_splits_is_not_read(tmp_path):
    """Such as test images without labels, as in competitions, and any other files."""
    touch(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "val/cat/c.jpg", "val/dog/d.jpg")
    touch(tmp_path, "test/e.jpg", "test/f.jpg", "notes/1/g.xml", "val/h.jpg")
    assert sources.folder.folder_splits(str(tmp_path)) == ("train", "val")
    splits = [sources.folder.folder(split, data_dir=str(tmp_path)) for split in ("train", "val")]
    assert [len(split) for split in splits] == [2, 2]
    expected = "4 of 8 files are not read: 3 outside of a class (test/e.jpg), 1 .xml (1/g.xml)."
    assert data.unread_of(splits) == expected
    with pytest.raises(ValueError, match=r"test has images, and no folders that say of which class they are; expected"):
        sources.folder.folder("test", data_dir=str(tmp_path))
    touch(tmp_path, "train/i.jpg")  # a class called train, with a folder in it?
    for call in (sources.folder.folder_splits, lambda data_dir: sources.folder.folder("val", data_dir=data_dir)):
        with pytest.raises(ValueError, match=r"images in train, and a folder in train \(cat\); expected either"):
            call(str(tmp_path))


def test_other_names_of_splits_are_read_where_they_are_asked_for(tmp_path):
    touch(tmp_path, "training/cat/a.jpg", "testing/cat/b.jpg")
    assert [len(sources.folder.folder(split, data_dir=str(tmp_path))) for split in ("training", "testing")] == [1, 1]
    with pytest.raises(ValueError, match="folders in testing, training, none of which is called train"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def test_a_copy_with_decomposed_names_is_the_same_data(tmp_path):
    """macOS and some archives write such names. Splits, order and classes are the same, and the files are opened."""
    for form in ("NFC", "NFD"):
        for name in ("café", "cafz", "zürich"):  # 'café' sorts before 'cafz' if decomposed, after it if composed
            names = [unicodedata.normalize(form, f"{name}/{'éa'[i % 2]}ö{i}.jpg") for i in range(30)]
            touch(tmp_path / form, *names)
    read = {form: sources.folder.folder("train", data_dir=str(tmp_path / form)) for form in ("NFC", "NFD")}
    assert read["NFC"].class_names == read["NFD"].class_names == ("cafz", "caf\xe9", "z\xfcrich")
    names = {form: [os.path.relpath(path, tmp_path / form) for path in files.paths] for form, files in read.items()}
    assert names["NFC"] != names["NFD"]
    assert names["NFC"] == [unicodedata.normalize("NFC", name) for name in names["NFD"]]
    assert 60 < len(read["NFC"]) < 90
    assert read["NFC"].labels == read["NFD"].labels
    assert read["NFD"][0]["image"] == b""
    composed = [int(hashlib.sha256(f"\xe9\xf6{i}.jpg".encode()).hexdigest()[:16], 16) / 2**64 for i in range(0, 30, 2)]
    of_cafz = [name for name in names["NFC"] if name.startswith("cafz/\xe9")]
    assert len(of_cafz) == sum(value >= 0.1 for value in composed)

    # The same under a locale in which Python reads the bytes of these names as surrogates.
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    program = (
        "import os, sys\nfrom xception_flax.text import naming\nfrom xception_flax.data import sources\n"
        "assert sys.getfilesystemencoding() == 'ascii'\n"
        "for form in ('NFC', 'NFD'):\n"
        "    files = sources.folder.folder('train', data_dir=os.path.join(sys.argv[1], form))\n"
        "    print(files.class_names, [naming.canonical(os.path.relpath(p, files.paths[0])) for p in files.paths])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, env=os.environ | ascii_only, check=True, capture_output=True, encoding="utf-8")
    first = read["NFC"].paths[0]
    expected = f"{read['NFC'].class_names} {[os.path.relpath(path, first) for path in read['NFC'].paths]}"
    assert result.stdout.splitlines() == [expected, expected]

    touch(tmp_path / "split", "entrai\u0302nement/cat/a.jpg")
    assert len(sources.folder.folder("entra\xeenement", data_dir=str(tmp_path / "split"))) == 1
    assert sources.folder.folder_splits(str(tmp_path / "split"), "entra\xeenement") == ("entra\xeenement",)
    touch(tmp_path / "NFC", "cafe\u0301/a.jpg")
    with pytest.raises(
        ValueError, match=r"two folders of the name caf\xe9, written 'cafe\\u0301' and 'caf\\xe9'; make"
    ):
        sources.folder.folder("train", data_dir=str(tmp_path / "NFC"))


def test_splits_of_other_classes_are_refused(prepared):
    split = data.load(source="digits", train=False, batch_size=8, image_size=8)
    data.check_class_names(list("0123456789"), split)
    with pytest.raises(
        ValueError, match=r"has 10 classes, and not the 10 that .*; another order: 0 where 1 is expected"
    ):
        data.check_class_names(list("1023456789"), split)
    accented = dataclasses.replace(split, source=dataclasses.replace(split.source, class_names=("caf\xe9", "x")))
    data.check_class_names(["cafe\u0301", "x"], accented)  # as an older checkpoint may have it
    with pytest.raises(
        ValueError, match=r"has 10 classes, and not the 3 that are expected; missing: x; not expected: 2, 3"
    ):
        data.check_class_names(["0", "1", "x"], split)


def test_mistakes_in_idx_files_are_refused(prepared, tmp_path):
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte is missing, plain or as \.gz; .*apt install dataset-fashion-mnist"
    ):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    for path in Path(prepared["fashion_mnist"]["data_dir"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: not a readable IDX file"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    whole = gzip.compress(bytes(1000))
    images.write_bytes(whole[:12] + bytes([whole[12] ^ 255]) + whole[13:])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: not a readable IDX file"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"0123456"))
    with pytest.raises(ValueError, match=r"expected 8 bytes of \(2, 2, 2\), got 7; it has been cut"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + bytes(10**7)))
    with pytest.raises(ValueError, match=r"expected 8 bytes of \(2, 2, 2\), got more\.$"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2) + b"abc"))
    with pytest.raises(ValueError, match=r"ubyte\.gz holds 8,589,934,592\.0 GiB by its header, but"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"abc"))
    with pytest.raises(ValueError, match="expected an IDX file of bytes with 3 dimensions"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    labels = tmp_path / "t10k-labels-idx1-ubyte"  # EMNIST has letters in files of this kind
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([26]))
    with pytest.raises(ValueError, match="the t10k labels go up to 26, but Fashion-MNIST has 10 classes; other data"):
        sources.fashion_mnist.fashion_mnist("test", data_dir=str(tmp_path))


def test_fashion_mnist_splits(prepared):
    parts = {
        s: sources.fashion_mnist.fashion_mnist(s, **prepared["fashion_mnist"]) for s in ("train", "validation", "test")
    }
    assert {s: len(p) for s, p in parts.items()} == {"train": 55, "validation": 5, "test": 20}
    whole = sources.fashion_mnist.fashion_mnist("train+validation", **prepared["fashion_mnist"])
    np.testing.assert_array_equal(whole.images, sources.digits.digits("train").images[:60])


def test_mistakes_in_arrays_are_refused(tmp_path):
    def write(**content):
        np.savez(tmp_path / "a.npz", **content)
        return str(tmp_path / "a.npz")

    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 2])
    for content, message in [
        (dict(images=images), "has no array 'train_images'"),
        (dict(train_images=images / 255, train_labels=labels), r"must be uint8 \[N, H, W\]"),
        (dict(train_images=images, train_labels=labels[:2]), "with a label each"),
        (dict(train_images=images, train_labels=np.eye(3, dtype=int) * 2), "must be 0 or 1, got 0 to 2"),
        (dict(train_images=images, train_labels=labels * 0.5), r"must be integers, .* got 0\.5\.$"),
        (dict(train_images=images, train_labels=labels.astype(complex)), r"must be integers, .* got complex128 \(3,\)"),
        (dict(train_images=images, train_labels=["a", "b", "c"]), r"must be integers, .* got <U1 \(3,\)"),
        (dict(train_images=images, train_labels=np.zeros((3, 0), int)), r"must be integers, .* got int64 \(3, 0\)"),
        (dict(train_images=images, train_labels=labels * 4.0 - 1), r"numbers of classes, from 0 on, got -1\.$"),
        (dict(train_images=images, train_labels=labels * 1e300), r"must be the numbers of classes, got 2e\+300\.$"),
        (dict(train_images=images, train_labels=[0, 1, -(2**63)]), "from 0 on, got -9223372036854775808"),
        (dict(train_images=images, train_labels=[0, 1, 2**62]), "4,611,686,018,427,387,905 classes, .* for 3 images"),
        (dict(train_images=images, train_labels=np.uint64([0, 1, 2**64 - 1])), "18,446,744,073,709,551,616 classes"),
        (dict(train_images=images, train_labels=np.zeros((3, 2**20 + 1), bool)), "1,048,577 classes, .* for 3 images"),
        (dict(train_images=images, train_labels=labels, class_names=list("abb")), "class_names must differ, got 'b' 2"),
        (
            dict(train_images=images, train_labels=labels, class_names=["x" * 999] * 3),
            r"must differ, got .x{59} \.\.\. x{29}. 3 t",
        ),
        (dict(train_images=images, train_labels=labels, class_names=["\xe9", "e\u0301", "f"]), "got '\xe9' 2 times"),
        (dict(train_images=images, train_labels=labels, class_names=[]), r"must be a list of names, .* \(0,\)"),
        (dict(train_images=images, train_labels=labels, class_names=[["a"], ["b"], ["c"]]), "list of names, .* <U1"),
        (
            dict(train_images=np.zeros((3, 3, 8, 8), np.uint8), train_labels=labels),
            "come last: np.moveaxis.images, 1, -1",
        ),
        (dict(train_images=np.zeros((3, 8, 8, 4), np.uint8), train_labels=labels), "1 or 3 channels, got 4 of "),
        (dict(train_images=np.zeros((3, 0, 8), np.uint8), train_labels=labels), r"got uint8 \(3, 0, 8\)"),
        (dict(train_images=images, train_labels=labels, class_names=["a", "b"]), "must be in 0 to 1, got 0 to 2"),
        (dict(train_images=images, train_labels=np.eye(3, dtype=int), class_names=["a", "b"]), "2 class_names, got 3"),
        (dict(train_images=images[:0], train_labels=labels[:0]), "train_images has no image"),
        (dict(train_images=images, train_labels=np.array(1)), "with a label each, got .* and labels \\(\\)"),
        (dict(train_images=images, train_labels=np.array([0, None, 2])), "train_labels is an array of Python objects"),
    ]:
        with pytest.raises(ValueError, match=message):
            sources.arrays.arrays("train", path=write(**content))

    file = io.BytesIO()
    np.savez_compressed(file, train_images=images, train_labels=labels)
    whole = file.getvalue()
    flipped = bytearray(whole)
    flipped[whole.index(b"train_images.npy") + 60] ^= 1
    plain = io.BytesIO()
    np.save(plain, images)
    for content in (b"", b"garbage" * 9, b"PK\x03\x04" + bytes(9), whole[:200], bytes(flipped), plain.getvalue()):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is not a readable \.npz file \([^\n]+\)\.$"):
            sources.arrays.arrays("train", path=str(tmp_path / "a.npz"))


def test_labels_are_taken_in_every_form_that_means_one_thing(tmp_path):
    path, images = str(tmp_path / "a.npz"), np.zeros((3, 8, 8), np.uint8)

    def read(labels, **names):
        np.savez(path, train_images=images, train_labels=labels, **names)
        found = sources.arrays.arrays("train", path=path)
        return found.labels.dtype, found.labels.tolist(), found.class_names

    expected = (np.int32, [0, 2, 1], ("0", "1", "2"))
    for labels in (
        [0, 2, 1],
        [[0], [2], [1]],
        [0.0, 2.0, 1.0],
        np.array([0, 2, 1], ">i8"),
        np.array([[0], [2], [1]], ">f4"),
        np.array([0, 2, 1], np.float16),
    ):
        with warnings.catch_warnings(action="error"):
            assert read(np.asarray(labels)) == expected
    rows = np.eye(3)[[0, 2, 1]]
    for labels in (rows, rows > 0, rows.astype(">i2")):
        assert read(labels) == (np.uint8, rows.tolist(), ("0", "1", "2"))
    assert read(np.array([True, False, True])) == (np.int32, [1, 0, 1], ("0", "1"))
    assert read(np.array([[1], [0], [1]]), class_names=[b"no", "d\xe9j\xe0 vu".encode()]) == (
        np.int32,
        [1, 0, 1],
        ("no", "d\xe9j\xe0 vu"),
    )
    assert read([9, 0, 1])[2] == tuple("0123456789")  # a few images of many classes, for evaluation


def test_an_npz_file_is_believed_before_it_is_read(tmp_path, monkeypatch):
    """Headers that claim more than the file has, and an array larger than memory, are refused."""
    path = tmp_path / "a.npz"

    def write(shape, content):
        header, labels = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        np.save(labels, np.zeros(4, int))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train_images.npy", header.getvalue() + content)
            archive.writestr("train_labels.npy", labels.getvalue())

    for shape, content, message in [
        ((2**34, 8, 8), b"abc", r"\(17179869184, 8, 8\) by its header, 1,099,511,627,776 bytes, and has 3; the file"),
        ((4, 8, 8), bytes(255), "by its header, 256 bytes, and has 255; the file is damaged"),
        ((-4, 8, 8), bytes(256), "by its header, -256 bytes, and has 256"),
    ]:
        write(shape, content)
        with pytest.raises(ValueError, match=message):
            sources.arrays.arrays("train", path=str(path))
    write((2**28, 8, 8), b"")
    with zipfile.ZipFile(path, "a") as archive:  # the archive's directory claims it too
        archive.writestr("more", b"")
        archive.filelist[0].file_size += 2**34
    with pytest.raises(
        ValueError, match=r"holds 16\.0 GiB by its header, in \d\d\d bytes, as no images do; it is damaged"
    ):
        sources.arrays.arrays("train", path=str(path))
    write((4, 1000, 1000), bytes(4_000_000))
    assert path.stat().st_size < 10_000
    assert sources.arrays.arrays("train", path=str(path)).images.shape == (4, 1000, 1000)
    assert allocator.free_memory_bytes() > 2**27
    monkeypatch.setattr(allocator, "free_memory_bytes", lambda: 2**21)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match=r"a\.npz holds 0\.0 GiB by its header, but 0\.0 GiB of memory are free; data"):
        sources.arrays.arrays("train", path=str(path))


# TensorFlow Datasets -------------------------------------------------------------------------------


def test_tfds_by_name_and_by_directory_and_by_slice(prepared):
    directory = Path(prepared["tfds"]["data_dir"])
    assert (directory.name, directory.parent.name) == ("1.2.3", "small_digits")
    whole = sources.tfds.tfds("train", data_dir=str(directory))
    half = sources.tfds.tfds("train[:50%]", data_dir=str(directory))
    assert (len(whole), len(half)) == (40, 20)
    named = sources.tfds.tfds("train", name="small_digits", data_dir=str(directory.parent.parent))
    assert named[7]["image"] == whole[7]["image"]


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_of_no_class_is_refused(label):
    for several in (False, True):
        record = {"image": b"", "label": [1, label] if several else label}
        source = sources.tfds.TfdsSource([record], tuple("abcde"), "image", "label", several)
        with pytest.raises(sources.InputError, match=f"record 0 has the label {label}, which is none of 5 classes"):
            source[0]


def test_linked_folders_are_read_and_none_twice(tmp_path):
    for path in ("photos/a/1.jpg", "photos/a/more/2.jpg", "photos/b/3.jpg", "elsewhere/deep/4.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "photos" / "a" / "more" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "photos" / "a")
    files = sources.folder.classes_in(tmp_path / "photos")
    found = [str(Path(path).relative_to(tmp_path / "photos")) for path in files.paths]
    assert found == ["a/1.jpg", "a/more/2.jpg", "a/more/linked/deep/4.jpg", "b/3.jpg"]
    assert files.labels == (0, 0, 0, 1)


def test_tfds_with_several_labels(tmp_path):
    digits = sources.digits.digits("train")
    directory = prepare_tfds(tmp_path, digits.images[:60], digits.labels[:60], "array_record", several=True)
    source = sources.tfds.tfds("train", data_dir=directory, label_key="labels")
    single = sources.tfds.tfds("train", data_dir=directory)
    rows = np.stack([source[i]["label"] for i in range(40)])
    assert (rows.shape, rows.dtype) == ((40, 10), np.uint8)
    assert all(rows[i][single[i]["label"]] == 1 for i in range(40))
    assert set(rows.sum(-1)) == {1, 2}
    batch = next(
        data.load(source="tfds", train=False, batch_size=4, label_key="labels", data_dir=directory, **LOAD).batches()
    )
    assert (batch["labels"].shape, batch["labels"].dtype) == ((4, 10), np.uint8)


def test_mistakes_with_tfds_are_refused(prepared, tmp_path):
    directory = prepared["tfds"]["data_dir"]
    for keywords, message in [
        (dict(split="tran", data_dir=directory), r"has no split 'tran' .*there are: test, train"),
        (dict(split="train", data_dir=directory, label_key="lable"), "no feature 'lable'; did you mean 'label'"),
        (dict(split="train", data_dir=directory, label_key="image"), "must be a ClassLabel or a sequence of them"),
        (dict(split="train", data_dir=str(tmp_path)), "has no dataset_info.json; point data.data_dir at NAME/VERSION"),
        (
            dict(split="train", name="no_such_data", data_dir=str(tmp_path)),
            "no TFDS data set 'no_such_data', neither .* none is like it",
        ),
        (dict(split="train", name="imagnet2012", data_dir=str(tmp_path)), "did you mean 'imagenet2012'"),
        (
            dict(split="train", name="imagenet2012", data_dir=str(tmp_path)),
            "is not prepared in .*--config.data.data_dir=DATA",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            sources.tfds.tfds(keywords.pop("split"), **keywords)


@pytest.mark.parametrize(
    ("number", "message"),
    [(2**62, "4,611,686,018,427,387,904 classes, .* for 40 images"), (None, "says nothing of its")],
)
def test_a_number_of_classes_that_cannot_be_is_refused(prepared, tmp_path, number, message):
    """The data set has no names of classes."""
    directory = tmp_path / "small_digits" / "1.2.3"
    shutil.copytree(prepared["tfds"]["data_dir"], directory)
    (directory / "label.labels.txt").unlink()
    description = json.loads((directory / "features.json").read_text())
    label = description["featuresDict"]["features"]["label"]["classLabel"]
    label.pop("numClasses")
    label |= {} if number is None else {"numClasses": str(number)}
    (directory / "features.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        sources.tfds.tfds("train", data_dir=str(directory))


def test_tfds_in_a_format_without_random_access_is_refused(prepared, tmp_path):
    """A data set whose dataset_info.json says tfrecord, the default of TFDS, is refused before it is read."""
    directory = tmp_path / "small_digits" / "1.2.3"
    shutil.copytree(prepared["tfds"]["data_dir"], directory)
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="holds file format 'tfrecord', which has no random access; prepare"):
        sources.tfds.tfds("train", data_dir=str(directory))


def test_tensorflow_is_never_imported(prepared, tmp_path):
    """A process reads every source without importing a fake TensorFlow, which would leave a file."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\nraise ImportError('imported')"
    )
    program = f"""
import importlib, pkgutil
import xception_flax, train
for module in pkgutil.walk_packages(xception_flax.__path__, "xception_flax."):
    importlib.import_module(module.name)
from xception_flax import data
for name, options in {prepared!r}.items():
    split = data.load(source=name, train=False, batch_size=4, image_size=8, channels=1, **options)
    assert next(iter(split.batches()))["images"].shape == (4, 8, 8, 1)
print("read", len(data.SOURCES))
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout == "read 5\n", result.stderr
    assert not (tmp_path / "mark").exists()
