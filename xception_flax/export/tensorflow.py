"""TensorFlow's SavedModel, which holds StableHLO, and LiteRT's file, which TensorFlow's converter makes of that."""

import tempfile
from pathlib import Path
from typing import Any

from xception_flax.export import process, stablehlo
from xception_flax.export.options import Options
from xception_flax.export.program import Program
from xception_flax.text import naming
from xception_flax.text.errors import UserError

DESCRIPTION = "assets.extra/xception_flax.json"  # a SavedModel's place for files of others

# In another process: TensorFlow logs a lot, wants the accelerators that JAX has, and its converter may abort.
_WRITER = """\
import sys, tensorflow as tf
from jax import export
from jax.experimental import jax2tf
with open(sys.argv[1], "rb") as file:
    program = export.deserialize(bytearray(file.read()))
(given,) = program.in_avals
call = jax2tf.convert(
    lambda images: dict(OUTPUT=program.call(images)),
    polymorphic_shapes=[str(given.shape)],
    native_serialization_platforms=program.platforms,
    with_gradient=False,
)
shape = [size if isinstance(size, int) else None for size in given.shape]
images = tf.TensorSpec(shape, tf.uint8, name="images")
function = tf.function(call, autograph=False, input_signature=[images]).get_concrete_function()
"""

_SAVED_MODEL_WRITER = """\
tf.saved_model.save(tf.Module(), sys.argv[2], signatures=function)
"""

_LITERT_WRITER = """\
with open(sys.argv[2], "wb") as file:
    file.write(tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module()).convert())
"""

SAVED_MODEL_RUNNER = """\
import sys, numpy, tensorflow
run = tensorflow.saved_model.load(sys.argv[1]).signatures["serving_default"]
(outputs,) = run(images=tensorflow.constant(numpy.load(sys.argv[2]))).values()
numpy.save(sys.argv[3], outputs.numpy())
"""

LITERT_RUNNER = """\
import sys, numpy
from ai_edge_litert.interpreter import Interpreter
run = Interpreter(sys.argv[1]).get_signature_runner("serving_default")
outputs = [next(iter(run(images=image[None]).values()))[0] for image in numpy.load(sys.argv[2])]
numpy.save(sys.argv[3], numpy.stack(outputs))
"""


def write_saved_model(program: Program, path: Path, metadata: dict[str, Any], options: Options) -> None:
    """Writes the program as a folder, for any number of images, for the platforms of `options`.

    Args:
      metadata: see `describe_saved_model`.

    Raises:
      UserError: TensorFlow fails.
    """
    _write(_SAVED_MODEL_WRITER, program, path, stablehlo.exported(program, options))


def describe_saved_model(path: Path, metadata: dict[str, Any]) -> None:
    """Writes the metadata into the folder."""
    (path / DESCRIPTION).parent.mkdir()
    (path / DESCRIPTION).write_bytes(naming.to_json(metadata, indent=2).encode())


def write_litert(program: Program, path: Path, metadata: dict[str, Any], options: Options) -> None:
    """Writes the program for one image at a time: for any number the converter lacks the slices of every other pixel.

    Args:
      metadata: is not in the file.

    Raises:
      UserError: the converter fails.
    """
    one = stablehlo.exported(program, options._replace(platforms=("cpu",)), batch=1, lowering="stock")
    _write(_LITERT_WRITER, program, path, one)


def _write(writer: str, program: Program, path: Path, exported: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "program.stablehlo"
        given.write_bytes(exported)
        reason = process.run(_WRITER.replace("OUTPUT", program.outputs) + writer, given, path)
    if reason is not None:
        raise UserError(f"TensorFlow does not write this network: {reason}")
