"""Evaluation over a split: every image counts once, whatever the batch size and the number of devices."""

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xception_flax import data
from xception_flax.data.batch import Batch
from xception_flax.training import checksums, metrics, sharding

# Takes a global batch, the place of each of its images in the split (from `num_images` on: padding), and the logits.
BatchCallback = Callable[[Batch[jax.Array], jax.Array, jax.Array], None]


class BrokenOff(Exception):
    """For `on_batch` of `evaluate`: it ends without results."""


def evaluate(
    eval_step: Callable[..., tuple[dict[str, metrics.Sum], jax.Array]],
    variables: Any,
    split: data.Split,
    mesh: Mesh,
    on_batch: BatchCallback | None = None,
    waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> dict[str, float]:
    """Returns the mean of each metric over all images of the split, and their `count`.

    If the split replaces bad images, `bad_images` is the number that were left out.

    Args:
      eval_step: from `steps.make_eval_step`.
      variables: of the network, as `eval_step` takes them.
      split: loaded with `train=False`.
      mesh: the mesh of the variables.
      on_batch: called with each global batch, the place `[N]` of its images in the split, and its logits. It may raise
        `BrokenOff`; with several processes on all of them, at the same batch.
      waiting: returns a block in which each batch is waited for.

    Raises:
      BrokenOff: by `on_batch`.
      data.InputError: none of the images can be decoded.
      NotFinite: the loss is so.
    """
    totals = metrics.Accumulator()
    with contextlib.closing(split.batches()) as batches:
        for number in itertools.count():
            with waiting():
                local = next(batches, None)
            if local is None:
                break
            batch = sharding.global_batch(mesh, local)
            sums, logits = eval_step(variables, batch)
            totals.add(sums)
            if on_batch is not None:
                share = len(local["labels"])
                first = number * split.batch_size + split.process_index * share
                index = sharding.global_array(mesh, np.arange(first, first + share, dtype=np.int32))
                on_batch(batch, index, logits)
    if not (count := round(totals.count("loss"))):
        raise data.InputError(f"none of the {split.num_images:,} images to evaluate on can be decoded.")
    means = totals.means()
    if not math.isfinite(means["loss"]):
        wrong = checksums.not_finite(variables)
        why = f"values of {wrong[0]} are not finite" if wrong else "the weights are finite, the network's output is not"
        raise metrics.NotFinite(f"the loss of the evaluation is {means['loss']}: {why}")
    bad = {"bad_images": split.num_images - count} if split.on_bad_image == "replace" else {}
    return means | {"count": count} | bad
