"""The function that is exported: uint8 images in, probabilities, logits or features out, with all else inside it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from xception_flax.inference.predictor import ACTIVATIONS, Predictor
from xception_flax.models.folding import fold_batch_norm
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest
from xception_flax.text.sizes import sides
from xception_flax.training.steps import create_normalizer

Variables = Mapping[str, Any]

OUTPUTS = ("probabilities", "logits", "features")


class Program(NamedTuple):
    """A network as one function, for inference.

    Attributes:
      network: variables, and images, uint8 `[N, H, W, C]` -> logits or features, float32 `[N, size]`.
      activation: 'softmax' or 'sigmoid' after it, of `ACTIVATIONS`; None for none.
      variables: the parameters, in NumPy arrays, with batch normalization folded.
      image_shape: `(H, W, C)` of the images that the network was trained for.
      outputs: one of `OUTPUTS`.
    """

    network: Callable[[Variables, jax.Array], jax.Array]
    activation: str | None
    variables: Variables
    image_shape: tuple[int, int, int]
    outputs: str

    def function(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Returns the outputs, float32 `[N, size]`, of images, uint8 `[N, H, W, C]`."""
        values = self.network(variables, images)
        return values if self.activation is None else ACTIVATIONS[self.activation](values)

    @property
    def size(self) -> int:
        """How many numbers it gives of an image."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.uint8)
        return jax.eval_shape(self.function, self.variables, images).shape[1]


def create_program(predictor: Predictor, outputs: str = "probabilities") -> Program:
    """Returns the function of a trained network.

    It computes in float32, whatever the network was trained in.

    Args:
      predictor: the network, and how its images are normalized.
      outputs: one of `OUTPUTS`; 'features' are the pooled features before the classifier.

    Raises:
      UserError: the network does not have the outputs.
    """
    if outputs not in OUTPUTS:
        raise UserError(f"unknown outputs {outputs!r}; {suggest(outputs, OUTPUTS)}")
    if outputs != "features" and not predictor.model.num_classes:
        raise UserError(f"this network has no classifier, and so no {outputs}; give --outputs features.")
    p = predictor.preprocessing
    image_shape = (*sides(p.image_size), p.channels)
    model, normalize = in_float32(predictor.model), create_normalizer(p.mean, p.std)
    # On the host, whatever mesh they are on.
    variables = jax.tree.map(lambda array: np.asarray(array).astype(np.float32), dict(predictor.variables))
    if variables.get("batch_stats"):
        variables = jax.tree.map(np.asarray, fold_batch_norm(model, variables, image_shape=image_shape))
    statistics = flatten_dict(variables.get("batch_stats", {}))

    def skip_folded(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        norm = context.module
        if isinstance(norm, nn.BatchNorm) and _is_folded(norm, statistics):
            return args[0] + norm.get_variable("params", "bias")[None, None, None]
        return call(*args, **kwargs)

    def network(variables: Variables, images: jax.Array) -> jax.Array:
        with nn.intercept_methods(skip_folded):
            endpoints: Any = model.apply(variables, normalize(images), train=False, method="endpoints")
        return endpoints["pooled" if outputs == "features" else "logits"].astype(jnp.float32)

    activation = predictor.activation if outputs == "probabilities" else None
    return Program(network, activation, variables, image_shape, outputs)


def in_float32(model: nn.Module) -> nn.Module:
    """Returns the network as it computes in float32, without rematerialisation, which is for training."""
    fields = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    return model.clone(**fields, **({"remat": False} if hasattr(model, "remat") else {}))


def _is_folded(norm: nn.BatchNorm, statistics: Mapping[tuple[str, ...], np.ndarray]) -> bool:
    """Whether a normalization has what `fold_batch_norm` leaves of one: it adds its bias, and nothing else."""
    mean, var = (statistics[(*norm.path, name)] for name in ("mean", "var"))
    return not mean.any() and bool((var == np.float32(1) - np.float32(norm.epsilon)).all())
