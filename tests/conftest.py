"""Eight virtual CPU devices for every test, Keras on its JAX backend, and a few shared makers."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Files in memory, where there is room: a checkpoint is hundreds of files, each of which waits for the disk.
memory = Path("/dev/shm")
if memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))

# One cache of compiled programs for the whole session, for its workers and for the commands they start
# too: many tests compile the same step.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="xception_flax_tests_", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes longer here than what is compiled. LLVM's level 0, and XLA's older emitter of loops where there still
# is one, need a third of the time. What is tested on top of XLA is the same; test_train.py's processes, and so the
# whole path, run as a user's do.
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # a vector meets an array where somebody has said along which axis
os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import shell


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """A test that fails leaves no process behind, nor one that stands still."""
    yield
    for process in shell.started:
        process.kill()
    shell.started.clear()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the workers end together."""
    longest = [
        "test_train",
        "test_prepare",
        "test_configs",
        "test_steps",
        "test_keras",
        "test_family",
        "test_models",
        "test_benchmarks",
    ]
    order = {name: i for i, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.stem, len(longest)))
