"""One process of `benchmarks.gpu`: it compares lowerings, times operations, or times one contender.

Each subject is a generator. Up to its first `yield` it imports and traces, without the device and while the process
before it is measured. After that it has the device for itself, and yields records.
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.worker import end_with_parent, one_line, take_output

NUM_CLASSES = 1000
LEARNING_RATE, MOMENTUM = 0.01, 0.9
REPEATS = 5  # chains of steps; the median counts
PROFILED = 3  # steps whose kernels are recorded: a trace must stay small beside what it is of
HOST_BATCHES = 4  # in turn, so that none is still in a cache when it is moved again
STEPS_IN_FLIGHT = 2  # train.MAX_STEPS_IN_FLIGHT, which cannot be imported without the libraries that reading needs

FED = "train, each batch from the host"  # the mode of rows of `TrainStep.fed`

Record = dict[str, Any]
Step = Callable[[], Any]  # sends one step to the device; its result is ready when the step is done


class Job(NamedTuple):
    """What is to be measured.

    Attributes:
      subject: 'correctness', 'operations' or a contender.
      mode: 'train' or 'forward', of a contender.
      batch: images.
      size: pixels a side.
      chain_seconds: approximate time of a chain of steps, which ends with one synchronization.
      tiny: small shapes and one middle block, for a CPU.
    """

    subject: str
    mode: str = ""
    batch: int = 0
    size: int = 299
    chain_seconds: float = 1.0
    tiny: bool = False


# Timing --------------------------------------------------------------------------------------------


def lap_seconds(step: Step, synchronize: Callable[[Any], Any], chain_seconds: float) -> list[float]:
    """Returns the seconds a step of each of `REPEATS` chains, which are sent without waiting and waited for once."""

    def chain(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            last = step()
        synchronize(last)
        return (time.perf_counter() - start) / steps

    chain(2)
    steps = min(max(round(chain_seconds / chain(3)), 2), 2000)
    return [chain(steps) for _ in range(REPEATS)]


def longest(kernels: Iterable[tuple[str, float]], steps: int) -> Record:
    """Returns the milliseconds a step of all kernels, of the ten longest and of the ten longest kinds.

    A kind is a name without the numbers that compilers give, as in `loop_fusion_12`.

    Args:
      kernels: (name, milliseconds) of each.
      steps: number of steps that they belong to.
    """
    names, kinds = Counter(), Counter()
    for name, milliseconds in kernels:
        names[name[:120]] += milliseconds / steps
        kinds[re.sub(r"[_.]?\d+", "", name)[:120]] += milliseconds / steps
    return {"kernel_ms": sum(names.values()), "longest": names.most_common(10), "kinds": kinds.most_common(10)}


# JAX -----------------------------------------------------------------------------------------------


class Jax:
    """How JAX waits, counts memory and profiles."""

    def __init__(self) -> None:
        import jax

        device = jax.devices()[0]
        self.versions = {"library": f"jax {jax.__version__}", "device": device.device_kind}
        self.synchronize = jax.block_until_ready
        self._device = device

    def peak_bytes(self) -> int | None:
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use")

    def kernels(self, step: Step, steps: int) -> list[tuple[str, float]]:
        """Returns (name, milliseconds) of what ran on the device; on a CPU, of what ran in XLA's threads."""
        import jax

        folder = tempfile.mkdtemp()
        try:
            with jax.profiler.trace(folder):
                for _ in range(steps):
                    last = step()
                jax.block_until_ready(last)
            (file,) = Path(folder).glob("**/*.xplane.pb")
            planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        finally:
            shutil.rmtree(folder)
        # A GPU's plane has a line for each stream, and may have others with the same events under another name.
        lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        lines = [line for line in lines if line.name.startswith("Stream")] or lines
        lines = lines or [line for plane in planes for line in plane.lines if line.name.startswith("tf_XLA")]
        return [(event.name, event.duration_ns / 1e6) for line in lines for event in line.events]


def weights(shapes: Any) -> Any:
    """Returns random variables of these shapes: kernels by He's rule, normalization as initialized; NumPy, float32.

    They suit this project's network and `plain_linen`, whose names are the same, and nothing is compiled for them.
    """
    import jax

    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        if path[-1].key == "kernel":
            return rng.standard_normal(shape.shape, np.float32) * math.sqrt(2 / math.prod(shape.shape[:-1]))
        return np.full(shape.shape, path[-1].key in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def initial(model: Any, size: int) -> Any:
    """Returns variables for the model, see `weights`."""
    import jax

    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    return weights(jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images))


def noise(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Returns images `[N, H, W, 3]`, normally distributed, and labels `[N]`."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((job.batch, job.size, job.size, 3), np.float32)
    return images, rng.integers(0, NUM_CLASSES, job.batch, np.int32)


def trace_forward(job: Job, model: Any) -> Callable[[], Step]:
    """Returns the function that compiles the forward pass in evaluation mode and returns its step."""
    import jax

    variables, images = initial(model, job.size), noise(job)[0]
    lowered = jax.jit(lambda variables, images: model.apply(variables, images, train=False)).lower(variables, images)

    def compile_() -> Step:
        return partial(lowered.compile(), *jax.device_put((variables, images)))

    return compile_


class TrainStep:
    """The step of train.py, on a batch that is on the device already, or by `fed` on one that must be moved first."""

    def __init__(self, compiled: Callable[..., Any], first: Any, mesh: Any, batch: dict[str, np.ndarray]) -> None:
        from xception_flax.training import metrics

        self._compiled, self._carried, self._mesh = compiled, first, mesh
        self._hosts = [{name: np.roll(values, i, 0) for name, values in batch.items()} for i in range(HOST_BATCHES)]
        self._number = 0
        self._placed = self.put()
        self._totals = metrics.Accumulator(STEPS_IN_FLIGHT)
        self.batch_bytes = sum(values.nbytes for values in batch.values())

    def __call__(self) -> Any:
        return self._sums(self._placed)["loss"].total

    def fed(self) -> Any:
        """Puts another batch to the device and sends the step, as train.py does: so many steps ahead and no more."""
        sums = self._sums(self.put())
        self._totals.add(sums)
        return sums["loss"].total

    def put(self) -> Any:
        """Returns the next of the host's batches, on the device once it is there."""
        from xception_flax.training import sharding

        self._number += 1
        return sharding.global_batch(self._mesh, self._hosts[self._number % HOST_BATCHES])

    def _sums(self, placed: Any) -> Any:
        self._carried, sums = self._compiled(self._carried, placed)
        return sums


def trace_ours(job: Job, lowering: str) -> Callable[[], Step]:
    """This project's network by one lowering; its training step is that of train.py: uint8 images, metrics."""
    import jax
    import jax.numpy as jnp

    from xception_flax import create_model
    from xception_flax.models import ops
    from xception_flax.training import length, losses, metrics, optimizers, sharding, state, steps

    fields = dict(width=0.125, middle_repeats=1) if job.tiny else {}
    model = create_model("xception", NUM_CLASSES, dropout_rate=0.0, dtype=jnp.bfloat16, **fields)
    if job.mode == "forward":
        with ops.lowering(lowering):
            return trace_forward(job, model)

    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    schedule = optimizers.create_schedule(run=length.RunLength(job.batch, num_images=job.batch, total_steps=1))
    tx, _ = optimizers.create_optimizer("sgd", LEARNING_RATE, schedule=schedule, momentum=MOMENTUM)
    _, abstract_state = state.make_init(model, tx, (job.size, job.size, 3), mesh, ema=False)
    train_step = steps.make_train_step(
        model,
        tx,
        losses.create_loss("softmax"),
        metrics.create_metrics("single_label"),
        steps.create_normalizer(mean=(127.5,), std=(50.0,)),
        abstract_state,
        mesh,
        seed=0,
        lowering=lowering,
    )
    images, labels = noise(job)
    batch = {"images": np.clip(127.5 + 50 * images, 0, 255).astype(np.uint8), "labels": labels}
    shapes = sharding.abstract_batch(mesh, {name: (value.shape, value.dtype) for name, value in batch.items()})
    lowered, variables = train_step.lower(abstract_state, shapes), initial(model, job.size)

    def compile_() -> Step:
        compiled = lowered.compile()
        first = state.TrainState(step=jnp.zeros((), jnp.int32), opt_state=tx.init(variables["params"]), **variables)
        carried = jax.device_put(first, jax.tree.map(lambda leaf: leaf.sharding, abstract_state))
        return TrainStep(compiled, carried, mesh, batch)

    return compile_


def trace_plain_linen(job: Job) -> Callable[[], Step]:
    """The network of `plain_linen`, with `nn.Conv(feature_group_count=...)` and Optax."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks import plain_linen

    model = plain_linen.Xception(NUM_CLASSES, middle_repeats=1 if job.tiny else 8, dtype=jnp.bfloat16)
    if job.mode == "forward":
        return trace_forward(job, model)
    tx = optax.sgd(LEARNING_RATE, MOMENTUM)
    variables, batch = initial(model, job.size), noise(job)
    lowered = plain_linen.make_train_step(model, tx).lower(variables, tx.init(variables["params"]), *batch)

    def compile_() -> Step:
        compiled = lowered.compile()
        placed = jax.device_put(batch)
        carried = jax.device_put((variables, tx.init(variables["params"])))

        def step() -> jax.Array:
            nonlocal carried
            *carried, loss = compiled(*carried, *placed)
            return loss

        return step

    return compile_


# torch ---------------------------------------------------------------------------------------------


class Torch:
    """How torch waits, counts memory and profiles."""

    def __init__(self, cuda: bool) -> None:
        import torch

        self._cuda = cuda
        device = torch.cuda.get_device_name() if cuda else "cpu"
        self.versions = {"library": f"torch {torch.__version__}", "device": device}

    def synchronize(self, value: Any) -> Any:
        import torch

        if self._cuda:
            torch.cuda.synchronize()
        return value

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self._cuda else None

    def kernels(self, step: Step, steps: int) -> list[tuple[str, float]]:
        """Returns (name, milliseconds) of what ran on the device."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                last = step()
            self.synchronize(last)
        kind = "device" if self._cuda else "cpu"
        return [(row.key, getattr(row, f"self_{kind}_time_total") / 1e3) for row in profiler.key_averages()]


TIMM = {"timm": None, "timm_compile": "default", "timm_max_autotune": "max-autotune-no-cudagraphs"}  # compile modes


def trace_timm(job: Job, compile_mode: str | None = None) -> Callable[[], Step]:
    """timm's `legacy_xception`, channels last, bfloat16 autocast over float32 parameters, fused SGD."""
    import timm
    import torch

    device = "cpu" if job.tiny else "cuda"
    torch.backends.cudnn.benchmark = True
    model = timm.create_model("legacy_xception", num_classes=NUM_CLASSES).train(job.mode == "train")
    images, labels = map(torch.from_numpy, noise(job))
    images = images.permute(0, 3, 1, 2)  # [N, C, H, W], channels last in memory

    def compile_() -> Step:
        placed, targets = images.to(device), labels.to(device, torch.int64)
        model.to(device, memory_format=torch.channels_last)
        network = torch.compile(model, mode=compile_mode) if compile_mode else model
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, fused=True)

        def forward() -> torch.Tensor:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                return network(placed)

        def train_step() -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(network(placed), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return forward if job.mode == "forward" else train_step

    return compile_


# A contender ---------------------------------------------------------------------------------------


def contender(job: Job) -> Iterator[Record]:
    """One mode and batch of one contender: its row, its longest kernels, and what moving a batch to a step costs."""
    if lowering := re.fullmatch(r"xception_flax_(.+)", job.subject):
        compile_, library = trace_ours(job, lowering[1]), Jax()
    elif job.subject == "plain_linen":
        compile_, library = trace_plain_linen(job), Jax()
    else:
        compile_, library = trace_timm(job, TIMM[job.subject]), Torch(cuda=not job.tiny)
    yield {}
    start = time.perf_counter()
    step = compile_()
    value = library.synchronize(step())
    first_seconds = time.perf_counter() - start

    def row(step: Step) -> Record:
        laps = lap_seconds(step, library.synchronize, job.chain_seconds)
        last = step().tolist()
        if not (np.isfinite(value.tolist()).all() and np.isfinite(last).all()):
            raise FloatingPointError(f"the {'loss' if job.mode == 'train' else 'logits'} are not finite")
        seconds = float(np.median(laps))
        return {
            "kind": "row",
            "seconds": seconds,
            "images_per_second": job.batch / seconds,
            "lap_seconds": laps,
            "first_seconds": first_seconds,
            "peak_bytes": library.peak_bytes(),
            **library.versions,
        }

    yield row(step)
    yield {"kind": "profile", **longest(library.kernels(step, PROFILED), PROFILED)}
    if isinstance(step, TrainStep) and job.subject == "xception_flax_platform":
        record = row(step.fed)
        put_seconds = float(np.median(lap_seconds(step.put, library.synchronize, job.chain_seconds / 10)))
        yield {**record, "mode": FED, "batch_bytes": step.batch_bytes, "put_seconds": put_seconds}


# Operations ----------------------------------------------------------------------------------------


def timed_lowerings() -> list[str]:
    """Returns the lowerings that differ on a GPU; 'fused' is for TPUs, 'portable' has no kernels."""
    from xception_flax.models import ops

    return [name for name in ops.LOWERINGS if name not in ("fused", "portable")]


# (operation, [H, W, C] of its input, shape of its kernel or None, options) at 299 px, as the network has them.
# The depthwise convolution at 19 x 19 x 728 is there 26 times, all others once.
_DEPTHWISE = [(147, 64), (147, 128), (74, 128), (74, 256), (37, 256), (37, 728), (19, 728), (10, 1024), (10, 1536)]
_POINTWISE = [(147, 64, 128), (37, 256, 728), (19, 728, 728), (10, 1536, 2048)]
_MAX_POOL = [(147, 128), (74, 256), (37, 728), (19, 1024)]
CASES = [
    *(("depthwise_convolution", (size, size, c), (3, 3, 1, c), {}) for size, c in _DEPTHWISE),
    *(("pointwise_convolution", (size, size, c), (1, 1, c, features), {}) for size, c, features in _POINTWISE),
    ("pointwise_convolution", (147, 147, 64), (1, 1, 64, 128), dict(strides=(2, 2))),  # block2_residual
    ("convolution", (299, 299, 3), (3, 3, 3, 32), dict(strides=(2, 2), padding="VALID")),  # block1_conv1
    ("convolution", (149, 149, 32), (3, 3, 32, 64), dict(padding="VALID")),  # block1_conv2
    *(("max_pool", (size, size, c), None, {}) for size, c in _MAX_POOL),
]
DTYPES = ("float32", "bfloat16")
PARTS = ("value", "input gradient", "kernel gradient")

# Largest ||out - ref|| / ||ref||. float32 is computed with `jax.default_matmul_precision("highest")`, bfloat16 as it
# is. A lowering may also be off by three times as much as 'stock' in bfloat16.
BOUNDS = {"operation": {"float32": 1e-5, "bfloat16": 1e-2}, "network": {"float32": 1e-5, "bfloat16": 1e-2}}

# In a network rounding decides which pixels are the maxima of windows and which pass a ReLU. It moves gradients far
# more than values, a little or a lot as it happens: those of 'stock' by 9e-4 to 5e-3 for images with other last bits.
# So a network's gradients in float32 may be off by twice the largest of so many such draws.
DRAWS = 16


def _cases(tiny: bool) -> list[tuple]:
    """Returns `CASES`; if `tiny`, a few of them, a quarter as high and wide, with odd sizes odd and even ones even."""
    if not tiny:
        return CASES

    def smaller(size: int) -> int:
        return size // 8 * 2 + size % 2

    few = [CASES[i] for i in (3, 6, 11, -6, -2)]
    return [(name, (smaller(h), smaller(w), c), kernel, options) for name, (h, w, c), kernel, options in few]


def _title(case: tuple) -> str:
    name, image, kernel, options = case
    features = "" if kernel is None or name == "depthwise_convolution" else f" -> {kernel[-1]}"
    return f"{name} {' x '.join(map(str, image))}{features}" + (", strides 2" if options.get("strides") else "")


class Comparison(NamedTuple):
    """A function whose value and gradients are compared: `make(dtype)` computes in that type."""

    title: str
    dtypes: tuple[str, ...]
    level: str  # of `BOUNDS`
    make: Callable[[str], Callable[..., Any]]
    operands: tuple[Any, ...]


def _comparisons(job: Job) -> list[Comparison]:
    """Operands are float32, with values that bfloat16 can represent, so that all types find the same maxima."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from xception_flax import create_model
    from xception_flax.models import ops

    rng = np.random.default_rng(2)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16).astype(jnp.float32)

    def operation(case: tuple) -> Comparison:
        name, image, kernel, options = case

        def make(dtype: str) -> Callable[..., jax.Array]:
            return lambda *operands: getattr(ops, name)(*(x.astype(dtype) for x in operands), **options)

        operands = [draw(job.batch, *image), *([draw(*kernel)] if kernel else [])]
        return Comparison(_title(case), DTYPES, "operation", make, tuple(operands))

    def network(dtype: str) -> Callable[..., jax.Array]:
        model = create_model("xception", NUM_CLASSES, dropout_rate=0.0, dtype=dtype, **fields)

        def logits(images: jax.Array, params: Any) -> jax.Array:
            variables = {"params": params, "batch_stats": lax.stop_gradient(statistics)}
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

        return logits

    fields = dict(middle_repeats=1) | (dict(width=0.125) if job.tiny else {})
    first = initial(create_model("xception", NUM_CLASSES, **fields), job.size)
    params, statistics = jax.device_put((first["params"], first["batch_stats"]))
    title = f"network, 1 middle block, {job.size} px"
    dtypes = DTYPES[:1] if job.tiny else DTYPES  # with so few pixels the gradient in bfloat16 is noise
    whole = Comparison(title, dtypes, "network", network, (draw(job.batch, job.size, job.size, 3), params))
    return [whole, *map(operation, _cases(job.tiny))]  # what compiles longest comes first


def correctness(job: Job) -> Iterator[Record]:
    """Value and gradients of every operation and of a network, by each lowering, against 'stock' in float32."""
    import jax
    import jax.numpy as jnp

    from xception_flax.models import ops

    comparisons = _comparisons(job)
    yield {}

    def evaluate(comparison: Comparison, dtype: str, lowering: str, draws: int = 0) -> list[list[jax.Array]] | str:
        """Returns [value, gradients], each as one vector, for the input or `draws` of its last bits; or an error."""
        function, key = comparison.make(dtype), jax.random.key(3)
        x, *others = comparison.operands
        last_bits = (jax.random.rademacher(jax.random.fold_in(key, i), x.shape) * 2.0**-23 for i in range(draws))
        inputs = (x * (1 + bits) for bits in last_bits) if draws else (x,)

        def both(*operands: Any) -> list[Any]:
            y, pull = jax.vjp(function, *operands)
            dy = jax.random.normal(key, y.shape, jnp.bfloat16).astype(y.dtype)
            wide = [jax.tree.map(lambda x: x.astype(jnp.float32), part) for part in (y, *pull(dy))]
            return [jnp.concatenate([x.ravel() for x in jax.tree.leaves(part)]) for part in wide]

        precision = "highest" if dtype == "float32" else "default"
        with ops.lowering(lowering), jax.default_matmul_precision(precision):
            try:
                program = jax.jit(both)
                return [jax.block_until_ready(program(x, *others)) for x in inputs]
            except Exception as error:
                traceback.print_exc()
                return one_line(error)

    with ThreadPoolExecutor(max(1, os.cpu_count() // 2)) as pool:  # most of the time is XLA's, compiling
        futures = {
            (i, dtype, lowering): pool.submit(evaluate, comparison, dtype, lowering)
            for i, comparison in enumerate(comparisons)
            for dtype in comparison.dtypes
            for lowering in timed_lowerings()
        }
        # In an operation the last bit would decide between equal maxima, which all lowerings decide alike.
        nudged = {
            i: pool.submit(evaluate, comparison, "float32", "stock", DRAWS)
            for i, comparison in enumerate(comparisons)
            if comparison.level == "network"
        }
        for (i, dtype, lowering), future in futures.items():
            record = {"kind": "correctness", "case": comparisons[i].title, "dtype": dtype, "lowering": lowering}
            usual = nudged.get(i) if dtype == "float32" else None
            found = [f.result() for f in (futures[i, "float32", "stock"], usual or futures[i, dtype, "stock"], future)]
            if failure := next((x for x in found if isinstance(x, str)), None):
                yield {**record, "same": False, "failure": failure}
                continue
            ([reference], usual, [outputs]) = found
            errors, *usual = (
                [relative_error(*pair) for pair in zip(x, reference, strict=True)] for x in (outputs, *usual)
            )
            factor = 2 if len(usual) > 1 else 3
            bound = BOUNDS[comparisons[i].level][dtype]
            limits = [max(bound, factor * error) for error in map(max, zip(*usual, strict=True))]
            same = all(error <= limit < math.inf for error, limit in zip(errors, limits, strict=True))
            parts = PARTS[: len(errors)]
            yield {**record, "same": same, "errors": dict(zip(parts, errors, strict=True)), "limits": limits}


def relative_error(out: Any, expected: Any) -> float:
    """Returns ||out - expected|| / ||expected||, or infinity if that is not finite."""
    import jax.numpy as jnp

    error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
    return error if math.isfinite(error) else math.inf


def operations(job: Job) -> Iterator[Record]:
    """The device's ceilings, and the time of each depthwise convolution and its gradients by each lowering."""
    import jax
    import jax.numpy as jnp

    from xception_flax.models import ops

    synchronize, key = jax.block_until_ready, jax.random.key(4)
    draw = jax.jit(partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
    yield {}

    def seconds(program: Callable[..., Any], inputs: list[tuple[jax.Array, ...]]) -> float:
        number = 0

        def step() -> Any:  # with inputs in turn, more than a cache holds
            nonlocal number
            number += 1
            return program(*inputs[number % len(inputs)])

        return float(np.median(lap_seconds(step, synchronize, job.chain_seconds)))

    side, length = (256, 2**20) if job.tiny else (8192, 2**29)
    copied = draw(key, (length,))
    copy = seconds(jax.jit(lambda x: -x), [(copied,)])
    del copied
    product = seconds(jax.jit(jnp.dot), [(draw(key, (side, side)), draw(jax.random.key(5), (side, side)))])
    yield {
        "kind": "ceilings",
        "copy_gb_per_second": 2 * 2 * length / copy / 1e9,
        "matmul_tflops_bf16": 2 * side**3 / product / 1e12,
    }

    for case in _cases(job.tiny):
        name, image, kernel, options = case
        if name != "depthwise_convolution":
            continue
        function = partial(getattr(ops, name), **options)
        x = jax.ShapeDtypeStruct((job.batch, *image), jnp.bfloat16)
        taps = jax.ShapeDtypeStruct(kernel, jnp.bfloat16)
        parts = {  # functions of the input, the output's gradient and the kernel
            "value": lambda x, dy, kernel, function=function: function(x, kernel),
            "input gradient": lambda x, dy, kernel, function=function: jax.vjp(lambda x: function(x, kernel), x)[1](dy),
            "kernel gradient": lambda x, dy, kernel, function=function: jax.vjp(partial(function, x), kernel)[1](dy),
        }

        def program(part: str, lowering: str, parts=parts, x=x, taps=taps) -> Any:
            try:
                with ops.lowering(lowering):
                    # A new function each time: jit remembers the lowering with which a function was first traced.
                    return jax.jit(lambda *operands: parts[part](*operands)).lower(x, x, taps).compile()
            except Exception as error:
                traceback.print_exc()
                return one_line(error)

        with ThreadPoolExecutor(max(1, os.cpu_count() // 2)) as pool:
            futures = {
                (part, lowering): pool.submit(program, part, lowering)
                for part in parts
                for lowering in timed_lowerings()
            }
        keys = [jax.random.key(number) for number in range(9)]
        inputs = [(draw(keys[i], x.shape), draw(keys[3 + i], x.shape), draw(keys[6 + i], kernel)) for i in range(3)]
        for (part, lowering), future in futures.items():
            record = {"kind": "operation", "case": _title(case), "part": part, "lowering": lowering}
            compiled = future.result()
            if isinstance(compiled, str):
                yield {**record, "failure": compiled}
                continue
            taken = seconds(compiled, inputs)
            # Each part moves two of x, y, dx and dy, and a kernel: 2 bytes a number.
            size = 2 * (2 * math.prod(x.shape) + math.prod(kernel))
            yield {**record, "seconds": taken, "gb_per_second": size / taken / 1e9}


# The process ---------------------------------------------------------------------------------------

SUBJECTS = {"correctness": correctness, "operations": operations}


def main(job: Job) -> None:
    """Gets ready, waits for a line on standard input, and writes a line of JSON for each record."""
    end_with_parent()
    records_file = take_output()

    def report(record: Record) -> None:
        records_file.write(json.dumps(record) + "\n")
        records_file.flush()

    try:
        records = SUBJECTS.get(job.subject, contender)(job)
        next(records)
        if not sys.stdin.readline():
            return
        for record in records:
            report(record)
        report({"kind": "end"})
    except Exception as error:
        traceback.print_exc()
        missing = isinstance(error, ModuleNotFoundError)
        report(
            {"kind": "failure", "failure": ("not installed: " if missing else "") + one_line(error), "skipped": missing}
        )


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
