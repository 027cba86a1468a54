"""Real photos, which scikit-image has in its wheel, and JPEGs like ImageNet's cut from them."""

import importlib.util
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from benchmarks.worker import WorkerError

PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


@cache
def photo(name: str) -> np.ndarray:
    """Returns one of `PHOTOS`, 0.1 to 2 megapixels: uint8 `[H, W, 3]`, read-only."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise WorkerError("the photos come with scikit-image: pip install scikit-image.")
    path = Path(package.origin).parent / "data" / name
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"{path} is no image; install scikit-image anew.")
    image.setflags(write=False)
    return image


def jpegs(number: int, *, width: int = 500, height: int = 375, quality: int = 98, seed: int = 0) -> list[bytes]:
    """Returns JPEG files of pieces of the photos in turn, at random places and scales.

    By default they are like ImageNet's: 500 x 375 pixels, and with a quality of 98 a mean of 99 kB.
    """
    rng = np.random.default_rng(seed)
    encoded = []
    for i in range(number):
        image = photo(PHOTOS[i % len(PHOTOS)])
        # A piece of the right shape, from half to all of what fits, then scaled: ImageNet's are scaled photos too.
        most = min(image.shape[0] / height, image.shape[1] / width)
        scale = most * rng.uniform(0.5, 1.0)
        h, w = int(scale * height), int(scale * width)
        top, left = rng.integers(image.shape[0] - h + 1), rng.integers(image.shape[1] - w + 1)
        piece = cv2.resize(image[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_CUBIC)
        encoded.append(encode(piece, quality=quality))
    return encoded


def encode(image: np.ndarray, *, quality: int = 95) -> bytes:
    """Returns uint8 `[H, W, 3]` as a JPEG file with 4:2:0 chroma, as nearly all of ImageNet's."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()
