"""ONNX files, run by ONNX Runtime: the values of every network, and a graph that is as fast as a graph can be."""

import collections
import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from xception_flax.export import onnx as format_onnx
from xception_flax.export import verifying, writing
from xception_flax.export.program import OUTPUTS
from xception_flax.inference import predictor


def call(path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


# Each has an operation that the others do not have.
NETWORKS = {
    "hidden layers, elu": dict(name="xception", width=0.02, middle_repeats=1, fc_layers=(8,), mid_activation="elu"),
    "dilated": dict(name="xception", width=0.02, middle_repeats=1, output_stride=8),
    "symmetric": dict(name="xception", width=0.02, middle_repeats=1, padding="SYMMETRIC"),
    "pre-activation": dict(name="xception41p", width=0.03),
    "aligned": dict(name="xception65", width=0.03),
    "dense Inception": dict(name="inception_v3", image_size=75, bn_scale=True, count_include_pad=True),
    "Keras' Inception": dict(name="inception_v3", image_size=75),
    "towers": dict(name="xception_towers", width=0.02, middle_repeats=1, towers=2, order="pointwise_first"),
    "lenet": dict(name="lenet", width=0.2),
}


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=list(NETWORKS))
def test_every_network(network, images, run, expected, tmp_path, fields):
    """Logits, which an error anywhere in the network changes."""
    if fields["name"] == "inception_v3":
        images = np.random.default_rng(0).integers(0, 256, (3, 75, 75, 3), np.uint8)
    path, output = network(**fields), tmp_path / "n.onnx"
    code, out, err = run(path, "--format", "onnx", "--output", output, "--outputs", "logits")
    assert code == 0, err
    assert "by its own runtime on 8 photos" in out
    logits = expected(path, images, "logits")
    assert logits.shape == (3, 4)
    # Sums in another order: 2e-5 of 'aligned', where a last bit of the images alone makes 1e-5.
    bound = verifying.MAX_DIFFERENCE * np.ptp(logits, axis=0).max()
    np.testing.assert_allclose(call(output, images), logits, atol=bound)
    np.testing.assert_allclose(call(output, images[:1]), logits[:1], atol=bound)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_outputs(network, images, run, expected, tmp_path, outputs, activation):
    path, output = network(name="lenet", width=0.2, activation=activation), tmp_path / "n.onnx"
    assert run(path, "--format", "onnx", "--output", output, "--outputs", outputs)[0] == 0
    name = {"features": "pooled"}.get(outputs, outputs)
    np.testing.assert_allclose(call(output, images), expected(path, images, name), rtol=1e-4, atol=1e-6)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["batch", 71, 71, 3])]
    assert [value.name for value in session.get_outputs()] == [outputs]


def test_the_graph_is_the_networks_own(network, run, tmp_path):
    """Figure 5 of the paper with one middle block, batch normalization folded: 74 convolutions less 7 x 3 x 2."""
    path, output = network(name="xception", width=0.1, middle_repeats=1), tmp_path / "n.onnx"
    assert run(path, "--format", "onnx", "--output", output, "--outputs", "logits", "--no-verify")[0] == 0
    model = onnx.load(output)
    assert (model.opset_import[0].version, model.ir_version) == (format_onnx.OPSET, format_onnx.IR_VERSION) == (17, 8)
    assert collections.Counter(node.op_type for node in model.graph.node) == {
        "Transpose": 1,  # uint8, of the images
        "Cast": 1,
        "Conv": 74 - 7 * 6,
        "Relu": 35 - 7 * 3,
        "Add": 12 - 7,
        "MaxPool": 4,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    with np.load(path) as file:
        parameters = {name: file[name] for name in file.files if name.startswith("params/")}
    assert set(arrays) == {name for name in parameters if not name.endswith("_bn/scale")}
    name = "params/block4_sepconv2/depthwise/kernel"  # nothing is folded into it
    np.testing.assert_array_equal(arrays[name], parameters[name].transpose(3, 2, 0, 1))
    (node,) = (node for node in model.graph.node if node.name == "block4_sepconv2/depthwise")
    channels = parameters[name].shape[-1]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "group": channels,
        "kernel_shape": [3, 3],
        "pads": [1, 1, 1, 1],
        "strides": [1, 1],
        "dilations": [1, 1],
    }


def test_the_metadata_are_those_beside_the_file(network, run, tmp_path):
    path, output = network(name="lenet", width=0.2), tmp_path / "n.onnx"
    assert run(path, "--format", "onnx", "--output", output)[0] == 0
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    inside = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert inside == json.loads((tmp_path / "n.onnx.json").read_text())
    assert inside["class_names"] == [f"class {i}" for i in range(4)]
    assert inside["versions"]["onnx"] == onnx.__version__
    assert inside["verified"]["images"] == 8
    assert inside["verified"]["largest_difference"] < verifying.MAX_DIFFERENCE


@pytest.mark.parametrize("name", ["xception", "xception41p"])
def test_any_size(network, run, tmp_path, name):
    path, output = network(name=name, width=0.03), tmp_path / "n.onnx"
    assert run(path, "--format", "onnx", "--output", output, "--outputs", "logits", "--any-size")[0] == 0
    found, rng = predictor.load(str(path)), np.random.default_rng(0)
    for shape in ((2, 71, 71, 3), (1, 103, 135, 3)):
        images = rng.integers(0, 256, shape, np.uint8)
        logits = found.model.apply(found.variables, images / np.float32(127.5) - 1, train=False)
        np.testing.assert_allclose(call(output, images), logits, atol=verifying.MAX_DIFFERENCE * np.ptp(logits))


def test_without_the_libraries(network, run, tmp_path, monkeypatch):
    arguments = [network(name="lenet", width=0.2), "--format", "onnx", "--output", tmp_path / "n.onnx"]
    missing = writing.FORMATS["onnx"]._replace(runtimes=("no_such_runtime",))
    monkeypatch.setitem(writing.FORMATS, "onnx", missing)
    assert run(*arguments) == (
        2,
        "",
        "error: --verify of onnx needs no_such_runtime: pip install 'xception_flax[onnx]'\n",
    )
    assert run(*arguments, "--no-verify")[0] == 0
