"""Before anything imports JAX: these tests compile for TPUs and must not look for one."""

from xception_flax import tpu

tpu.hide_hardware()
