"""Hosts with GPUs: their names, links and figures, and the message without XLA for CUDA."""

import importlib.metadata
import importlib.util
import re

import pytest

from xception_flax.planning import gpus
from xception_flax.text.errors import UserError


@pytest.mark.parametrize(
    ("name", "hosts", "each"),
    [
        ("h100", 1, 1),
        ("h100:1", 1, 1),
        ("h100:8", 1, 8),
        ("h100:2x8", 2, 8),
        ("l4:16x1", 16, 1),
        ("b200:999x8", 999, 8),
    ],
)
def test_hosts(name: str, hosts: int, each: int) -> None:
    where = gpus.parse_hosts(name)
    assert (where.num_hosts, where.gpus_a_host, where.num_chips) == (hosts, each, hosts * each)


@pytest.mark.parametrize("shape", [":", ":0", ":9", ":16", ":0x8", ":2x", ":x8", ":1000x8", ":2x2x8", ":+8", ":\u0668"])
def test_no_hosts(shape: str) -> None:
    with pytest.raises(UserError, match=r"1 to 8 GPUs: h100:8 is one of eight, h100:2x8 two of them .*, h100 one GPU."):
        gpus.parse_hosts(f"h100{shape}")


def test_figures_are_as_specified() -> None:
    # GB of memory, its GB/s, dense TFLOP/s in bfloat16, GB/s of all NVLinks (or PCIe) both ways, by NVIDIA's data
    # sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 and L4; Gbit/s of a GPU's network card in a DGX.
    specified = {
        "a100": (80, 2039, 312, 600, 200),
        "h100": (80, 3350, 989.4, 900, 400),
        "h200": (141, 4800, 989.4, 900, 400),
        "b200": (180, 7700, 2250, 1800, 400),
        "l4": (24, 300, 121, 64, 100 / 8),
    }
    assert set(gpus.GPUS) == set(specified)
    for name, (memory, bandwidth, teraflops, link, network) in specified.items():
        gpu = gpus.GPUS[name]
        assert gpu.memory_bytes / 1e9 == pytest.approx(memory, rel=0.08), name
        assert gpu.usable_bytes == int(0.75 * gpu.memory_bytes)
        assert gpu.hbm_bytes_per_second == pytest.approx(bandwidth * 1e9, rel=0.005), name
        assert gpu.peaks["bfloat16"] == teraflops * 1e12
        assert 2 * gpu.link_bytes_per_second == link * 1e9
        assert 8 * gpu.network_bytes_per_second == network * 1e9
        assert gpu.nvlink == (link > 100)
        # Triton's kernels are for these, `models.ops.lowerings`.
        assert gpu.compute_capability >= (8, 0)


def test_collectives_by_hand() -> None:
    host = gpus.parse_hosts("h100:8")
    # Seven eighths of 360 MB at 450 GB/s are 0.7 ms; 6.8 us to start, and seven steps of 0.6 us.
    assert host.collective_seconds("all-gather", 360_000_000) == pytest.approx(0.7e-3 + 6.8e-6 + 4.2e-6)
    assert host.collective_seconds("all-reduce", 360_000_000) == pytest.approx(2 * 0.7e-3 + 6.8e-6 + 8.4e-6)
    assert host.collective_seconds("all-reduce", 4) == pytest.approx(15.2e-6, rel=1e-3)
    # Over four hosts three quarters of an eighth, 33.75 MB, at 50 GB/s are 0.675 ms, less than within a host;
    # of hosts with one GPU three quarters of all. A tree of four has two levels of 5 us.
    assert gpus.parse_hosts("h100:4x8").collective_seconds("all-gather", 360_000_000) == pytest.approx(
        0.7e-3 + 6.8e-6 + 4.2e-6 + 10e-6
    )
    assert gpus.parse_hosts("h100:4x1").collective_seconds("all-gather", 360_000_000) == pytest.approx(
        5.4e-3 + 6.8e-6 + 10e-6
    )
    # By PCIe: half of 64 MB at 32 GB/s, one step of 1 us.
    assert gpus.parse_hosts("l4:2").collective_seconds("all-gather", 64_000_000) == pytest.approx(1e-3 + 7.8e-6)
    assert gpus.parse_hosts("h100").collective_seconds("all-reduce", 10**9) == 0


def test_the_description_for_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"nvidia-cuda-runtime": "13.5.37", "nvidia-cudnn-cu13": "9.28.1.4"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    text = gpus.target_config(gpus.GPUS["l4"])
    fields = dict(re.findall(r"(\w+): ([\d.]+)$", text, re.MULTILINE))
    # As deviceQuery and the CUDA C++ Programming Guide (compute capability 8.9) have them.
    assert fields["core_count"] == "58"
    assert fields["shared_memory_per_core"] == str(100 * 1024)
    assert fields["shared_memory_per_block_optin"] == str(99 * 1024)
    assert fields["memory_bandwidth"] == "300000000000"
    assert "cuda_compute_capability { major: 8 minor: 9 }" in text
    assert "dnn_version_info { major: 9 minor: 28 patch: 1 }" in text
    assert "runtime_version { major: 13 minor: 5 patch: 37 }" in text
    assert text.count("{") == text.count("}")


def test_missing_cuda_is_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs XLA for CUDA") as caught:
        gpus.parse_hosts("h100:8").devices()
    assert str(caught.value).splitlines()[1:] == ["pip install -e '.[cuda]'"]


def test_a_plugin_that_does_not_load_is_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX itself then has no platform 'cuda', as here, where there is no plugin."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpus, "target_config", lambda chip: "")  # it names the libraries that are installed
    with pytest.raises(UserError, match="is installed but cannot be loaded") as caught:
        gpus.parse_hosts("h100:8").devices()
    assert str(caught.value).splitlines()[1:] == ["pip install --force-reinstall 'jax[cuda13]'"]
