"""The cost of a network, layer by layer, from shapes alone: parameters, multiply-adds, memory of activations."""

import contextlib
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xception_flax.host import peaks


class Layer(NamedTuple):
    """A module with parameters of its own.

    Attributes:
      path: in the variables, such as `('block2_sepconv1', 'depthwise')`.
      module: its class, such as 'DepthwiseConv'.
      shape: of its output, without the batch.
      parameters: number of trainable values.
      statistics: number of moving means and variances.
      macs: multiply-adds an image; 0 except for convolutions and dense layers.
      activation_bytes: of its output, an image. About these are kept for the backward pass; ReLU, pooling and sums
        are fused or computed again.
    """

    path: tuple[str, ...]
    module: str
    shape: tuple[int, ...]
    parameters: int
    statistics: int
    macs: int
    activation_bytes: int


def list_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """Returns the layers of `model` in the order of their computation, for one image `(H, W, C)`.

    It only traces the network: nothing is computed, and no array is made.

    Raises:
      UserError: the model does not accept images of this shape.
    """
    layers: list[Layer] = []

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = next_call(*args, **kwargs)
        module = context.module
        own = {
            collection: {k: v for k, v in variables.items() if hasattr(v, "shape")}
            for collection, variables in module.variables.items()
        }
        if context.method_name == "__call__" and any(own.values()):
            parameters = own.get("params", {})
            layers.append(
                Layer(
                    path=module.path,
                    module=type(module).__name__,
                    shape=result.shape[1:],
                    parameters=_size(parameters),
                    statistics=_size(own.get("batch_stats", {})),
                    # Each weight of a kernel is used once for each pixel of the output.
                    macs=_size(parameters.get("kernel")) * math.prod(result.shape[1:-1]),
                    activation_bytes=math.prod(result.shape[1:]) * result.dtype.itemsize,
                )
            )
        return result

    def init(images: jax.Array) -> Any:
        return model.init(jax.random.key(0), images, train=False)

    float64 = jnp.float64 in (jnp.dtype(getattr(model, name, jnp.float32)) for name in ("dtype", "param_dtype"))
    with nn.intercept_methods(record), jax.enable_x64(True) if float64 else contextlib.nullcontext():
        jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return layers


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def training_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Returns the floating-point operations that training this network needs for one image.

    A multiply-add is two operations. Training takes three times the forward pass: for each product, the backward pass
    computes two of the same size, the gradients of its input and of its weights. Only convolutions and dense layers
    count, without what is recomputed to save memory.
    """
    return 2 * 3 * sum(layer.macs for layer in list_layers(model, image_shape))


def peak_images_per_second(
    model: nn.Module, image_shape: tuple[int, int, int], device_kind: str, num_devices: int
) -> float | None:
    """Returns the largest training rate that these devices can reach; None where their peak is not known."""
    peak = peaks.peak_flops_per_second(device_kind, jnp.dtype(model.dtype).name)
    return None if peak is None else num_devices * peak / training_flops(model, image_shape)
