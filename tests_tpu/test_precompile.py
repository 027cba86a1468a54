"""Steps compiled by the TPU's own compiler (libtpu): `make test-tpu`.

Networks are narrow and images small, since a whole network takes minutes. What is asserted holds for the
whole too: which collectives there are and what they add up, how the depthwise convolution is lowered, and
that the report adds up to what the compiler counts.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from xception_flax import create_model
from xception_flax.models import costs, ops
from xception_flax.planning import report as reporting
from xception_flax.planning import tpus
from xception_flax.planning.hlo import Hlo
from xception_flax.recipes import reading

ROOT = Path(__file__).parent.parent
IMAGENET = str(ROOT / "configs" / "imagenet.py")
SMALL = ("model.width=0.25", "model.middle_repeats=1", "data.image_size=96", "batch_size=128")
WHERE = tpus.parse_slice("v5e:2x4")


def load(*overrides: str) -> ConfigDict:
    return reading.load(IMAGENET, [f"--config.{text}" for text in overrides])


def compile_for(config: ConfigDict) -> jax.stages.Compiled:
    return reporting.compile_step(config, WHERE.devices(), 1_281_167)


@pytest.fixture(scope="module")
def config() -> ConfigDict:
    return load(*SMALL)


@pytest.fixture(scope="module")
def compiled(config: ConfigDict) -> jax.stages.Compiled:
    return compile_for(config)


@pytest.fixture(scope="module")
def layers(config: ConfigDict) -> list[costs.Layer]:
    return costs.list_layers(create_model(**config.model), (96, 96, 3))


@pytest.fixture(scope="module")
def parameters(layers: list[costs.Layer]) -> int:
    return sum(layer.parameters for layer in layers)


def test_report_adds_up(compiled: jax.stages.Compiled, config: ConfigDict, parameters: int) -> None:
    report = reporting.create_report(compiled, config, WHERE)
    # Parameters, momentum and averages, float32, and twice the moving statistics; tiles pad short rows.
    assert 3 * 4 * parameters < report.state < 1.2 * 3 * 4 * parameters
    assert report.state < report.memory < 1 * 2**30
    # The compiler counts the network's arithmetic, except at the borders of images, and all other arithmetic.
    network = sum(cost.flops for cost in report.kinds.values())
    assert network == pytest.approx(report.flops, rel=0.15)
    # The sum is what the compiler counts; those of HBM alone are fewer.
    assert sum(cost.size for cost in Hlo(compiled.as_text()).traffic()) == pytest.approx(report.xla_size, rel=0.2)
    assert sum(cost.size for cost in report.kinds.values()) < report.xla_size
    assert all(report.kinds[kind].size > 0 for kind in (*reporting.KINDS.values(), reporting.UPDATE))


def test_chips_add_up_gradients_and_statistics_and_nothing_else(
    compiled: jax.stages.Compiled, layers: list[costs.Layer], parameters: int
) -> None:
    collectives = Hlo(compiled.as_text()).collectives()
    assert {c.kind for c in collectives} == {"all-reduce"}
    # Gradients of kernels are added up in bfloat16, as they are computed; all else is float32, and little.
    assert 2 * parameters < sum(c.times * c.size for c in collectives) < 4.2 * parameters
    # Nearly all belong to a batch norm: mean and variance forward, two sums backward.
    norms = sum(layer.module == "BatchNorm" for layer in layers)
    assert 1.5 * norms < sum(c.times for c in collectives) < 2.5 * norms


def test_depthwise_convolution_is_a_grouped_one(compiled: jax.stages.Compiled) -> None:
    text = compiled.as_text()
    depthwise = [line for line in text.splitlines() if " convolution(" in line and "/depthwise/" in line]
    assert depthwise
    # Forward and the gradient of the input by groups of channels, that of the kernel by groups of the batch.
    assert all("feature_group_count=" in line or "batch_group_count=" in line for line in depthwise)


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_fused_kernels_compile_and_save_bytes(topology: str) -> None:
    """The separable convolution of the middle flow in training, 128 images: one kernel each way, 0.27 of the bytes."""
    mesh = Mesh(np.array(tpus.parse_slice(topology).devices()).reshape(1, 1), ("data", "fsdp"))
    any_layout = Format(Layout.AUTO, NamedSharding(mesh, PartitionSpec()))
    array = jax.ShapeDtypeStruct

    images = array((128, 19, 19, 728), jnp.bfloat16)
    scale, moments = array((728,), jnp.float32), array((2, 728), jnp.float32)
    kernels = array((3, 3, 1, 728), jnp.bfloat16), array((1, 1, 728, 728), jnp.bfloat16)

    def gradients(primals: tuple, cotangents: tuple) -> tuple:
        result, pullback = jax.vjp(ops.normalized_separable_convolution, *primals)
        return result, pullback(cotangents)

    programs = {}
    for name in ("platform", "fused"):
        with ops.lowering(name), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # XLA chooses the layouts of the arguments, as it does inside a network.
            step = jax.jit(lambda *arguments: gradients(*arguments), in_shardings=any_layout, out_shardings=any_layout)
            programs[name] = step.lower((images, scale, scale, *kernels), (images, moments)).compile()
    calls = {name: program.as_text().count("tpu_custom_call") for name, program in programs.items()}
    assert calls == {"platform": 0, "fused": 2}
    size = {name: program.cost_analysis()["bytes accessed"] for name, program in programs.items()}
    assert size["fused"] < 0.5 * size["platform"]


def test_fsdp_gathers_and_scatters(parameters: int) -> None:
    changed = load(*SMALL, "mesh.data=1", "mesh.fsdp=8")
    compiled = compile_for(changed)
    kinds = {c.kind for c in Hlo(compiled.as_text()).collectives()}
    assert "all-gather" in kinds
    report = reporting.create_report(compiled, changed, WHERE)
    assert report.state < 0.5 * 3 * 4 * parameters  # the large arrays are split by eight


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:16x16"])
def test_command(topology: str) -> None:
    command = [sys.executable, "-m", "xception_flax", "precompile", "--config", "configs/digits.py:lenet"]
    command += ["--topology", topology, "--config.batch_size=256", "--num-images=1257"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["chips"], result["steps"]) == (tpus.parse_slice(topology).num_chips, round(36 * 1257 / 256))
    assert bool(result["collectives"]) == (result["chips"] > 1)
    # libtpu prints nothing about missing hardware.
    assert [line for line in done.stderr.splitlines() if not line.startswith("compiling")] == []


@pytest.mark.parametrize("name", list(tpus.CHIPS))
def test_memory_is_as_libtpu_has_it(name: str) -> None:
    where = tpus.parse_slice(f"{name}:{tpus.CHIPS[name].shapes[-1]}")
    device = where.devices()[0]
    huge = jax.ShapeDtypeStruct((2**38,), jax.numpy.uint8, sharding=jax.sharding.SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"available HBM \\({where.chip.usable_bytes / 2**30:.2f}G\\)"):
        jax.jit(lambda x: x + 1).lower(huge).compile()


def test_a_batch_that_does_not_fit() -> None:
    command = [sys.executable, "-m", "xception_flax", "precompile", "--config", "configs/digits.py:lenet"]
    command += [
        "--topology=v5e:2x2",
        "--config.data.image_size=256",
        "--config.batch_size=32768",
        "--find-largest-batch",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["memory_bytes"] > result["usable_bytes"]
    assert 0 < result["largest_batch"] < result["too_large_batch"] < 32768
