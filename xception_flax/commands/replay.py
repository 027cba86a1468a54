"""Computes one step of a run again and shows it layer by layer: why a loss or a gradient is not finite.

It starts from the nearest older checkpoint, with the same images, order and random keys, and writes nothing into
WORKDIR. Without --step it looks for the first step after the newest checkpoint that is not finite.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.host import files
from xception_flax.recipes import reading
from xception_flax.recipes.comparing import differences
from xception_flax.runs import replaying
from xception_flax.runs.replaying import Example, Replayed
from xception_flax.runs.workdir import read_recipe
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training.probing import Values
from xception_flax.training.program import Program
from xception_flax.training.state import TrainState
from xception_flax.weights import initial

EXAMPLES = """\
  xception-flax replay runs/photos
  xception-flax replay runs/photos --step 1234 --output step_1234
  JAX_PLATFORMS=cpu xception-flax replay runs/photos --step 1234 --config.data.data_dir=/mnt/photos"""

BATCH, TABLE = "batch.npz", "step.json"  # in the folder of the output

MAX_IMAGES = 32  # shown; all are in the table
OUT_OF_MEMORY = "Replay on the CPU (JAX_PLATFORMS=cpu), or on more devices."


def main(argv: list[str]) -> int:
    arguments, overrides = _parser().parse_known_args(argv)
    workdir, output = arguments.workdir, arguments.output
    recipe = read_recipe(workdir)
    config = reading.override(recipe, overrides, ("data", "mesh"))
    if changed := differences(recipe, config):
        raise UserError("another value would make it another run:\n  " + "\n  ".join(changed))
    files.check_new(output)
    if output.absolute().resolve().is_relative_to(workdir.absolute().resolve()):
        raise UserError(f"--output {output} lies in {workdir}, which stays as it is; take a place outside of it.")
    cli.start(arguments)

    def begin(program: Program, mesh: Mesh, split: data.Split) -> TrainState:
        return _initial(config, program, mesh, split)

    own_mesh = any(text.startswith("--config.mesh.") for text in overrides)
    with cli.out_of_memory(OUT_OF_MEMORY):
        found = replaying.replay(workdir, config, arguments.step, begin, own_mesh=own_mesh)
    with files.beside(output) as folder:
        folder.mkdir()
        np.savez(folder / BATCH, **_arrays(found))
        (folder / TABLE).write_text(naming.to_json(_table(found, workdir), indent=1, allow_nan=False) + "\n")
    _show(found, workdir)
    print(f"\n  see {naming.shown(output / TABLE)}, {naming.shown(output / BATCH)}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("xception-flax replay", __doc__, EXAMPLES, hosts=False)
    parser.add_argument("workdir", type=cli.directory, metavar="WORKDIR", help="of a run of train.py")
    parser.add_argument("--step", type=cli.positive, metavar="K", help="which step, from 1 on")
    parser.add_argument(
        "--output",
        type=cli.directory,
        default=Path("replayed"),
        metavar="DIR",
        help=f"new folder for the batch ({BATCH}) and the table ({TABLE}); default: replayed",
    )
    cli.add_overrides(parser, what="say where the data is or how many devices compute (groups data, mesh)")
    return parser


def _initial(config: ConfigDict, program: Program, mesh: Mesh, split: data.Split) -> TrainState:
    """Returns the state before the first step, as `train.py` makes it."""
    if config.init.bn_batches:
        raise UserError(
            "no checkpoint is older than this step, and the run began with statistics of batches (init.bn_batches), "
            "which are not computed again; give a step after its first checkpoint."
        )
    weights = initial.load(
        **config.init,
        **config.normalize,
        model=program.model,
        image_shape=split.image_shape,
        mesh=mesh,
        class_names=split.class_names,
    )
    return program.init(jax.random.key(config.seed), weights.arrays)


# Files ---------------------------------------------------------------------------------------------


def _arrays(found: Replayed) -> dict[str, np.ndarray]:
    """Returns the batch: as the data has it, and what mixing made of it."""
    arrays = dict(found.batch) | {
        "names": np.array([example.name for example in found.examples]),
        "index": np.array([example.index for example in found.examples]),
    }
    if found.mixing:
        arrays["mixed_images"] = found.probed.batch["images"]
        arrays["mixed_share"] = found.probed.batch["share"]
    return arrays


def _table(found: Replayed, workdir: Path) -> dict[str, Any]:
    return {
        "workdir": naming.decoded(workdir),
        "step": found.step,
        "from_checkpoint": found.start,
        "devices": found.devices,
        "first_not_finite": found.first(),
        "earlier_step_not_finite": found.earlier,
        "earlier_update_not_finite": found.earlier_update,
        "values": {name: _number(value) for name, value in found.values.items()},
        "skipped": found.skipped,
        "mixing": found.mixing,
        "notes": found.notes,
        "state_before_not_finite": found.before,
        "state_after_not_finite": found.after,
        "layers": [
            {
                "layer": layer.name,
                "output": _json(layer.output),
                "output_gradient": _json(layer.output_gradient),
                "weight_gradient": None if layer.weight_gradient is None else _json(layer.weight_gradient),
                "images_not_finite": np.flatnonzero(layer.images).tolist(),
            }
            for layer in found.probed.layers
        ],
        "images": [example._asdict() | {"loss": _number(example.loss)} for example in found.examples],
    }


def _json(values: Values) -> dict[str, float | int | None]:
    return {
        "norm": _number(values.norm),
        "min": _number(values.low),
        "max": _number(values.high),
        "not_finite": values.not_finite,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Words ---------------------------------------------------------------------------------------------


def _show(found: Replayed, workdir: Path) -> None:
    layers = found.probed.layers
    columns = {"layer": [layer.name for layer in layers]} | _columns("", [layer.output for layer in layers])
    console.show_columns("forward: what each layer gives", columns)
    layers = layers[::-1]
    columns = {"layer": [layer.name for layer in layers]}
    columns |= _columns("output ", [layer.output_gradient for layer in layers])
    columns |= _columns("weights ", [layer.weight_gradient for layer in layers])
    console.show_columns("backward: the gradients of its output and its weights", columns)
    # If the loss of all is not finite, those that may have caused it come first.
    suspicious = sorted(found.examples, key=lambda example: example.pixels_finite and not example.no_class)
    shown = [example for example in suspicious if example.suspicious][:MAX_IMAGES]
    title = "images to look at: pixels or loss not finite, or a label of no class"
    if not shown:
        shown, title = found.examples[:MAX_IMAGES], "images of the batch"
    console.show_columns(
        title + (f" ({len(shown)} of {len(found.examples)})" if len(shown) < len(found.examples) else ""),
        {
            "name": [naming.shown(example.name) for example in shown],
            "index": [str(example.index) for example in shown],
            "label": [_label(example) for example in shown],
            "pixels": ["finite" if example.pixels_finite else "NOT FINITE" for example in shown],
            "loss": [f"{example.loss:.4g}" if example.counts else "left out" for example in shown],
        },
    )
    rows = {
        "computed": f"from {replaying.origin(found.start)}, on {found.devices}",
        **{name: f"{value:.6g}" for name, value in found.values.items() if name in ("loss", "gradient_norm")},
        **({"mixing": found.mixing} if found.mixing else {}),
        **{f"note {number}": note for number, note in enumerate(found.notes, 1)},
        "first not finite": found.first() or "nothing: all is finite",
    }
    if found.earlier is not None:
        what = f"{'the update of ' if found.earlier_update else ''}step {found.earlier:,}"
        rows["before it"] = f"{what} was not finite already: look at --step {found.earlier}"
    console.show_table(f"{naming.shown(workdir)}, step {found.step:,}", rows)


def _columns(prefix: str, values: Sequence[Values | None]) -> dict[str, list[str]]:
    def column(name: str) -> list[str]:
        return [
            "" if each is None or math.isnan(getattr(each, name)) else f"{getattr(each, name):.3g}" for each in values
        ]

    return {
        f"{prefix}norm": column("norm"),
        f"{prefix}min": column("low"),
        f"{prefix}max": column("high"),
        f"{prefix}not finite": ["" if each is None else f"{each.not_finite:,}" for each in values],
    }


def _label(example: Example) -> str:
    labels = [naming.shown(label) for label in example.labels]
    return ", ".join([*labels, *(f"{number}, which is no class" for number in example.no_class)])
