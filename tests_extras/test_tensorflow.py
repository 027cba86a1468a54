"""SavedModel, run by TensorFlow, and LiteRT's file, run by its interpreter: the values of every network."""

import collections
import json

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from tests_extras.test_onnx import NETWORKS
from xception_flax.export import verifying, writing
from xception_flax.export.program import OUTPUTS

LENET = dict(name="lenet", width=0.2)
XCEPTION = dict(name="xception", width=0.1, middle_repeats=1)


def call_saved_model(path, images: np.ndarray) -> dict[str, np.ndarray]:
    run = tf.saved_model.load(path).signatures["serving_default"]
    return {name: values.numpy() for name, values in run(images=tf.constant(images)).items()}


def call_litert(path, images: np.ndarray) -> dict[str, np.ndarray]:
    run = Interpreter(str(path)).get_signature_runner()
    rows = [{name: values.copy() for name, values in run(images=image[None]).items()} for image in images]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


RUNTIMES = {"savedmodel": ("n", call_saved_model), "litert": ("n.tflite", call_litert)}


# The StableHLO of a SavedModel is tested with JAX; the converter of LiteRT meets every operation.
EVERY = [("savedmodel", "pre-activation"), ("savedmodel", "towers"), *(("litert", name) for name in NETWORKS)]


@pytest.mark.parametrize(("form", "name"), EVERY)
def test_every_network(network, images, run, expected, tmp_path, form, name):
    """Logits, which an error anywhere in the network changes."""
    fields = NETWORKS[name]
    if fields["name"] == "inception_v3":  # of 75 px the converter makes no file, see below
        fields = fields | dict(image_size=107)
        images = np.random.default_rng(0).integers(0, 256, (3, 107, 107, 3), np.uint8)
    (name, call), path = RUNTIMES[form], network(**fields)
    code, _, err = run(path, "--format", form, "--output", tmp_path / name, "--outputs", "logits", "--no-verify")
    assert code == 0, err
    (found,) = call(tmp_path / name, images).values()
    logits = expected(path, images, "logits")
    assert logits.shape == (3, 4)
    rounding = 2e-6 * np.abs(logits).max()  # more than what some networks make of three images of noise
    np.testing.assert_allclose(found, logits, atol=verifying.MAX_DIFFERENCE * np.ptp(logits, axis=0).max() + rounding)


@pytest.mark.parametrize(("form", "outputs"), [("savedmodel", OUTPUTS[0]), *(("litert", name) for name in OUTPUTS)])
def test_outputs(network, images, run, expected, tmp_path, form, outputs):
    """Verified by the runtime in another process; the output has its name."""
    (name, call), path = RUNTIMES[form], network(activation="sigmoid", **LENET)
    code, out, err = run(path, "--format", form, "--output", tmp_path / name, "--outputs", outputs)
    assert code == 0, err
    assert "by its own runtime on 8 photos" in out
    found = call(tmp_path / name, images)
    assert list(found) == [outputs]
    values = expected(path, images, {"features": "pooled"}.get(outputs, outputs))
    np.testing.assert_allclose(found[outputs], values, rtol=1e-4, atol=1e-6)


def test_the_graph_of_litert(network, run, tmp_path):
    """Figure 5 of the paper with one middle block, in operations that every interpreter has: none of TensorFlow's own.

    Dense convolutions of one pixel are FULLY_CONNECTED, and every other pixel before them is STRIDED_SLICE.
    """
    output = tmp_path / "n.tflite"
    code, _, err = run(network(**XCEPTION), "--format", "litert", "--output", output, "--outputs", "logits")
    assert code == 0, err
    interpreter = Interpreter(str(output))
    operations = collections.Counter(one["op_name"] for one in interpreter._get_ops_details())
    assert operations["DEPTHWISE_CONV_2D"] == 34 - 7 * 3
    assert operations["CONV_2D"] + operations["FULLY_CONNECTED"] == 2 + 34 - 7 * 3 + 4 + 1
    assert (operations["MAX_POOL_2D"], operations["STRIDED_SLICE"]) == (4, 4)
    known = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "STRIDED_SLICE")
    assert set(operations) - {*known, "DELEGATE"} == {"ADD", "CAST", "RELU", "SUM"}
    (given,) = interpreter.get_input_details()
    assert (given["dtype"], given["shape_signature"].tolist()) == (np.uint8, [1, 71, 71, 3])


def test_a_saved_model_has_the_parameters_once_and_its_description(network, run, tmp_path):
    path, output = network(**XCEPTION), tmp_path / "n"
    assert run(path, "--format", "savedmodel", "--output", output, "--no-verify")[0] == 0
    function = tf.saved_model.load(output).signatures["serving_default"]
    (given,) = function.structured_input_signature[1].values()
    assert (given.name, given.dtype, given.shape.as_list()) == ("images", tf.uint8, [None, 71, 71, 3])
    with np.load(path) as file:
        parameters = sum(file[name].nbytes for name in file.files if name.startswith("params/"))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    assert 0.9 * parameters < size < 1.5 * parameters
    said = json.loads((tmp_path / "n.json").read_text())
    assert json.loads((output / "assets.extra" / "xception_flax.json").read_text()) == said
    assert said["versions"]["tensorflow"] == tf.__version__
    assert call_saved_model(output, np.zeros((5, 71, 71, 3), np.uint8))["probabilities"].shape == (5, 4)


def test_mistakes(network, run, tmp_path, monkeypatch):
    path = network(**LENET)
    for form, name, more, message in [
        ("litert", "n.onnx", (), "a file of litert must end in '.tflite'"),
        ("litert", "n.tflite", ("--any-size",), "--any-size is not of litert"),
        ("savedmodel", "n", ("--any-size",), "--any-size is not of savedmodel"),
        ("savedmodel", "n", ("--int8", tmp_path), "--int8 is of onnx, not of savedmodel"),
        ("savedmodel", "n", ("--platforms", "cpu"), "--platforms is of stablehlo"),
    ]:
        code, out, err = run(path, "--format", form, "--output", tmp_path / name, *more)
        assert (code, out) == (2, "")
        assert message in err
    for form, (name, _) in RUNTIMES.items():
        monkeypatch.setitem(writing.FORMATS, form, writing.FORMATS[form]._replace(writers=("no_such_library",)))
        assert run(path, "--format", form, "--output", tmp_path / name) == (
            2,
            "",
            f"error: writing {form} needs no_such_library: pip install 'xception_flax[{form}]'\n",
        )


def test_what_tensorflow_refuses_is_a_line(network, run, tmp_path):
    """Inception's last features of an image of 75 px are one pixel, which the converter does not survive."""
    path = network(**NETWORKS["Keras' Inception"])
    code, out, err = run(path, "--format", "litert", "--output", tmp_path / "n.tflite")
    assert (code, out) == (2, "")
    reason = "'tfl.batch_matmul' op found invalid output rank, expected 3 but got 4"
    assert err.splitlines()[-1] == f"error: TensorFlow does not write this network: {reason}"
    assert not list(tmp_path.glob("n.tflite*"))
