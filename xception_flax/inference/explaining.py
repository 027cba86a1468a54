"""Why a network says what it says: where in an image its evidence for a class is.

Two questions, two methods. Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): which places of a stage's features speak
for the class. Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365): how much each pixel adds to the logit,
compared with an image of one gray. Both take the logit of the class, before softmax or sigmoid.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xception_flax.inference.predictor import Predictor
from xception_flax.inference.preprocessing import AnImage
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.naming import composed
from xception_flax.text.ranges import check_range
from xception_flax.training import sharding

PREDICTED = -1  # in place of the number of a class: the most likely one

MAX_STEPS = 10_000


class Explanation(NamedTuple):
    """What speaks for one class in one image.

    Attributes:
      pixels: what the network took: `[H, W, C]`, 0 to 255.
      probabilities: of all classes, `[num_classes]`.
      number: of the class that is explained.
      maps: Grad-CAM by the name of the stage: `[h, w]` float32, 0 and more, in units of the logit. Where it is 0,
        nothing at this stage speaks for the class.
      attributions: integrated gradients, `[H, W, C]` float32, in units of the logit; None if
        they were not asked for.
      difference: the logit of the image less that of the baseline, which is the sum of exact `attributions`.
    """

    pixels: np.ndarray
    probabilities: np.ndarray
    number: int
    maps: dict[str, np.ndarray]
    attributions: np.ndarray | None
    difference: float | None


def grad_cam(
    model: nn.Module, variables: Any, inputs: jax.Array, numbers: jax.Array, stages: Sequence[str]
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Returns the logits, the numbers of the classes, and Grad-CAM's map of each stage.

    A map is the features that flow on at the end of the stage, weighted with the mean of their gradient over all
    places, summed over the channels, and cut off below 0 (section 3 of the paper).

    Args:
      model: a network of `models`.
      variables: as `model.apply` takes them.
      inputs: `[N, H, W, C]`, normalized.
      numbers: `[N]`, of the class to explain in each image; `PREDICTED` for the most likely one.
      stages: names of them.
    """

    def score(perturbations: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        everything = {**variables, "perturbations": perturbations}
        logits, kept = model.apply(everything, inputs, train=False, mutable=["intermediates"])
        chosen = jnp.where(numbers == PREDICTED, logits.argmax(-1), numbers)
        found = {stage: kept["intermediates"][stage][0] for stage in stages}
        return jnp.take_along_axis(logits, chosen[:, None], axis=-1).sum(), (logits, chosen, found)

    def zeros() -> dict[str, jax.Array]:
        _, (_, _, found) = jax.eval_shape(score, {})
        return {stage: jnp.zeros(x.shape, x.dtype) for stage, x in found.items()}

    gradients, (logits, chosen, found) = jax.grad(score, has_aux=True)(zeros())
    maps = {}
    for stage, features in found.items():
        weights = gradients[stage].astype(jnp.float32).mean((1, 2), keepdims=True)
        maps[stage] = nn.relu((features.astype(jnp.float32) * weights).sum(-1))
    return logits, chosen, maps


class Explainer:
    """Explains what a trained network says of images."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        stages: Sequence[str] = (),
        steps: int = 0,
        baseline: float = 0.0,
        output_stride: int | None = None,
    ) -> None:
        """Checks what is asked for.

        Args:
          predictor: the network.
          stages: for Grad-CAM; () for the last one.
          steps: of integrated gradients; 0 leaves them out. More are more exact.
          baseline: the gray that the image is compared with, 0 to 255.
          output_stride: of the features; None for the network's own. At 16 or 8 the maps are finer, and the network is
            another one with the same weights: the middle flow has seen such a grid, the exit flow has not.

        Raises:
          UserError: the network has no classifier or no such stage, or a number is out of its range.
        """
        if not predictor.class_names:
            raise UserError("this network has no classifier, so there is no class to explain.")
        self.predictor = predictor
        self.model = predictor.model
        if output_stride is not None:
            if not hasattr(self.model, "output_stride"):
                raise UserError(f"{type(self.model).__name__} has one output stride; leave --output-stride out.")
            self.model = self.model.clone(output_stride=output_stride)
        known = tuple(self.model.strides)
        for stage in stages:
            if stage not in known:
                raise UserError(f"unknown stage {written(stage)}; {suggest(stage, known)}")
        self.stages = tuple(dict.fromkeys(stages)) or known[-1:]
        check_range("steps of integrated gradients (0: none)", steps, 0, MAX_STEPS)
        check_range("the gray of the baseline", baseline, 0, 255)
        self._baseline, self._steps = baseline, steps
        self._maps = jax.jit(self._grad_cam)
        self._slopes = jax.jit(self._input_gradients)

    def number_of(self, name: str) -> int:
        """Returns the number of a class.

        Raises:
          UserError: the network has no class of this name.
        """
        predictor = self.predictor
        for names in (predictor.class_names, predictor.class_descriptions):
            names = tuple(map(composed, names))
            if composed(name) in names:
                return names.index(composed(name))
        unnamed = predictor.names_assumed and predictor.class_names[:1] == ("0",)
        advice = " These are numbers, for want of names; --class-names FILE gives them." if unnamed else ""
        raise UserError(f"unknown class {written(name)}; {suggest(name, predictor.class_names)}{advice}")

    def stream(
        self, images: Sequence[AnImage], number: int = PREDICTED
    ) -> Iterator[tuple[AnImage, Explanation | UserError]]:
        """Yields each image with its explanation, or with the error, a batch at a time.

        Args:
          images: as of `Predictor.predict`, a sequence of them.
          number: of the class to explain in all images; `PREDICTED` for the most likely one of each.
        """
        predictor = self.predictor
        for part, prepared, batch in predictor.batches(images):
            numbers = np.full(len(batch), number, np.int32)
            arrays = sharding.global_batch(predictor.mesh, {"images": batch, "labels": numbers})
            probabilities, chosen, maps = jax.device_get(
                self._maps(predictor.variables, arrays["images"], arrays["labels"])
            )
            for i, (image, pixels) in enumerate(zip(part, prepared, strict=True)):
                if isinstance(pixels, UserError):
                    yield image, pixels
                    continue
                integrated = self._integrated(pixels, int(chosen[i])) if self._steps else (None, None)
                found = {stage: values[i] for stage, values in maps.items()}
                if not all(np.isfinite(values).all() for values in (probabilities[i], *found.values())):
                    yield image, UserError("the network's output for it is not finite.")
                    continue
                yield image, Explanation(pixels, probabilities[i], int(chosen[i]), found, *integrated)

    def _grad_cam(
        self, variables: Any, images: jax.Array, numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        with jax.sharding.use_abstract_mesh(self.predictor.mesh.abstract_mesh):
            inputs = self.predictor.normalize(images)
            logits, chosen, maps = grad_cam(self.model, variables, inputs, numbers, self.stages)
        return self.predictor.activate(logits).astype(jnp.float32), chosen, maps

    def _input_gradients(self, variables: Any, points: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits of the classes `numbers`, `[N]`, and their gradients by the images `points`, of 0 to 255."""

        def score(points: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = self.model.apply(variables, self.predictor.normalize(points), train=False)
            chosen = jnp.take_along_axis(logits, numbers[:, None], axis=-1)[:, 0]
            return chosen.sum(), chosen

        with jax.sharding.use_abstract_mesh(self.predictor.mesh.abstract_mesh):
            gradients, logits = jax.grad(score, has_aux=True)(points)
        return logits.astype(jnp.float32), gradients.astype(jnp.float32)

    def _integrated(self, pixels: np.ndarray, number: int) -> tuple[np.ndarray, float]:
        """Returns integrated gradients of one image, and the difference of the logits that their sum approaches.

        The integral over the straight line from the baseline is by Gauss and Legendre. The points of the line are the
        batch, so that one image keeps all devices busy. Its ends have weight 0: they are there for their logits.
        """
        image = pixels.astype(np.float32)
        line = image - np.float32(self._baseline)
        nodes, weights = np.polynomial.legendre.leggauss(self._steps)
        places = np.concatenate([(nodes + 1) / 2, [0.0, 1.0]])
        weights = np.concatenate([weights / 2, [0.0, 0.0]])
        size, logits, mean = self.predictor.batch_size, [], np.zeros(image.shape, np.float64)
        for start in range(0, len(places), size):
            part = places[start : start + size]
            points = np.zeros((size, *image.shape), np.float32)
            shares = part.astype(np.float32)[:, None, None, None]
            points[: len(part)] = np.float32(self._baseline) + shares * line[None]
            arrays = (sharding.global_array(self.predictor.mesh, a) for a in (points, np.full(size, number, np.int32)))
            values, gradients = self._slopes(self.predictor.variables, *arrays)
            logits.append(np.asarray(values)[: len(part)])
            mean += np.tensordot(weights[start : start + size], np.asarray(gradients)[: len(part)], axes=1)
        ends = np.concatenate(logits)[-2:]
        return (mean * line).astype(np.float32), float(ends[1] - ends[0])
