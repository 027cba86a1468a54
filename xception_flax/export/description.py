"""What an exported file is, as JSON: inside it where its format has a place, and beside it."""

from importlib import metadata
from pathlib import Path
from typing import Any

from xception_flax import __version__
from xception_flax.export.program import Program
from xception_flax.inference.predictor import Predictor
from xception_flax.weights import description
from xception_flax.weights.pretrained import Pretrained


def describe(
    program: Program, predictor: Predictor, pretrained: Pretrained, form: str, libraries: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the description of an exported file.

    It is that of our own files of weights, with what the source does not say filled in, and of the file itself:
    'input', 'output', and the versions of the libraries that wrote it.

    Args:
      form: name of the format.
      libraries: distributions that wrote the file, beside this one.
    """
    p = predictor.preprocessing
    origin = dict(predictor.origin)
    if "file" in origin:
        origin["file"] = Path(origin["file"]).name  # its folder says something of a person, not of the network
    return {
        "format": form,
        "versions": {"xception_flax": __version__} | {name: metadata.version(name) for name in libraries},
        "input": {
            "name": "images",
            "dtype": "uint8",
            "channels": {1: "gray", 3: "RGB", 4: "RGBA"}.get(p.channels, p.channels),
            "normalized_inside": True,
        },
        "output": {"name": program.outputs, "dtype": "float32", "shape": ["batch", program.size]},
        **description.describe(pretrained),
        "class_names": list(predictor.class_names),
        "image_size": p.image_size,
        "transforms": p.transforms,
        "normalize": {"mean": list(p.mean), "std": list(p.std)},
        "origin": origin,
    }
