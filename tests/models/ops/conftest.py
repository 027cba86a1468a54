"""Nothing here promotes a type by itself: in networks Flax and Optax do, so it cannot be asked of all tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_types() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield
