"""StableHLO, by `jax.export`: one file, which JAX alone reads and runs, on every platform it was written for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from xception_flax.export.options import Options
from xception_flax.export.program import Program
from xception_flax.models import ops

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
    """
    path.write_bytes(exported(program, options))


def exported(program: Program, options: Options, *, batch: int | str = "batch", lowering: str = "portable") -> bytes:
    """Returns the program with its parameters, serialized.

    Args:
      batch: number of images, or a name for any number.
      lowering: of `ops.LOWERINGS`. It must have no kernels: a later version of JAX need not run them.
    """
    height, width, channels = program.image_shape
    if options.any_size:
        sides = {"h": height, "w": width}
        pixels = [f"{SIZE_STEP}*{name}+{side % SIZE_STEP}" for name, side in sides.items()]
        shape = export.symbolic_shape(
            ", ".join([str(batch), *pixels, str(channels)]),
            constraints=[f"{name} >= {min(side // SIZE_STEP, 3)}" for name, side in sides.items()],
        )
    else:
        shape = export.symbolic_shape(f"{batch}, {height}, {width}, {channels}")
    traced = jax.jit(lambda images: program.function(program.variables, images))
    with ops.lowering(lowering):
        made = export.export(traced, platforms=options.platforms)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    return bytes(made.serialize())
