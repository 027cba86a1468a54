"""Hosts with NVIDIA GPUs, which this machine need not have: the figures of the GPUs, and devices to compile for.

Memory, its bandwidth and the processors are as XLA describes these GPUs (openxla/xla, Apache-2.0:
`xla/backends/gpu/target_config/specs`). Those of the L4, which is not there, are from CUDA's deviceQuery, and its
shared memory from the CUDA C++ Programming Guide (compute capability 8.9). NVLink and PCIe are from NVIDIA's data
sheets. The network is that of NVIDIA's hosts of eight (DGX A100: 200 Gbit/s a GPU; DGX H100, H200 and B200: 400), and
for the L4 that of Google Cloud's g2-standard-96: 100 Gbit/s for eight.
"""

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xception_flax.host.peaks import PEAK_FLOPS_PER_SECOND
from xception_flax.planning.hlo import COLLECTIVES, PASSES, Traffic
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

# JAX takes this share of a GPU's memory at the start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
# (docs.jax.dev, 'GPU memory allocation').
MEMORY_FRACTION = 0.75

# The latency of a small all-reduce by NCCL's own model (NVIDIA/nccl, `src/graph/tuning.cc`: Tree, protocol LL).
START_SECONDS = 6.8e-6
NVLINK_SECONDS = 0.6e-6  # for each other GPU of the host
PCIE_SECONDS = 1e-6
NETWORK_SECONDS = 5e-6  # for each level of the tree of hosts

MAX_GPUS = 8  # of a host
MAX_HOSTS = 999

KERNELS = ("matrix product", "cuDNN convolution", "depthwise kernel", "fusion", "other kernel")


class Gpu(NamedTuple):
    """The figures of a GPU.

    Attributes:
      kind: JAX's name of it.
      memory_bytes: of all its memory (HBM; GDDR6 of the L4), as CUDA counts it.
      hbm_bytes_per_second: reads and writes together.
      link_bytes_per_second: to the other GPUs of the host, in one direction.
      network_bytes_per_second: its share of the host's network, in one direction.
      compute_capability: major, minor.
      cores: multiprocessors (SM).
      fpus: float32 units of a multiprocessor.
      threads: most threads of a multiprocessor.
      shared_bytes: shared memory of a multiprocessor.
      l2_bytes: of the cache that all multiprocessors share.
      clock_ghz: the highest clock.
      nvlink: whether the GPUs of a host are connected by NVLink, not by PCIe alone.
    """

    kind: str
    memory_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    compute_capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared_bytes: int
    l2_bytes: int
    clock_ghz: float
    nvlink: bool = True

    @property
    def usable_bytes(self) -> int:
        """Memory for a program and its arrays."""
        return int(MEMORY_FRACTION * self.memory_bytes)

    @property
    def peaks(self) -> Mapping[str, float]:
        """Of matrix products, by their type; see `host.peaks`."""
        return PEAK_FLOPS_PER_SECOND[self.kind]


_HOPPER = dict(compute_capability=(9, 0), cores=132, fpus=128, threads=2048, shared_bytes=233_472, clock_ghz=1.98)

GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.03904e12, 3e11, 2.5e10, (8, 0), cores=108, fpus=64, threads=2048,
        shared_bytes=167_936, l2_bytes=41_943_040, clock_ghz=1.41,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35232e12, 4.5e11, 5e10, l2_bytes=52_428_800, **_HOPPER
    ),
    "h200": Gpu("NVIDIA H200", 151_397_597_184, 4.8e12, 4.5e11, 5e10, l2_bytes=52_428_800, **_HOPPER),
    "b200": Gpu(
        "NVIDIA B200", 191_514_411_008, 7.67232e12, 9e11, 5e10, (10, 0), cores=148, fpus=128, threads=2048,
        shared_bytes=233_472, l2_bytes=132_644_864, clock_ghz=1.965,
    ),
    "l4": Gpu(
        "NVIDIA L4", 23_612_293_120, 3e11, 3.2e10, 1.5625e9, (8, 9), cores=58, fpus=128, threads=1536,
        shared_bytes=102_400, l2_bytes=50_331_648, clock_ghz=2.04, nvlink=False,
    ),
}  # fmt: skip


class Hosts(NamedTuple):
    """Hosts with the same number of GPUs each.

    Attributes:
      name: 'h100:2x8'.
      chip: the GPU.
      num_hosts: of all.
      gpus_a_host: 1 to `MAX_GPUS`.
    """

    name: str
    chip: Gpu
    num_hosts: int
    gpus_a_host: int

    noun = "GPU"
    libraries = ("jax", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")
    not_known = "what autotuning chooses on a GPU for products and cuDNN's convolutions: kernels, memory, time"

    @property
    def num_chips(self) -> int:
        return self.num_hosts * self.gpus_a_host

    @property
    def compiler_options(self) -> dict[str, Any]:
        return {"xla_gpu_autotune_level": 0}  # autotuning runs kernels, on a GPU

    def collective_seconds(self, kind: str, size: int) -> float:
        """Returns an estimate of the time of a collective over all GPUs: NCCL's latency, then the full bandwidth.

        Each GPU of a host sends its part of the array to the others of the host, and its share of it to its
        counterparts in the other hosts at the same time; the slower of the two counts.

        Args:
          kind: 'all-reduce', 'all-gather', ...
          size: of the whole array, in bytes.
        """
        if self.num_chips == 1:
            return 0.0
        gpus, hosts = self.gpus_a_host, self.num_hosts
        within = size * (gpus - 1) / gpus / self.chip.link_bytes_per_second
        between = size * (hosts - 1) / hosts / (gpus * self.chip.network_bytes_per_second)
        hop = NVLINK_SECONDS if self.chip.nvlink else PCIE_SECONDS
        hops = (gpus - 1) * hop + math.ceil(math.log2(hosts)) * NETWORK_SECONDS
        return START_SECONDS + PASSES.get(kind, 1) * (hops + max(within, between))

    def kernel(self, part: Traffic) -> str | None:
        """Returns what runs an instruction of a program, one of `KERNELS`."""
        if part.opcode == "dot" or part.target.startswith(("__cublas$", "__triton_gemm", "__triton_nested_gemm")):
            return "matrix product"
        if part.target.startswith("__cudnn$"):
            return "cuDNN convolution"
        if part.target == "__gpu$xla.gpu.triton":  # by Pallas, of `models.ops.gpu`
            return "depthwise kernel"
        if part.opcode.removesuffix("-start") in COLLECTIVES:
            return None  # counted as such
        return "fusion" if part.opcode == "fusion" else "other kernel"

    def devices(self) -> Sequence[Any]:
        """Returns devices of the hosts, to compile for.

        Raises:
          UserError: XLA for GPUs is missing, or does not know the GPU.
        """
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            raise UserError(
                "compiling for GPUs needs XLA for CUDA (4.5 GB, no GPU), which is not installed here.\n"
                "pip install -e '.[cuda]'"
            )
        import jax
        from jax.experimental import topologies

        options = {"topology": f"1x{self.num_hosts}x{self.gpus_a_host}", "target_config": target_config(self.chip)}
        try:
            return topologies.get_topology_desc(platform="cuda", **options).devices
        except NotImplementedError:  # JAX has no such platform, so its plugin did not load (CUPTI missing, say)
            raise UserError(
                "JAX's plugin for CUDA is installed but cannot be loaded; install it anew, with CUDA's own libraries.\n"
                "pip install --force-reinstall 'jax[cuda13]'"
            ) from None
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"XLA cannot describe {self.name!r}: {str(error).partition(chr(10))[0]}") from None


def parse_hosts(name: str) -> Hosts:
    """Returns the hosts of a name: 'h100' is one GPU of `GPUS`, 'h100:8' a host of eight, 'h100:2x8' two such hosts.

    Raises:
      UserError: not a number of hosts and GPUs.
    """
    kind, colon, shape = name.partition(":")
    match = re.fullmatch(r"(?:([1-9][0-9]{0,2})x)?([1-9])", shape if colon else "1")
    if match is None or int(match[2]) > MAX_GPUS:
        raise UserError(
            f"there are no hosts {written(name)}; a host has 1 to {MAX_GPUS} GPUs: {kind}:8 is one of eight, "
            f"{kind}:2x8 two of them (at most {MAX_HOSTS}), {kind} one GPU."
        )
    return Hosts(name, GPUS[kind], int(match[1] or 1), int(match[2]))


def target_config(gpu: Gpu) -> str:
    """Returns XLA's description of a GPU, of which it compiles for: the text of a GpuTargetConfigProto.

    The versions are those of the libraries installed here, with which the program would run.
    """
    major, minor = gpu.compute_capability
    cuda, cudnn = (
        "major: {} minor: {} patch: {}".format(*importlib.metadata.version(name).split(".")[:3])
        for name in ("nvidia-cuda-runtime", "nvidia-cudnn-cu13")
    )
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
  shared_memory_per_core: {gpu.shared_bytes}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.hbm_bytes_per_second:.0f}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ {cudnn} }}
runtime_version {{ {cuda} }}
device_description_str: "{gpu.kind}"
"""
