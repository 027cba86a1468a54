"""The benchmark for GPUs runs completely on a CPU, at tiny shapes; times are never asserted."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import environments
import train
from benchmarks import gpu, gpu_contenders

ROOT = Path(__file__).parent.parent


def test_a_dry_run(tmp_path):
    """Everything but torch, which is not installed: its row says so. Nor is any library that it does not need."""
    file, lowerings = tmp_path / "gpu.json", gpu_contenders.timed_lowerings()
    ours = ["xception_flax_platform", "xception_flax_stock", "plain_linen"]
    names = ["correctness", "operations", *ours, "timm"]
    call = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "30"]
    call += ["--only", ",".join(names), "--json", str(file)]
    environments.restrict(tmp_path, ["jax", "jaxlib", "flax", "optax"])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

    record = json.loads(file.read_text())
    compared = record["correctness"]
    assert {r["lowering"] for r in compared} == set(lowerings)
    for r in compared:
        assert r["same"]
        assert set(r["errors"]) == set(gpu_contenders.PARTS[: 2 if r["case"].startswith("max_pool") else 3])
        # Measured: 2.2e-6 in float32, 2.4e-3 in bfloat16, 8.7e-3 where a CPU sums in bfloat16 (a product, jax 0.11.2).
        assert max(r["errors"].values()) < (1e-5 if r["dtype"] == "float32" else 1e-2)
    kinds = {r["case"].split()[0].rstrip(",") for r in compared}
    assert kinds == {"network", "depthwise_convolution", "pointwise_convolution", "convolution", "max_pool"}

    assert all(value > 0 for value in record["ceilings"].values())
    timed = [(r["part"], r["lowering"]) for r in record["operations"] if r["gb_per_second"] > 0]
    assert set(timed) == {(part, lowering) for part in gpu_contenders.PARTS for lowering in lowerings}

    rows = {(row["contender"], row["mode"]): row for row in record["rows"]}
    measured = {(name, mode) for name in ours for mode in ("train", "forward")}
    fed = ("xception_flax_platform", gpu_contenders.FED)
    assert set(rows) == measured | {fed, ("timm", "train"), ("timm", "forward")}
    for key in (*measured, fed):
        row = rows[key]
        assert row["batch"] == 2
        assert row["images_per_second"] == pytest.approx(2 / sorted(row["lap_seconds"])[2])
        assert row["first_seconds"] > 0
        assert row["library"].startswith("jax ")
    assert rows[fed]["batch_bytes"] == 2 * (64 * 64 * 3 + 4)  # uint8 images, int32 labels
    assert rows[fed]["put_seconds"] > 0
    assert {(profile["contender"], profile["mode"]) for profile in record["profiles"]} == measured
    assert all(len(profile["longest"]) == 10 for profile in record["profiles"])
    for mode in ("train", "forward"):
        assert "not installed: ModuleNotFoundError: No module named 'timm'" in rows["timm", mode]["failure"]
    assert "| timm | not installed: " in result.stdout
    assert f"| {gpu_contenders.FED}, 2 images | images/s |" in result.stdout


def test_batches_are_moved_as_train_py_moves_them():
    """Which cannot be imported where only JAX, Flax and Optax are."""
    assert gpu_contenders.STEPS_IN_FLIGHT == train.MAX_STEPS_IN_FLIGHT


@pytest.fixture
def options():
    return gpu.parser().parse_args(["--dry-run"])


def results(options, lowering):
    found = gpu.Results(None, options)
    record = {"kind": "correctness", "case": "x", "dtype": "float32", "lowering": lowering, "same": False}
    found.add(gpu_contenders.Job("correctness"), record | {"errors": {"value": float("inf")}, "limits": [1e-5]})
    return found


def test_a_wrong_lowering_is_not_timed(options, capsys):
    found = results(options, "stock")
    gpu.measure([gpu_contenders.Job("xception_flax_stock", "train", 2)], found, time.monotonic() + 600, dry_run=True)
    assert found.all["rows"][0]["failure"] == "not timed: it does not compute the same"
    assert found.failed()
    assert "stock: inf NOT THE SAME" in capsys.readouterr().out


def test_no_time_left_has_a_row(options):
    found = gpu.Results(None, options)
    gpu.measure([gpu_contenders.Job("plain_linen", "train", 2)], found, 0.0, dry_run=True)
    assert found.all["rows"] == [
        dict(contender="plain_linen", mode="train", batch=2, failure="left out: no time left", skipped=True)
    ]
    assert not found.failed()


def test_a_contender_that_fails_has_a_row_with_its_message(options, tmp_path):
    """It fails because 8 px are too few for the network."""
    found = gpu.Results(tmp_path / "gpu.json", options)
    jobs = [gpu_contenders.Job("xception_flax_stock", "forward", 2, size=8, tiny=True)]
    gpu.measure(jobs, found, time.monotonic() + 600, dry_run=True)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["failure"].startswith("UserError: ")
    assert found.failed()


def test_the_most_valuable_comes_first(options):
    options.dry_run = False
    jobs = gpu.jobs(["correctness", "operations", "plain_linen", "timm"], [128, 1], options)
    assert [(job.subject, job.mode, job.batch) for job in jobs] == [
        ("correctness", "", 8),
        ("plain_linen", "train", 128),
        ("timm", "train", 128),
        ("operations", "", 128),
        ("plain_linen", "forward", 128),
        ("timm", "forward", 128),
        ("plain_linen", "forward", 1),
        ("timm", "forward", 1),
        ("plain_linen", "train", 1),
        ("timm", "train", 1),
    ]


def test_kernels_are_added_up_by_name_and_by_kind():
    kernels = [("loop_fusion_1", 1.0), ("loop_fusion_2", 2.0), ("loop_fusion_1", 3.0), ("gemm", 4.0)]
    assert gpu_contenders.longest(kernels, steps=2) == {
        "kernel_ms": 5.0,
        "longest": [("loop_fusion_1", 2.0), ("gemm", 2.0), ("loop_fusion_2", 1.0)],
        "kinds": [("loop_fusion", 3.0), ("gemm", 2.0)],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only timm_compiled", "unknown name 'timm_compiled'; did you mean 'timm_compile'?"),
        ("--batch 0", "--batch takes numbers of images"),
        ("--json /nowhere/gpu.json", "--json: there is no folder /nowhere"),
    ],
)
def test_mistakes(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
