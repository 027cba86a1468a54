"""StableHLO, by `jax.export`: one file, which JAX alone reads and runs, on every platform it was written for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from xception_flax.export.options import Options
from xception_flax.export.program import Program
from xception_flax.models import ops
from xception_flax.text.errors import UserError

SIZE_STEP = 32  # pixels: the stride of the last features, by which sizes may differ with `any_size`

RUNNER = """\
import sys, jax, numpy
from jax import export
with open(sys.argv[1], "rb") as file:
    program = export.deserialize(bytearray(file.read()))
numpy.save(sys.argv[3], program.call(numpy.load(sys.argv[2])))
"""


def write(program: Program, path: Path, metadata: dict[str, Any], options: Options) -> None:
    """Writes the program with its parameters, for any number of images.

    Args:
      metadata: is not in the file, which has no place for it.

    Raises:
      UserError: the program is not possible for a platform.
    """
    height, width, channels = program.image_shape
    try:
        if options.any_size:
            names, least = ("h", "w"), min(height // SIZE_STEP, 3)
            shape = export.symbolic_shape(
                ", ".join(["batch", *(f"{SIZE_STEP}*{name}+{height % SIZE_STEP}" for name in names), str(channels)]),
                constraints=[f"{name} >= {least}" for name in names],
            )
        else:
            shape = export.symbolic_shape(f"batch, {height}, {width}, {channels}")
        traced = jax.jit(lambda images: program.function(program.variables, images))
        with ops.lowering("portable"):  # no kernels: a later version of JAX need not run them
            exported = export.export(traced, platforms=options.platforms)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    except NotImplementedError as error:
        raise UserError(f"this network has no program for {', '.join(options.platforms)}: {error}") from error
    path.write_bytes(exported.serialize())
