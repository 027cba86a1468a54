"""What a network consists of, by stages or layers: shapes, parameters, multiply-adds."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn

from xception_flax.models import costs
from xception_flax.text.lookup import lookup

Shape = tuple[int, ...]


class Row(NamedTuple):
    """Layers that are counted together, such as those of a stage.

    Attributes:
      name: of the layers, or 'first ... last' of folded rows.
      count: number of rows with equal figures that are folded into this one.
      shape: of the output, `(H, W, C)` or `(C,)`; of a stage, the shape that the next one gets.
      stride: of the output, in pixels of the image; None if the output has no pixels.
      parameters: number of trainable values; this and the following are totals of the folded rows.
      statistics: number of moving means and variances.
      macs: multiply-adds an image.
      activation_bytes: bytes of the outputs, an image.
    """

    name: str
    count: int
    shape: Shape
    stride: int | None
    parameters: int
    statistics: int
    macs: int
    activation_bytes: int


class Trace(NamedTuple):
    """What a network does with one image.

    Attributes:
      layers: in the order of computation.
      inputs: shape of the input of each top-level module, by its name.
      features: shape of the last stage of the network's `endpoints`.
    """

    layers: list[costs.Layer]
    inputs: dict[str, Shape]
    features: Shape


def trace_network(model: nn.Module, image_shape: tuple[int, int, int]) -> Trace:
    """Returns the trace of a network for one image of `image_shape`, `(H, W, C)`."""
    inputs: dict[str, Shape] = {}
    features: Shape = ()

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal features
        path, method = context.module.path, context.method_name
        if len(path) == 1 and method == "__call__":
            inputs[path[0]] = args[0].shape[1:]
        result = next_call(*args, **kwargs)
        if not path and method == "endpoints":
            features = [x.shape[1:] for name, x in result.items() if name.startswith("stage")][-1]
        return result

    with nn.intercept_methods(record):
        layers = costs.list_layers(model, image_shape)
    return Trace(layers, inputs, features)


def _stages(trace: Trace) -> Iterator[tuple[str, Shape, list[costs.Layer]]]:
    """Yields name, shape of the output and layers of each stage."""
    groups = [
        (stage, list(layers))
        for stage, layers in itertools.groupby(trace.layers, lambda layer: layer.path[0].partition("_")[0])
    ]
    for i, (stage, layers) in enumerate(groups):
        shape = layers[-1].shape
        if len(shape) == 3:
            # Operations after the last layer, such as pooling and concatenating towers, have no parameters
            # and so no row: the shape after them is that of the next stage's input. The global pooling
            # after the last features belongs to no stage.
            following = trace.inputs[groups[i + 1][1][0].path[0]] if i + 1 < len(groups) else ()
            shape = following if len(following) == 3 else trace.features
        yield stage, shape, layers


def _layers(trace: Trace) -> Iterator[tuple[str, Shape, list[costs.Layer]]]:
    for layer in trace.layers:
        yield "/".join(layer.path), layer.shape, [layer]


def summarize(model: nn.Module, image_shape: tuple[int, int, int], *, by: str = "stages") -> list[Row]:
    """Returns a row for each stage of `model`, or for each layer, in the order of computation.

    A stage is a sequence of layers whose top-level names begin with the same word: 'block2' in
    'block2_sepconv1'. Every layer with parameters is in exactly one row.

    Args:
      model: with `endpoints`, as every network of `MODELS`.
      image_shape: height and width in pixels, channels.
      by: 'stages' or 'layers'.

    Raises:
      UserError: the model does not accept images of this shape, or `by` is neither.
    """
    parts = lookup({"stages": _stages, "layers": _layers}, by, "grouping")
    height, width, channels = image_shape
    trace = trace_network(model, image_shape)
    # Two image sizes show the exact stride, whatever borders are lost: from an image that is larger by
    # n strides, the output is larger by n pixels. The auxiliary tower has a stride of 3 besides.
    growth = 6 * max(model.strides.values())
    larger = trace_network(model, (height + growth, width + growth, channels))
    rows = []
    for (name, shape, layers), (_, larger_shape, _) in zip(parts(trace), parts(larger), strict=True):
        stride = growth // (larger_shape[0] - shape[0]) if len(shape) == 3 else None
        rows.append(Row(name, 1, shape, stride, *totals(layers)))
    return rows


def fold(rows: Iterable[Row]) -> list[Row]:
    """Folds neighbouring rows that differ only in their names into one row with their totals."""
    folded = []
    for _, same in itertools.groupby(rows, lambda row: row[1:]):
        same = list(same)
        name = same[0].name if len(same) == 1 else f"{same[0].name} ... {same[-1].name}"
        folded.append(Row(name, len(same), same[0].shape, same[0].stride, *totals(same)))
    return folded


def totals(parts: Iterable[costs.Layer | Row]) -> tuple[int, int, int, int]:
    """Returns the sums of parameters, statistics, macs and activation_bytes."""
    columns = zip(*((p.parameters, p.statistics, p.macs, p.activation_bytes) for p in parts), strict=True)
    parameters, statistics, macs, activation_bytes = (int(sum(column)) for column in columns)
    return parameters, statistics, macs, activation_bytes
