"""Batch normalization folded into the convolutions before it, for inference."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax.models.layers import Conv, DepthwiseConv, PointwiseConv
from xception_flax.text.errors import UserError

PyTree = Any
Flat = dict[tuple[str, ...], jax.Array]

CONVOLUTIONS = (Conv, DepthwiseConv, PointwiseConv)


def fold_batch_norm(
    model: nn.Module, variables: PyTree, *, image_shape: tuple[int, int, int] | None = None
) -> dict[str, PyTree]:
    """Returns variables of the same network in which a normalization after a convolution only adds a bias.

    `scale / sqrt(var + epsilon)` is multiplied into the kernel, and the rest goes into `bias`; `mean`, `var` and
    `scale` become an identity. Names and shapes are unchanged, so the result can replace the variables everywhere: all
    `endpoints` with `train=False` are equal up to float32's rounding. It is not for training, since the statistics are
    gone. A normalization that does not follow a convolution, as with pre-activation, is unchanged.

    Args:
      model: one of `MODELS`, or a network in which the result of a normalized convolution is used only by its
        normalization and as an endpoint; other uses are not detected.
      variables: `{'params': ..., 'batch_stats': ...}`.
      image_shape: `(H, W, C)` of an image that the network accepts; None for 299 pixels a side, and the channels that
        the kernel of its first convolution has.

    Raises:
      UserError: there are no statistics to fold.

    Example:
      >>> import jax
      >>> from xception_flax import create_model, fold_batch_norm
      >>> model = create_model("xception", num_classes=10, width=0.05, middle_repeats=0)
      >>> images = jax.random.normal(jax.random.key(1), [2, 71, 71, 3])
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> folded = fold_batch_norm(model, variables, image_shape=(71, 71, 3))
      >>> before, after = (model.apply(each, images, train=False) for each in (variables, folded))
      >>> bool(abs(after - before).max() < 1e-5)
      True
    """
    if not variables.get("batch_stats"):
        raise UserError("fold_batch_norm needs variables with 'batch_stats'; this network, or this file, has none.")
    params, stats = (cast("Flat", flatten_dict(variables[name])) for name in ("params", "batch_stats"))
    if image_shape is None:
        image_shape = (299, 299, params[(*_first_convolution(model), "kernel")].shape[2])
    for convolution, norm, epsilon in _normalized_convolutions(model, variables, image_shape):
        mean, var = stats[(*norm, "mean")], stats[(*norm, "var")]
        scale = jax.lax.rsqrt(var + epsilon) * params.get((*norm, "scale"), 1.0)
        kernel, bias = params[(*convolution, "kernel")], params[(*norm, "bias")]
        params[(*convolution, "kernel")] = (kernel * scale[None, None, None]).astype(kernel.dtype)
        params[(*norm, "bias")] = (bias - mean * scale).astype(bias.dtype)
        stats[(*norm, "mean")], stats[(*norm, "var")] = jnp.zeros_like(mean), jnp.ones_like(var) - epsilon
        if (*norm, "scale") in params:
            params[(*norm, "scale")] = jnp.ones_like(params[(*norm, "scale")])
    return {**variables, "params": unflatten_dict(params), "batch_stats": unflatten_dict(stats)}


def _first_convolution(model: nn.Module) -> tuple[str, ...]:
    paths = []

    def watch(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, CONVOLUTIONS):
            paths.append(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 299, 299, 3)), train=False), jax.random.key(0))
    return paths[0]


def _normalized_convolutions(
    model: nn.Module, variables: PyTree, image_shape: tuple[int, int, int]
) -> list[tuple[tuple[str, ...], tuple[str, ...], float]]:
    """Returns (path of a convolution, path of the normalization that alone uses its result, its epsilon), in order."""
    if getattr(model, "remat", False):
        model = model.clone(remat=False)  # with remat, a block returns other objects than those made inside it
    made, pairs = {}, []  # `made` keeps the arrays alive, so that no other array gets the id of one

    def watch(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, CONVOLUTIONS):
            made[id(result)] = (result, context.module.path)
        elif isinstance(context.module, nn.BatchNorm) and id(args[0]) in made:
            pairs.append((args[0], context.module))
        return result

    def trace(variables: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        with nn.intercept_methods(watch):
            endpoints: Any = model.apply(variables, images, train=False, method="endpoints")
        # A result that is also an endpoint must not change.
        kept = {id(value) for value in endpoints.values()}
        pairs[:] = [(x, norm) for x, norm in pairs if id(x) not in kept]
        return endpoints

    jax.eval_shape(trace, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return [(made[id(x)][1], norm.path, norm.epsilon) for x, norm in pairs]
