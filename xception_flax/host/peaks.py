"""The published peak speed of devices."""

# A multiplication and an addition count as two operations. The values are for dense arrays, not doubled for sparse
# weights. `float32` is XLA's default precision: one pass of the bfloat16 unit on TPUs, TF32 on NVIDIA's tensor cores.
# The keys are JAX's whole names of devices: a part of a GPU (MIG) and a GPU with another power limit have other names,
# and have no entry. Missing values are not guessed.
#
# TPU: the 'System architecture' pages of cloud.google.com/tpu/docs (v3 to v6e, TPU7x) give the peak of a chip. It is
# divided by the number of JAX's devices on a chip: two for v3 and TPU7x, one for the others.
# NVIDIA: the data sheets of V100, A100, L4, H100, H200, HGX B200; where they give the peak with sparse weights, half.
_V4 = {"bfloat16": 275e12, "float32": 275e12}
_V5E = {"bfloat16": 197e12, "float32": 197e12}
_V5P = {"bfloat16": 459e12, "float32": 459e12}
_V6E = {"bfloat16": 918e12, "float32": 918e12}
_V100 = {"float16": 125e12, "float32": 15.7e12}  # no bfloat16, no TF32
_A100 = {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}
_L4 = {"bfloat16": 121e12, "float16": 121e12, "float32": 60e12}
_HOPPER = {"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 494.7e12}  # H100 and H200 of 700 W

PEAK_FLOPS_PER_SECOND: dict[str, dict[str, float]] = {
    "TPU v3": {"bfloat16": 61.5e12, "float32": 61.5e12},
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": {"bfloat16": 1153.5e12, "float32": 1153.5e12},
    "Tesla V100-SXM2-16GB": _V100,
    "Tesla V100-SXM2-32GB": _V100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
    "NVIDIA B200": {"bfloat16": 2250e12, "float16": 2250e12},
    "NVIDIA L4": _L4,
}


def peak_flops_per_second(device_kind: str, dtype: str) -> float | None:
    """Returns the peak of one device in floating-point operations a second; None where it is not known.

    Args:
      device_kind: JAX's name of the device, `jax.devices()[0].device_kind`.
      dtype: in which the network computes, such as 'bfloat16'.
    """
    return PEAK_FLOPS_PER_SECOND.get(device_kind, {}).get(dtype)
