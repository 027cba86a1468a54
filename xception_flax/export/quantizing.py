"""ONNX in int8: calibrated on a user's images, and what that costs, measured on others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xception_flax.data.sources import folder
from xception_flax.export import onnx, verifying
from xception_flax.export.options import Options
from xception_flax.export.program import Program
from xception_flax.inference.predictor import Predictor
from xception_flax.text.errors import UserError
from xception_flax.text.naming import canonical, composed

MAX_CALIBRATED, MAX_MEASURED = 128, 512  # images
LEAST_HALVES = 16  # images: with fewer in the folder, all of them are calibrated on and measured

LIBRARIES = ("onnx", "onnxruntime")  # as they are imported
SCHEME = "static, QDQ, per channel; activations uint8, weights int8"

# What ONNX Runtime's quantizer knows of our graphs. Softmax and the logits stay float32: eight bits of a logit would
# be steps of a tenth and more.
OPERATIONS = ["Conv", "Gemm", "Add", "Concat", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool"]


class Quantized(NamedTuple):
    """What int8 changes, against the file in float32, both run by ONNX Runtime.

    Attributes:
      calibrated: images that the ranges of activations are from.
      measured: images of what follows.
      held_out: whether none of them was calibrated on.
      agreeing: of them, those with the same top-1; for one logit, on the same side of 1/2.
      largest, mean: change of a probability.
      labelled: of them, those in a folder called as a class of the network.
      right: of those, how many have the right top-1: in float32, in int8.
    """

    calibrated: int
    measured: int
    held_out: bool
    agreeing: int
    largest: float
    mean: float
    labelled: int
    right: tuple[int, int]

    def describe(self) -> dict[str, Any]:
        """As JSON, for beside the file."""
        said = {
            "images": self.measured,
            "held_out": self.held_out,
            "top1_agreement": self.agreeing / self.measured,
            "largest_change_of_probability": self.largest,
            "mean_change_of_probability": self.mean,
        }
        if self.labelled:
            shares = {name: right / self.labelled for name, right in zip(("float32", "int8"), self.right, strict=True)}
            said |= {"labelled_images": self.labelled, "top1": shares}
        return said


def images_of(directory: Path) -> tuple[list[Path], list[Path]]:
    """Returns the images to calibrate on, and those to measure: every other one, in the order of their names.

    Raises:
      UserError: there is none.
    """
    found, _ = folder.list_files(directory)
    if not found:
        raise UserError(f"--int8 {directory} has no image (of {', '.join(folder.IMAGE_SUFFIXES)}).")
    halves = (found[::2], found[1::2]) if len(found) >= LEAST_HALVES else (found, found)
    return _some(halves[0], MAX_CALIBRATED), _some(halves[1], MAX_MEASURED)


def quantize(
    program: Program, predictor: Predictor, file: Path, metadata: dict[str, Any], options: Options
) -> Quantized:
    """Replaces an ONNX file by the same in int8, and measures what that changes.

    Args:
      program: that was exported, probabilities or logits.
      predictor: the same network.
      file: in float32.
      metadata: what was done is added, and what it costs. Those in `file` get lost.
      options: with `int8`, a folder of images.

    Raises:
      UserError: an image cannot be read.
      NotVerifiedError: ONNX Runtime does not run the file.
    """
    calibrated, measured = images_of(options.int8)
    pixels = verifying.prepared(predictor.preprocessing, measured)
    before = _probabilities(program, predictor, verifying.run(file, onnx.RUNNER, pixels))
    _write(file, verifying.prepared(predictor.preprocessing, calibrated))
    after = _probabilities(program, predictor, verifying.run(file, onnx.RUNNER, pixels))
    labels = _labels(options.int8, measured, predictor)
    change = np.abs(after - before)
    quantized = Quantized(
        calibrated=len(calibrated),
        measured=len(measured),
        held_out=not set(calibrated) & set(measured),
        agreeing=int((_top1(before) == _top1(after)).sum()),
        largest=float(change.max()),
        mean=float(change.mean()),
        labelled=int((labels >= 0).sum()),
        right=(int((_top1(before) == labels).sum()), int((_top1(after) == labels).sum())),
    )
    metadata["quantized"] = {
        "scheme": SCHEME,
        "by": "onnxruntime.quantization",
        "calibrated_images": len(calibrated),
        "measured": quantized.describe(),
    }
    metadata["versions"] = _with_onnxruntime(metadata["versions"])
    return quantized


def _write(file: Path, pixels: np.ndarray) -> None:
    """Quantizes a file in its place; activations get the ranges that they have for pixels `[N, H, W, C]`."""
    import onnx as library
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(pixels)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    model = library.load(file)
    # So it does not advise a preparation that has nothing left to do: our graph has shapes, and nothing to fold.
    library.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantization.quantize_static(
        model,
        file,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=OPERATIONS,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    library.checker.check_model(library.load(file), full_check=True)


def _with_onnxruntime(versions: dict[str, str]) -> dict[str, str]:
    import onnxruntime

    return versions | {"onnxruntime": onnxruntime.__version__}


def _probabilities(program: Program, predictor: Predictor, values: np.ndarray) -> np.ndarray:
    return values if program.outputs == "probabilities" else np.asarray(predictor.activate(values))


def _top1(probabilities: np.ndarray) -> np.ndarray:
    """The class of each image `[N]`; of one logit, whether it is of its class."""
    return probabilities.argmax(1) if probabilities.shape[1] > 1 else (probabilities[:, 0] > 0.5).astype(int)


def _labels(directory: Path, images: Sequence[Path], predictor: Predictor) -> np.ndarray:
    """The class of each image, by the name of its folder in `directory`: `[N]`, -1 where the network has no such."""
    names = [composed(name) for name in predictor.class_names]
    # Nobody says whether numbers that are folders are the network's, see `inference.evaluation.match`.
    if len(names) == 1 or len(set(names)) < len(names) or (predictor.names_assumed and names[0] == "0"):
        return np.full(len(images), -1)
    numbers = {name: i for i, name in enumerate(names)}
    return np.array([numbers.get(canonical(image.relative_to(directory).parts[0]), -1) for image in images])


def _some(paths: list[Path], most: int) -> list[Path]:
    """At most so many, evenly from all of them."""
    return [paths[i] for i in np.linspace(0, len(paths) - 1, min(len(paths), most)).astype(int)]
