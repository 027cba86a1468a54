"""A trained network of any origin, ready to be asked: `load(SOURCE).predict(images)`."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from xception_flax import models
from xception_flax.data.decoding import BadImageError
from xception_flax.inference import class_names as known_names
from xception_flax.inference import preprocessing as preprocessings
from xception_flax.inference.preprocessing import AnImage, Image, Preprocessing
from xception_flax.models import ops
from xception_flax.runs.restore import Run
from xception_flax.text.errors import UserError
from xception_flax.text.ranges import check_range
from xception_flax.text.sizes import ImageSize
from xception_flax.training import sharding, state, steps
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.source import open_source
from xception_flax.weights.word import told

# Images at a time. On CPUs larger batches take longer for each image: their arrays do not fit into the caches.
BATCH_SIZE, CPU_BATCH_SIZE = 32, 8

Outputs = dict[str, np.ndarray]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


class Predictor:
    """A network with its weights, and what it needs to be asked about images.

    Attributes:
      model: the linen module.
      variables: what `model.apply` takes, on the devices.
      class_names: of the logits, in their order; numbers where nobody says them.
      preprocessing: how an image becomes what the network takes.
      activation: 'softmax' or 'sigmoid', from logits to probabilities.
      origin: what the weights are, as JSON.
      notes: what was assumed and left out, in words.
      batch_size: images at a time.
      class_descriptions: the classes in words, where `class_names` are codes; () where nobody says them.
      names_assumed: whether `class_names` are ImageNet's, or numbers, for want of others.
      measured: as of `Pretrained`.
      mesh: the devices.
      normalize: from pixels, 0 to 255, to what the network takes.
      activate: from logits to probabilities.
      compiler_options: of the forward pass; see `ops.compiler_options`.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        mesh: Mesh,
        activation: str = "softmax",
        origin: Mapping[str, Any] = {},
        notes: Sequence[str] = (),
        batch_size: int | None = None,
        class_descriptions: Sequence[str] = (),
        names_assumed: bool = False,
        measured: Mapping[str, Any] = {},
    ) -> None:
        self.class_descriptions, self.names_assumed = tuple(class_descriptions), names_assumed
        self.measured, self.mesh = dict(measured), mesh
        self.model, self.variables = model, variables
        self.class_names, self.preprocessing = tuple(class_names), preprocessing
        self.activation, self.origin, self.notes = activation, dict(origin), tuple(notes)
        platform, shape = mesh.devices.flat[0].platform, preprocessing.image_shape
        if batch_size is None:
            batch_size = CPU_BATCH_SIZE if platform == "cpu" else BATCH_SIZE
        check_range("batch_size", batch_size, 1)
        self.batch_size = -(-batch_size // mesh.size) * mesh.size  # each device as many
        self.normalize = steps.create_normalizer(preprocessing.mean, preprocessing.std)
        self.activate = ACTIVATIONS[activation]
        self.compiler_options = ops.compiler_options(platform, *shape[:2])
        self._forward = jax.jit(self._outputs, static_argnames="names", compiler_options=self.compiler_options)

    def predict(self, images: Image | Sequence[Image] | np.ndarray) -> np.ndarray:
        """Returns the probability of each class, float32 `[N, num_classes]`.

        With `activation` 'softmax' the probabilities of an image sum to 1; with 'sigmoid' each class has its own.

        Args:
          images: one or several, each a path, the content of a file, an image of PIL, or uint8 pixels `[H, W]` or
            `[H, W, C]`, an array of any library; or all in one array `[N, H, W, C]`. Any number, of any sizes.

        Raises:
          UserError: the network has no classifier, or an image cannot be read; the message says which.
        """
        return self._whole(images, ("probabilities",))["probabilities"]

    def embed(self, images: Image | Sequence[Image] | np.ndarray) -> np.ndarray:
        """Returns the pooled features, float32 `[N, 2048]` for Xception. Arguments as of `predict`."""
        return self._whole(images, ("pooled",))["pooled"]

    def endpoints(self, images: Image | Sequence[Image] | np.ndarray) -> Outputs:
        """Returns all outputs of the network by name, as its `endpoints` does. Arguments as of `predict`."""
        return self._whole(images, ())

    def run(self, pixels: np.ndarray, names: tuple[str, ...]) -> Outputs:
        """Returns outputs for images that are prepared already.

        Args:
          pixels: `[N, H, W, C]`, uint8, as `preprocessing.prepare` returns one.
          names: as of `stream`.
        """
        missing = -len(pixels) % self.batch_size
        padded = np.pad(pixels, [(0, missing), (0, 0), (0, 0), (0, 0)])
        outputs = [self._batch(part, names) for part in np.split(padded, len(padded) // self.batch_size)]
        return {name: np.concatenate([part[name] for part in outputs])[: len(pixels)] for name in outputs[0]}

    def stream(
        self, images: Sequence[AnImage], names: tuple[str, ...], *, dark: list[AnImage] | None = None
    ) -> Iterator[tuple[AnImage, Outputs | UserError]]:
        """Yields each image with its outputs, or with the error, a batch at a time.

        Args:
          images: as of `predict`, a sequence of them.
          names: of the outputs: 'probabilities', and those of the network's `endpoints`; () for all of the latter.
          dark: a list to which files of 16 bits without a value in the upper half are added.
        """
        if "probabilities" in names and not self.class_names:
            raise UserError("this network has no classifier; its features can be had (embed), or classes be trained.")
        for part, prepared, batch in self.batches(images, dark=dark):
            outputs = self._batch(batch, names)
            for i, (image, pixels) in enumerate(zip(part, prepared, strict=True)):
                if isinstance(pixels, UserError):
                    yield image, pixels
                    continue
                found = {name: values[i] for name, values in outputs.items()}
                finite = all(np.isfinite(values).all() for values in found.values())
                yield image, found if finite else UserError("the network's output for it is not finite.")

    def batches(
        self, images: Sequence[AnImage], *, dark: list[AnImage] | None = None
    ) -> Iterator[tuple[Sequence[AnImage], Sequence[np.ndarray | UserError], np.ndarray]]:
        """Yields a part of the images, the pixels of each or its error, and these as one batch for the network.

        Each batch is `[batch_size, H, W, C]`, for one program; images that are missing are
        black. Arguments as of `stream`.
        """
        p = self.preprocessing
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(images), self.batch_size):
                part = images[start : start + self.batch_size]
                prepared, may_be_dark = zip(*threads.map(self._prepared, part), strict=True)
                if dark is not None:
                    dark.extend(itertools.compress(part, may_be_dark))
                batch = np.zeros((self.batch_size, *p.image_shape), np.uint8 if p.rounded else np.float32)
                for i, pixels in enumerate(prepared):
                    if not isinstance(pixels, UserError):
                        batch[i] = pixels
                yield part, prepared, batch

    def _batch(self, pixels: np.ndarray, names: tuple[str, ...]) -> Outputs:
        """Returns the outputs for one whole batch."""
        images = sharding.global_array(self.mesh, pixels)
        return {name: np.asarray(values) for name, values in self._forward(self.variables, images, names).items()}

    def _outputs(self, variables: Mapping[str, Any], images: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # each device computes its own images
            inputs = self.normalize(images)
            outputs: Any = self.model.apply(variables, inputs, train=False, method="endpoints")
        if "probabilities" in names:
            outputs = outputs | {"probabilities": self.activate(outputs["logits"])}
        return {name: outputs[name].astype(jnp.float32) for name in names or outputs}

    def _prepared(self, image: Image) -> tuple[np.ndarray | UserError, bool]:
        """Returns the pixels or the error, and whether the image may be nearly black by mistake."""
        try:
            content = preprocessings.content(image, self.preprocessing.channels)
            return self.preprocessing.prepare(content), self.preprocessing.may_be_dark(content)
        except BadImageError as error:
            return error, False

    def _whole(self, images: Image | Sequence[Image] | np.ndarray, names: tuple[str, ...]) -> Outputs:
        rows = []
        for i, (image, outputs) in enumerate(self.stream(_listed(images), names)):
            if isinstance(outputs, UserError):
                which = image if isinstance(image, str) or hasattr(image, "__fspath__") else f"image {i}"
                raise UserError(f"{which}: {outputs}") from None
            rows.append(outputs)
        if not rows:
            raise UserError("there are no images; expected at least one.")
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def load(
    source: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    weights: str | None = None,
    image_size: ImageSize | None = None,
    transforms: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Predictor:
    """Returns a trained network, whoever trained it, ready to be asked.

    Args:
      source: the workdir of a run; a file of Keras, timm, torch or this project; a folder as the Hugging Face hub has
        it; 'keras:NETWORK', 'timm:NAME' or 'hf:OWNER/NAME', which are fetched.
      checkpoint: of a workdir: 'best', 'latest' or the number of a step.
      weights: of a workdir: 'raw' or 'ema', the averaged ones; None for 'ema' where the run keeps them.
      image_size, transforms, mean, std: as of `Preprocessing`; None for what the source says, or else what its library
        does. Not for a workdir, whose recipe says it.
      class_names: of the logits, or a file of text with a name in each line; None for those of the source, ImageNet's
        for its 1,000 classes, or else numbers.
      batch_size: images at a time; None for 32, on CPUs 8. It is rounded up to a multiple of the devices. Fewer images
        take as long as so many: for one at a time give 1.
      mesh: the devices; None for all of them.

    Raises:
      UserError: the source, or one of the values, is wrong.

    Example:
      A file of a network with three classes, and two photos.

      >>> import xception_flax
      >>> network = xception_flax.load("network.safetensors", class_names=["cat", "dog", "fox"])
      >>> probabilities = network.predict(["garden.jpg", "street.jpg"])
      >>> probabilities.shape
      (2, 3)
      >>> names = [network.class_names[best] for best in probabilities.argmax(axis=1)]
    """
    mesh = mesh or sharding.create_mesh()
    found = open_source(str(source), mesh, str(checkpoint), weights)
    found = told(found, class_names=class_names, image_size=image_size, transforms=transforms, mean=mean, std=std)
    if isinstance(found, Run):
        return from_run(found, mesh, batch_size=batch_size)
    return from_pretrained(found, mesh, batch_size=batch_size)


def from_run(run: Run, mesh: Mesh, *, batch_size: int | None = None) -> Predictor:
    """Returns a run, restored to `mesh`, ready to be asked; arguments as of `load`."""
    return Predictor(
        run.model,
        run.variables,
        run.class_names,
        preprocessings.of_recipe(run.recipe),
        mesh=mesh,
        activation=run.activation,
        origin={"step": run.step, "weights": run.weights},
        batch_size=batch_size,
    )


def from_pretrained(pretrained: Pretrained, mesh: Mesh, *, batch_size: int | None = None) -> Predictor:
    """Returns a network from elsewhere ready to be asked; arguments as of `load`."""
    preprocessing, assumed = preprocessings.of_pretrained(pretrained)
    model = models.create_model(**pretrained.model)
    notes = [f"left out: {part}" for part in pretrained.left_out]
    names = pretrained.class_names
    if not names and model.num_classes:
        names = known_names.of(model.num_classes)
        assumed = (*assumed, f"classes are {known_names.describe(model.num_classes)}")
    if assumed:
        notes.append(f"the source does not say, and so assumed: {', '.join(assumed)}")
    abstract = state.abstract_variables(model, preprocessing.image_shape, mesh)
    shapes = cast("dict[tuple[str, ...], jax.ShapeDtypeStruct]", flatten_dict(abstract))
    values = cast("dict[tuple[str, ...], np.ndarray]", flatten_dict(dict(pretrained.variables)))
    placed = {place: _placed(values[place].astype(leaf.dtype), leaf.sharding) for place, leaf in shapes.items()}
    return Predictor(
        model,
        unflatten_dict(placed),
        names,
        preprocessing,
        mesh=mesh,
        activation=pretrained.activation,
        origin=pretrained.origin,
        notes=notes,
        batch_size=batch_size,
        class_descriptions=pretrained.class_descriptions,
        names_assumed=not pretrained.class_names,
        measured=pretrained.measured,
    )


def _listed(images: Image | Sequence[Image] | np.ndarray) -> Sequence[Image]:
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return list(images)  # not every sequence can be sliced
    if getattr(images, "ndim", 0) == 4:  # of any library
        return cast("Sequence[np.ndarray]", images)
    return [images]


def _placed(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on the devices; of several hosts each puts there its own part."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
