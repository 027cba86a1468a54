"""Runs an exported file by its own runtime alone, and compares it with the network that it is from."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from xception_flax.data.decoding import BadImageError
from xception_flax.export import process
from xception_flax.export.program import Program, in_float32
from xception_flax.inference.predictor import Predictor
from xception_flax.inference.preprocessing import Image, Preprocessing
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.weights.verifying import MAX_DIFFERENCE, difference

MAX_IMAGES = 32

# A probability below this is taken for it: its logarithm in float32 means nothing.
LEAST_PROBABILITY = 1e-30

_ALONE = """
assert not [name for name in sys.modules if name.partition(".")[0] == "xception_flax"]
"""


class NotVerifiedError(Exception):
    """An exported file does not do what its source does."""


class Verified(NamedTuple):
    """How far an exported file is from its source.

    Attributes:
      difference: the largest, as a share of what an image changes; of logits, or of the logarithms of probabilities.
      images: that were compared.
    """

    difference: float
    images: int


def photos() -> list[np.ndarray]:
    """Returns eight crops of the two photos that come with scikit-learn, uint8 `[H, W, 3]`."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photo in load_sample_images().images:  # 427 x 640
        height, width = photo.shape[:2]
        crops += [photo, photo[:, : width // 2], photo[:, width // 2 :], photo[height // 4 :, width // 4 :]]
    return crops


def verify(
    program: Program, predictor: Predictor, file: Path, runner: str, images: Sequence, *, sizes: Sequence[int] = ()
) -> Verified:
    """Runs an exported file in a process that has no part of this project, and compares.

    Args:
      program: that was exported.
      predictor: the network that it is from; it computes the same in float32.
      file: what was written.
      runner: a program in Python: `FILE IMAGES.npy OUTPUTS.npy` are its arguments.
      images: as `Predictor.predict` takes a list of them.
      sizes: other sizes of images to compare, in pixels.

    Raises:
      NotVerifiedError: the outputs differ by more than `MAX_DIFFERENCE`, or the runtime cannot run the file.
      UserError: an image cannot be read.
    """
    worst = 0.0
    for size in (program.image_shape[0], *sizes):
        pixels = prepared(predictor.preprocessing._replace(image_size=size), images)
        expected = _logarithm(source_outputs(program, predictor, pixels), program.outputs)
        found = _logarithm(run(file, runner, pixels), program.outputs)
        worst = max(worst, difference(found, expected))
    if not worst <= MAX_DIFFERENCE:  # NaN too
        raise NotVerifiedError(f"its outputs differ from the network's by {worst:.1e} of their spread")
    return Verified(worst, len(images))


def prepared(preprocessing: Preprocessing, images: Sequence[Image]) -> np.ndarray:
    """Returns images as an exported file takes them: uint8 `[N, H, W, C]`.

    Raises:
      UserError: an image cannot be read; the message says which.
    """
    pixels = []
    for image in images:
        try:
            pixels.append(np.rint(preprocessing.prepare(image)).astype(np.uint8))
        except BadImageError as error:
            raise UserError(f"{naming.shown(image)}: {error}") from None
    return np.stack(pixels)


def source_outputs(program: Program, predictor: Predictor, pixels: np.ndarray) -> np.ndarray:
    """Returns what the network itself gives for pixels `[N, H, W, C]`, in float32: `[N, size]`."""
    name = {"features": "pooled"}.get(program.outputs, program.outputs)
    source = Predictor(
        in_float32(predictor.model),
        predictor.variables,
        predictor.class_names,
        predictor.preprocessing._replace(image_size=pixels.shape[1], rounded=True),
        mesh=predictor.mesh,
        activation=predictor.activation,
        batch_size=min(predictor.batch_size, len(pixels)),
    )
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs compute float32 with fewer bits otherwise
        return source.run(pixels, (name,))[name]


def run(file: Path, runner: str, pixels: np.ndarray) -> np.ndarray:
    """Returns what a file gives for pixels by its own runtime, in a process of its own.

    Raises:
      NotVerifiedError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "images.npy", Path(folder) / "outputs.npy"
        np.save(given, pixels)
        if (reason := process.run(runner + _ALONE, file, given, made)) is not None:
            raise NotVerifiedError(f"its own runtime does not run it: {reason}")
        return np.load(made)


def _logarithm(values: np.ndarray, outputs: str) -> np.ndarray:
    return np.log(np.maximum(values, LEAST_PROBABILITY)) if outputs == "probabilities" else values
