"""An evaluation stops where it is not finite."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from xception_flax.training import evaluation, metrics


@pytest.mark.parametrize(
    ("loss", "weight", "reason"),
    [
        (np.nan, 1.0, "nan: the weights are finite, the network's output is not"),
        (np.inf, 1.0, "inf: the weights are finite, the network's output is not"),
        (np.nan, np.nan, "nan: values of ['params']['k'] are not finite"),
        (np.nan, -np.inf, "nan: values of ['params']['k'] are not finite"),
    ],
)
def test_what_is_not_finite_in_an_evaluation_is_named(one_device, loss, weight, reason):
    batch = {"images": np.zeros((2, 1, 1, 1), np.uint8), "labels": np.zeros(2, np.int32)}
    split = SimpleNamespace(num_images=2, on_bad_image="stop", batches=lambda: (b for b in [batch]))
    sums = {"loss": metrics.Sum(np.float32(loss), np.float32(2))}
    variables = {"params": {"a": jax.numpy.ones(3), "k": jax.numpy.array([1.0, weight])}}
    with pytest.raises(metrics.NotFinite, match=f"^the loss of the evaluation is {re.escape(reason)}$"):
        evaluation.evaluate(lambda variables, batch: (sums, None), variables, split, one_device)
