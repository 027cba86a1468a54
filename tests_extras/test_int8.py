"""ONNX in int8: what the command says of the loss is what ONNX Runtime gives for both files, on images held out."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from tests_extras.test_onnx import NETWORKS, call
from xception_flax.export import verifying, writing
from xception_flax.export.quantizing import MAX_CALIBRATED, images_of
from xception_flax.inference import predictor

LENET = dict(name="lenet", width=0.2)


@pytest.fixture
def folder(tmp_path):
    """Writes as many crops of two photos, a third in folders of two classes each, and a third in another's."""

    def write(number: int):
        rng, places = np.random.default_rng(0), ("class 0", "class 3", "of no class")
        for i in range(number):
            photo = verifying.photos()[4 * (i % 2)]
            top, left = rng.integers(0, (256, 400))
            place = tmp_path / "photos" / places[3 * i // number]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[top : top + 160, left : left + 200]).save(place / f"{i:03}.png")
        return tmp_path / "photos"

    return write


def prepared(path, photos) -> np.ndarray:
    return verifying.prepared(predictor.load(str(path)).preprocessing, photos)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("outputs", ["probabilities", "logits"])
def test_what_is_said_of_the_loss(network, folder, run, tmp_path, outputs):
    path, photos = network(name="xception", width=0.1, middle_repeats=1), folder(30)
    files = {name: tmp_path / f"{name}.onnx" for name in ("float32", "int8")}
    arguments = ["--format", "onnx", "--outputs", outputs]
    assert run(path, *arguments, "--output", files["float32"])[0] == 0
    code, out, err = run(path, *arguments, "--output", files["int8"], "--int8", photos)
    assert code == 0, err
    calibrated, measured = images_of(photos)
    assert (len(calibrated), len(measured), len({*calibrated, *measured})) == (15, 15, 30)
    assert "calibrated on 15 images, measured on 15 others" in out
    assert "in float32, by its own runtime on 8 photos" in out

    images = prepared(path, measured)
    found = {name: call(file, images) for name, file in files.items()}
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    if outputs == "logits":
        found = {name: softmax(values) for name, values in found.items()}
    change = np.abs(found["int8"] - found["float32"])
    top1 = {name: values.argmax(1) for name, values in found.items()}
    labels = np.array([{"class 0": 0, "class 3": 3}.get(file.parent.name, -1) for file in measured])
    said = json.loads((tmp_path / "int8.onnx.json").read_text())["quantized"]
    assert said["calibrated_images"] == 15
    assert said["measured"] == {
        "images": 15,
        "held_out": True,
        "top1_agreement": np.mean(top1["int8"] == top1["float32"]),
        "largest_change_of_probability": pytest.approx(change.max(), rel=1e-4),
        "mean_change_of_probability": pytest.approx(change.mean(), rel=1e-4),
        "labelled_images": 10,
        "top1": {name: np.sum(top1[name] == labels) / 10 for name in files},
    }
    assert 0 < change.mean() < change.max() < 0.1
    agreeing, of = map(int, re.search(r"same top-1 +(\d+) of (\d+) as in float32", out).groups())
    assert (agreeing / of, of) == (said["measured"]["top1_agreement"], 15)
    assert "of the 10 in folders of its classes" in out


def test_the_file(network, folder, run, tmp_path):
    """Every kernel has eight bits and a scale a feature; images are uint8 as before, in any number."""
    path, output = network(name="xception", width=0.1, middle_repeats=1), tmp_path / "n.onnx"
    assert run(path, "--format", "onnx", "--output", output, "--int8", folder(16))[0] == 0
    model = onnx.load(output)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    convolutions = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(convolutions) == 74 - 7 * 6 + 1
    for node in convolutions:
        image, kernel = (makers[name] for name in node.input[:2])
        assert (image.op_type, kernel.op_type) == ("DequantizeLinear", "DequantizeLinear")
        weights, scales = (arrays[name] for name in kernel.input[:2])
        assert (weights.dtype, scales.shape) == (np.int8, (len(weights),))
        assert arrays[image.input[2]].dtype == np.uint8
    (given,) = model.graph.input
    assert given.type.tensor_type.elem_type == TensorProto.UINT8
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 71, 71, 3]
    inside = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert inside == json.loads((tmp_path / "n.onnx.json").read_text())
    assert inside["quantized"]["measured"]["images"] == 8
    assert inside["verified_float32"]["images"] == 8
    assert "verified" not in inside  # which is what was measured of a file itself
    assert inside["quantized"]["scheme"] == "static, QDQ, per channel; activations uint8, weights int8"
    assert inside["versions"]["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize("name", ["hidden layers, elu", "pre-activation", "dense Inception", "towers", "lenet"])
def test_other_operations(network, folder, run, tmp_path, name):
    """Logits are almost those in float32: measured correlations are 0.985 to 0.9998."""
    fields = NETWORKS[name]
    path, photos = network(**fields), folder(16)
    files = [tmp_path / "float32.onnx", tmp_path / "int8.onnx"]
    for file, more in zip(files, [(), ("--int8", photos)], strict=True):
        code, _, err = run(path, "--format", "onnx", "--outputs", "logits", "--output", file, "--no-verify", *more)
        assert code == 0, err
    images = prepared(path, images_of(photos)[1])
    expected, found = (call(file, images) for file in files)
    assert 0.98 < np.corrcoef(found.ravel(), expected.ravel())[0, 1] < 1
    np.testing.assert_allclose(call(files[1], images[:1]), found[:1], atol=1e-5)


def test_few_images_are_measured_too(network, folder, run, tmp_path):
    code, out, _ = run(network(**LENET), "--format", "onnx", "--output", tmp_path / "n.onnx", "--int8", folder(5))
    assert code == 0
    assert "calibrated on 5 images, measured on the same, as there are few" in out
    assert json.loads((tmp_path / "n.onnx.json").read_text())["quantized"]["measured"]["held_out"] is False


def test_many_images_are_taken_evenly(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}.jpg").touch()
    calibrated, measured = images_of(tmp_path)
    assert (len(calibrated), len(measured), len({*calibrated, *measured})) == (MAX_CALIBRATED, 150, 128 + 150)
    assert (calibrated[0].stem, calibrated[-1].stem, measured[0].stem, measured[-1].stem) == (
        "000",
        "298",
        "001",
        "299",
    )


def test_one_logit(network, folder, run, tmp_path):
    """Its top-1 is the side of 1/2; nothing is labelled, as its folders are not 'no' and 'yes'."""
    path = network(num_classes=1, activation="sigmoid", **LENET)
    code, out, err = run(path, "--format", "onnx", "--output", tmp_path / "n.onnx", "--int8", folder(16))
    assert code == 0, err
    assert "8 of 8 as in float32" in out
    assert "accuracy" not in out


def test_mistakes(network, folder, run, tmp_path, monkeypatch):
    path, photos, output = network(**LENET), folder(16), tmp_path / "n.onnx"
    (tmp_path / "empty").mkdir()
    onnx_file = [path, "--format", "onnx", "--output", output]
    for arguments, message in [
        ([path, "--format", "stablehlo", "--output", tmp_path / "n.stablehlo", "--int8", photos], "--int8 is of onnx"),
        ([*onnx_file, "--int8", photos, "--outputs", "features"], "give --outputs probabilities or logits"),
        ([*onnx_file, "--int8", tmp_path / "none"], "--int8 .*none is no folder"),
        ([*onnx_file, "--int8", tmp_path / "empty"], "--int8 .*empty has no image"),
    ]:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert re.search(message, err), err
    (photos / "class 0" / "004.png").write_bytes(b"no image")
    code, out, err = run(*onnx_file, "--int8", photos)
    assert (code, out) == (2, "")
    assert re.search(r"error: .*004.png: .*", err)
    monkeypatch.setattr(writing.quantizing, "LIBRARIES", ("onnx", "no_such_runtime"))
    code, _, err = run(*onnx_file, "--int8", photos)
    assert (code, err) == (2, "error: --int8 needs no_such_runtime: pip install 'xception_flax[onnx]'\n")
    assert not list(tmp_path.glob("n.*"))
