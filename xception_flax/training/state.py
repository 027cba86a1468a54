"""The training state: everything that a run needs to go on."""

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
      opt_state: state of the optimizer.
      ema_params: exponential moving average of `params`; None if the recipe keeps none.
      ema_batch_stats: the same of `batch_stats`.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    ema_params: PyTree | None = None
    ema_batch_stats: PyTree | None = None

    def variables(self, weights: str) -> dict[str, PyTree]:
        """Returns what `model.apply` takes: the `weights` 'raw' (the latest) or 'ema' (the averaged).

        Raises:
          UserError: `weights` is neither, or is 'ema' and the state keeps no average.
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

    `init(key, pretrained={})` returns the initial state. Each array is created with its sharding, so no device ever
    holds more than its share. `pretrained` has variables by path, such as `('params', 'predictions', 'kernel')`, which
    replace random ones; see `weights.initial`. `abstract_state` has the shape, type and sharding of each array, without
    memory; restoring a checkpoint and compiling ahead of time need it.

    Args:
      model: the network.
      tx: the optimizer.
      image_shape: `(H, W, C)` of one image.
      mesh: of all devices.
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
            # Copies: the state is donated, and one buffer cannot be donated twice.
            ema_params=jax.tree.map(jnp.copy, params) if ema else None,
            ema_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema else None,
        )

    # Traced with the same arguments as the run's own call, so that JAX does not trace that one again.
    abstract_state = _placed(mesh, jax.eval_shape(init, jax.random.key(0), {}))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    # It runs once. On CPUs, XLA's highest level 3 takes longer to optimize a hundred random generators than they take
    # to run. Level 0 compiles as slowly as 1, and runs ten times slower.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options), abstract_state


def abstract_variables(model: nn.Module, image_shape: tuple[int, int, int], mesh: Mesh) -> dict[str, PyTree]:
    """Returns shape, type and sharding of the variables that `model.apply` takes, without memory.

    Raises:
      UserError: the model does not take such images, or has float64 while JAX has it turned off.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return _placed(mesh, jax.eval_shape(partial(_init_variables, model), jax.random.key(0), images))


def _init_variables(model: nn.Module, key: jax.Array, images: jax.Array) -> dict[str, PyTree]:
    """Returns `model.init`, always with both collections, and moving statistics of the type that a step returns."""
    for field in ("dtype", "param_dtype"):
        wanted = getattr(model, field, jnp.float32)
        if jax.dtypes.canonicalize_dtype(wanted) != wanted:  # JAX would use another type
            raise UserError(f"model.{field}={jnp.dtype(wanted)} needs JAX_ENABLE_X64=1 in the environment.")
    variables = {"batch_stats": {}} | dict(model.init(key, images, train=False))
    # linen creates float32 statistics even for a model of float64; the first update would change their type.
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    return variables | {"batch_stats": jax.tree.map(lambda leaf: leaf.astype(dtype), variables["batch_stats"])}


def _placed(mesh: Mesh, shapes: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )
