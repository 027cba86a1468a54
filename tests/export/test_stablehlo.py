"""StableHLO: what JAX alone computes from the file is what `predict` computes, and mistakes are a line each."""

import errno
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from jax import export as jax_export

import shell
from tests.weights.test_writing import random_network
from xception_flax.commands import export
from xception_flax.export import program, stablehlo, verifying, writing
from xception_flax.host import files as host_files
from xception_flax.inference import predictor
from xception_flax.weights import writing as weights_writing

NETWORKS = {
    "xception": dict(name="xception", width=0.02, middle_repeats=1),
    "pre-activation": dict(name="xception41p", width=0.03),
    "lenet": dict(name="lenet", width=0.2),
    "bfloat16": dict(name="xception", width=0.02, middle_repeats=1, dtype="bfloat16"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Files of small networks, four classes each."""
    folder = tmp_path_factory.mktemp("networks")
    for name, fields in NETWORKS.items():
        network = random_network(num_classes=4, **fields)._replace(transforms="resize")
        weights_writing.write(network, folder / f"{name}.npz")
    headless = random_network(num_classes=0, **NETWORKS["lenet"])
    weights_writing.write(headless._replace(measured={}), folder / "headless.npz")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Of the size that the networks take."""
    return np.random.default_rng(0).integers(0, 256, (3, 71, 71, 3), np.uint8)


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    return shell.call(monkeypatch, capsys, export.main, *arguments)


def call(path: Path, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax_export.deserialize(bytearray(path.read_bytes())).call(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_predict_does(files, images, name, tmp_path, monkeypatch, capsys):
    """For any number of images, on all platforms, without kernels that a later version could not run."""
    output = tmp_path / "n.stablehlo"
    code, out, err = run(monkeypatch, capsys, files[name], "--format", "stablehlo", "--output", output)
    assert (code, re.sub(r"writing .*\n", "", err)) == (0, "")
    assert "by its own runtime on 8 photos" in out
    expected, tolerance = predictor.load(str(files[name])).predict(images), 2e-2 if name == "bfloat16" else 2e-6
    np.testing.assert_allclose(call(output, images), expected, atol=tolerance)
    np.testing.assert_allclose(call(output, images[:1]), expected[:1], atol=tolerance)
    exported = jax_export.deserialize(bytearray(output.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert set(re.findall(r"custom_call @(\w+)", exported.mlir_module())) <= {"shape_assertion"}
    assert json.loads((tmp_path / "n.stablehlo.json").read_text())["output"]["shape"] == ["batch", 4]


@pytest.mark.parametrize("outputs", program.OUTPUTS)
def test_outputs(files, images, outputs, tmp_path, monkeypatch, capsys):
    output, source = tmp_path / "n.stablehlo", files["xception"]
    arguments = [source, "--format", "stablehlo", "--output", output, "--outputs", outputs, "--platforms", "cpu"]
    assert run(monkeypatch, capsys, *arguments, "--no-verify")[0] == 0
    name = {"features": "pooled"}.get(outputs, outputs)
    expected = predictor.load(str(source)).run(images, (name,))[name]
    assert expected.shape == (3, 40 if outputs == "features" else 4)
    np.testing.assert_allclose(call(output, images), expected, rtol=1e-4, atol=1e-5)
    assert jax_export.deserialize(bytearray(output.read_bytes())).platforms == ("cpu",)


def test_any_size(files, tmp_path, monkeypatch, capsys):
    """The network's 71 px and multiples of 32 more, height and width each by itself; other sizes are refused."""
    output = tmp_path / "n.stablehlo"
    arguments = [files["xception"], "--format", "stablehlo", "--output", output, "--outputs", "logits", "--any-size"]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "uint8 [batch, height, width, 3], 0 to 255" in out
    assert json.loads((tmp_path / "n.stablehlo.json").read_text())["input"]["shape"] == ["batch", "height", "width", 3]
    found = predictor.load(str(files["xception"]))
    rng = np.random.default_rng(0)
    for shape in ((2, 71, 71, 3), (1, 103, 135, 3)):
        images = rng.integers(0, 256, shape, np.uint8)
        expected = found.model.apply(found.variables, images / np.float32(255), train=False)  # mean 0, std 255
        np.testing.assert_allclose(call(output, images), expected, atol=1e-5 * np.ptp(expected))
    with pytest.raises(ValueError, match="32"):
        call(output, np.zeros((1, 80, 80, 3), np.uint8))


@pytest.mark.parametrize(("channels", "more"), [(3, []), (4, ["--any-size"])])
def test_images_that_are_not_square(channels, more, tmp_path, monkeypatch, capsys):
    """Height and width are not mixed up, other sizes are multiples of 32 from each, and alpha is a channel."""
    made = random_network(channels, num_classes=4, **NETWORKS["xception"])._replace(
        transforms="resize", image_size=(71, 108)
    )
    weights_writing.write(made, tmp_path / "n.npz")
    output = tmp_path / "n.stablehlo"
    arguments = [tmp_path / "n.npz", "--format", "stablehlo", "--output", output, "--platforms", "cpu", *more]
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    images = np.random.default_rng(0).integers(0, 256, (2, 71, 108, channels), np.uint8)
    expected = predictor.load(str(tmp_path / "n.npz")).predict(images)
    np.testing.assert_allclose(call(output, images), expected, atol=2e-6)
    assert json.loads((tmp_path / "n.stablehlo.json").read_text())["image_size"] == [71, 108]
    larger = np.zeros((1, 103, 140, channels), np.uint8)
    if more:
        assert call(output, larger).shape == (1, 4)
    for wrong in (larger.swapaxes(1, 2), larger[:, :72]) if more else (larger, images.swapaxes(1, 2)):
        with pytest.raises(ValueError, match=r"32|71|108"):
            call(output, wrong)


def test_the_description_is_that_of_the_weights_and_the_file(files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "n.stablehlo"
    assert run(monkeypatch, capsys, files["lenet"], "--format", "stablehlo", "--output", output)[0] == 0
    said = json.loads((tmp_path / "n.stablehlo.json").read_text())
    assert said["class_names"] == [f"class {i}" for i in range(4)]
    assert (said["activation"], said["transforms"], said["image_size"]) == ("sigmoid", "resize", 71)
    assert said["normalize"] == {"mean": [0], "std": [255]}
    assert said["input"]["shape"] == ["batch", 71, 71, 3]
    assert said["origin"]["file"] == "lenet.npz"
    assert len(said["origin"]["sha256"]) == 64
    assert said["measured"]["top1"] == 0.9
    assert said["versions"]["jax"] == jax.__version__
    assert 0 <= said["verified"]["largest_difference"] < 1e-5


def test_a_file_that_computes_something_else_is_not_written(files, tmp_path, monkeypatch, capsys):
    def wrong(exported, path, metadata, options):
        changed = jax.tree.map(lambda array: array * 1.001, dict(exported.variables))
        stablehlo.write(exported._replace(variables=changed), path, metadata, options)

    broken = writing.FORMATS["stablehlo"]._replace(write=wrong)
    monkeypatch.setitem(writing.FORMATS, "stablehlo", broken)
    arguments = [files["xception"], "--format", "stablehlo", "--output", tmp_path / "n.stablehlo"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (1, "")
    assert re.search(
        r"error: .*n.stablehlo was not written: its outputs differ from the network's by \S+ of their", err
    )
    assert list(tmp_path.iterdir()) == []
    no_file = broken._replace(write=lambda exported, path, *_: path.write_bytes(b"no program"))
    monkeypatch.setitem(writing.FORMATS, "stablehlo", no_file)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "its own runtime does not run it" in err
    assert list(tmp_path.iterdir()) == []


def child_of(process: subprocess.Popen) -> Path:
    """Waits until a process has another one; returns the place of that in /proc."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    shell.wait_until(children.read_text, process)
    return Path("/proc", children.read_text().split()[0])


def wait_for_end(process: Path) -> None:
    """Where nobody asks for its code it is a zombie."""
    deadline = time.monotonic() + 10
    while process.exists() and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(files, tmp_path, monkeypatch, number):
    """While the file is run by another process."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    arguments = ["--format", "stablehlo", "--output", tmp_path / "n.stablehlo"]
    process = shell.start("-m", "xception_flax", "export", files["lenet"], *arguments)
    shell.wait_until(lambda: list(tmp_path.glob(".*.partial/n.stablehlo")), process)
    child = child_of(process)
    process.send_signal(number)
    code, _, err = shell.finish(process)
    assert (code, err) == (128 + number, "writing n.stablehlo ...\n\ninterrupted\n")
    wait_for_end(child)
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


def test_the_other_process_ends_with_one_that_is_killed():
    program = "from xception_flax.export import process; process.run('import time; time.sleep(60)')"
    process = shell.start("-c", program)
    child = child_of(process)
    process.kill()
    wait_for_end(child)
    assert shell.finish(process)[0] == -signal.SIGKILL


def test_a_description_is_not_left_alone(files, tmp_path, monkeypatch, capsys):
    """It is written before its file has its name, which may fail."""

    def fail(path: Path) -> None:
        if path.parent.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(host_files, "sync", fail)
    arguments = [files["lenet"], "--format", "stablehlo", "--output", tmp_path / "n.stablehlo", "--no-verify"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.endswith("n.stablehlo cannot be written: Input/output error.\n")
    assert list(tmp_path.iterdir()) == []


def test_ones_own_photos(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(verifying.photos()[:3]):
        PIL.Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.png")
    arguments = ["--format", "stablehlo", "--output", tmp_path / "n.stablehlo", "--images", tmp_path / "photos"]
    code, out, _ = run(monkeypatch, capsys, files["lenet"], *arguments)
    assert code == 0
    assert "on 3 photos" in out


def test_mistakes(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.stablehlo").touch()
    (tmp_path / "empty").mkdir()
    good = {"--format": "stablehlo", "--output": tmp_path / "n.stablehlo"}
    before = sorted(tmp_path.iterdir())
    for changed, message in [
        ({"--format": "stablehol"}, "unknown format 'stablehol'; did you mean 'stablehlo'?"),
        ({"--output": tmp_path / "n.bin"}, "a file of stablehlo must end in '.stablehlo', got '.bin'."),
        ({"--output": tmp_path / "there.stablehlo"}, "is there already; nothing was written."),
        ({"--output": tmp_path / "no" / "n.stablehlo"}, f"{tmp_path / 'no'} is no folder; make it"),
        ({"--outputs": "logit"}, "unknown outputs 'logit'; did you mean 'logits'?"),
        ({"--platforms": "cpu,gpu"}, "unknown platform 'gpu'"),
        ({"--platforms": "tpu"}, "give --platforms cpu too, or --no-verify."),
        ({"--images": tmp_path / "empty"}, "empty has no image (of .jpg"),
        ({"--images": tmp_path / "no"}, f"--images {tmp_path / 'no'} is no folder."),
    ]:
        arguments = [word for pair in (good | changed).items() for word in pair]
        code, out, err = run(monkeypatch, capsys, files["lenet"], *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
    arguments = [word for pair in good.items() for word in pair]
    code, _, err = run(monkeypatch, capsys, files["headless"], *arguments)
    assert code == 2
    assert "this network has no classifier, and so no probabilities; give --outputs features." in err
    monkeypatch.setitem(
        writing.FORMATS, "stablehlo", writing.FORMATS["stablehlo"]._replace(writers=("no_such_module",))
    )
    code, _, err = run(monkeypatch, capsys, files["lenet"], *arguments)
    assert (code, err) == (
        2,
        "error: writing stablehlo needs no_such_module: pip install 'xception_flax[stablehlo]'\n",
    )
    assert sorted(tmp_path.iterdir()) == before
