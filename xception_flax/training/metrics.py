"""Metrics as a sum and a count, which are added over batches and hosts and divided once.

`mask` is 1 for an example that counts and 0 for padding.
"""

import collections
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, written
from xception_flax.text.ranges import check_range


class Sum(NamedTuple):
    """A metric before the division: two scalars, float32 on devices and float64 on the host."""

    total: Any
    count: Any


class NotFinite(UserError):
    """A loss, a gradient, weights or moments are not finite: what was found, without what is kept and what to do.

    Attributes:
      first_step: that was so, where it is known.
    """

    def __init__(self, reason: str, first_step: int | None = None) -> None:
        super().__init__(reason)
        self.first_step = first_step


MetricFunction = Callable[[jax.Array, jax.Array, jax.Array], dict[str, Sum]]


def masked_sum(values: jax.Array, mask: jax.Array) -> Sum:
    """Returns the sum of `values` `[N]` where `mask` `[N]` is 1. Padding may hold any value, even NaN.

    Raises:
      UserError: `values` are not `[N]`. Of a mean, which has padding in it, any sum would be wrong.
    """
    if jnp.shape(values) != mask.shape:
        raise UserError(
            f"a loss and a metric must have a value for each image, [N], here {mask.shape}, "
            f"got shape {jnp.shape(values)}; leave the mean over the images to the program."
        )
    values = jnp.where(mask > 0, values.astype(jnp.float32), 0.0)
    return Sum(jnp.sum(values), jnp.sum(mask.astype(jnp.float32)))


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the true class is among the k classes with the highest logits.

    Of equal logits the lower index ranks first, as in `jax.lax.top_k`, so that a constant network scores chance and
    not 100 %. An example with a NaN or infinite logit, or with a label that is no class, is never correct.

    Args:
      logits: `[N, num_classes]`.
      labels: `[N]` integers.

    Returns:
      `[N]` float32, 0 or 1.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    ahead = (logits > true) | ((logits == true) & earlier)
    rank = jnp.sum(ahead, axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    return ((rank < k) & finite & is_class).astype(jnp.float32)


def average_precision(
    logits: jax.Array, labels: jax.Array, k: int, class_weights: jax.Array | None = None
) -> jax.Array:
    """Average precision over the k best predictions of each example.

    For an example with label set L and class weights w, this is `sum over ranks r <= k of [c_r in L] w(c_r)
    precision(r)`, divided by the sum of the k largest weights in L, which is the most that a ranking can reach. With
    w = 1 this is the usual `AP@k`. The paper (section 4.1) weights each class of FastEval14k "with a score estimating
    how common the class is" and publishes neither the scores nor the formula; this reading is ours.

    Args:
      logits: `[N, num_classes]`.
      labels: `[N, num_classes]`, 0 or 1.
      class_weights: `[num_classes]`, not negative; None weights all alike.

    Returns:
      `[N]` float32 in [0, 1]; 0 for an example without labels, and for a NaN or infinite logit.
    """
    labels = labels.astype(jnp.float32)
    k = min(k, logits.shape[-1])
    weights = labels if class_weights is None else labels * class_weights[None]
    _, ranked = jax.lax.top_k(logits, k)
    hits = jnp.take_along_axis(labels, ranked, axis=-1)
    gains = jnp.take_along_axis(weights, ranked, axis=-1)
    precision = jnp.cumsum(hits, axis=-1) / jnp.arange(1, k + 1)[None]
    best = jnp.sum(jax.lax.top_k(weights, k)[0], axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)  # `top_k` would rank NaN first
    return finite * jnp.sum(gains * precision, axis=-1) / jnp.maximum(best, jnp.finfo(jnp.float32).tiny)


def single_label() -> MetricFunction:
    """Top-1 and top-5 accuracy (paper, table 1). Labels are `[N]` integers."""

    def compute(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, Sum]:
        if labels.ndim != 1:
            raise UserError(
                f"metrics 'single_label' take one label an image, got labels of shape {labels.shape}; "
                "for several set metrics.name=multi_label."
            )
        return {
            "top1": masked_sum(top_k_correct(logits, labels, 1), mask),
            "top5": masked_sum(top_k_correct(logits, labels, 5), mask),
        }

    return compute


def multi_label(k: int = 100, class_weights: str | None = None) -> MetricFunction:
    """Mean average precision over the k best predictions (paper, table 2: `MAP@100`), as `map`.

    Labels are `[N, num_classes]`, 0 or 1. The mean is over the examples with at least one label of positive weight.

    Args:
      k: number of predictions that count.
      class_weights: path of a `.npy` file with `[num_classes]` weights; None weights all alike.

    Raises:
      UserError: k is out of its range, or the file is not readable or has a negative or infinite weight.
    """
    check_range("metrics.k", k, 1)
    weights = None if class_weights is None else _load_class_weights(class_weights)

    def compute(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, Sum]:
        if weights is not None and weights.shape != logits.shape[-1:]:
            raise UserError(
                f"metrics.class_weights must have one weight for each of the {logits.shape[-1]} classes, "
                f"got shape {weights.shape} in {class_weights}."
            )
        if labels.shape != logits.shape:
            raise UserError(
                f"metrics 'multi_label' take a row of 0 and 1 an image, got labels of shape {labels.shape} for logits "
                f"of shape {logits.shape}; for one label an image set metrics.name=single_label."
            )
        relevant = labels > 0 if weights is None else (labels > 0) & (weights > 0)[None]
        mask = mask * jnp.any(relevant, axis=-1)
        return {"map": masked_sum(average_precision(logits, labels, k, weights), mask)}

    return compute


def _load_class_weights(path: str) -> np.ndarray:
    if not os.path.isfile(path):  # a pipe would block
        raise UserError(f"metrics.class_weights: {path} is no readable .npy file (no such file).")
    try:
        weights = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"metrics.class_weights: {path} is no readable .npy file ({error}).") from None
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise UserError(f"metrics.class_weights: {path} must hold finite weights that are not negative.")
    return weights


class Entry(NamedTuple):
    """One choice of metrics.

    Attributes:
      function: makes the function that computes them.
      shares: names of all its metrics. Each is a share from 0 to 1, and higher is better.
      best: the one of `shares` whose highest value marks the 'best' checkpoint, and which curves show.
      title: what `best` is called there.
      several_labels: whether labels are `[N, num_classes]`, and not `[N]`.
    """

    function: Callable[..., MetricFunction]
    shares: tuple[str, ...]
    best: str
    title: str
    several_labels: bool


#: The sets of metrics by name, for `metrics.name` of a recipe.
METRICS = {
    "single_label": Entry(single_label, ("top1", "top5"), "top1", "top-1 accuracy", several_labels=False),
    "multi_label": Entry(multi_label, ("map",), "map", "mean average precision", several_labels=True),
}

# Of the results of an evaluation, those that are shares; others are a loss and numbers of images.
SHARES = frozenset(name for entry in METRICS.values() for name in entry.shares)


def create_metrics(name: str, **options: Any) -> MetricFunction:
    """Returns a function (logits, labels, mask) -> {metric: Sum}, by name.

    Args:
      name: a key of `METRICS`.
      **options: the metrics' own keywords.

    Raises:
      UserError: unknown name, or a value out of its range. The function raises it if it has computed other metrics
        than its entry names.
    """
    entry = lookup(METRICS, name, "metric")
    function = entry.function(**options)

    def compute(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, Sum]:
        sums = function(logits, labels, mask)
        if sums.keys() != set(entry.shares) or entry.best not in sums:
            raise UserError(
                f"metrics {name!r} have computed {written(tuple(sums))}, but their entry in METRICS has "
                f"shares={written(entry.shares)} and best={written(entry.best)}; give both the same names."
            )
        return sums

    return compute


class Accumulator:
    """Adds the metrics of batches on the host, in float64.

    Attributes:
      pending: sums not added yet, which devices may still be computing.
    """

    def __init__(self, max_pending: int = 0, skipped_in_a_row: int = 0) -> None:
        """Begins without batches.

        Args:
          max_pending: batches that the host may run ahead of the devices. Adding another one waits for the oldest.
          skipped_in_a_row: how many steps were skipped one after the other just before.
        """
        self._max_pending = max_pending
        self.pending: collections.deque[Mapping[str, Sum]] = collections.deque()
        self._sums: dict[str, Sum] = {}
        self._skipped_in_a_row = skipped_in_a_row

    def add(self, sums: Mapping[str, Sum]) -> None:
        """Adds the sums of a batch."""
        self.pending.append(sums)
        self._wait(self._max_pending)

    def count(self, name: str) -> float:
        """Returns the count that the total of metric `name` is divided by."""
        self._wait()
        return self._sums[name].count

    def total(self, name: str) -> float:
        """Returns the total of metric `name`; 0 if there is none of that name."""
        self._wait()
        return self._sums[name].total if name in self._sums else 0.0

    def skipped_in_a_row(self) -> int:
        """Returns how many steps up to the newest were skipped one after the other; `clear` does not begin anew."""
        self._wait()
        return self._skipped_in_a_row

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric; NaN if its count is 0."""
        self._wait()
        return {name: s.total / s.count if s.count else float("nan") for name, s in self._sums.items()}

    @property
    def is_empty(self) -> bool:
        """Whether no batch was added since the beginning, or since `clear`."""
        return not self.pending and not self._sums

    def clear(self) -> None:
        """Removes all sums."""
        self.pending.clear()
        self._sums = {}

    def _wait(self, max_pending: int = 0) -> None:
        while len(self.pending) > max_pending:
            for name, (total, count) in jax.device_get(dict(self.pending.popleft())).items():
                old = self._sums.get(name, Sum(0.0, 0.0))
                self._sums[name] = Sum(old.total + float(total), old.count + float(count))
                if name == "skipped_steps":
                    self._skipped_in_a_row = self._skipped_in_a_row + 1 if total else 0


def check_finite(sums: Mapping[str, Sum], step: int) -> None:
    """Raises NotFinite if the loss or the gradient of step `step` is so. Call it before saving its state.

    A step that was skipped has changed nothing.
    """
    if "skipped_steps" in sums and float(sums["skipped_steps"].total):
        return
    if not float(sums["loss"].count):
        raise UserError(f"none of the images of step {step} can be decoded; look at the data.")
    for name in ("loss", "gradient_norm"):
        value = float(sums[name].total / sums[name].count)
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value} at step {step}")
