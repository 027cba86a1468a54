"""Tests of operations run with strict promotion of types. Tests of networks cannot: Flax and Optax promote."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_types() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield
