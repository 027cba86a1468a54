"""`precompile` on CPUs; tests_tpu/ and tests_gpu/ have the tests that need the compilers of TPUs and GPUs."""

import importlib.metadata
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from xception_flax import create_model
from xception_flax.commands import precompile
from xception_flax.models import costs
from xception_flax.planning import gpus, tpus
from xception_flax.planning import report as reporting
from xception_flax.recipes import reading
from xception_flax.text.errors import UserError

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")
LENET = ["--config", f"{DIGITS}:lenet", "--topology", "v5e:2x4"]


@pytest.fixture
def cpus_for_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU devices stand for chips, and neither libtpu nor CUDA is needed."""
    for machine in (tpus.Slice, gpus.Hosts):
        monkeypatch.setattr(machine, "devices", lambda where: jax.devices()[: where.num_chips])
    monkeypatch.setattr(gpus.Hosts, "compiler_options", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")


def test_command(cpus_for_chips: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert precompile.main([*LENET, "--num-images", "1257"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert "lenet on v5e:2x4, 8 chips" in out
    assert "64, 8 images a chip" in out
    assert "compiling for v5e:2x4" in err
    assert (result["chips"], result["batch_size"], result["fits"]) == (8, 64, True)
    assert result["steps"] == round(36 * 1257 / 64)
    # Six times the multiply-adds of eight images.
    model = reading.load(f"{DIGITS}:lenet").model
    macs = sum(layer.macs for layer in costs.list_layers(create_model(**model), (48, 48, 1)))
    assert result["network_flops"] == 6 * macs * 8
    # The chips must sum at least the gradient: 74,010 float32.
    assert set(result["collectives"]) == {"all-reduce"}
    assert 74_010 * 4 <= result["collectives"]["all-reduce"]["bytes"] < 1.01 * 74_010 * 4
    kinds = result["kinds"]
    assert list(kinds) == ["regular conv.", "classifier", "between layers", "input, loss", "optimizer"]
    assert result["hbm_bytes"] == sum(kind["bytes"] for kind in kinds.values())
    assert result["step_seconds"] == pytest.approx(
        sum(kind["seconds"] for kind in kinds.values()) + result["collective_seconds"]
    )
    assert result["images_per_second_per_chip"] == pytest.approx(8 / result["step_seconds"])
    assert result["hours"] == pytest.approx(result["steps"] * result["step_seconds"] / 3600)
    # AdamW and averages: each of four arrays read and written, the gradient read.
    assert kinds["optimizer"]["bytes"] >= 9 * 74_010 * 4


def test_gpus(cpus_for_chips: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert precompile.main([*LENET[:-1], "h100:2x4", "--num-images", "1257"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "lenet on h100:2x4, 8 GPUs" in out
    assert "64, 8 images a GPU" in out
    assert "a GPU, of 59.33 GiB: fits" in out  # three quarters of 79.11
    assert "what autotuning chooses on a GPU" in out
    # What runs on a CPU is no kernel of a GPU, but each instruction that moves data is counted once.
    assert sum(result["kernels"].values()) > 10
    assert result["jax-cuda13-pjrt"] == "1.2.3"
    # The recipe computes in float32: TF32 on the GPU's tensor cores.
    assert re.search(r"peak +494\.7 TFLOP/s, in float32$", out, re.MULTILINE)


def test_a_peak_that_is_not_known_is_said(cpus_for_chips: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert precompile.main([*LENET[:-1], "b200", "--num-images", "1257"]) == 0
    expected = "2,250.0 TFLOP/s, in bfloat16, since the GPU's in float32 is not known"
    assert expected in capsys.readouterr().out


def test_what_does_not_fit_a_gpu_is_compiled_all_the_same(
    cpus_for_chips: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpus.GPUS, "h100", gpus.GPUS["h100"]._replace(memory_bytes=2**20))
    assert precompile.main([*LENET[:-1], "h100:8", "--num-images", "1257"]) == 1
    out = capsys.readouterr().out
    assert "GiB: DOES NOT FIT" in out
    assert json.loads(out.splitlines()[-1])["memory_bytes"] > 0.75 * 2**20


def test_length_is_left_open_where_the_data_is_unknown(
    cpus_for_chips: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precompile.main(LENET) == 0
    out = capsys.readouterr().out
    assert "its length needs --num-images" in out
    assert '"steps"' not in out


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.50G) exceeds "
        "available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G.",
    ],
)
def test_what_does_not_fit_is_said(
    message: str, cpus_for_chips: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: None) -> None:
        raise jax.errors.JaxRuntimeError(message)

    step = SimpleNamespace(lower=lambda *shapes: SimpleNamespace(compile=fail))
    monkeypatch.setattr(
        reporting, "create_program", lambda *args: SimpleNamespace(train_step=step, abstract_state=None)
    )
    assert precompile.main(LENET) == 1
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "17.50 GiB a chip, of 15.75 GiB: DOES NOT FIT" in out
    assert (result["fits"], result["memory_bytes"]) == (False, int(17.5 * 2**30))
    assert "step_seconds" not in result


def test_other_errors_of_the_compiler_are_not_hidden(
    cpus_for_chips: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: None) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 32.77M of 16.00M vmem.")

    step = SimpleNamespace(lower=lambda *shapes: SimpleNamespace(compile=fail))
    monkeypatch.setattr(
        reporting, "create_program", lambda *args: SimpleNamespace(train_step=step, abstract_state=None)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        precompile.main(LENET)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v9:2x2"], "unknown TPU or GPU 'v9'"),
        (["--config.batch_size=60"], "batch_size=60 does not divide over 8 devices"),
        (["--config.step.lowering=fused"], "'fused' has kernels for TPU v5 lite, .* only, and this is a cpu"),
        (["--config.mesh.fsdp=3"], "must cover the 8 devices"),
        (["--config.model.depth=3"], "unknown recipe key 'model.depth'"),
        (["--num-images", "0"], "must be a positive integer"),
    ],
)
def test_mistakes(arguments: list[str], words: str, cpus_for_chips: None) -> None:
    with pytest.raises(UserError, match=words):
        precompile.main([*LENET, *arguments])
