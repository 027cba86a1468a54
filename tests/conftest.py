"""Eight virtual CPU devices for every test, Keras on its JAX backend, and a few shared makers."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Files are in memory if there is room: a checkpoint is hundreds of files, and each is synced to its disk.
memory = Path("/dev/shm")
if memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))

# One cache of compiled programs for the session, its workers and the commands that they start: many tests compile the
# same step. It is kept for the next session, since compiling is half of the suite's time.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # not the user's own, which it would fill
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes longer here than running. LLVM's level 0, and XLA's older loop emitter in the versions that have it,
# need a third of the time. Our own code is the same. The processes of test_train.py compile as a user's do.
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # broadcasting needs an explicit axis
os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import shell
import small_run
from xception_flax.host import compilation_cache


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The workdir of an uninterrupted run, and its duration in seconds, measured from outside.

    It is trained once for all workers: the first that asks for it trains, and others wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    workdir, seconds = folder / "trained", folder / "trained.seconds"
    with open(folder / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not seconds.exists():
            begin = time.monotonic()
            code, out, err = shell.finish(small_run.start(workdir))
            assert code == 0, err
            assert "finished" in out
            seconds.write_text(str(time.monotonic() - begin))
    return workdir, float(seconds.read_text())


@pytest.fixture(scope="module")
def whole_timed(trained: tuple[Path, float], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A copy of that run for the tests of one file, and its duration in seconds."""
    workdir, seconds = trained
    return shutil.copytree(workdir, tmp_path_factory.mktemp("runs") / "whole"), seconds


@pytest.fixture(scope="module")
def whole(whole_timed: tuple[Path, float]) -> Path:
    """The workdir of that copy."""
    return whole_timed[0]


@pytest.fixture
def on_one_device() -> Iterator[None]:
    with shell.on_one_device():
        yield


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """Kills the processes that a failed test leaves behind, stopped ones too."""
    yield
    for process in shell.started:
        process.kill()
    shell.started.clear()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        compilation_cache.prune(CACHE, compilation_cache.MAX_BYTES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, so that the workers end together."""
    longest = [
        "test_train",
        "test_docs",
        "test_chaos",
        "test_keras",
        "test_models",
        "test_evaluate_weights",
        "test_family",
        "test_steps",
        "test_initial",
        "test_benchmarks",
        "test_configs",
        "test_training",
        "test_evaluate",
    ]
    order = {name: i for i, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.stem, len(longest)))
