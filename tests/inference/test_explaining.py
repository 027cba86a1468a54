"""Grad-CAM and integrated gradients against their definitions, in every network but those of another depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xception_flax
from golden.seeded import structured_images
from tests.models.test_family import OTHER_DEPTHS
from tests.models.test_models import NARROW, random_variables
from tests.weights.test_writing import random_network
from xception_flax.inference import predictor
from xception_flax.inference.explaining import PREDICTED, Explainer, grad_cam
from xception_flax.text.errors import UserError


@pytest.fixture(scope="module", params=[name for name in NARROW if name not in OTHER_DEPTHS])
def network(request):
    """A narrow network with random weights, and four images for it."""
    size = 75 if request.param == "inception_v3" else 40
    model = xception_flax.create_model(request.param, num_classes=5, **NARROW[request.param])
    images = jnp.asarray(structured_images(4, size, size))
    return model, random_variables(model, images), images


@functools.partial(jax.jit, static_argnums=0)
def features(model, variables, images, perturbations):
    """The logits, and what flows on at each stage."""
    everything = {**variables, "perturbations": perturbations}
    logits, kept = model.apply(everything, images, train=False, mutable=["intermediates"])
    return logits, {stage: kept["intermediates"][stage][0] for stage in model.strides}


def test_all_evidence_passes_each_stage(network):
    """If the same is put in place of a stage's features for every image, every image has the same logits.

    So the gradient there is the whole gradient, with that of shortcuts.
    """
    model, variables, images = network
    logits, flows = features(model, variables, images, {})
    spread = float(jnp.ptp(logits, axis=0).max())
    assert spread > 0
    for stage, x in flows.items():
        replaced, _ = features(model, variables, images, {stage: x[:1] - x})
        np.testing.assert_allclose(replaced, np.tile(logits[:1], (4, 1)), atol=1e-5 * spread, err_msg=stage)


def test_the_last_map_is_the_classifiers(network):
    """The last stage is averaged and multiplied with the kernel: the gradient of logit c is kernel[:, c] / (h w)."""
    model, variables, images = network
    if getattr(model, "fc_layers", ()):
        model = model.clone(fc_layers=())
        variables = random_variables(model, images)
    logits, flows = features(model, variables, images, {})
    stage, last = list(flows.items())[-1]
    kernel = variables["params"]["predictions"]["kernel"]
    numbers = jnp.array([0, 1, PREDICTED, 4])
    found, chosen, maps = jax.jit(grad_cam, static_argnums=(0, 4))(model, variables, images, numbers, (stage,))
    np.testing.assert_array_equal(chosen, [0, 1, logits[2].argmax(), 4])
    np.testing.assert_allclose(found, logits, atol=1e-6 * float(jnp.abs(logits).max()))
    expected = jnp.einsum("nhwc,cn->nhw", last, kernel[:, chosen]) / np.prod(last.shape[1:3])
    np.testing.assert_allclose(maps[stage], np.maximum(expected, 0), atol=1e-6 * float(jnp.abs(expected).max()))
    assert float(maps[stage].max()) > 0


def test_a_map_is_the_gradient_by_differences():
    """Stage 3 of Xception in float64: the weight of a channel is what the logit gains if all its places gain alike."""
    model = xception_flax.create_model("xception", num_classes=3, **NARROW["xception"])
    with jax.enable_x64(True):
        model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        images = jnp.asarray(structured_images(1, 40, 40), jnp.float64)
        variables = model.init(jax.random.key(1), images, train=False)
        _, flows = features(model, variables, images, {})
        x, step = flows["stage3"], 1e-4
        places, weights = np.prod(x.shape[1:3]), []
        for channel in range(x.shape[-1]):
            shift = jnp.zeros_like(x).at[..., channel].set(step)
            more, less = (features(model, variables, images, {"stage3": sign * shift})[0] for sign in (1, -1))
            weights.append(float(more[0, 2].astype(jnp.float64) - less[0, 2]) / (2 * step * places))
        expected = np.maximum((np.asarray(x) * np.reshape(weights, (1, 1, 1, -1))).sum(-1), 0)
        _, _, maps = grad_cam(model, variables, images, jnp.array([2]), ("stage3",))
    scale = np.abs(np.asarray(x) * np.reshape(weights, (1, 1, 1, -1))).sum(-1).max()
    np.testing.assert_allclose(maps["stage3"], expected, atol=1e-2 * scale)  # logits are float32


@pytest.fixture(scope="module")
def loaded() -> predictor.Predictor:
    network = random_network(name="xception", num_classes=4, width=0.05, middle_repeats=0)
    return predictor.from_pretrained(network, predictor.sharding.create_mesh(), batch_size=8)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [np.uint8((image + 1) * 127.5) for image in structured_images(10, 90, 100)]


def test_attributions_add_up(loaded, photos):
    """The sum over the pixels is the logit less the baseline's (section 3, completeness), whatever the batch size."""
    explainer = Explainer(loaded, steps=100, baseline=10.0)
    (_, found), *_ = explainer.stream(photos[:1], 0)
    gray = np.full((71, 71, 3), 10, np.uint8)
    logits = [
        loaded.model.apply(loaded.variables, loaded.normalize(x[None]), train=False)[0, 0] for x in (found.pixels, gray)
    ]
    assert found.difference == pytest.approx(float(logits[0] - logits[1]), abs=1e-5)
    assert abs(found.difference) > 0.01
    assert found.attributions.shape == (71, 71, 3)
    assert found.attributions.sum(dtype=np.float64) == pytest.approx(found.difference, rel=0.02)

    def gradient(share):
        def logit(x):
            return loaded.model.apply(loaded.variables, loaded.normalize(x[None]), train=False)[0, 0]

        return jax.grad(logit)(10.0 + share * (jnp.float32(found.pixels) - 10.0))

    shares = (np.arange(200) + 0.5) / 200  # another rule: the middles of 200 parts
    mean = jax.jit(lambda s: jax.lax.map(gradient, s).mean(0))(jnp.float32(shares))
    expected = np.asarray(mean) * (np.float32(found.pixels) - 10)
    error = np.linalg.norm(found.attributions - expected) / np.linalg.norm(expected)
    assert error < 0.1
    other = predictor.Predictor(
        loaded.model, loaded.variables, loaded.class_names, loaded.preprocessing, mesh=loaded.mesh, batch_size=24
    )
    (_, same), *_ = Explainer(other, steps=100, baseline=10.0).stream(photos[:1], 0)
    np.testing.assert_allclose(same.attributions, found.attributions, atol=1e-4 * np.abs(found.attributions).max())


def test_every_image_is_explained_for_its_class(loaded, photos):
    """Ten images in batches of eight, one of them none; without a class each for the one the network says."""
    explainer = Explainer(loaded, stages=("stage2", "stage5", "stage2"))
    assert explainer.stages == ("stage2", "stage5")
    results = [found for _, found in explainer.stream([*photos, b"no image"])]
    assert isinstance(results.pop(), UserError)
    probabilities = loaded.predict(photos)
    for found, expected in zip(results, probabilities, strict=True):
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
        assert found.number == expected.argmax()
        assert {stage: values.shape for stage, values in found.maps.items()} == {"stage2": (17, 17), "stage5": (3, 3)}
        assert (found.attributions, found.difference) == (None, None)
    finer = Explainer(loaded, output_stride=8)
    (_, found), *_ = finer.stream(photos[:1], 1)
    assert (found.number, found.maps["stage5"].shape) == (1, (9, 9))


def test_mistakes_are_named(loaded):
    for options, message in [
        (dict(stages=("stage6",)), "unknown stage 'stage6'; did you mean 'stage"),
        (dict(steps=-1), r"steps of integrated gradients \(0: none\) must be"),
        (dict(steps=10**9), "steps of integrated gradients"),
        (dict(baseline=256.0), "the gray of the baseline must be"),
        (dict(output_stride=7), "model.output_stride must be one of"),
    ]:
        with pytest.raises(UserError, match=message):
            Explainer(loaded, **options)
    explainer = Explainer(loaded)
    assert [explainer.number_of(name) for name in loaded.class_names] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="unknown class 'nobody'"):
        explainer.number_of("nobody")
