"""The training state: all that a run needs in order to go on."""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from xception_flax.text.errors import UserError
from xception_flax.training import sharding

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes from step to step.

    Attributes:
      step: int32 scalar; updates done so far.
      params: trainable parameters, collection 'params'.
      batch_stats: moving mean and variance of batch normalization, collection 'batch_stats'.
      opt_state: of the optimizer.
      ema_params: exponential moving average of `params`; None where the recipe keeps none.
      ema_batch_stats: the same of `batch_stats`.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    ema_params: PyTree | None = None
    ema_batch_stats: PyTree | None = None

    def variables(self, weights: str) -> dict[str, PyTree]:
        """What `model.apply` takes: `weights` is 'raw' (the last ones) or 'ema' (the averaged ones).

        Raises:
          ValueError: 'ema' of a state that keeps no average, or another word.
        """
        if weights == "raw":
            return {"params": self.params, "batch_stats": self.batch_stats}
        if weights != "ema":
            raise UserError(f"weights must be 'raw' or 'ema', got {weights!r}.")
        if self.ema_params is None:
            raise UserError("weights='ema', but the recipe keeps no average (step.ema_decay is 0).")
        return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}


def make_init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
    *,
    ema: bool,
) -> tuple[Any, TrainState]:
    """Returns (init, abstract_state).

    `init(key, pretrained={})` makes the state, each array already where it belongs: no device ever
    holds more than its share. `weights.initial` has variables by their path, `('params', 'predictions',
    'kernel')` say, that take the place of random ones. `abstract_state` has the shape, type and sharding
    of each, without memory: what restoring a checkpoint and compiling ahead of time need.

    Args:
      image_shape: `(H, W, C)` of one image.
      ema: whether to keep averages of parameters and batch statistics.
    """

    def init(key: jax.Array, pretrained: dict[tuple[str, ...], jax.Array] | None = None) -> TrainState:
        variables = _init_variables(model, key, jnp.zeros((1, *image_shape), jnp.float32))
        flat = flatten_dict(variables)
        given = {path: value.astype(flat[path].dtype) for path, value in (pretrained or {}).items()}
        variables = {"batch_stats": {}} | unflatten_dict(flat | given)
        params, batch_stats = variables["params"], variables["batch_stats"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(params),
            # Copies: the state is donated, and one buffer cannot be given away twice.
            ema_params=jax.tree.map(jnp.copy, params) if ema else None,
            ema_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema else None,
        )

    # With the arguments of the run's own call, which then is not traced again.
    abstract_state = _placed(mesh, jax.eval_shape(init, jax.random.key(0), {}))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    # It runs once. On CPUs XLA's highest level, 3, spends longer on making a hundred random generators fast than they
    # run; 0 takes as long to compile as 1, and ten times as long to run.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options), abstract_state


def abstract_variables(model: nn.Module, image_shape: tuple[int, int, int], mesh: Mesh) -> dict[str, PyTree]:
    """Returns shape, type and sharding of what `model.apply` takes, without memory.

    Raises:
      ValueError: the model does not take such images, or is of float64 while JAX has it switched off.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return _placed(mesh, jax.eval_shape(partial(_init_variables, model), jax.random.key(0), images))


def _init_variables(model: nn.Module, key: jax.Array, images: jax.Array) -> dict[str, PyTree]:
    """`model.init`, always with both collections, and with moving statistics of the type that a step gives them."""
    for field in ("dtype", "param_dtype"):
        if (
            jax.dtypes.canonicalize_dtype(wanted := getattr(model, field, jnp.float32)) != wanted
        ):  # JAX would take another
            raise UserError(f"model.{field}={jnp.dtype(wanted)} needs JAX_ENABLE_X64=1 in the environment.")
    variables = {"batch_stats": {}} | dict(model.init(key, images, train=False))
    # linen begins in float32 where the model computes in float64: the first update would change the state's types.
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    return variables | {"batch_stats": jax.tree.map(lambda leaf: leaf.astype(dtype), variables["batch_stats"])}


def _placed(mesh: Mesh, shapes: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )
