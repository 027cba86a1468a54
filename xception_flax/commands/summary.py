"""Shows the stages or layers of a network and their costs: a table, totals, and one line of JSON.

It works from shapes: nothing is computed and no accelerator is opened.
  output    height x width x channels; of a stage, the input of the next one
  stride    pixels of the image per pixel of the output
  MACs      multiply-adds per image, of convolutions and dense layers
  act. MB   activations per image, in 10^6 bytes: outputs of the layers that have
            parameters, in the network's dtype (float32; --config.model.dtype)
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xception_flax import models
from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.host import files
from xception_flax.host.libraries import check_extra
from xception_flax.models.summary import Row, Shape, fold, summarize, totals, trace_network
from xception_flax.recipes import checking, reading
from xception_flax.text import naming, sizes
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

EXAMPLES = """\
  xception-flax summary xception
  xception-flax summary xception65 --image-size 513 --config.model.output_stride=16
  xception-flax summary --config digits --layers
  xception-flax summary xception --picture xception.png
  xception-flax summary --all --config.model.dtype=bfloat16"""

IMAGE_SIZE = 299  # pixels a side, as in the paper
IMAGE_SIZES = {"lenet": 32}  # of networks for smaller images


# Showing -------------------------------------------------------------------------------------------


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _decimals(value: float) -> int:
    """Returns how many decimals give a value of 1 to 1000 four digits."""
    return 3 if value < 10 else 2 if value < 100 else 1


def _si(number: int) -> str:
    """8357403496 -> '8.357 G'."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:,.{_decimals(number / size)}f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    """66461440 -> '66.46 MB'."""
    return f"{_si(number)}B" if number >= 1000 else f"{number} B"


def _megabytes(numbers: Sequence[int]) -> list[str]:
    """Formats numbers of bytes, all with the decimals that suit the largest."""
    decimals = _decimals(max(numbers) / 1e6)
    return [f"{number / 1e6:,.{decimals}f}" for number in numbers]


def _show_rows(title: str, rows: Sequence[Row], *, by: str) -> None:
    columns = {
        by.removesuffix("s"): [row.name if row.count == 1 else f"{row.name} x{row.count}" for row in rows],
        "output": [_times(row.shape) for row in rows],
        "stride": [str(row.stride or "") for row in rows],
        "parameters": [f"{row.parameters:,}" for row in rows],
        "MACs": [_si(row.macs) for row in rows],
    }
    if by == "stages":  # names of layers are too long for this column too, in a terminal of 80
        total = sum(row.macs for row in rows)
        columns["share"] = [f"{100 * row.macs / total:.1f}%" for row in rows]
    columns["act. MB"] = _megabytes([row.activation_bytes for row in rows])
    console.show_columns(title, columns)


def _classes(config: ConfigDict) -> str:
    return counted(config.num_classes, "class") if config.num_classes else "no classifier"


def _record(config: ConfigDict, image_shape: Shape, totals: tuple[int, int, int, int]) -> dict[str, Any]:
    parameters, statistics, macs, activation_bytes = totals
    return {
        "name": config.name,
        "image_size": sizes.normal(image_shape[:2]),
        "channels": image_shape[2],
        "num_classes": config.num_classes,
        "parameters": parameters,
        "statistics": statistics,
        "macs": macs,
        "activation_bytes": activation_bytes,
        "parameter_bytes": parameters * np.dtype(config.param_dtype).itemsize,
    }


def _check_picture(path: Path) -> None:
    check_extra("plot", ("matplotlib",), "--picture")
    from xception_flax.display import pictures  # Matplotlib, which takes a second

    pictures.check_suffix(path)
    files.check_writable(path)


def _draw(config: ConfigDict, image_shape: tuple[int, int, int], path: Path) -> None:
    """Draws the stages, with their layers and costs."""
    from xception_flax.display.blocks import Block, draw_blocks

    model = models.create_model(**config.to_dict())
    layers: dict[str, list[str]] = {}  # by stage; a separable convolution has one name
    for layer in trace_network(model, image_shape).layers:
        stage, _, name = layer.path[0].partition("_")
        name = name.removesuffix("_depthwise").removesuffix("_pointwise")
        if name and layer.module != "BatchNorm" and name not in layers.setdefault(stage, []):
            layers[stage].append(name)
    blocks = [
        Block(
            row.name,
            row.count,
            row.shape,
            layers.get(row.name.partition(" ")[0], []),
            {
                "parameters": (row.parameters, _si(row.parameters)),
                "multiply-adds": (row.macs, _si(row.macs)),
                "activations": (row.activation_bytes, _bytes(row.activation_bytes)),
            },
        )
        for row in fold(summarize(model, image_shape))
    ]
    draw_blocks(image_shape, blocks, _title(config, image_shape), path)


def _title(config: ConfigDict, image_shape: Shape) -> str:
    return f"{config.name}, images {' x '.join(map(str, image_shape))}, {_classes(config)}"


def _summarize_one(
    config: ConfigDict, image_shape: tuple[int, int, int], *, by: str, picture: Path | None = None
) -> None:
    rows = summarize(models.create_model(**config.to_dict()), image_shape, by=by)
    record = _record(config, image_shape, totals(rows))
    if picture is not None:
        _draw(config, image_shape, picture)
    _show_rows(_title(config, image_shape), fold(rows) if by == "stages" else rows, by=by)
    console.show_table(
        "in all",
        {
            "trainable parameters": f"{record['parameters']:,}",
            "memory of parameters": f"{_megabytes([record['parameter_bytes']])[0]} MB as {config.param_dtype}",
            "moving statistics": f"{record['statistics']:,}",
            "multiply-adds": f"{_si(record['macs'])} an image",
            "memory of activations": f"{_megabytes([record['activation_bytes']])[0]} MB an image as {config.dtype}",
            **({"picture": naming.shown(picture)} if picture is not None else {}),
        },
    )
    print(naming.to_json_line(record))


def _compare(configs: Sequence[ConfigDict], image_shapes: Sequence[tuple[int, int, int]]) -> None:
    traces = [
        trace_network(models.create_model(**c.to_dict()), shape) for c, shape in zip(configs, image_shapes, strict=True)
    ]
    records = [
        _record(config, shape, totals(trace.layers))
        for config, shape, trace in zip(configs, image_shapes, traces, strict=True)
    ]
    columns = {
        "network": [record["name"] for record in records],
        "image": [sizes.spelled(record["image_size"]) for record in records],
        "features": [_times(trace.features) for trace in traces],
        "parameters": [f"{record['parameters']:,}" for record in records],
        "statistics": [f"{record['statistics']:,}" for record in records],
        "MACs": [_si(record["macs"]) for record in records],
        "act. MB": _megabytes([record["activation_bytes"] for record in records]),
    }
    console.show_columns(f"all networks, {_classes(configs[0])}", columns)
    print("[" + ", ".join(map(naming.to_json_line, records)) + "]")


# Command -------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax summary", __doc__, EXAMPLES, hosts=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME", help=f"a network: {', '.join(models.MODELS)}")
    which.add_argument("--config", metavar="FILE[:ARG]", help="the network, image size and channels of a recipe")
    which.add_argument("--all", action="store_true", help="compare all networks; the JSON is a list")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the stages: .png, .svg or .pdf; not with --all"
    )
    parser.add_argument("--layers", action="store_true", help="one row per layer instead of one per stage")
    parser.add_argument(
        "--image-size",
        type=cli.image_size,
        metavar="N|HxW",
        help="pixels a side, or height x width; default: 299 (lenet: 32), or the recipe's",
    )
    parser.add_argument("--channels", type=cli.positive, metavar="N", help="of the images, default: 3, or the recipe's")
    parser.add_argument("--num-classes", type=int, metavar="N", help="0: no classifier; default: 1000, or the recipe's")
    cli.add_overrides(parser, "model.KEY", "set a field of the network, as in a recipe")
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and not overrides[0].startswith("-"):
        parser.error(f"one NAME only, got {written(overrides[0])} too; --all compares all networks")
    if arguments.all and arguments.layers:
        parser.error("argument --layers: not allowed with argument --all, which has one row per network")
    if arguments.picture is not None:
        if arguments.all:
            parser.error("argument --picture: not allowed with argument --all; a picture shows one network")
        _check_picture(arguments.picture)
    if arguments.num_classes is not None:
        if any(text.startswith("--config.model.num_classes=") for text in overrides):
            parser.error("argument --num-classes: not allowed with --config.model.num_classes")
        overrides.append(f"--config.model.num_classes={arguments.num_classes}")

    if arguments.config is not None:
        config = reading.load(arguments.config, overrides, groups=("model",))
        choices = [(config.model, config.data.image_size, config.data.channels)]
    else:
        if any(text.startswith("--config.model.name=") for text in overrides):
            parser.error("--config.model.name is for a recipe's network (--config); else give the network as NAME")
        if not arguments.all and arguments.name not in models.MODELS and os.path.exists(arguments.name):
            raise UserError(
                f"{written(arguments.name)} is a file or folder; give the name of a network, such as xception. "
                "`xception-flax convert FILE --output OTHER` says which a file has, `recipe WORKDIR` which a run has."
            )
        choices = [
            (checking.resolve_group("model", {"name": name}, overrides), IMAGE_SIZES.get(name, IMAGE_SIZE), 3)
            for name in (models.MODELS if arguments.all else [arguments.name])
        ]
    # Shapes need no accelerator, and opening one would take memory from a run that is on it.
    jax.config.update("jax_platforms", "cpu")
    image_shapes = [
        (*sizes.sides(arguments.image_size or size), arguments.channels or channels) for _, size, channels in choices
    ]
    if arguments.all:
        _compare([config for config, _, _ in choices], image_shapes)
    else:
        by = "layers" if arguments.layers else "stages"
        _summarize_one(choices[0][0], image_shapes[0], by=by, picture=arguments.picture)
    return 0
