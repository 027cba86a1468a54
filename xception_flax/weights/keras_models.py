"""Finds Xception or Inception V3 in a Keras file: in a whole model that was built on it, or in weights alone.

A whole model has its configuration in the file. In that the network is found by its layers and how they are connected,
so it is exactly that network; names do not matter. What stands before it is read as its normalization, and what stands
behind it as its classifier, as far as our networks can say it; the rest is named. Weights alone have no more than names
or places of layers, so they say nothing of what a head computes.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xception_flax.text.errors import UserError
from xception_flax.text.naming import shown
from xception_flax.text.sizes import ImageSize, normal
from xception_flax.weights import keras, keras_graph
from xception_flax.weights.keras_graph import Graph, Layer, Match, Node, Op, numbers
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.room import Contents
from xception_flax.weights.shapes import shapes_of, width_fields

Arrays = Sequence[np.ndarray]
Entries = list[tuple[str, Arrays]]  # layers and their arrays, by Keras' names or by ours
Affine = tuple[np.ndarray, np.ndarray]  # scale and offset, float64, [C] or [1]

NETWORKS = "Xception or Inception V3"
BN_EPSILON = 1e-3  # of Keras Applications

# A smaller standard deviation, of 0 to 255, and something has scaled the images before the model sees them.
MIN_STD = 10.0

# A layer's place in a file of Keras 3: '/layers/functional/layers/conv2d_3'.
_PLACE = re.compile(r"(?P<parent>/(?:.*/)?layers)/(?P<kind>[^/]+?)(?:_(?P<rank>[0-9]{1,6}))?")
_KINDS = {"Conv2D": "conv2d", "SeparableConv2D": "separable_conv2d", "BatchNormalization": "batch_normalization"}


class Before(NamedTuple):
    """What a model does to images of 0 to 255, and their size, as of `Pretrained`."""

    normalize: dict[str, tuple[float, ...]] | None = None
    image_size: ImageSize | None = None


class Head(NamedTuple):
    """What is behind the features: fields of our networks, and the layers that they stand for."""

    num_classes: int = 0
    fc_layers: tuple[int, ...] = ()
    dropout_rate: float = 0.0
    activation: str = "softmax"
    layers: Sequence[tuple[str, Arrays]] = ()


def recognize(contents: Contents, path: Path) -> Pretrained:
    """Returns the network in a file that Keras wrote, and all that the file says of its use.

    The classifier is there too where our networks can say it (`num_classes`, `fc_layers`): the logits are then the
    file's. A last softmax or sigmoid is `activation`; a single unit is one logit for 'sigmoid'.

    Args:
      contents: of the file.
      path: of the file, for messages.

    Raises:
      UserError: it has neither network, or two, or only a part of one; or arrays of other shapes.
    """
    entries = _entries(contents)
    if not entries:
        raise UserError(f"{path} has no layers with weights in it; expected a file of Keras' model.save_weights().")
    config, metadata = contents.config.get("config"), contents.config.get("metadata", {})
    try:
        # Keras 1 wrote its configurations in other words.
        if keras_graph.is_model(config) and not str(metadata.get("keras_version", "")).startswith("1."):
            return _from_model(config, entries)
        return _from_weights(entries)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def variables_of(contents: Contents, model: Mapping[str, Any], channels: int, path: Path) -> dict[str, Any]:
    """Returns the variables of a network that `writing` wrote for Keras, as its description says it.

    Args:
      contents: of the file, whole model or weights alone.
      model: keywords of `models.create_model`.
      channels: of the images.
      path: of the file, for messages.

    Raises:
      UserError: the file has other layers than the network.
    """
    try:
        entries = _entries(contents)
        by_place = any(name.startswith("/") for name, _ in entries)
        found = (_by_place if by_place else _by_name)(entries)
        head = found.others
        if by_place:  # they are numbered in the order in which `writing` made them
            names = [*(f"fc{i}" for i in range(1, len(head))), "predictions"]
            head = [(name, arrays) for name, (_, arrays) in zip(names, sorted(head, key=_rank), strict=False)]
        return keras.from_keras([*found.layers, *head], shapes_of(model, channels))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _entries(contents: Contents) -> Entries:
    """The layers with arrays; Keras on Windows wrote places with backslashes."""
    return [(name.replace("\\", "/"), arrays) for name, arrays in contents.entries if arrays]


def _rank(entry: tuple[str, Arrays]) -> int:
    """The number of a layer among those of its class, by its place."""
    match = _PLACE.fullmatch(entry[0])
    return int(match["rank"] or 0) if match else 0


def _pretrained(
    name: str, layers: Entries, head: Head, bn_epsilon: float, before: Before, left_out: Sequence[str]
) -> Pretrained:
    """Puts it together: `layers` are those of the backbone by our names."""
    model = dict(name=name, num_classes=head.num_classes, fc_layers=head.fc_layers, dropout_rate=head.dropout_rate)
    model["bn_epsilon"] = bn_epsilon
    if name == "xception":
        model["padding"] = "SAME"
        middle_repeats = sum(ours.endswith("_sepconv3") for ours, _ in layers)
        model |= {"middle_repeats": middle_repeats} if middle_repeats != 8 else {}
    else:
        model["auxiliary"] = False
    first = [array.shape for ours, arrays in layers if ours in ("block1_conv1", "stem_conv1") for array in arrays]
    channels = first[0][2] if first and len(first[0]) == 4 else 3
    widths = _widths(layers, shapes_of(model, channels)["params"])
    model |= width_fields(widths, multiples=(8, 1) if name == "xception" else (8,))
    variables = keras.from_keras([*layers, *head.layers], shapes_of(model, channels))
    return Pretrained(
        "keras",
        model,
        variables,
        channels,
        image_size=before.image_size,
        normalize=before.normalize,
        activation=head.activation,
        left_out=tuple(left_out),
    )


def _widths(layers: Entries, template: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields channels of each convolution at width 1, and those that it has."""
    for ours, arrays in layers:
        if arrays and not ours.endswith("_bn"):
            leaf = template[ours]
            yield leaf.get("pointwise", leaf)["kernel"].shape[-1], _channels(arrays)


# Whole models --------------------------------------------------------------------------------------


def _from_model(config: Mapping[str, Any], entries: Entries) -> Pretrained:
    try:
        graph = keras_graph.read(config)
    except ValueError as error:
        raise ValueError(f"its configuration is not as Keras writes it: {shown(f'{error}'[:200])}.") from None
    left = _give_arrays(graph.layers, entries)
    name, network = _found(graph)
    before, prelude, left_out = _before(network.start)
    head, behind, more = _head(graph, network)
    left_out += more
    others = [node for node in graph.nodes if node not in network.nodes | prelude | behind and not node.is_identity]
    if others:
        left_out.append(f"beside the network: {_words(others)}")
    left_out += [f"arrays of {shown(layer)}, which the configuration does not have" for layer in left]
    layers = [(ours, layer.arrays) for ours, layer in network.layers.items()]
    norms = [layer for ours, layer in network.layers.items() if ours.endswith("_bn")]
    epsilons = {f"{layer.config.get('epsilon', BN_EPSILON)!r:.40}" for layer in norms}
    epsilon = norms[0].config.get("epsilon", BN_EPSILON)
    if len(epsilons) > 1 or type(epsilon) is not float:
        raise ValueError(
            f"epsilon is {' and '.join(sorted(epsilons)[:3])} in its batch normalizations; expected one number."
        )
    return _pretrained(name, layers, head, epsilon, before, left_out)


def _give_arrays(layers: Sequence[Layer], entries: Entries) -> list[str]:
    """Gives each layer its arrays; returns the names of those of no layer."""
    if any(name.startswith("/") for name, _ in entries):
        of_entry = {layer.place: layer for layer in layers}
        owners = [of_entry.get(name) for name, _ in entries]
    else:
        # Layers of different models may have the same name. Files of Keras 3 are in the order of the places, older ones
        # in the model's.
        names, by_place = [name for name, _ in entries], sorted(layers, key=lambda layer: layer.place.split("/"))
        known = set(names)
        orders = ([layer for layer in order if layer.name in known] for order in (by_place, layers))
        owners = next((order for order in orders if [layer.name for layer in order] == names), None)
        if owners is None and len(known) < len(names):
            raise ValueError("it has several layers of one name, and not in the model's order; give them other names.")
        of_entry = {layer.name: layer for layer in layers}
        owners = owners or [of_entry.get(name) for name in names]
    for layer, (_, arrays) in zip(owners, entries, strict=True):
        if layer is not None:
            layer.arrays = list(arrays)
    return [name for layer, (name, _) in zip(owners, entries, strict=True) if layer is None]


def _found(graph: Graph) -> tuple[str, Match]:
    """Returns our name of the one network in a model, and where it is."""
    separable = sum(layer.kind == "SeparableConv2D" for layer in graph.layers)
    convolutions = sum(layer.kind == "Conv2D" for layer in graph.layers)
    networks = []
    if separable:
        depths = {8, max(0, (separable - 10) // 3)}  # published, or what the number of layers is for
        networks += [("xception", keras_graph.xception(depth)) for depth in sorted(depths)]
    if convolutions >= len(keras.INCEPTION_V3_NUMBERED):
        networks.append(("inception_v3", keras_graph.inception_v3()))
    found, misses = {}, []
    for name, network in networks:
        for node in graph.nodes:
            match = keras_graph.match(network, node) if node.kind == network.kind else (0, "")
            if isinstance(match, Match):
                found.setdefault(frozenset(match.layers.values()), (name, match))  # it may be called twice
            else:
                misses.append(match)
    if len(found) > 1:
        raise ValueError(_several([name for name, _ in found.values()]))
    if found:
        return next(iter(found.values()))
    fits, reason = max(misses, default=(0, ""))
    nearest = f" The nearest to it fits in {fits} operations from the end; then: {shown(reason)}." if fits > 2 else ""
    raise ValueError(
        f"the model has no whole {NETWORKS} as Keras has them; it has {separable} SeparableConv2D (Xception: 34) and "
        f"{convolutions} Conv2D (Xception: 6, Inception V3: 94).{nearest}"
    )


def _before(node: Node | None) -> tuple[Before, set[Node], list[str]]:
    """Returns what a model does to its images before `node` gives them to the network, the calls, and what is left."""
    chain: list[Node] = []
    while node is not None:
        chain.insert(0, node)
        node = node.inputs[0] if len(node.inputs) == 1 else None
    scale, offset, size = np.ones(1), np.zeros(1), None
    applied, strange, left_out = [], [], []
    for node in chain:
        config = node.layer.config
        shape = config.get("batch_shape") or config.get("batch_input_shape") or ()
        if affine := _affine(node):
            scale, offset = scale * affine[0], offset * affine[0] + affine[1]
            applied.append(node)
        elif node.kind == "InputLayer" and isinstance(shape, list) and len(shape) == 4 and all(shape[1:3]):
            size = shape[1:3]
        elif node.kind == "Resizing":
            size = config.get("height"), config.get("width")
        elif node.kind in ("CenterCrop", "RandomCrop"):
            size = config.get("height"), config.get("width")
            left_out.append(f"before the network: {_words([node])}")
        elif not node.is_identity:
            strange.append(node)
    if size and any(type(side) is not int for side in size):
        left_out.append(f"images of {size[0]!r:.10} x {size[1]!r:.10} pixels")
        size = None
    reason = ""
    if strange:
        reason = f"{_words(strange)}, which is not read"
    elif (scale <= 0).any():
        reason = f"{_words(applied)}, which inverts the images"
    elif applied and (1 / scale < MIN_STD).any():
        reason = f"{_words(applied)}, which takes images that are scaled already, not of 0 to 255"
    if reason:
        left_out.append(f"before the network: {reason}; so the normalization is unsaid")
    said = applied and not reason
    normalize = {"mean": _each(-offset / scale), "std": _each(1 / scale)} if said else None
    return Before(normalize, normal(size) if size else None), set(chain), left_out


def _each(values: np.ndarray) -> tuple[float, ...]:
    """One value a channel, or one for all; of as many digits as float32 has, so that 127.5 is that."""
    rounded = tuple(float(f"{value:.7g}") + 0.0 for value in values)  # + 0.0: no -0.0
    return rounded[:1] if len(set(rounded)) == 1 else rounded


def _affine(node: Node) -> Affine | None:
    """Returns a call that multiplies and adds one value a channel; None for any other."""
    config, arrays = node.layer.config, [array.astype(np.float64) for array in node.layer.arrays]
    pair: tuple[Any, Any] = (None, None)
    with np.errstate(all="ignore"):
        if node.training or len(node.inputs) > 1:
            pass
        elif node.kind == "Rescaling":
            pair = numbers(config.get("scale")), numbers(config.get("offset", 0.0))
        elif node.kind == "Normalization" and config.get("axis", -1) in (None, -1, 3, [-1], [3]):
            mean, variance = (
                arrays[:2] if len(arrays) >= 2 else map(numbers, (config.get("mean"), config.get("variance")))
            )
            if mean is not None and variance is not None and not config.get("invert"):
                std = np.maximum(np.sqrt(variance), 1e-7)  # Keras' smallest
                pair = 1 / std, -mean / std
        elif node.kind == "BatchNormalization" and len(arrays) >= 2:
            *trained, mean, variance = arrays
            gamma = trained[0] if trained and config.get("scale", True) else np.ones(1)
            beta = trained[-1] if trained and config.get("center", True) else np.zeros(1)
            scale = gamma / np.sqrt(variance + config.get("epsilon", BN_EPSILON))
            pair = scale, beta - mean * scale
        elif len(node.arguments) == 2:
            pair = _arithmetic(node)
    scale, offset = pair
    if scale is None or offset is None or not (np.isfinite(scale).all() and np.isfinite(offset).all()):
        return None
    if any(values.size != max(values.shape, default=1) for values in (scale, offset)):
        return None
    return np.ravel(scale), np.ravel(offset)  # Keras has [1, 1, 1, C], too


def _arithmetic(node: Node) -> tuple[Any, Any]:
    """Of a call of an operator with a tensor and a number: `x / 127.5`, in Keras 3, or of TensorFlow in Keras 2."""
    name = node.layer.config.get("function") if node.kind == "TFOpLambda" else node.kind
    operator = re.sub(r"[^a-z]", "", str(name).rpartition(".")[2].lower())
    first, second = node.arguments
    number = numbers(second if first is None else first)
    if number is None or (first is not None and second is not None):
        return None, None
    if operator in ("truedivide", "truediv", "divide") and first is None:
        return 1 / number, np.zeros(1)
    one = np.ones(1)
    return {
        "multiply": (number, 0 * one),
        "mul": (number, 0 * one),
        "add": (one, number),
        "subtract": (one, -number) if first is None else (-one, number),
        "sub": (one, -number) if first is None else (-one, number),
    }.get(operator, (None, None))


# Heads ---------------------------------------------------------------------------------------------


def _head(graph: Graph, network: Match) -> tuple[Head, set[Node], list[str]]:
    """Returns the classifier if it is one of our networks', the calls behind the network, and what is left of them."""
    chain: list[Node] = []
    node = graph.outputs[0] if len(graph.outputs) == 1 else None
    while node is not None and node is not network.end:
        chain.insert(0, node)
        node = node.inputs[0] if len(node.inputs) == 1 else None
    if node is None:  # several outputs, or other paths to the output: `others` of our caller
        return Head(), set(), []
    chain = [node for node in chain if not node.is_identity or node.kind == "Dropout"]
    if read := _classifier(chain):
        return read[0], set(chain), read[1]
    effective = [node for node in chain if node.kind not in ("Dropout", "Flatten", "GlobalAveragePooling2D")]
    return Head(), set(chain), [f"head: {_words(effective)}"] if effective else []


class _Dense:
    """A Dense of a head, with the batch normalizations beside it made part of it."""

    def __init__(self, layer: Layer, before: Affine | None) -> None:
        kernel, *bias = layer.arrays
        self.dtype, self.activation = kernel.dtype, layer.activation
        self.kernel = kernel.astype(np.float64)
        self.bias = bias[0].astype(np.float64) if bias else np.zeros(kernel.shape[1])
        if before is not None:
            scale, offset = (np.broadcast_to(values, kernel.shape[:1]) for values in before)
            self.bias = self.bias + offset @ self.kernel
            self.kernel = scale[:, None] * self.kernel

    def then(self, affine: Affine) -> None:
        """Makes part of it what follows it."""
        scale, offset = (np.broadcast_to(values, self.bias.shape) for values in affine)
        self.kernel, self.bias = self.kernel * scale[None], self.bias * scale + offset


def _classifier(chain: Sequence[Node]) -> tuple[Head, list[str]] | None:
    """Returns calls as our classifier, and what is to be said of it; None if it is not one.

    Ours is average pooling, Dense with ReLU any number of times, Dropout, Dense. A Dropout anywhere else does nothing
    at inference, too.
    """
    if not chain or chain[0].kind != "GlobalAveragePooling2D":
        return None
    if chain[0].layer.config.get("data_format", "channels_last") != "channels_last":
        return None
    dense: list[_Dense] = []
    waiting: Affine | None = None  # a normalization before the next Dense
    dropout_rate, rate, left_out = 0.0, 0.0, []
    for node in chain[1:]:
        is_open = bool(dense) and dense[-1].activation == "linear"
        if node.kind == "Dropout":
            rate = node.layer.config.get("rate")
            rate = float(rate) if isinstance(rate, int | float) and 0 <= rate < 1 else 0.0
        elif node.kind == "Dense" and [array.ndim for array in node.layer.arrays] in ([2], [2, 1]) and not is_open:
            dense.append(_Dense(node.layer, waiting))
            waiting, dropout_rate, rate = None, rate, 0.0
        elif node.kind == "BatchNormalization" and waiting is None and (affine := _affine(node)):
            left_out.append(f"{_words([node])} of the head, which is made part of the Dense beside it: the same logits")
            waiting = None if is_open else affine
            if is_open:
                dense[-1].then(affine)
        elif node.kind == "Activation" and is_open:
            dense[-1].activation = node.layer.activation
        elif node.kind in ("ReLU", "Softmax") and is_open and node.layer.config.get("axis", -1) == -1:
            if any(node.layer.config.get(option) for option in ("max_value", "negative_slope", "threshold")):
                return None
            dense[-1].activation = node.kind.lower()
        elif node.kind != "Flatten":
            return None
    activations = [layer.activation for layer in dense]
    if (
        not dense
        or waiting
        or set(activations[:-1]) - {"relu"}
        or activations[-1] not in ("linear", "softmax", "sigmoid")
    ):
        return None
    names = [*(f"fc{i}" for i in range(1, len(dense))), "predictions"]
    layers = [
        (name, [layer.kernel.astype(layer.dtype), layer.bias.astype(layer.dtype)])
        for name, layer in zip(names, dense, strict=True)
    ]
    *widths, num_classes = (len(layer.bias) for layer in dense)
    linear = "sigmoid" if num_classes == 1 else "softmax"  # one logit can only be for a sigmoid
    activation = linear if activations[-1] == "linear" else activations[-1]
    return Head(num_classes, tuple(widths), dropout_rate, activation, layers), left_out


def _words(nodes: Sequence[Node]) -> str:
    """Calls as text, at most ten: 'Dense(64, gelu), Dense(6)'."""
    words = []
    for node in nodes[:10]:
        config, activation = node.layer.config, node.layer.activation
        facts = [config[key] for key in ("units", "filters", "rate", "scale", "offset", "function") if key in config]
        facts = [fact for fact in facts if isinstance(fact, int | float | str) and not isinstance(fact, bool)]
        facts += [activation] if activation != "linear" else []
        words.append(shown((node.kind + (f"({', '.join(map(str, facts))})" if facts else ""))[:60]))
    return ", ".join(words) + (f" and {len(nodes) - 10} more" if len(nodes) > 10 else "")


# Weights alone -------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A network in weights alone.

    Attributes:
      name: ours.
      network: its operations.
      layers: by our names.
      others: what else there is.
      classifier: the arrays of what can only be the published classifier; None if nothing is.
    """

    name: str
    network: Op
    layers: Entries
    others: Entries
    classifier: Arrays | None


def _from_weights(entries: Entries) -> Pretrained:
    found = (_by_place if any(name.startswith("/") for name, _ in entries) else _by_name)(entries)
    head, others = Head(), found.others
    if found.classifier and found.classifier[0].shape[:-1] == (_features(found.network, dict(found.layers)),):
        head = Head(found.classifier[0].shape[-1], layers=[("predictions", found.classifier)])
        others = [(name, arrays) for name, arrays in others if arrays is not found.classifier]
    words = [f"{shown(name)} ({' x '.join(map(str, arrays[0].shape))})" for name, arrays in others[:10]]
    more = f" and {len(others) - 10} more" if len(others) > 10 else ""
    left_out = [f"{', '.join(words)}{more}: weights alone do not say what these compute"] if words else []
    return _pretrained(found.name, found.layers, head, BN_EPSILON, Before(), left_out)


def _features(op: Op, layers: Mapping[str, Arrays]) -> int:
    """Number of channels of an operation's result."""
    if op.kind == "Concatenate":
        return sum(_features(source, layers) for source in op.inputs)
    return _channels(layers[op.name]) if op.name.endswith("_bn") else _features(op.inputs[0], layers)


def _channels(arrays: Arrays) -> int:
    """Of the result of a convolution or normalization; 0 if these are not its arrays."""
    return (0, *arrays[-1].shape)[-1]


def _by_place(entries: Entries) -> Found:
    """Finds the network where the file has no names, but Keras' order of the layers of a class."""
    parents: dict[str, dict[str, list[tuple[int, str, Arrays]]]] = defaultdict(lambda: defaultdict(list))
    for place, arrays in entries:
        if match := _PLACE.fullmatch(place):
            parents[match["parent"]][match["kind"]].append((int(match["rank"] or 0), place, arrays))
    found = []
    for parent, kinds in parents.items():
        separable = len(kinds["separable_conv2d"])
        name = "xception" if separable else "inception_v3"
        network = keras_graph.xception(max(0, (separable - 10) // 3)) if separable else keras_graph.inception_v3()
        expected: dict[str, list[str]] = defaultdict(list)
        for op in keras_graph.in_order(network):
            if op.name:
                expected[_KINDS[op.kind]].append(op.name)
        if any(len(kinds[kind]) < len(names) for kind, names in expected.items()):
            continue
        layers, used = [], set()
        for kind, names in expected.items():  # a head's layers of a kind are behind the network's
            for ours, (_, place, arrays) in zip(names, sorted(kinds[kind], key=lambda item: item[0]), strict=False):
                layers.append((ours, arrays))
                used.add(place)
        others = [(place, arrays) for place, arrays in entries if place not in used]
        is_published = [(place, len(arrays)) for place, arrays in others] == [(f"{parent}/dense", 2)]
        found.append(Found(name, network, layers, others, others[0][1] if is_published else None))
    if len(found) != 1:
        raise ValueError(_several([name for name, *_ in found]) if found else _no_network(entries))
    return found[0]


def _by_name(entries: Entries) -> Found:
    """Finds the network by Keras' names of its layers."""
    blocks = {name for name, _ in entries if re.fullmatch(r"block[0-9]+_sepconv[123]", name)}
    middle_repeats = sum(name.endswith("3") for name in blocks)  # only those blocks have three
    name = "xception" if blocks else "inception_v3"
    network = keras_graph.xception(middle_repeats) if blocks else keras_graph.inception_v3()
    names = [op.name for op in keras_graph.in_order(network) if op.name]
    unused, found = dict(enumerate(entries)), {}

    def take(ours: str, theirs: str, count: int | None = None, features: int | None = None) -> None:
        """The first to be made of those that it can be: a head is made after its network."""
        fitting = [
            (int(match[1] or 0), i)
            for i, (name, arrays) in unused.items()
            if (match := re.fullmatch(theirs, name))
            and count in (None, len(arrays))
            and (features is None or arrays[-1].shape[-1:] == (features,))
        ]
        if fitting:
            found[ours] = unused.pop(min(fitting)[1])[1]

    numbered = [name for name in names if name.endswith("_residual")] if blocks else keras.INCEPTION_V3_NUMBERED
    for ours in set(names) - {f"{conv}{bn}" for conv in numbered for bn in ("", "_bn")}:
        take(ours, f"{ours}()")
    for ours in numbered:
        beside = found.get(ours.replace("residual", "sepconv2")) if blocks else None
        take(ours, keras.NUMBERED_CONV, 1, _channels(beside) if beside else None)
        if ours in found:
            take(f"{ours}_bn", keras.NUMBERED_NORM, 4 if blocks else 3, _channels(found[ours]))
    missing = [ours for ours in names if ours not in found]
    if len(missing) > len(names) // 2:
        raise ValueError(_no_network(entries))
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"it has nothing for {', '.join(missing[:10])}{more} of {name}.")
    others = list(unused.values())
    if any(name in found for name, _ in others):
        raise ValueError(_several([name, name]))
    classifier = [arrays for name, arrays in others if name == "predictions" and len(arrays) == 2]
    return Found(name, network, list(found.items()), others, classifier[0] if len(classifier) == 1 else None)


def _several(networks: Sequence[str]) -> str:
    return f"it has several networks, {', '.join(networks)}; expected one."


def _no_network(entries: Entries) -> str:
    names = ", ".join(shown(name[:60]) for name, _ in entries[:5])
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return f"it has not the layers of Keras' {NETWORKS}; it has {names}{more}."
