"""Writes a network as a program of another runtime: whole, verified, or not at all."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xception_flax.export import onnx, quantizing, stablehlo, tensorflow, verifying
from xception_flax.export.description import describe
from xception_flax.export.options import Options
from xception_flax.export.program import Program
from xception_flax.export.quantizing import Quantized
from xception_flax.export.verifying import Verified
from xception_flax.host.files import beside, check_new, write_whole
from xception_flax.host.libraries import check_extra
from xception_flax.inference.predictor import Predictor
from xception_flax.text import naming, sizes
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup
from xception_flax.weights.pretrained import Pretrained


class Format(NamedTuple):
    """A kind of file.

    Attributes:
      write: writes a program to a path, with metadata where it has a place for them.
      runner: a program in Python that runs such a file by its own runtime: `FILE IMAGES.npy OUTPUTS.npy`.
      suffix: of the file; '' for a folder.
      meaning: in the words of the help.
      writers: libraries that write it, as they are imported.
      runtimes: that run it.
      distributions: whose versions go into the metadata.
      any_size: whether it can be written for images of other sizes too.
      describe: puts metadata into a file that was written, in place of those there; None if it has no place for them.
    """

    write: Callable[[Program, Path, dict[str, Any], Options], None]
    runner: str
    suffix: str
    meaning: str
    writers: tuple[str, ...]
    runtimes: tuple[str, ...]
    distributions: tuple[str, ...]
    any_size: bool = True
    describe: Callable[[Path, dict[str, Any]], None] | None = None


# The name of a format is that of the extra that installs its libraries.
FORMATS = {
    "stablehlo": Format(stablehlo.write, stablehlo.RUNNER, ".stablehlo", "for JAX", ("flatbuffers",), (), ("jax",)),
    "onnx": Format(
        onnx.write,
        onnx.RUNNER,
        ".onnx",
        "for ONNX Runtime",
        ("onnx",),
        ("onnxruntime",),
        ("onnx",),
        describe=onnx.describe,
    ),
    "savedmodel": Format(
        tensorflow.write_saved_model,
        tensorflow.SAVED_MODEL_RUNNER,
        "",
        "for TensorFlow",
        ("tensorflow",),
        ("tensorflow",),
        ("jax", "tensorflow"),
        any_size=False,
        describe=tensorflow.describe_saved_model,
    ),
    "litert": Format(
        tensorflow.write_litert,
        tensorflow.LITERT_RUNNER,
        ".tflite",
        "for LiteRT, one image at a time",
        ("tensorflow",),
        ("ai_edge_litert",),
        ("jax", "tensorflow"),
        any_size=False,
    ),
}


class Written(NamedTuple):
    """What is known of a file that was written.

    Attributes:
      verified: how far its outputs are from the network's, of an int8 file before it was quantized; None if not run.
      quantized: what int8 changed; None in float32.
    """

    verified: Verified | None
    quantized: Quantized | None


def check(form: str, output: Path, options: Options, *, verify: bool) -> None:
    """Raises UserError if a format is unknown or has no such option, a library is missing, or `output` cannot be it."""
    found = lookup(FORMATS, form, "format")
    if found.suffix and output.suffix != found.suffix:
        raise UserError(f"--output {output}: a file of {form} must end in {found.suffix!r}, got {output.suffix!r}.")
    others = [each.suffix for each in FORMATS.values() if each.suffix]
    if not found.suffix and output.suffix in others:
        raise UserError(f"--output {output}: {form} is a folder; take a name that does not end in {output.suffix!r}.")
    if options.any_size and not found.any_size:
        raise UserError(f"--any-size is not of {form}, which is written for images of one size.")
    check_extra(form, found.writers, f"writing {form}")
    if options.int8 is not None:
        if form != "onnx":
            raise UserError(f"--int8 is of onnx, not of {form}.")
        check_extra(form, quantizing.LIBRARIES, "--int8")
    if verify:
        check_extra(form, found.runtimes, f"--verify of {form}")
    check_new(output)
    check_new(beside_it(output))


def beside_it(output: Path) -> Path:
    """Returns the path of the description beside a file."""
    return output.with_name(f"{output.name}.json")


def input_shape(program: Program, options: Options) -> list[int | str]:
    """Returns the sizes of the input, with names for those that are free."""
    height, width, channels = program.image_shape
    return ["batch", *(("height", "width") if options.any_size else (height, width)), channels]


def write(
    program: Program,
    predictor: Predictor,
    pretrained: Pretrained,
    form: str,
    output: Path,
    options: Options,
    images: Sequence | None,
) -> Written:
    """Writes a network, and its description beside it in `OUTPUT.json` and, where the format has a place, inside.

    Args:
      program: the network as a function.
      predictor: the same network.
      pretrained: the same, for its description.
      form: one of `FORMATS`.
      output: the file or folder, which is not there yet.
      images: that the file is verified with, by its own runtime; None not to verify it.

    Raises:
      UserError: see `check`; or the format has no place for this network.
      NotVerifiedError: the file does not do what the network does. Then there is no file.
    """
    check(form, output, options, verify=images is not None)
    found, verified, quantized = FORMATS[form], None, None
    metadata = describe(program, predictor, pretrained, form, found.distributions)
    metadata["input"]["shape"] = input_shape(program, options)
    with _no_description_alone(output), beside(output) as partial:
        found.write(program, partial, metadata, options)
        if images is not None:
            height, width, _ = program.image_shape
            larger = sizes.normal((height + stablehlo.SIZE_STEP, width + stablehlo.SIZE_STEP))
            others = [larger] if options.any_size else []
            verified = verifying.verify(program, predictor, partial, found.runner, images, sizes=others)
            key = "verified" if options.int8 is None else "verified_float32"  # before it is quantized
            metadata |= {key: {"largest_difference": verified.difference, "images": verified.images}}
        if options.int8 is not None:
            quantized = quantizing.quantize(program, predictor, partial, metadata, options)
        if found.describe is not None:
            found.describe(partial, metadata)
        write_whole(beside_it(output), [naming.to_json(metadata, indent=2).encode()])  # before the file has its name
    return Written(verified, quantized)


@contextlib.contextmanager
def _no_description_alone(output: Path) -> Iterator[None]:
    """Removes the description of a file that did not get its name after all."""
    try:
        yield
    except BaseException:
        if not os.path.lexists(output):
            beside_it(output).unlink(missing_ok=True)
        raise
