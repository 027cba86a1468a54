"""Costs and ceilings, from published numbers."""

import jax.numpy as jnp
import pytest

from xception_flax import models
from xception_flax.host import peaks
from xception_flax.models import costs

# The multiply-adds of figure 5 for an image of 299 x 299, which test_models.py checks.
XCEPTION_MACS = 8.357e9


def test_training_is_three_times_the_forward_pass():
    model = models.create_model("xception")
    assert costs.training_flops(model, (299, 299, 3)) == pytest.approx(6 * XCEPTION_MACS, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("Tesla V100-SXM2-16GB", "float16", 125),
    ],
)
def test_ceiling(kind, dtype, teraflops):
    """Eight chips, 50.14 GFLOP an image: 8 x 275 T / 50.14 G = 43.9 thousand images/s on TPU v4."""
    model = models.create_model("xception", dtype=dtype)
    ceiling = costs.peak_images_per_second(model, (299, 299, 3), kind, 8)
    assert ceiling == pytest.approx(8 * teraflops * 1e12 / (6 * XCEPTION_MACS), rel=1e-4)


def test_what_is_not_known_is_not_claimed():
    assert peaks.peak_flops_per_second("cpu", "float32") is None
    assert peaks.peak_flops_per_second("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert peaks.peak_flops_per_second("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16") is None
    assert costs.peak_images_per_second(models.create_model("lenet"), (32, 32, 1), "cpu", 8) is None
    for kind, of_types in peaks.PEAK_FLOPS_PER_SECOND.items():
        for dtype, peak in of_types.items():
            assert jnp.dtype(dtype).itemsize <= 4, kind
            assert 1e13 < peak < 1e16, kind
