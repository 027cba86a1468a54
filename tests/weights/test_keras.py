"""Parity with `keras.applications.Xception` and `InceptionV3`, live, on Keras' JAX backend."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from golden.seeded import structured_images
from xception_flax import create_model
from xception_flax.weights import keras as keras_weights

# A difference counts only against what an image changes. With arbitrary batch statistics the logits
# spread by 1e-5 of the largest over images, and any two networks would agree.
MIN_SPREAD = 0.05  # of the largest logit, over images
MAX_DIFFERENCE = 1e-4  # of that spread
MAX_GRADIENT_DIFFERENCE = 1e-9  # of the largest gradient of the same array, in float64


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    """As Keras' own layers do; ours are held to the strict rule by all other tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def random_variables(model, images: np.ndarray) -> dict:
    """Random weights, and batch statistics of these very images, perturbed."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 75, 75, 3)), train=False))

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return rng.normal(0, 1 / np.sqrt(np.prod(leaf.shape[:-1])), leaf.shape).astype(leaf.dtype)
        if kind == "scale":
            return rng.uniform(0.7, 1.3, leaf.shape).astype(leaf.dtype)
        if kind == "bias":
            return rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
        return np.ones(leaf.shape, leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, dict(shapes))
    # With a decay of 0 one pass leaves the statistics of the batch itself.
    calibrate = model.clone(bn_decay=0.0, dropout_rate=0.0)
    _, updates = jax.jit(lambda v, x: calibrate.apply(v, x, train=True, mutable="batch_stats"))(variables, images)

    def disturb(path, leaf):
        noise = rng.normal(0, 1, leaf.shape).astype(leaf.dtype)
        return leaf * np.exp(0.1 * noise) if path[-1].key == "var" else leaf + 0.02 * noise

    stats = jax.tree_util.tree_map_with_path(disturb, updates["batch_stats"])
    return jax.tree.map(np.asarray, {"params": variables["params"], "batch_stats": stats})


def copy_to_keras(variables: dict, keras_model: keras.Model) -> None:
    layers = [layer for layer in keras_model.layers if layer.weights]
    arrays = keras_weights.to_keras(variables, [(layer.name, len(layer.weights)) for layer in layers])
    for layer, values in zip(layers, arrays, strict=True):
        layer.set_weights(values)


APPLICATIONS = {"xception": keras.applications.Xception, "inception_v3": keras.applications.InceptionV3}


def keras_model_of(name: str, height: int, width: int) -> keras.Model:
    return APPLICATIONS[name](weights=None, classifier_activation=None, input_shape=(height, width, 3))


def keras_apply(model: keras.Model, trainable: list, images: np.ndarray, training: bool) -> tuple:
    state = [v.value for v in model.non_trainable_variables]
    return model.stateless_call(trainable, state, images, training=training)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("xception", size) for size in ((299, 299), (150, 213), (71, 71))),
        *(("inception_v3", size) for size in ((299, 299), (150, 213))),
    ],
    ids=str,
)
def test_logits_equal_keras(name, size):
    model = create_model(name, num_classes=1000)
    images = structured_images(4, *size)
    variables = random_variables(model, images)
    keras_model = keras_model_of(name, *size)
    copy_to_keras(variables, keras_model)

    ours = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))
    trainable = [v.value for v in keras_model.trainable_variables]
    theirs = np.asarray(jax.jit(lambda t, x: keras_apply(keras_model, t, x, False)[0])(trainable, images))

    spread = np.ptp(theirs, axis=0).max()
    assert spread >= MIN_SPREAD * np.abs(theirs).max()
    print(f"{name} {size}: {np.abs(ours - theirs).max() / spread:.1e} of the spread")
    assert np.abs(ours - theirs).max() <= MAX_DIFFERENCE * spread


def narrow_keras_model(name: str, model, height: int, width: int) -> keras.Model:
    """Keras' own graph with the widths of a narrow model of ours."""
    config = keras_model_of(name, height, width).get_config()
    for layer in config["layers"]:
        if "filters" in layer["config"]:
            layer["config"]["filters"] = max(8, 8 * round(layer["config"]["filters"] * model.width / 8))
        if layer["config"]["name"] == "predictions":
            layer["config"]["units"] = model.num_classes
        layer.pop("build_config", None)
    return keras.Model.from_config(config)


@pytest.fixture
def keras_in_float64(monkeypatch):
    """Keras on JAX rounds batch normalization to float32 in a float64 model too, unless this table lets it be."""
    monkeypatch.setitem(keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.usefixtures("keras_in_float64")
@pytest.mark.parametrize(("name", "width"), [("xception", 0.125), ("inception_v3", 0.05)])
def test_gradients_and_statistics_equal_keras_in_training(name, width):
    """In float64: in float32 one ReLU whose input is within rounding of 0 changes all gradients before it."""
    model = create_model(name, num_classes=10, width=width, dropout_rate=0.0, dtype="float64", param_dtype="float64")
    images = structured_images(4, 75, 79).astype(np.float64)
    labels = np.arange(4)
    variables = random_variables(model, images)
    keras_model = narrow_keras_model(name, model, *images.shape[1:3])
    copy_to_keras(variables, keras_model)

    def loss_of(logits):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

    def ours(params):
        logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable="batch_stats")
        return loss_of(logits), updates["batch_stats"]

    def theirs(trainable):
        logits, state = keras_apply(keras_model, trainable, images, True)
        return loss_of(logits), state

    (loss, (grads, stats)) = _loss_and_gradients(ours, variables["params"])
    trainable = [v.value for v in keras_model.trainable_variables]
    (keras_loss, (keras_grads, keras_state)) = _loss_and_gradients(theirs, trainable)

    # Put Keras' results into its own layers, to read them back by our table.
    for variable, value in zip(keras_model.trainable_variables, keras_grads, strict=True):
        variable.assign(value)
    for variable, value in zip(keras_model.non_trainable_variables, keras_state, strict=True):
        variable.assign(value)
    expected = keras_weights.from_keras([(layer.name, layer.get_weights()) for layer in keras_model.layers], variables)

    assert loss == pytest.approx(keras_loss, rel=MAX_GRADIENT_DIFFERENCE)
    assert jax.tree.structure(grads) == jax.tree.structure(expected["params"])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected["params"]), strict=True
    ):
        assert np.abs(b).max() > 1e-6, path
        assert np.abs(a - b).max() <= MAX_GRADIENT_DIFFERENCE * np.abs(b).max(), path
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected["batch_stats"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=MAX_GRADIENT_DIFFERENCE, atol=MAX_GRADIENT_DIFFERENCE)


def _loss_and_gradients(function, argument):
    (loss, updates), grads = jax.jit(jax.value_and_grad(function, has_aux=True))(argument)
    return float(loss), (grads, updates)


@pytest.mark.usefixtures("keras_in_float64")
@pytest.mark.parametrize("size", [(32, 45), (27, 64)], ids=str)
def test_lenet_equals_the_same_stack_in_keras(size):
    """Logits and the gradients of all weights, in float64; Keras' pooling is told to keep odd borders too."""
    model = create_model("lenet", num_classes=10, width=0.25, dtype="float64", param_dtype="float64")
    images = structured_images(4, *size).astype(np.float64)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    layers = [keras.layers.Input((*size, 3))]
    for channels in (8, 16, 32):
        layers.append(keras.layers.Conv2D(channels, 5, padding="same", activation="relu", use_bias=False))
        layers.append(keras.layers.MaxPooling2D(2, padding="same"))
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(10),
    ]
    keras_model = keras.Sequential(layers)
    params = variables["params"]
    kernels = [[params[f"conv{i}"]["kernel"]] for i in (1, 2, 3)]
    dense = [[params[name]["kernel"], params[name]["bias"]] for name in ("fc1", "predictions")]
    arrays = [np.asarray(array) for layer in (*kernels, *dense) for array in layer]
    keras_model.set_weights(arrays)

    def ours(params):
        logits = model.apply({"params": params}, images, train=True)
        return jnp.sum(jnp.sin(logits)), logits

    def theirs(trainable):
        logits = keras_apply(keras_model, trainable, images, True)[0]
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(theirs, has_aux=True))(
        [v.value for v in keras_model.trainable_variables]
    )
    assert np.ptp(expected, axis=0).max() >= MIN_SPREAD * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-12)
    ordered = [grads[f"conv{i}"]["kernel"] for i in (1, 2, 3)]
    ordered += [grads[name][leaf] for name in ("fc1", "predictions") for leaf in ("kernel", "bias")]
    for a, b in zip(ordered, expected_grads, strict=True):
        assert np.abs(a - b).max() <= MAX_GRADIENT_DIFFERENCE * np.abs(b).max()
