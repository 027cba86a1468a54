"""Runs before anything imports JAX: these tests compile for GPUs and must not look for one."""

from xception_flax.planning import machines

machines.hide_hardware()
