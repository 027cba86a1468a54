"""From a network's jaxpr to the nodes of an ONNX graph.

A converter for any function of JAX keeps JAX's layout, with transposes around every convolution. This one knows only
what these networks consist of. Images are `[N, C, H, W]` from the first node to the last, as ONNX has them. What
belongs together becomes one node: a convolution, the factor and the bias after it; a slice and the 1x1 convolution
after it; a sum and the division that makes it a mean. What depends on parameters alone is computed here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from xception_flax.export.program import Program
from xception_flax.models import ops
from xception_flax.text.errors import UserError

LAST = np.iinfo(np.int64).max  # of a slice: to the end of the axis
IMAGES = 2  # of the trace; the graph takes any number

# Operations of one array, and of two, that are a node each.
UNARY = {"exp": "Exp", "neg": "Neg", "logistic": "Sigmoid", "tanh": "Tanh"}
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}

# They change no number.
IDENTITIES = ("optimization_barrier", "stop_gradient", "copy", "copy_p")


@dataclass(eq=False)
class Constant:
    """An array that is known, and its name among the parameters, '' if it is none of them."""

    value: np.ndarray
    label: str = ""


@dataclass(eq=False)
class Value:
    """An array that depends on the images: its shape as JAX has it, and a name once a node makes it.

    `origin` is what it is made of, until a node is needed; the operation after it may take both as one.
    """

    shape: tuple[int, ...]
    name: str = ""
    origin: Any = None


@dataclass(eq=False)
class Product:
    """A convolution (`kernel` `[features, C / groups, kh, kw]`), or a matrix product (`[features, C]`)."""

    x: Value
    kernel: Constant
    bias: Constant | None
    options: dict[str, Any]


@dataclass(eq=False)
class Affine:
    """`x * scale + shift`, both `[C]`; None for 1 and 0."""

    x: Value
    scale: Constant | None
    shift: Constant | None


@dataclass(eq=False)
class Sum:
    """Over windows (`options` of ONNX's pooling), or with None over whole images."""

    x: Value
    options: dict[str, Any] | None


@dataclass(eq=False)
class Strided:
    """Every pixel of so many, from the first on."""

    x: Value
    strides: tuple[int, int]


class Graph:
    """The nodes and initializers of a program, `onnx.NodeProto` and `onnx.TensorProto`.

    The input is called 'images', the output as the program's outputs. Initializers are called as our parameters,
    nodes as our layers.

    Raises:
      UserError: the network has an operation that is not known here.
    """

    def __init__(self, program: Program) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._relus: dict[str, Value] = {}
        self._names: set[str] = set()
        images = jax.ShapeDtypeStruct((IMAGES, *program.image_shape), jnp.uint8)
        with ops.lowering("stock"):  # convolutions that are convolutions
            traced = jax.make_jaxpr(program.network)(program.variables, images)
        places = jax.tree_util.tree_leaves_with_path(program.variables)
        labels = ["/".join(str(key.key) for key in place) for place, _ in places]
        variables = [Constant(value, label) for label, (_, value) in zip(labels, places, strict=True)]
        self._add("Transpose", ["images"], "pixels", perm=[0, 3, 1, 2])
        constants = [Constant(np.asarray(value)) for value in traced.consts]
        (output,) = self._run(traced.jaxpr, constants, [*variables, Value(images.shape, "pixels")])
        last = self._name(output)
        if program.activation is not None:
            options = {"axis": 1} if program.activation == "softmax" else {}
            last = self._add({"softmax": "Softmax", "sigmoid": "Sigmoid"}[program.activation], [last], **options)
        self._finish(last, program.outputs)

    # The jaxpr ------------------------------------------------------------------------------------

    def _run(self, jaxpr: Jaxpr, constants: Sequence[Constant], arguments: Sequence[Constant | Value]) -> list[Any]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

        def read(atom: Any) -> Constant | Value:
            return Constant(np.asarray(atom.val)) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, given: list[Any]) -> list[Any]:
        name, options = equation.primitive.name, equation.params
        shape = equation.outvars[0].aval.shape
        if name == "platform_index":  # of the branch for all platforms
            return [Constant(np.asarray(options["platforms"].index(None)))]
        if name == "cond":
            return self._call(options["branches"][int(given[0].value)], given[1:])
        if name in IDENTITIES:
            return given
        if options.get("name") == "elu" and isinstance(given[0], Value):
            return [Value(shape, self._add("Elu", [self._name(given[0])]))]
        for key in ("jaxpr", "call_jaxpr"):
            if key in options:
                return self._call(options[key], given)
        if all(isinstance(argument, Constant) for argument in given):
            return _computed(equation, given)
        if name in BINARY:
            return [self._binary(name, given[0], given[1], shape)]
        if name in UNARY:
            return [Value(shape, self._add(UNARY[name], [self._name(given[0])]))]
        if (method := getattr(self, f"_{name}", None)) is not None and isinstance(given[0], Value):
            return [method(*given, shape=shape, **options)]
        raise UserError(f"this network has the operation {name!r} of {shape}, which is not written to ONNX.")

    def _call(self, jaxpr: Any, given: list[Any]) -> list[Any]:
        constants = [Constant(np.asarray(value)) for value in getattr(jaxpr, "consts", ())]
        return self._run(getattr(jaxpr, "jaxpr", jaxpr), constants, given)

    # Arithmetic -----------------------------------------------------------------------------------

    def _binary(self, name: str, a: Any, b: Any, shape: tuple[int, ...]) -> Value:
        """Elementwise; a number a channel is what the operation before it, or after it, can take."""
        value, other = (a, b) if isinstance(a, Value) else (b, a)
        if isinstance(other, Constant):
            constant = Constant(_narrowed(other.value), other.label)
            if name == "max" and not constant.value.any():
                return self._relu(value)
            if name == "div" and value is a and (mean := self._mean(value, constant.value)) is not None:
                return mean
            if value.shape == shape and (per_channel := _per_channel(constant)) is not None:
                if name == "add":
                    return _affine(value, None, per_channel)
                if name == "mul":
                    return _affine(value, per_channel, None)
                if name == "sub" and value is a:
                    return _affine(value, None, Constant(-per_channel.value))
                if name == "div" and value is a:
                    return _affine(value, Constant(1 / per_channel.value), None)
        return Value(shape, self._add(BINARY[name], [self._operand(a), self._operand(b)]))

    def _relu(self, value: Value) -> Value:
        name = self._name(value)
        if name not in self._relus:  # two layers may begin with the same
            self._relus[name] = Value(value.shape, self._add("Relu", [name]))
        return self._relus[name]

    def _mean(self, value: Value, count: np.ndarray) -> Value | None:
        """A sum divided by the number of pixels: of the window, or of those that are inside the image; None if not."""
        if not isinstance(value.origin, Sum):
            return None
        x, options = value.origin.x, value.origin.options
        if options is None:
            if count.shape or count != math.prod(x.shape[1:3]):
                return None
            pooled = self._add("GlobalAveragePool", [self._name(x)])
            return Value(value.shape, self._add("Flatten", [pooled], axis=1))
        if np.array_equal(count, _pixels_inside(x.shape[1:3], options)):
            include_pad = False
        elif count.size == 1 and count == math.prod(options["kernel_shape"]):
            include_pad = True
        else:
            return None
        name = self._add("AveragePool", [self._name(x)], count_include_pad=int(include_pad), **options)
        return Value(value.shape, name)

    def _expm1(self, x: Value, *, shape: tuple[int, ...], **_: Any) -> Value:
        exp = self._add("Exp", [self._name(x)])
        return Value(shape, self._add("Sub", [exp, self._initializer(Constant(np.float32(1)))]))

    def _integer_pow(self, x: Value, *, shape: tuple[int, ...], y: int, **_: Any) -> Value:
        return Value(shape, self._add("Pow", [self._name(x), self._initializer(Constant(np.float32(y)))]))

    def _convert_element_type(self, x: Value, *, shape: tuple[int, ...], new_dtype: Any, **_: Any) -> Value:
        if x.name != "pixels":  # all else is float32 already
            return x
        from onnx import helper

        return Value(shape, self._add("Cast", [x.name], to=helper.np_dtype_to_tensor_dtype(np.dtype(new_dtype))))

    # Convolutions and pooling -----------------------------------------------------------------------

    def _conv_general_dilated(self, x: Value, kernel: Constant, *, shape: tuple[int, ...], **options: Any) -> Value:
        weights = Constant(kernel.value.transpose(3, 2, 0, 1), kernel.label)
        groups, pads, bias = options["feature_group_count"], options["padding"], None
        if isinstance(x.origin, Affine) and groups == 1 and not any(map(any, pads)):
            # What normalizes the images is within the first convolution, where that has no padding.
            scale, shift = (
                None if c is None else c.value[None, :, None, None] for c in (x.origin.scale, x.origin.shift)
            )
            if shift is not None:
                bias = Constant((weights.value * shift).sum((1, 2, 3)))
            if scale is not None:
                weights = replace(weights, value=weights.value * scale)
            x = x.origin.x
        settings = {"strides": options["window_strides"], "dilations": options["rhs_dilation"], "group": groups}
        return Value(shape, origin=Product(x, weights, bias, _windows(weights.value.shape[2:], pads, **settings)))

    def _dot_general(self, x: Value, kernel: Constant, *, shape: tuple[int, ...], **_: Any) -> Value:
        weights = Constant(kernel.value.T, kernel.label)
        if len(shape) == 2:
            return Value(shape, origin=Product(x, weights, None, {}))
        x, strides = (x.origin.x, x.origin.strides) if isinstance(x.origin, Strided) else (x, (1, 1))
        weights = replace(weights, value=weights.value[:, :, None, None])
        options = _windows((1, 1), ((0, 0), (0, 0)), strides=strides, dilations=(1, 1), group=1)
        return Value(shape, origin=Product(x, weights, None, options))

    def _reduce_window_max(self, x: Value, *, shape: tuple[int, ...], **options: Any) -> Value:
        return Value(shape, self._add("MaxPool", [self._name(x)], **_pooling(options)))

    def _reduce_window_sum(self, x: Value, *, shape: tuple[int, ...], **options: Any) -> Value:
        return Value(shape, origin=Sum(x, _pooling(options)))

    def _reduce_sum(self, x: Value, *, shape: tuple[int, ...], axes: tuple[int, ...], **_: Any) -> Value:
        if (len(x.shape), axes) != (4, (1, 2)):
            raise UserError(f"this network has a sum over the axes {axes}, which is not written to ONNX.")
        return Value(shape, origin=Sum(x, None))

    # Parts of arrays --------------------------------------------------------------------------------

    def _slice(
        self, x: Value, *, shape: tuple[int, ...], start_indices: Any, limit_indices: Any, strides: Any
    ) -> Value:
        strides = strides or (1,) * len(shape)
        every = all(size == math.ceil(whole / step) for size, whole, step in zip(shape, x.shape, strides, strict=True))
        if not any(start_indices) and every and len(shape) == 4:
            return Value(shape, origin=Strided(x, tuple(strides[1:3])))
        ends = [LAST if end == size else end - size for end, size in zip(limit_indices, x.shape, strict=True)]
        axes = [i for i, size in enumerate(x.shape) if (start_indices[i], ends[i], strides[i]) != (0, LAST, 1)]
        place = [{1: 2, 2: 3, 3: 1}.get(i, i) if len(shape) == 4 else i for i in axes]
        lists = [[start_indices[i] for i in axes], [ends[i] for i in axes], place, [strides[i] for i in axes]]
        return Value(shape, self._add("Slice", [self._name(x), *map(self._integers, lists)]))

    def _pad(self, x: Value, value: Constant, *, shape: tuple[int, ...], padding_config: Any) -> Value:
        n, h, w, c = padding_config
        ordered = [(int(low), int(high), int(between)) for low, high, between in (n, c, h, w)]
        if any(between for *_, between in ordered):
            raise UserError("this network pads between pixels, which is not written to ONNX.")
        pads = self._integers([low for low, *_ in ordered] + [high for _, high, _ in ordered])
        fill = self._initializer(Constant(np.float32(value.value)))
        return Value(shape, self._add("Pad", [self._name(x), pads, fill]))

    def _concatenate(self, *values: Any, shape: tuple[int, ...], dimension: int) -> Value:
        axis = {1: 2, 2: 3, 3: 1}.get(dimension, dimension) if len(shape) == 4 else dimension
        return Value(shape, self._add("Concat", [self._name(value) for value in values], axis=axis))

    # Nodes ------------------------------------------------------------------------------------------

    def _name(self, value: Value) -> str:
        """The name of an array, of which a node is made if none makes it yet."""
        if not value.name:
            value.name = self._made(value.origin, value.shape)
        return value.name

    def _made(self, origin: Any, shape: tuple[int, ...]) -> str:
        if isinstance(origin, Product):
            layer = origin.kernel.label.removeprefix("params/").removesuffix("/kernel")
            inputs = [self._name(origin.x), self._initializer(origin.kernel)]
            if origin.bias is not None:
                inputs.append(self._initializer(origin.bias))
            if len(shape) == 2:
                return self._add("Gemm", inputs, layer, transB=1)
            return self._add("Conv", inputs, layer, **origin.options)
        if isinstance(origin, Affine):
            name = self._name(origin.x)
            for node, constant in (("Mul", origin.scale), ("Add", origin.shift)):
                if constant is not None:
                    shaped = constant.value.reshape(-1, *(1,) * (len(shape) - 2))  # beside [N, C, H, W] or [N, C]
                    name = self._add(node, [name, self._initializer(Constant(shaped, constant.label))])
            return name
        if isinstance(origin, Strided):
            x = origin.x
            ends, axes = [LAST, LAST], [2, 3]
            lists = [[0, 0], ends, axes, list(origin.strides)]
            return self._add("Slice", [self._name(x), *map(self._integers, lists)])
        raise UserError("this network has a sum of pixels that is no mean, which is not written to ONNX.")

    def _operand(self, argument: Constant | Value) -> str:
        if isinstance(argument, Value):
            return self._name(argument)
        value = _narrowed(argument.value)
        return self._initializer(Constant(value.transpose(0, 3, 1, 2) if value.ndim == 4 else value, argument.label))

    def _add(self, op: str, inputs: list[str], name: str = "", **options: Any) -> str:
        """Adds a node with one output, and returns the output's name, which is the node's too."""
        from onnx import helper

        name = self._free(name or op.lower())
        self.nodes.append(helper.make_node(op, inputs, [name], name, **options))
        return name

    def _initializer(self, constant: Constant) -> str:
        from onnx import numpy_helper

        name = self._free(constant.label or "constant")
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(constant.value), name))
        return name

    def _integers(self, values: Sequence[int]) -> str:
        return self._initializer(Constant(np.asarray(values, np.int64)))

    def _free(self, name: str) -> str:
        """The name, with a number behind it if another thing has it already."""
        number, found = 1, name
        while found in self._names:
            number, found = number + 1, f"{name}_{number}"
        self._names.add(found)
        return found

    def _finish(self, last: str, output: str) -> None:
        """Names the output, and removes what it does not depend on: the endpoints that nobody asked for."""
        needed, kept = {last}, []
        for node in reversed(self.nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                kept.append(node)
                node.output[0] = output if node.output[0] == last else node.output[0]
        self.nodes = kept[::-1]
        self.initializers = [tensor for tensor in self.initializers if tensor.name in needed]


def _computed(equation: Any, given: list[Constant]) -> list[Constant]:
    """The results of an operation on constants. A parameter in another shape keeps its name."""
    name, options = equation.primitive.name, equation.params
    if name == "broadcast_in_dim":
        shape = [1] * len(options["shape"])
        for axis, size in zip(options["broadcast_dimensions"], given[0].value.shape, strict=True):
            shape[axis] = size
        # NumPy repeats without a copy, by which `_narrowed` sees it.
        return [Constant(np.broadcast_to(given[0].value.reshape(shape), options["shape"]), given[0].label)]
    results = equation.primitive.bind(*(constant.value for constant in given), **options)
    results = results if equation.primitive.multiple_results else [results]
    kept = given[0].label if name in ("reshape", "squeeze", "convert_element_type", "transpose") else ""
    return [Constant(np.asarray(result), kept) for result in results]


def _affine(value: Value, scale: Constant | None, shift: Constant | None) -> Value:
    """`value * scale + shift`, together with the product or the scale and shift before it."""
    before = value.origin
    if isinstance(before, Product):
        features = before.kernel.value.shape[0]
        kernel, bias = before.kernel, before.bias
        if scale is not None:
            factors = scale.value.reshape(-1, *(1,) * (kernel.value.ndim - 1))
            kernel = replace(kernel, value=kernel.value * factors)
            bias = bias and replace(bias, value=bias.value * scale.value)
        if shift is not None:
            whole = np.broadcast_to(shift.value, (features,))
            bias = Constant(whole if bias is None else bias.value + whole, shift.label or (bias.label if bias else ""))
        return Value(value.shape, origin=replace(before, kernel=kernel, bias=bias))
    if isinstance(before, Affine) and not value.name:
        if scale is not None:
            factor = scale if before.scale is None else Constant(before.scale.value * scale.value)
            moved = before.shift and replace(before.shift, value=before.shift.value * scale.value)
            before = Affine(before.x, factor, moved)
        if shift is not None:
            moved = shift if before.shift is None else Constant(before.shift.value + shift.value, shift.label)
            before = replace(before, shift=moved)
        return Value(value.shape, origin=before)
    return Value(value.shape, origin=Affine(value, scale, shift))


def _narrowed(array: np.ndarray) -> np.ndarray:
    """An array without what broadcasting repeats: `[1, 1, 1, C]`, or `[]` for one number."""
    for axis, stride in enumerate(array.strides):
        if array.shape[axis] > 1 and (stride == 0 or (array == array.take([0], axis)).all()):
            array = array.take([0], axis)
    return array.reshape(()) if array.size == 1 else array


def _per_channel(constant: Constant) -> Constant | None:
    """`[C]`, or `[1]` for one number; None where other axes matter."""
    value = constant.value
    if value.size not in (1, value.shape[-1] if value.ndim else 1):
        return None
    return Constant(value.reshape(-1), constant.label)


def _pixels_inside(sizes: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    """How many pixels of each window are inside the image, not padding: `[1, H', W', 1]`, narrowed."""
    counts = []
    for axis, size in enumerate(sizes):
        low, high, span = options["pads"][axis], options["pads"][axis + 2], options["kernel_shape"][axis]
        is_inside = np.pad(np.ones(size, np.float32), (low, high))
        starts = range(0, len(is_inside) - span + 1, options["strides"][axis])
        counts.append(np.array([is_inside[start : start + span].sum() for start in starts]))
    return _narrowed(counts[0][None, :, None, None] * counts[1][None, None, :, None])


def _windows(kernel_shape: Sequence[int], pads: Sequence[tuple[int, int]], **options: Any) -> dict[str, Any]:
    """ONNX's attributes of a window that slides over rows and columns."""
    (top, bottom), (left, right) = pads
    lists = {name: list(map(int, value)) if isinstance(value, tuple) else int(value) for name, value in options.items()}
    return {"kernel_shape": list(map(int, kernel_shape)), "pads": list(map(int, (top, left, bottom, right)))} | lists


def _pooling(options: dict[str, Any]) -> dict[str, Any]:
    pads, window, strides = (options[name][1:3] for name in ("padding", "window_dimensions", "window_strides"))
    return _windows(window, pads, strides=tuple(strides))
