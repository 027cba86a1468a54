"""Steps compiled by XLA for CUDA, without a GPU: `make test-gpu`.

The network is narrow and its images small, since the whole takes minutes. What is asserted holds for the whole too:
which kernels and collectives there are, and what they add up.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from xception_flax import create_model
from xception_flax.models import costs, ops
from xception_flax.planning import gpus, machines
from xception_flax.planning import report as reporting
from xception_flax.planning.hlo import Collective, Hlo
from xception_flax.recipes import reading
from xception_flax.training import sharding

ROOT = Path(__file__).parent.parent
SMALL = ("model.width=0.25", "model.middle_repeats=1", "data.image_size=96", "batch_size=64")
WHERE = machines.parse_machine("h100:2x2")
TRITON = 'custom_call_target="__gpu$xla.gpu.triton"'


@pytest.fixture(scope="module")
def config() -> ConfigDict:
    return reading.load(str(ROOT / "configs" / "imagenet.py"), [f"--config.{text}" for text in SMALL])


@pytest.fixture(scope="module")
def report(config: ConfigDict) -> reporting.Report:
    compiled = reporting.compile_step(config, WHERE.devices(), 1_281_167, WHERE.compiler_options)
    return reporting.create_report(compiled, config, WHERE)


@pytest.fixture(scope="module")
def layers(config: ConfigDict) -> list[costs.Layer]:
    return costs.list_layers(create_model(**config.model), (96, 96, 3))


def test_report_adds_up(report: reporting.Report, layers: list[costs.Layer]) -> None:
    # Parameters, momentum and averages, float32, and twice the moving statistics; nothing is padded.
    parameters = sum(layer.parameters for layer in layers)
    assert 3 * 4 * parameters < report.state < 1.05 * 3 * 4 * parameters
    assert report.state < report.memory < 2**30
    assert (report.flops, report.xla_size) == (None, None)  # a program that no GPU has has no cost analysis
    assert all(report.kinds[kind].size > 0 for kind in (*reporting.KINDS.values(), reporting.UPDATE))
    # The chains of layers are told apart: what is left between layers is residuals and pooling.
    assert report.kinds[reporting.BETWEEN].size < 0.15 * sum(cost.size for cost in report.kinds.values())


def test_kernels_are_those_of_the_lowering_for_gpus(report: reporting.Report, layers: list[costs.Layer]) -> None:
    """Each depthwise convolution is one of Triton each way: the lowering follows the devices that are compiled for."""
    depthwise = sum(layer.module == "DepthwiseConv" for layer in layers)
    assert report.kernels["depthwise kernel"] == 2 * depthwise
    # Pointwise convolutions and the classifier three times; the first convolution forward. cuDNN has its gradient, and
    # the second convolution three times.
    products = sum(layer.module in ("PointwiseConv", "Dense") for layer in layers)
    assert 0.9 * 3 * products < report.kernels["matrix product"] <= 3 * products + 1
    assert report.kernels["cuDNN convolution"] == 4


def test_gpus_add_up_gradients_and_statistics_and_nothing_else(
    report: reporting.Report, layers: list[costs.Layer]
) -> None:
    parameters = sum(layer.parameters for layer in layers)
    assert {c.kind for c in report.collectives} == {"all-reduce", "all-gather"}
    assert 2 * parameters < sum(c.times * c.size for c in report.collectives) < 4.2 * parameters
    # Moments are gathered and then added up, two arrays of a row a GPU.
    gathered = [c for c in report.collectives if c.kind == "all-gather"]
    channels = max(layer.shape[-1] for layer in layers if layer.module == "BatchNorm")
    assert max(c.size for c in gathered) == 2 * 4 * WHERE.num_chips * channels


@pytest.mark.parametrize("name", list(gpus.GPUS))
def test_kernels_compile_for_every_gpu_and_save_bytes(name: str) -> None:
    """The separable convolution of the middle flow in training, 128 images: 0.7 of the bytes of XLA's operations."""
    where = machines.parse_machine(name)
    mesh = sharding.create_mesh(devices=where.devices())
    whole, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shapes = (128, 19, 19, 728), (728,), (728,), (3, 3, 1, 728), (1, 1, 728, 728)
    dtypes = jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16
    arrays = [jax.ShapeDtypeStruct(*described) for described in zip(shapes, dtypes, strict=True)]

    def gradients(images, *weights):
        result, pullback = jax.vjp(ops.normalized_separable_convolution, images, *weights)
        return result, pullback(result)

    programs = {}
    for lowering in ("platform", "stock"):
        with ops.lowering(lowering), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            step = jax.jit(lambda *arguments: gradients(*arguments), in_shardings=(batch, *[whole] * 4))
            programs[lowering] = step.lower(*arrays).compile(where.compiler_options).as_text()
    assert {lowering: text.count(TRITON) for lowering, text in programs.items()} == {"platform": 2, "stock": 0}
    size = {lowering: sum(part.size for part in Hlo(text).traffic()) for lowering, text in programs.items()}
    assert size["platform"] < 0.75 * size["stock"]


def test_collectives_of_several_hosts() -> None:
    mesh = sharding.create_mesh(data=1, fsdp=4, devices=WHERE.devices())
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=split)
    step = jax.jit(lambda x, w: jax.lax.with_sharding_constraint(x.T @ w, split), out_shardings=split)
    compiled = step.lower(matrix, matrix).compile(WHERE.compiler_options)
    # Each GPU has a product of its rows, 4 MiB; the sum is scattered.
    assert Hlo(compiled.as_text()).collectives() == [Collective("reduce-scatter", 4 * 2**20, 1)]
    gather = jax.jit(lambda x: x + 1, out_shardings=sharding.replicated(mesh))
    compiled = gather.lower(matrix).compile(WHERE.compiler_options)
    assert Hlo(compiled.as_text()).collectives() == [Collective("all-gather", 4 * 2**20, 1)]


@pytest.mark.parametrize(("topology", "batch", "code"), [("h100", 256, 0), ("l4:4", 400_000, 1)])
def test_command(topology: str, batch: int, code: int) -> None:
    command = [sys.executable, "-m", "xception_flax", "precompile", "--config", "configs/digits.py:lenet"]
    command += ["--topology", topology, f"--config.batch_size={batch}", "--num-images=1000000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"] == (result["memory_bytes"] <= result["usable_bytes"]) == (code == 0)
    assert result["chips"] == machines.parse_machine(topology).num_chips
    # XLA prints nothing about a missing GPU.
    assert [line for line in done.stderr.splitlines() if not line.startswith("compiling")] == []
