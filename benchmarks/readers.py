"""Contenders that read images: as in `contenders.py`, builders of a function, which reads `BATCHES` batches.

Files are in `job.folder/train/photo`. In mode 'random' a batch is `job.batch` random crops, each 8 to 100 % of the area
and 3:4 to 4:3 in aspect, scaled bilinearly to `job.size` pixels a side, half of them mirrored: uint8. In mode 'whole'
it is all files in order, scaled without a crop; it is written to `whole_NAME.npy` to be compared.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import Contender, Work
from benchmarks.job import Job

MODES = ("random", "whole")

BATCHES = 8  # of a run: several, because some pipelines make two at once, and every second one would be free

# A few files have as many names as ImageNet has images, so that costs of a data set's length are included.
NUM_IMAGES = 1_281_167


MAX_SIDE, QUALITY = 400, 90  # of the records that `prepared` reads


def _paths(job: Job) -> list[str]:
    return sorted(map(str, Path(job.folder, "train", "photo").iterdir()))


def _reader(job: Job, name: str, batches: Callable[[], np.ndarray]) -> Work:
    def run() -> np.ndarray:
        if job.mode == "whole":
            images = batches()
            np.save(Path(job.folder) / f"whole_{name}.npy", images)
            return images[0, 0, 0, 0]
        for _ in range(BATCHES):
            images = batches()
        if images.shape not in ((job.batch, job.size, job.size, 3), (job.batch, 3, job.size, job.size)):
            raise ValueError(f"expected a batch of {job.batch} images of {job.size} pixels, got {images.shape}")
        return images[0, 0, 0, 0]

    return run


def build_xception_flax(job: Job) -> Work:
    """`Split.batches`, as `train.py` reads them, with its allocator."""
    import dataclasses

    whole = job.mode == "whole"
    split = _split(job, "folder", job.folder)
    if not whole:
        times = NUM_IMAGES // len(split.source)
        many = dataclasses.replace(split.source, paths=split.source.paths * times, labels=split.source.labels * times)
        split = dataclasses.replace(split, source=many)
    iterator = split.batches()
    return _reader(job, "xception_flax", lambda: next(iterator)["images"])


def build_prepared(job: Job) -> Work:
    """The same of the records that `xception-flax prepare --max-side` makes of these files, which it writes first."""
    import dataclasses

    split = _prepared(job)
    many = dataclasses.replace(split.source, records=_Many(split.source.records))
    iterator = dataclasses.replace(split, source=many).batches()
    return _reader(job, "prepared", lambda: next(iterator)["images"])


def _prepared(job: Job) -> Any:
    """Returns the split of the records of these files, which are written first where they are missing."""
    from xception_flax.data.sources.tfds import Reencoding
    from xception_flax.prepare import folder, records

    how = Reencoding(MAX_SIDE, QUALITY)
    info = folder.create_info("photos", ("photo", "none"), Path(job.folder), reencoding=how)
    paths = [Path(path) for path in _paths(job)]
    images = [records.EncodedImage(path.name, 0, str(path), 0, path.stat().st_size) for path in paths]
    layout = records.create_layout(info, {"train": images}, Path(job.folder), job.folder, how)
    if not records.is_complete(layout):
        with records.claim(layout) as missing:
            records.complete(layout, records.write(layout, missing, 1, lambda num_bytes: None))
    return _split(job, "tfds", str(layout.directory))


class _Many:
    """Records, again and again, as many as ImageNet has."""

    def __init__(self, records: Sequence[Any]) -> None:
        self._records = records

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> Any:
        return self._records[index % len(self._records)]


def _split(job: Job, source: str, data_dir: str) -> Any:
    """Returns the split 'train' as training has it; in mode 'whole' as evaluation does."""
    from xception_flax import data
    from xception_flax.host import allocator

    allocator.keep_freed_memory()
    return data.load(
        source,
        data_dir=data_dir,
        train=job.mode != "whole",
        eval_split="train",
        batch_size=job.batch,
        image_size=job.size,
        train_transforms="random_resized_crop(min_area=0.08) | flip_left_right",
        num_threads=job.threads,
        num_workers=0,
    )


def build_alone(job: Job) -> Work:
    """Only decoding, crop with resizing, and flip, of files in memory: no pipeline can be faster."""
    return _alone(job, [Path(path).read_bytes() for path in _paths(job)])


def build_prepared_alone(job: Job) -> Work:
    """The same of the images of the records that `prepared` reads."""
    source = _prepared(job).source
    return _alone(job, [source[i]["image"] for i in range(len(source))])


def _alone(job: Job, files: Sequence[bytes]) -> Work:
    from xception_flax.data import decoding, transforms
    from xception_flax.host import allocator

    allocator.keep_freed_memory()
    chain = transforms.parse_transforms("random_resized_crop(min_area=0.08) | flip_left_right", job.size)
    rng = np.random.default_rng(0)

    def run() -> np.ndarray:
        for i in range(BATCHES * job.batch):
            image = decoding.decode(files[i % len(files)], 3)
            for transform in chain:
                image = transform(image, rng)
        return image[0, 0, 0]

    return run


def build_tf_data(job: Job) -> Work:
    """As TensorFlow's own ImageNet examples do it: crop in the decoder, `tf.image.resize`."""
    import tensorflow as tf

    def prepare(path: "tf.Tensor") -> "tf.Tensor":
        content = tf.io.read_file(path)
        if job.mode == "whole":
            image = tf.io.decode_jpeg(content, channels=3)
        else:
            box, size, _ = tf.image.sample_distorted_bounding_box(
                tf.io.extract_jpeg_shape(content),
                tf.zeros((0, 0, 4)),
                min_object_covered=0.0,
                aspect_ratio_range=(3 / 4, 4 / 3),
                area_range=(0.08, 1.0),
                max_attempts=10,
                use_image_if_no_bounding_boxes=True,
            )
            window = tf.concat([box[:2], size[:2]], 0)
            image = tf.image.decode_and_crop_jpeg(content, window, channels=3)
        image = tf.image.resize(image, (job.size, job.size), method="bilinear")
        if job.mode != "whole":
            image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8)

    paths = _paths(job)
    dataset = tf.data.Dataset.from_tensor_slices(paths)
    if job.mode != "whole":
        dataset = dataset.repeat().shuffle(16 * len(paths))
    dataset = dataset.map(prepare, num_parallel_calls=job.threads).batch(job.batch, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = job.threads
    iterator = iter(dataset.with_options(options).as_numpy_iterator())
    return _reader(job, "tf_data", lambda: next(iterator))


def build_torchvision(job: Job) -> Work:
    """As torchvision's reference recipe: Pillow, `RandomResizedCrop`, `DataLoader` with a worker for each CPU."""
    import itertools

    import torch
    from PIL import Image
    from torchvision import transforms

    torch.set_num_threads(1)
    whole = job.mode == "whole"
    if whole:
        steps = [transforms.Resize((job.size, job.size))]
    else:
        steps = [transforms.RandomResizedCrop(job.size), transforms.RandomHorizontalFlip()]
    prepare, paths = transforms.Compose([*steps, transforms.PILToTensor()]), _paths(job)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths) if whole else NUM_IMAGES

        def __getitem__(self, index: int) -> torch.Tensor:
            with open(paths[index % len(paths)], "rb") as file:
                return prepare(Image.open(file).convert("RGB"))

    loader = torch.utils.data.DataLoader(
        Files(), batch_size=job.batch, shuffle=not whole, num_workers=0 if whole else job.threads
    )
    iterator = itertools.chain.from_iterable(itertools.repeat(loader))
    layout = (lambda images: images.transpose(0, 2, 3, 1)) if whole else (lambda images: images)
    return _reader(job, "torchvision", lambda: layout(next(iterator).numpy()))


READERS: dict[str, Contender] = {
    "xception_flax": Contender("xception_flax", build_xception_flax, ("grain", "cv2", "simplejpeg"), ours=True),
    "prepared": Contender(
        f"xception_flax, records of {MAX_SIDE} px", build_prepared, ("grain", "cv2", "simplejpeg"), ours=True
    ),
    "alone": Contender("decode, crop, resize, flip alone", build_alone, ("grain", "cv2", "simplejpeg"), ours=True),
    "prepared_alone": Contender(
        f"decode, crop, resize, flip alone, {MAX_SIDE} px",
        build_prepared_alone,
        ("grain", "cv2", "simplejpeg"),
        ours=True,
    ),
    "tf_data": Contender("tf.data, decode_and_crop_jpeg", build_tf_data, ("tensorflow",)),
    "torchvision": Contender("torchvision's DataLoader, Pillow", build_torchvision, ("torch", "torchvision", "PIL")),
}
