"""The contenders: a table from names to functions that build one forward pass or one training step.

Each builder is called in a process of its own, gets a `Job`, and returns a function that does the work once, to its
end: the forward pass of a batch returns the logits `[N, classes]`, the training step the loss before its update.
Builders import their libraries themselves, so that a process has no other library.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.job import LEARNING_RATE, MOMENTUM, NUM_CLASSES, Job, network

MATRIX_SIZE = 2048  # of the ceiling
MATRIX_GFLOP = 2 * MATRIX_SIZE**3 / 1e9

Work = Callable[[], np.ndarray]  # the function that is timed


class Contender(NamedTuple):
    """A row of the table.

    Attributes:
      title: in the table.
      build: makes the function that is timed.
      imports: modules to import before memory is first measured.
      environment: variables of its process, beside those that all have.
      reading: whose Xception it is, see `job.READINGS`; None if it is none.
      ours: runs in this project's environment; otherwise in the contenders'.
      modes: that it has.
    """

    title: str
    build: Callable[[Job], Work]
    imports: tuple[str, ...]
    environment: Mapping[str, str] = MappingProxyType({})
    reading: str | None = "keras"
    ours: bool = False
    modes: tuple[str, ...] = ("forward", "train")


# This project ----------------------------------------------------------------------------------------


def _variables(job: Job) -> Any:
    import jax
    from flax.traverse_util import unflatten_dict

    with job.load("flax.npz") as file:
        return jax.device_put(unflatten_dict({tuple(name.split("/")): file[name] for name in file}))


def _jitted_forward(model: Any, variables: Any, job: Job, compiler_options: dict[str, str] | None = None) -> Work:
    import jax

    forward = jax.jit(
        lambda variables, images: model.apply(variables, images, train=False), compiler_options=compiler_options
    )
    images = jax.device_put(job.load("images.npy"))
    return lambda: np.asarray(forward(variables, images))


def build_xception_flax(job: Job) -> Work:
    """As all commands run it: `build_xception_flax_glibc` with freed memory kept."""
    from xception_flax.host import allocator

    allocator.keep_freed_memory()
    run, is_first = build_xception_flax_glibc(job), True

    def run_as_train_py() -> np.ndarray:
        nonlocal is_first
        result = run()
        if is_first:
            is_first = False
            allocator.release_free_memory()
        return result

    return run_as_train_py


def build_xception_flax_glibc(job: Job) -> Work:
    """Jitted `model.apply`, and the step of `train.py`, which takes uint8 and normalizes."""
    import jax
    import jax.numpy as jnp

    from xception_flax import ops
    from xception_flax.training import losses, metrics, optimizers, sharding, state, steps
    from xception_flax.training.length import RunLength

    model, variables = network(job), _variables(job)
    if job.mode == "forward":
        return _jitted_forward(model, variables, job, ops.compiler_options("cpu", job.size, job.size))

    mesh = sharding.create_mesh()
    schedule = optimizers.create_schedule(run=RunLength(job.batch, num_images=job.batch, total_steps=1))
    tx, _ = optimizers.create_optimizer("sgd", LEARNING_RATE, schedule=schedule, momentum=MOMENTUM)
    _, abstract_state = state.make_init(model, tx, (job.size, job.size, 3), mesh, ema=False)
    train_step = steps.make_train_step(
        model,
        tx,
        losses.create_loss("softmax"),
        metrics.create_metrics("single_label"),
        steps.create_normalizer(mean=(127.5,), std=(127.5,)),
        abstract_state,
        mesh,
        seed=0,
    )
    first = state.TrainState(step=jnp.zeros((), jnp.int32), opt_state=tx.init(variables["params"]), **variables)
    carried = jax.device_put(first, jax.tree.map(lambda leaf: leaf.sharding, abstract_state))
    batch = sharding.global_batch(mesh, {"images": job.load("images_uint8.npy"), "labels": job.load("labels.npy")})

    def run() -> np.ndarray:
        nonlocal carried
        carried, sums = jax.block_until_ready(train_step(carried, batch))
        return np.asarray(sums["loss"].total / sums["loss"].count)

    return run


def build_folded(job: Job) -> Work:
    """Inference with batch normalization folded into the convolutions by this project's own function."""
    from xception_flax import fold_batch_norm, ops
    from xception_flax.host import allocator

    allocator.keep_freed_memory()
    model, options = network(job), ops.compiler_options("cpu", job.size, job.size)
    return _jitted_forward(model, fold_batch_norm(model, _variables(job)), job, options)


def build_plain_linen(job: Job) -> Work:
    import jax
    import optax

    from benchmarks import plain_linen

    model, variables = plain_linen.Xception(NUM_CLASSES), _variables(job)
    if job.mode == "forward":
        return _jitted_forward(model, variables, job)

    tx = optax.sgd(LEARNING_RATE, MOMENTUM)
    train_step = plain_linen.make_train_step(model, tx)
    carried = variables, tx.init(variables["params"])
    images, labels = jax.device_put((job.load("images.npy"), job.load("labels.npy")))

    def run() -> np.ndarray:
        nonlocal carried
        *carried, loss = jax.block_until_ready(train_step(*carried, images, labels))
        return np.asarray(loss)

    return run


# Keras Applications ----------------------------------------------------------------------------------


def _keras_model(job: Job, *, jit_compile: bool) -> Any:
    """`keras.applications.Xception` with logits, compiled for training where that is the mode."""
    import keras

    shape = (job.size, job.size, 3)
    model = keras.applications.Xception(
        weights=None, input_shape=shape, classes=NUM_CLASSES, classifier_activation=None
    )
    with job.load("keras.npz") as file:
        for layer in model.layers:
            if layer.weights:
                layer.set_weights([file[f"{layer.name}/{i}"] for i in range(len(layer.weights))])
    if job.mode == "train":
        model.compile(
            optimizer=keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
        )
    return model


def _keras_training(model: Any, job: Job) -> Work:
    """Keras' own compiled step; what `train_on_batch` does around it takes a thousandth of a step."""
    images, labels = job.load("images.npy"), job.load("labels.npy")
    return lambda: np.asarray(model.train_on_batch(images, labels))


def build_keras_tensorflow(job: Job, *, xla: bool = False) -> Work:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(job.threads)
    model = _keras_model(job, jit_compile=xla)
    if job.mode == "train":
        return _keras_training(model, job)
    # As `model.predict` compiles it, without its loop.
    forward = tf.function(lambda images: model(images, training=False), jit_compile=xla, reduce_retracing=True)
    images = tf.constant(job.load("images.npy"))
    return lambda: forward(images).numpy()


def build_keras_tensorflow_xla(job: Job) -> Work:
    return build_keras_tensorflow(job, xla=True)


def build_keras_jax(job: Job) -> Work:
    import jax

    model = _keras_model(job, jit_compile=True)
    if job.mode == "train":
        return _keras_training(model, job)
    weights = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    forward = jax.jit(lambda weights, images: model.stateless_call(*weights, images, training=False)[0])
    images = jax.device_put(job.load("images.npy"))
    return lambda: np.asarray(forward(weights, images))


# timm ------------------------------------------------------------------------------------------------


def _timm_model(job: Job) -> Any:
    import timm
    import torch

    model = timm.create_model("legacy_xception", num_classes=NUM_CLASSES)
    with job.load("timm.npz") as file:
        wrong = model.load_state_dict({name: torch.from_numpy(file[name]) for name in file}, strict=False)
    if wrong.unexpected_keys or not all(name.endswith("num_batches_tracked") for name in wrong.missing_keys):
        raise RuntimeError(f"the weights do not fit timm's legacy_xception: {wrong}")
    return model.train(job.mode == "train")


def build_timm(job: Job, *, compiled: bool = False) -> Work:
    import torch

    torch.set_num_threads(job.threads)
    model = _timm_model(job).to(memory_format=torch.channels_last)
    images = torch.from_numpy(job.load("images.npy")).permute(0, 3, 1, 2)  # [N, C, H, W], channels last in memory
    network = torch.compile(model) if compiled else model
    if job.mode == "forward":
        # What torch advises for inference on CPUs: weights are constants, batch normalization is folded into them.
        torch._inductor.config.freezing = compiled

        def forward() -> np.ndarray:
            with torch.inference_mode():
                return network(images).numpy()

        return forward

    labels = torch.from_numpy(job.load("labels.npy").astype(np.int64))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)

    def train_step() -> np.ndarray:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    return train_step


def build_timm_compiled(job: Job) -> Work:
    return build_timm(job, compiled=True)


def write_onnx(job: Job) -> None:
    """Writes `timm.onnx` into `job.folder`: in evaluation mode, for one shape, batch normalization not folded."""
    import torch

    images = torch.from_numpy(job.load("images.npy").transpose(0, 3, 1, 2).copy())
    path = str(Path(job.folder) / "timm.onnx")
    torch.onnx.export(_timm_model(job), (images,), path, input_names=["images"], dynamo=True, verbose=False)


def write_our_onnx(job: Job) -> None:
    """Writes `ours.onnx` into `job.folder`, as `xception-flax export --outputs logits` does."""
    import jax

    from xception_flax.export import writing
    from xception_flax.export.options import Options
    from xception_flax.export.program import create_program
    from xception_flax.inference import predictor
    from xception_flax.training import sharding
    from xception_flax.weights.pretrained import Pretrained

    pretrained = Pretrained(
        "xception_flax",
        {"name": "xception", "num_classes": NUM_CLASSES, "width": job.width, "middle_repeats": job.middle_repeats},
        jax.tree.map(np.asarray, _variables(job)),
        channels=3,
        image_size=job.size,
        normalize={"mean": (127.5,), "std": (127.5,)},
    )
    network = predictor.from_pretrained(pretrained, sharding.create_mesh())
    output = Path(job.folder) / "ours.onnx"
    writing.write(create_program(network, "logits"), network, pretrained, "onnx", output, Options(), None)


# Engines of inference --------------------------------------------------------------------------------


def build_onnxruntime(job: Job) -> Work:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    path = str(Path(job.folder) / "timm.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.ascontiguousarray(job.load("images.npy").transpose(0, 3, 1, 2))
    return lambda: session.run(None, {"images": images})[0]


def build_our_onnx(job: Job) -> Work:
    """`write_our_onnx`'s file, whose time has the normalization in it too."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    path = str(Path(job.folder) / "ours.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = job.load("images_uint8.npy")
    return lambda: session.run(None, {"images": images})[0]


def build_openvino(job: Job) -> Work:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where a CPU has that
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(Path(job.folder) / "timm.onnx", "CPU", settings).create_infer_request()
    images = np.ascontiguousarray(job.load("images.npy").transpose(0, 3, 1, 2))
    return lambda: request.infer({0: images}, share_inputs=True)[0]


# The ceiling -----------------------------------------------------------------------------------------


def _matrices() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, MATRIX_SIZE, MATRIX_SIZE), np.float32)


def build_product_jax(job: Job) -> Work:
    import jax

    product, matrices = jax.jit(lambda a, b: a @ b), jax.device_put(tuple(_matrices()))
    return lambda: np.asarray(product(*matrices))


def build_product_numpy(job: Job) -> Work:
    a, b = _matrices()
    return lambda: a @ b


def build_product_torch(job: Job) -> Work:
    import torch

    torch.set_num_threads(job.threads)
    a, b = torch.from_numpy(_matrices())
    return lambda: (a @ b).numpy()


# Tables ----------------------------------------------------------------------------------------------

_FLAX = dict(imports=("jax", "flax", "optax"), ours=True)
_TENSORFLOW = dict(imports=("tensorflow", "keras"), environment={"KERAS_BACKEND": "tensorflow"})
_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_ARENA_MAX": "1"}
_TENSORFLOW_KEPT = _TENSORFLOW | dict(environment=_TENSORFLOW["environment"] | _KEPT)
_TORCH = dict(imports=("torch", "timm"), reading="timm")
_ENGINE = dict(reading="timm", modes=("forward",))
_ENGINE_KEPT = _ENGINE | dict(environment=_KEPT)

CONTENDERS = {
    "xception_flax": Contender("xception_flax", build_xception_flax, **_FLAX),
    "xception_flax_folded": Contender("xception_flax, batch norm folded", build_folded, **_FLAX, modes=("forward",)),
    "xception_flax_glibc": Contender("xception_flax, allocator as it is", build_xception_flax_glibc, **_FLAX),
    "plain_linen": Contender("plain linen", build_plain_linen, **_FLAX),
    "keras_tensorflow": Contender("Keras on TensorFlow", build_keras_tensorflow, **_TENSORFLOW),
    "keras_tensorflow_xla": Contender("Keras on TensorFlow, XLA", build_keras_tensorflow_xla, **_TENSORFLOW),
    "keras_jax": Contender("Keras on JAX", build_keras_jax, ("jax", "keras"), {"KERAS_BACKEND": "jax"}),
    "timm": Contender("timm, torch eager", build_timm, **_TORCH),
    "timm_compile": Contender("timm, torch.compile", build_timm_compiled, **_TORCH),
    "timm_compile_kept": Contender(
        "timm, torch.compile, freed memory kept", build_timm_compiled, **_TORCH, environment=_KEPT
    ),
    "keras_tensorflow_kept": Contender(
        "Keras on TensorFlow, freed memory kept", build_keras_tensorflow, **_TENSORFLOW_KEPT
    ),
    "timm_kept": Contender("timm, torch eager, freed memory kept", build_timm, **_TORCH, environment=_KEPT),
    "onnxruntime": Contender("ONNX Runtime", build_onnxruntime, ("onnxruntime",), **_ENGINE),
    "openvino": Contender("OpenVINO", build_openvino, ("openvino",), **_ENGINE),
    "onnxruntime_kept": Contender(
        "ONNX Runtime, freed memory kept", build_onnxruntime, ("onnxruntime",), **_ENGINE_KEPT
    ),
    "openvino_kept": Contender("OpenVINO, freed memory kept", build_openvino, ("openvino",), **_ENGINE_KEPT),
}

# A large matrix product by three libraries, for both modes, shows what the machine can do. The best of them counts.
CEILINGS = {
    "product_jax": Contender("product by JAX", build_product_jax, ("jax",), reading=None, ours=True),
    "product_numpy": Contender("product by NumPy", build_product_numpy, ("numpy",), reading=None, ours=True),
    "product_torch": Contender("product by torch", build_product_torch, ("torch",), reading=None),
}

# Files of ONNX, run by the same ONNX Runtime.
EXPORTED = {
    "our_onnx": Contender("xception-flax export", build_our_onnx, ("onnxruntime",), modes=("forward",)),
    "timm_onnx": Contender("timm, torch.onnx", build_onnxruntime, ("onnxruntime",), **_ENGINE),
}
