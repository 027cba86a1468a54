"""Shows what a report of a defect needs: versions, devices, memory, settings; and runs a training step on each backend.

The step is of the recipe `digits`, on its first images, from its initial weights: the losses of all backends agree but
for rounding. Nothing is written, but the compiled programs into their cache.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jax
from packaging.requirements import Requirement

from xception_flax import __version__, data
from xception_flax.commands import cli
from xception_flax.data.pipeline import usable_cpus
from xception_flax.display import console
from xception_flax.host import compilation_cache, libraries, processor
from xception_flax.host.project import PROJECT
from xception_flax.recipes import reading
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.training import sharding
from xception_flax.training.program import create_program

EXAMPLES = """\
  xception-flax doctor
  JAX_PLATFORMS=cpu xception-flax doctor"""

DISTRIBUTION = "xception-flax"
GIB = 2**30

# Settings that change what is computed, where or how fast, by the beginning of their names.
SETTINGS = (
    *("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_VISIBLE_", "NVIDIA_TF32_", "NCCL_", "TF_CPP_"),
    *("OMP_", "MALLOC_", "LD_PRELOAD", "XCEPTION_FLAX_"),
)

# What JAX sets itself when it is imported, and nobody has chosen.
SET_BY_JAX = {"TF_CPP_MIN_LOG_LEVEL": "1", "TPU_SKIP_MDS_QUERY": "1"}

RECIPE = "digits"
BATCH_SIZE = 8  # images of a device


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax doctor", __doc__, EXAMPLES, hosts=False)
    arguments = parser.parse_args(argv)
    console.show_table("software", _software())
    console.show_table("extras", _extras())
    console.show_table("machine", _machine())
    cli.start(arguments)
    console.show_table("devices", dict(_devices()))
    console.show_table(f"a training step of the recipe {RECIPE}", dict(_steps()))
    return 0


def _software() -> dict[str, str]:
    rows = {DISTRIBUTION: f"{__version__}, {PROJECT}", "Python": f"{platform.python_version()}, {sys.executable}"}
    names = {"jax", "jaxlib", *(requirement.name for requirement in _requirements(""))}
    return rows | {name: _version(name) or "missing" for name in sorted(names, key=str.lower)}


def _extras() -> dict[str, str]:
    """Returns for each extra of the package what of it is installed, and what is missing."""
    try:
        extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        extras = []
    rows = {}
    for extra in extras:
        names = [name for requirement in _requirements(extra) for name in _distributions(requirement)]
        missing = [name for name in names if _version(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in names)
        rows[extra] = f"missing: {', '.join(missing)}" if missing else found
    return rows or {"(none)": f"{DISTRIBUTION} is not installed: pip install -e ."}


def _requirements(extra: str) -> list[Requirement]:
    """Returns what the package requires, or what `extra` adds to that."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    return [each for each in map(Requirement, lines) if _applies(each, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if not extra:
        return marker is None or marker.evaluate({"extra": ""})
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _distributions(requirement: Requirement) -> list[str]:
    """Returns the names of what must be installed: JAX's plugins with `jax[cuda13]`, and what our extras have."""
    names = [] if requirement.name == DISTRIBUTION else [requirement.name]
    for extra in sorted(requirement.extras):
        if _version(requirement.name) is not None:
            parts = map(Requirement, metadata.requires(requirement.name) or [])
            names += [name for part in parts if _applies(part, extra) for name in _distributions(part)]
    return list(dict.fromkeys(names))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    cpus = f"{usable_cpus()} of {os.cpu_count()} for this process, {processor.name()}"
    rows = {"system": platform.platform(), "CPUs": cpus}
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        values = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free, total = (int(values[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
        rows["memory"] = f"{free / GIB:.1f} of {total / GIB:.1f} GiB available"
    for folder in ("/dev/shm", os.environ.get("TMPDIR", "/tmp"), "."):
        if Path(folder).is_dir():
            usage = shutil.disk_usage(folder)
            rows[f"disk of {folder}"] = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    settings = sorted(item for item in os.environ.items() - SET_BY_JAX.items() if item[0].startswith(SETTINGS))
    return rows | {name: naming.harmless(value) for name, value in settings}


def _backends() -> Mapping[str, list[jax.Device]]:
    """Returns the devices of this process by backend: the default one first, and the CPU."""
    backends = {jax.default_backend(): jax.local_devices()}
    try:
        return backends | {"cpu": jax.local_devices(backend="cpu")}
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return backends


def _devices() -> Iterator[tuple[str, str]]:
    for backend, devices in _backends().items():
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        of_memory = f", {memory / GIB:.1f} GiB each for JAX" if memory else ""
        yield backend, f"{counted(len(devices), 'device')}, {devices[0].device_kind}{of_memory}"
    folder = compilation_cache.enable()
    size = sum(file.stat().st_size for file in folder.glob("*-cache")) if folder else 0
    yield "compiled programs", f"{folder}, {size / GIB:.2f} GiB" if folder else "not kept"


def _steps() -> Iterator[tuple[str, str]]:
    """Trains for a step on all devices of each backend."""
    if missing := libraries.missing_of(libraries.TRAINING):
        yield "not tried", f"it needs {', '.join(missing)}: pip install 'xception_flax[train]'"
        return
    for backend, devices in _backends().items():
        try:
            said = _step(backend, devices)
        except Exception as error:  # whatever it is, it belongs into the report, and the other backends are tried
            first = (str(error).strip() or "no message").splitlines()[0]
            said = f"failed: {type(error).__name__}: {naming.harmless(first)}"
        yield backend, said


def _step(backend: str, devices: Sequence[jax.Device]) -> str:
    """Trains for a step on the devices of a backend; returns what a row says of it."""
    mesh = sharding.create_mesh(devices=devices)
    recipe = reading.load(RECIPE, [f"--config.batch_size={BATCH_SIZE * len(devices)}"])
    split = data.load(**recipe.data, batch_size=recipe.batch_size, seed=recipe.seed, train=True)
    program = create_program(recipe, mesh, split.image_shape, split.num_images)
    begin = time.perf_counter()
    with console.waiting(f"compiling for {backend}"):
        abstract_batch = sharding.abstract_batch(mesh, split.batch_shapes)
        step = program.train_step.lower(program.abstract_state, abstract_batch).compile()
    compiled = time.perf_counter()
    state = program.init(jax.random.key(recipe.seed))
    batches = split.batches()
    batch = next(batches)
    batches.close()
    _, sums = jax.block_until_ready(step(state, sharding.global_batch(mesh, batch)))
    loss, count = jax.device_get(sums["loss"])
    return (
        f"{counted(recipe.batch_size, 'image')} on {counted(len(devices), 'device')}: loss {loss / count:.6f}, "
        f"compiled in {compiled - begin:.1f} s"
    )
