"""The graph of a Keras model, from its configuration; and in it, Keras' Xception or Inception V3.

A configuration lists layers, and of each layer its calls. Models may be within models. Here every call of a layer that
is no model becomes a `Node`. So it makes no difference whether Xception is a model inside another one, or its layers
stand among others. No code of a configuration is run.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_NODES = 10_000  # calls of layers; Inception V3 has 313
MAX_PASSES = 100  # over a model's calls; Keras lists a layer behind those it takes from, but for what is called again

# Layers that do nothing at inference.
IDENTITIES = {
    *("InputLayer", "Identity", "Cast", "ActivityRegularization"),
    *("Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise"),
    *("RandomBrightness", "RandomColorDegeneration", "RandomColorJitter", "RandomContrast", "RandomElasticTransform"),
    *("RandomErasing", "RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomHeight", "RandomHue"),
    *("RandomInvert", "RandomPerspective", "RandomPosterization", "RandomRotation", "RandomSaturation"),
    *("RandomSharpness", "RandomShear", "RandomTranslation", "RandomWidth", "RandomZoom"),
    *("AugMix", "CutMix", "MixUp", "RandAugment"),
}


@dataclasses.dataclass(eq=False)
class Layer:
    """A layer, or a model within a model.

    Attributes:
      kind: its class in Keras: 'Conv2D'; of a class of the user's own its registered name: 'Custom>Conv2D'.
      name: its name. Layers of different models may have the same one.
      config: its own configuration.
      place: in the files of Keras 3: '/layers/functional/layers/conv2d_3'.
      parts: of a model its layers, each with its calls as the configuration has them; None for other layers.
      arrays: in Keras' order; for the reader of the file to fill in.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    place: str
    parts: list[tuple["Layer", Sequence[Any]]] | None = None
    arrays: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def activation(self) -> str:
        """The name of its activation, 'linear' for none, another text for a function of the user's own."""
        name = self.config.get("activation") or "linear"
        own = name.get("config") if isinstance(name, Mapping) else name
        return name if isinstance(name, str) else f"function {own}"


@dataclasses.dataclass(eq=False)
class Node:
    """A call of a layer.

    Attributes:
      layer: what is called.
      inputs: the calls that it takes tensors from.
      arguments: of an operation: its numbers, and None for each tensor, in their order.
      training: whether it always computes as in training.
    """

    layer: Layer
    inputs: list["Node"]
    arguments: list[Any] = dataclasses.field(default_factory=list)
    training: bool = False

    @property
    def kind(self) -> str:
        """The layer's."""
        return self.layer.kind

    @property
    def is_identity(self) -> bool:
        """Whether it does nothing at inference."""
        linear = self.kind == "Activation" and self.layer.activation == "linear"
        cast = self.kind == "TFOpLambda" and self.layer.config.get("function") == "cast"
        return len(self.inputs) <= 1 and (linear or cast or self.kind in IDENTITIES)


class Graph(NamedTuple):
    """All layers of a model in the configuration's order, all calls, and those that the model returns."""

    layers: list[Layer]
    nodes: list[Node]
    outputs: list[Node]


# Configurations ------------------------------------------------------------------------------------


def is_model(entry: Any) -> bool:
    """Whether a configuration is one of a sequential or functional model."""
    config = entry.get("config") if isinstance(entry, Mapping) else None
    return isinstance(config, list) or (isinstance(config, Mapping) and isinstance(config.get("layers"), list))


def read(model: Mapping[str, Any]) -> Graph:
    """Returns the graph of a model.

    Args:
      model: its configuration, as of `model.to_json()` of Keras 2 or 3; `is_model` is true of it.

    Raises:
      ValueError: it is not as Keras writes it.
    """
    layers: list[Layer] = []
    nodes: list[Node] = []
    try:
        return Graph(layers, nodes, _call(_declare(model, "", layers), [], False, nodes))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _declare(entry: Mapping[str, Any], place: str, layers: list[Layer]) -> Layer:
    """Returns the layer of an entry, with its parts, and adds all that are no models to `layers`."""
    config, kind = entry["config"], _text(entry["class_name"])
    if isinstance(config, list):  # a Sequential of Keras before 2.2.3
        config = {"layers": config}
    if not isinstance(config, Mapping):
        raise TypeError(f"the configuration of a layer is {config!r:.80}")
    if ">" in (entry.get("registered_name") or ""):
        kind = _text(entry["registered_name"])
    layer = Layer(kind, _text(entry.get("name") or config.get("name") or ""), config, place)
    if not is_model(entry):
        layers.append(layer)
        return layer
    if not config["layers"]:
        raise ValueError(f"its model {layer.name!r} has no layers")
    layer.parts, ranks = [], Counter()
    for part in config["layers"]:
        snake_case = _snake_case(_text(part["class_name"]))
        rank = f"_{ranks[snake_case]}" if ranks[snake_case] else ""
        ranks[snake_case] += 1
        declared = _declare(part, f"{place}/layers/{snake_case}{rank}", layers)
        layer.parts.append((declared, part.get("inbound_nodes") or []))
    return layer


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a name is {name!r:.80}")
    return name


def _snake_case(name: str) -> str:
    """As Keras names the groups of its files: 'SeparableConv2D' is 'separable_conv2d'."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _call(layer: Layer, inputs: list[Node], training: bool, nodes: list[Node]) -> list[Node]:
    """Returns the outputs of a call, and adds the calls within to `nodes`."""
    if len(nodes) >= MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES:,} calls of layers")
    if layer.parts is None:
        nodes.append(Node(layer, inputs, training=training))
        return nodes[-1:]
    if "input_layers" in layer.config:
        return _call_functional(layer, inputs, training, nodes)
    for part, _ in layer.parts:
        inputs = _call(part, inputs, training, nodes)
    return inputs


def _call_functional(model: Layer, inputs: list[Node], training: bool, nodes: list[Node]) -> list[Node]:
    declared = model.parts or []
    # Keras 2 writes calls as lists, and counts the making of a model within a model as its first call.
    is_keras_2 = any(isinstance(call, list) for _, calls in declared for call in calls)
    fed = {name: [node] for (name, *_), node in zip(_references(model.config["input_layers"]), inputs, strict=False)}
    parts = {part.name: (part, max(1, len(calls))) for part, calls in declared}
    done: dict[tuple[str, int], list[Node]] = {}

    def output(name: str, call: int, tensor: int) -> Node | None:
        part, calls = parts[name]
        call -= is_keras_2 and part.parts is not None
        outputs = done.get((name, min(max(call, 0), calls - 1)))
        return outputs[tensor if part.parts is not None else 0] if outputs else None

    waiting = [(part, *item) for part, calls in declared for item in enumerate(map(_parsed, calls or [{"args": []}]))]
    for _ in range(MAX_PASSES):
        later = []
        for part, i, call in waiting:
            sources = [output(*reference) for reference in call.references]
            if None in sources:
                later.append((part, i, call))
                continue
            done[part.name, i] = _call(part, sources or fed.get(part.name, []), training or call.training, nodes)
            if part.parts is None:
                nodes[-1].arguments = call.arguments
        waiting = later
    if waiting:
        raise ValueError(f"nothing gives the inputs of its layer {waiting[0][0].name!r}")
    return [node for reference in _references(model.config["output_layers"]) if (node := output(*reference))]


class _Call(NamedTuple):
    references: list[tuple[str, int, int]]  # layer, call, tensor
    arguments: list[Any]
    training: bool


def _is_reference(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 3 and [type(item) for item in value[:3]] == [str, int, int]


def _references(value: Any) -> list[tuple[str, int, int]]:
    """Returns the references in a reference, or in lists or objects of them."""
    if _is_reference(value):
        return [tuple(value[:3])]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [reference for item in items for reference in _references(item)]


def _parsed(call: Any) -> _Call:
    references: list[tuple[str, int, int]] = []
    arguments: list[Any] = []

    def add(value: Any) -> None:
        kind = value.get("class_name") if isinstance(value, Mapping) else None
        if kind == "__keras_tensor__" or _is_reference(value):
            references.extend(_references(value["config"]["keras_history"] if kind else value))
            arguments.append(None)
        elif kind in ("__numpy__", "__tensor__"):
            arguments.append(value["config"]["value"])
        elif isinstance(value, list) and numbers(value) is None:
            for item in value:
                add(item)
        else:
            arguments.append(value)

    if isinstance(call, Mapping):  # of Keras 3
        keywords = call.get("kwargs", {})
        for value in [*call["args"], *keywords.values()]:
            add(value)
        return _Call(references, arguments, keywords.get("training") is True)
    training = False
    for item in [call] if isinstance(call[0], str) else call:
        add(item[2] if item[0] == "_CONSTANT_VALUE" else item)
        for name, value in (item[3] if len(item) > 3 else {}).items():
            training |= name == "training" and value is True
            if name in ("x", "y") or _is_reference(value):
                add(value)
    return _Call(references, arguments, training)


def numbers(value: Any) -> np.ndarray | None:
    """A number, or nested lists of finite numbers, as float64; None for all else."""
    try:
        array = np.array(value, np.float64) if isinstance(value, int | float | list) else None
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array is not None and array.size and np.isfinite(array).all() else None


# The networks to find ------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Op:
    """An operation of a network: what a `Node` must be like.

    Attributes:
      kind: class of the layer in Keras; '' for the images, which anything may give.
      options: of the layer's configuration.
      inputs: in their order.
      name: our name of the layer, if it has arrays.
    """

    kind: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Sequence["Op"] = ()
    name: str = ""


# What Keras' configuration has of layers, with Keras' default. Not listed: what arrays or training know.
_DEFAULTS = {
    "Conv2D": dict(strides=1, padding="valid", dilation_rate=1, groups=1, use_bias=False, activation="linear"),
    "SeparableConv2D": dict(strides=1, padding="valid", dilation_rate=1, use_bias=False, activation="linear"),
    "MaxPooling2D": dict(pool_size=2, padding="valid"),
    "AveragePooling2D": dict(pool_size=2, padding="valid"),
}


def _conv(x: Op, name: str, size: Any, strides: int = 1, padding: str = "valid") -> Op:
    return Op("Conv2D", dict(kernel_size=size, strides=strides, padding=padding), (x,), name)


def _norm(x: Op) -> Op:
    return Op("BatchNormalization", {}, (x,), f"{x.name}_bn")


def _relu(x: Op) -> Op:
    return Op("Activation", dict(activation="relu"), (x,))


def xception(middle_repeats: int = 8) -> Op:
    """Returns the last features of Keras' Xception."""

    def unit(x: Op, name: str) -> Op:
        return _norm(Op("SeparableConv2D", dict(kernel_size=3, padding="same"), (x,), name))

    def down(x: Op, name: str, *, relu_first: bool = True) -> Op:
        y = unit(_relu(x) if relu_first else x, f"{name}_sepconv1")
        y = unit(_relu(y), f"{name}_sepconv2")
        y = Op("MaxPooling2D", dict(pool_size=3, strides=2, padding="same"), (y,))
        return Op("Add", {}, (y, _norm(_conv(x, f"{name}_residual", 1, 2, "same"))))

    x = _relu(_norm(_conv(Op(), "block1_conv1", 3, 2)))
    x = _relu(_norm(_conv(x, "block1_conv2", 3)))
    for i in (2, 3, 4):
        x = down(x, f"block{i}", relu_first=i > 2)
    for i in range(5, 5 + middle_repeats):
        y = x
        for j in (1, 2, 3):
            y = unit(_relu(y), f"block{i}_sepconv{j}")
        x = Op("Add", {}, (y, x))
    i = 5 + middle_repeats
    x = down(x, f"block{i}")
    for j in (1, 2):
        x = _relu(unit(x, f"block{i + 1}_sepconv{j}"))
    return x


def inception_v3() -> Op:
    """Returns the last features of Keras' Inception V3."""

    def unit(x: Op, name: str, size: Any, strides: int = 1, padding: str = "same") -> Op:
        return _relu(_norm(_conv(x, name, size, strides, padding)))

    def tower(x: Op, name: str, *sizes: Any, reduce: bool = False) -> Op:
        for i, size in enumerate(sizes, start=1):
            x = unit(x, f"{name}_{i}", size, *((2, "valid") if reduce and i == len(sizes) else ()))
        return x

    def halve(x: Op) -> Op:
        return Op("MaxPooling2D", dict(pool_size=3, strides=2), (x,))

    def pool(x: Op, name: str) -> Op:
        x = Op("AveragePooling2D", dict(pool_size=3, strides=1, padding="same"), (x,))
        return unit(x, f"{name}_pool", 1)

    def join(*x: Op) -> Op:
        return Op("Concatenate", {}, x)

    x = unit(Op(), "stem_conv1", 3, 2, "valid")
    x = unit(unit(x, "stem_conv2", 3, 1, "valid"), "stem_conv3", 3)
    x = unit(halve(x), "stem_conv4", 1, 1, "valid")
    x = halve(unit(x, "stem_conv5", 3, 1, "valid"))
    for name in ("mixed0", "mixed1", "mixed2"):
        towers = unit(x, f"{name}_1x1", 1), tower(x, f"{name}_5x5", 1, 5), tower(x, f"{name}_3x3dbl", 1, 3, 3)
        x = join(*towers, pool(x, name))
    x = join(unit(x, "mixed3_3x3", 3, 2, "valid"), tower(x, "mixed3_3x3dbl", 1, 3, 3, reduce=True), halve(x))
    for name in ("mixed4", "mixed5", "mixed6", "mixed7"):
        single = tower(x, f"{name}_7x7", 1, (1, 7), (7, 1))
        double = tower(x, f"{name}_7x7dbl", 1, (7, 1), (1, 7), (7, 1), (1, 7))
        x = join(unit(x, f"{name}_1x1", 1), single, double, pool(x, name))
    seven = tower(x, "mixed8_7x7x3", 1, (1, 7), (7, 1), 3, reduce=True)
    x = join(tower(x, "mixed8_3x3", 1, 3, reduce=True), seven, halve(x))
    for name in ("mixed9", "mixed10"):
        y = unit(x, f"{name}_3x3_1", 1)
        single = join(unit(y, f"{name}_3x3_2a", (1, 3)), unit(y, f"{name}_3x3_2b", (3, 1)))
        y = tower(x, f"{name}_3x3dbl", 1, 3)
        double = join(unit(y, f"{name}_3x3dbl_3a", (1, 3)), unit(y, f"{name}_3x3dbl_3b", (3, 1)))
        x = join(unit(x, f"{name}_1x1", 1), single, double, pool(x, name))
    return x


def in_order(end: Op) -> list[Op]:
    """Returns the operations before and at `end` as Keras orders the layers of a model.

    That is by their distance from the output, the furthest first; among equal ones by when a walk from the output,
    depth first, comes upon them.
    """
    met: dict[Op, None] = {}
    stack = [end]
    while stack:
        op = stack.pop()
        if op not in met:
            met[op] = None
            stack.extend(reversed(op.inputs))
    users = Counter(source for op in met for source in op.inputs)
    distance, ready = defaultdict(int), [end]
    while ready:
        op = ready.pop()
        for source in op.inputs:
            distance[source] = max(distance[source], distance[op] + 1)
            users[source] -= 1
            if not users[source]:
                ready.append(source)
    return sorted(met, key=lambda op: -distance[op])


class Match(NamedTuple):
    """Where a network is in a model.

    Attributes:
      layers: those with arrays, by our names.
      nodes: all calls of the network.
      start: what gives it images; None for nothing.
      end: its last features.
    """

    layers: dict[str, Layer]
    nodes: set[Node]
    start: Node | None
    end: Node


def match(network: Op, end: Node) -> Match | tuple[int, str]:
    """Returns where `network` is, if it ends at `end`; else how many operations fit, and what does not."""
    found: dict[Op, Node | None] = {}
    stack: list[tuple[Op, Node | None]] = [(network, end)]
    nodes = set()
    while stack:
        op, node = stack.pop()
        while op.kind and node is not None and node.is_identity:
            nodes.add(node)
            node = next(iter(node.inputs), None)
        if op in found:
            if found[op] is not node:
                return len(found), f"{op.name or op.kind or 'the first layer'} takes its input from another layer"
            continue
        if reason := op.kind and _difference(op, node):
            return len(found), reason
        found[op] = node
        if op.kind:
            nodes.add(node)
            inputs = node.inputs or [None] * len(op.inputs)
            stack += zip(op.inputs, inputs, strict=True)
    (start,) = (node for op, node in found.items() if not op.kind)
    return Match({op.name: node.layer for op, node in found.items() if op.name}, nodes, start, end)


def _difference(op: Op, node: Node | None) -> str:
    """How a call differs from the operation that is expected; '' if it does not."""
    what = op.name or op.kind
    if node is None or node.kind != op.kind:
        return f"expected {what}{f', a {op.kind}' if op.name else ''}, got {node.kind if node else 'the input'}"
    if node.training:
        return f"{what} always computes as in training"
    config = node.layer.config
    if config.get("data_format", "channels_last") != "channels_last":
        return f"{what} has data_format {config['data_format']}; expected channels_last"
    if len(node.inputs) not in (len(op.inputs), 0):
        return f"{what} has {len(node.inputs)} inputs; expected {len(op.inputs)}"
    for option, expected in (_DEFAULTS.get(op.kind, {}) | dict(op.options)).items():
        value = config.get(option, _DEFAULTS.get(op.kind, {}).get(option))
        if _pair(value) != _pair(expected):
            return f"{what} has {option} {value!r:.40}; expected {expected!r}"
    return ""


def _pair(value: Any) -> Any:
    if type(value) is int:
        return (value, value)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
