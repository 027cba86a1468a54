"""The inputs of all contenders: images, labels, the weights under each library's names, and the expected results.

It runs in this project's environment, in a process that ends before anything is measured.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from benchmarks.job import LEARNING_RATE, NUM_CLASSES, READINGS, Job, network
from xception_flax.models import costs
from xception_flax.weights import keras, timm

# For programs that run once: LLVM's passes would take more time than they save.
_COMPILED_FAST = {"xla_backend_optimization_level": 0}


def write(job: Job, readings: list[str]) -> dict[str, Any]:
    """Writes the files of `job.folder`, with the results of each of `readings` in `expected_{reading}.npy`.

    Weights are random. To compare logits, the moving statistics are those of the images: with others the signal
    vanishes on its way, and any two networks agree.

    Returns:
      `macs` of one image, forward, and `parameters`.
    """
    folder, rng = Path(job.folder), np.random.default_rng(0)
    images, labels = _images(rng, job.batch, job.size), rng.integers(0, NUM_CLASSES, job.batch)
    normalized = (images.astype(np.float32) - 127.5) / 127.5
    np.save(folder / "images_uint8.npy", images)
    np.save(folder / "images.npy", normalized)
    np.save(folder / "labels.npy", labels.astype(np.int32))

    init = jax.jit(
        lambda key: network(job).init(key, jnp.zeros((1, 75, 75, 3)), train=False), compiler_options=_COMPILED_FAST
    )
    variables = init(jax.random.key(0))
    if readings and job.mode == "forward":
        # With a decay of 0 one step leaves the statistics of the batch itself.
        _, updates = _apply(network(job, bn_decay=0.0), variables, normalized, train=True)
        variables = {"params": variables["params"], **updates}
    for reading in readings:
        model = network(job, **READINGS[reading])
        if job.mode == "forward":
            expected, _ = _apply(model, variables, normalized, train=False)
        else:
            expected = _losses(model, variables, normalized, labels)
        np.save(folder / f"expected_{reading}.npy", expected)

    np.savez(folder / "flax.npz", **flatten_dict(variables, sep="/"))
    if "keras" in readings:
        layers = _keras_layers(variables)
        arrays = keras.to_keras(variables, layers)
        named = {f"{layer}/{i}": a for (layer, _), each in zip(layers, arrays, strict=True) for i, a in enumerate(each)}
        np.savez(folder / "keras.npz", **named)
    if "timm" in readings:
        np.savez(folder / "timm.npz", **timm.to_timm(variables))
    layers = costs.list_layers(network(job), (job.size, job.size, 3))
    return {"macs": sum(layer.macs for layer in layers), "parameters": sum(layer.parameters for layer in layers)}


def _images(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Returns `[n, size, size, 3]` uint8: patches of color with a little noise, different in each image."""
    patches = rng.integers(0, 224, (n, 6, 6, 3))
    place = np.arange(size) * 6 // size
    return (patches[:, place][:, :, place] + rng.integers(0, 32, (n, size, size, 3))).astype(np.uint8)


def _apply(model: nn.Module, variables: Any, images: np.ndarray, *, train: bool) -> tuple[np.ndarray, Any]:
    apply = jax.jit(
        lambda variables, images: model.apply(variables, images, train=train, mutable="batch_stats"),
        compiler_options=_COMPILED_FAST,
    )
    return apply(variables, images)


def _losses(model: nn.Module, variables: Any, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    """Returns the losses `[2]` before and after an update."""

    def loss(params: Any) -> jax.Array:
        state = {**variables, "params": params}
        logits, _ = model.apply(state, images, train=True, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = jax.jit(jax.value_and_grad(loss), compiler_options=_COMPILED_FAST)
    first, gradient = step(variables["params"])
    second, _ = step(jax.tree.map(lambda p, g: p - LEARNING_RATE * g, variables["params"], gradient))
    return jnp.stack([first, second])


def _keras_layers(variables: Any) -> list[tuple[str, int]]:
    """Returns (name in a fresh process of Keras, number of arrays) of each layer of Keras Applications' Xception."""
    numbered = {}
    for i, ours in enumerate(keras.XCEPTION_NUMBERED):
        suffix = f"_{i}" if i else ""
        numbered |= {ours: f"conv2d{suffix}", f"{ours}_bn": f"batch_normalization{suffix}"}
    counts: dict[str, int] = {}
    for _, layer, *_ in (path for path in flatten_dict(variables)):
        counts[layer] = counts.get(layer, 0) + 1
    return [(numbered.get(layer, layer), count) for layer, count in counts.items()]
