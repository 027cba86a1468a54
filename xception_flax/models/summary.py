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
      name: theirs, or 'first ... last' of a fold.
      count: rows of the same numbers that are folded into this one.
      shape: of the output, `(H, W, C)` or `(C,)`; of a stage it is what the next one gets.
      stride: pixels of the image to a pixel of the output; None where it has none.
      parameters: trainable; this and the following are totals of the fold.
      statistics: moving means and variances.
      macs: multiply-adds an image.
      activation_bytes: an image.
    """

    name: str
    count: int
    shape: Shape
    stride: int | None
    parameters: int
    statistics: int
    macs: int
    activation_bytes: int


class _Trace(NamedTuple):
    layers: list[costs.Layer]
    inputs: dict[str, Shape]  # of the modules at the top, by name
    features: Shape  # the last stage of the network's `endpoints`


def trace_network(model: nn.Module, image_shape: tuple[int, int, int]) -> _Trace:
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
    return _Trace(layers, inputs, features)


def _stages(trace: _Trace) -> Iterator[tuple[str, Shape, list[costs.Layer]]]:
    """Name, shape of the output and layers of each stage."""
    groups = [
        (stage, list(layers))
        for stage, layers in itertools.groupby(trace.layers, lambda layer: layer.path[0].partition("_")[0])
    ]
    for i, (stage, layers) in enumerate(groups):
        shape = layers[-1].shape
        if len(shape) == 3:
            # What stands behind the last layer, such as pooling and the concatenation of towers, has no
            # parameters and so no row; the next stage's input shows it. Behind the last features that is
            # the global pooling, which belongs to no stage.
            following = trace.inputs[groups[i + 1][1][0].path[0]] if i + 1 < len(groups) else ()
            shape = following if len(following) == 3 else trace.features
        yield stage, shape, layers


def _layers(trace: _Trace) -> Iterator[tuple[str, Shape, list[costs.Layer]]]:
    for layer in trace.layers:
        yield "/".join(layer.path), layer.shape, [layer]


def summarize(model: nn.Module, image_shape: tuple[int, int, int], *, by: str = "stages") -> list[Row]:
    """Returns a row a stage of `model`, or a row a layer, in the order of computation, for one image `(H, W, C)`.

    A stage is the neighbouring layers whose names at the top begin with the same word: 'block2' of
    'block2_sepconv1'. Every layer with parameters is in exactly one row.

    Args:
      model: with `endpoints`, as every network of `MODELS`.
      image_shape: height and width in pixels, channels.
      by: 'stages' or 'layers'.

    Raises:
      ValueError: the model does not take images of this shape, or `by` is neither.
    """
    parts = lookup({"stages": _stages, "layers": _layers}, by, "grouping")
    height, width, channels = image_shape
    trace = trace_network(model, image_shape)
    # A stride is exact when read from two image sizes: an image larger by a multiple of it has just as
    # many more pixels in the output, whatever borders are lost on the way. 3 is the auxiliary tower's.
    growth = 6 * max(model.strides.values())
    larger = trace_network(model, (height + growth, width + growth, channels))
    rows = []
    for (name, shape, layers), (_, larger_shape, _) in zip(parts(trace), parts(larger), strict=True):
        stride = growth // (larger_shape[0] - shape[0]) if len(shape) == 3 else None
        rows.append(Row(name, 1, shape, stride, *totals(layers)))
    return rows


def fold(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows, neighbours that differ only in their names folded into one with their totals."""
    folded = []
    for _, same in itertools.groupby(rows, lambda row: row[1:]):
        same = list(same)
        name = same[0].name if len(same) == 1 else f"{same[0].name} ... {same[-1].name}"
        folded.append(Row(name, len(same), same[0].shape, same[0].stride, *totals(same)))
    return folded


def totals(parts: Iterable[costs.Layer | Row]) -> tuple[int, int, int, int]:
    columns = zip(*((p.parameters, p.statistics, p.macs, p.activation_bytes) for p in parts), strict=True)
    return tuple(map(sum, columns))
