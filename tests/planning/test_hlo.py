"""Reading compiled programs: real ones for CPUs, and lines of programs for TPUs and GPUs; every number is by hand."""

import jax
import jax.numpy as jnp
import pytest

from xception_flax.planning.hlo import Collective, Hlo
from xception_flax.planning.machines import parse_machine
from xception_flax.training import sharding

# What only TPU programs have: tiles that pad, memory in the chip (S(1)), asynchronous copies into it,
# convolutions inside fusions, collectives inside fusions.
TPU = """\
HloModule jit_step, is_scheduled=true

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.1 (p0: bf16[8,3,100], p1: f32[20]) -> (bf16[8,3,20], f32[20]) {
  %p0 = bf16[8,3,100]{2,0,1:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = f32[20]{0:T(128)} parameter(1)
  %convolution.1 = bf16[8,3,20]{2,0,1:T(8,128)(2,1)} convolution(%p0, %p0), metadata={op_name="step/conv1/dot_general"}
  ROOT %tuple.1 = (bf16[8,3,20]{2,0,1:T(8,128)(2,1)}, f32[20]{0:T(128)}) tuple(%convolution.1, %p1)
}

%all-reduce-scatter.1 (p2: f32[1000]) -> f32[125] {
  %p2 = f32[1000]{0:T(1024)} parameter(0)
  %all-reduce.5 = f32[1000]{0:T(1024)} all-reduce(%p2), channel_id=1, to_apply=%region_0.1
  ROOT %dynamic-slice.1 = f32[125]{0:T(128)} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={125}
}

ENTRY %main.1 (x: bf16[8,3,100], g: f32[1000], s: f32[20]) -> f32[20] {
  %x = bf16[8,3,100]{2,0,1:T(8,128)(2,1)} parameter(0), metadata={op_name="batch"}
  %g = f32[1000]{0:T(1024)} parameter(1)
  %s = f32[20]{0:T(128)} parameter(2), metadata={op_name="state[\\'scale\\']"}
  %copy-start.1 = (bf16[8,3,100]{2,0,1:T(8,128)(2,1)S(1)}, bf16[8,3,100]{2,0,1:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%x)
  %copy-done.1 = bf16[8,3,100]{2,0,1:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = (bf16[8,3,20]{2,0,1:T(8,128)(2,1)}, /*index=1*/f32[20]{0:T(128)}) fusion(%copy-done.1, %s), \
kind=kOutput, calls=%fused_computation.1, metadata={op_name="step/bn1/reduce_sum"}
  %get-tuple-element.1 = f32[20]{0:T(128)} get-tuple-element(%fusion.1), index=1
  %fusion.2 = f32[125]{0:T(128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="step/grad"}
  %all-gather-start.1 = (f32[125]{0:T(128)}, f32[1000]{0:T(1024)}) all-gather-start(%fusion.2), dimensions={0}
  %all-gather-done.1 = f32[1000]{0:T(1024)} all-gather-done(%all-gather-start.1)
  ROOT %add.2 = f32[20]{0:T(128)} add(%get-tuple-element.1, %s), metadata={op_name="step/add"}
}
"""

# Dimensions from the fastest: 100, 8, 3, padded to 128, 8, 3 and two bytes each.
IMAGES = 128 * 8 * 3 * 2
FEATURES = 128 * 8 * 3 * 2  # 20 channels are padded to 128 too
ROW = 128 * 4  # 20 float32, padded to 128


def test_tpu_instructions_by_hand() -> None:
    traffic = {part.opcode + part.op_name: part for part in Hlo(TPU).traffic()}
    copy = traffic[
        "copy-startstep/conv1/dot_general"
    ]  # it has the name of its user, a fusion, which has that of its convolution
    assert (copy.size, copy.hbm_size) == (2 * IMAGES, IMAGES)  # read from HBM, written into the chip
    fusion = traffic["fusionstep/conv1/dot_general"]
    assert (fusion.size, fusion.hbm_size) == (IMAGES + FEATURES + 2 * ROW, FEATURES + 2 * ROW)
    assert traffic["addstep/add"].size == 3 * ROW
    scatter = traffic["fusionstep/grad"]
    assert scatter.size == 1024 * 4 + 128 * 4
    assert sum(part.opcode.endswith("-done") for part in traffic.values()) == 0


def test_tpu_collectives_by_hand() -> None:
    # The one inside a fusion counts. The result of an asynchronous one includes its operand. 1,000 fill 1,024 places.
    assert Hlo(TPU).collectives() == [Collective("all-gather", 4096, 1), Collective("all-reduce", 4096, 1)]


# What only GPU programs have: kernels of cuDNN and of Triton, products fused by Triton, tuples of collectives.
GPU = """\
HloModule jit_step, is_scheduled=true

%product (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%p0, %p1), metadata={op_name="step/conv2/dot_general"}
}

ENTRY %main.1 (x: bf16[64,32], w: bf16[32,16], s: f32[2,32]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %s = f32[2,32]{1,0} parameter(2)
  %cudnn-conv.1 = (bf16[64,32]{1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3}, \
custom_call_target="__cudnn$convForward", metadata={op_name="step/conv1/conv_general_dilated"}
  %get-tuple-element.1 = bf16[64,32]{1,0} get-tuple-element(%cudnn-conv.1), index=0
  %pallas_call.1 = bf16[64,32]{1,0} custom-call(%get-tuple-element.1, %s), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="step/depthwise/pallas_call"}
  %all-reduce-start.1 = (f32[2,32]{1,0}, f32[2,32]{1,0}) all-reduce-start(%s, %s), to_apply=%add
  %all-reduce-done.1 = (f32[2,32]{1,0}, f32[2,32]{1,0}) all-reduce-done(%all-reduce-start.1)
  ROOT %fusion.1 = bf16[64,16]{1,0} fusion(%pallas_call.1, %w), kind=kCustom, calls=%product, backend_config=\
{"operation_queue_id":"0","fusion_backend_config":{"kind":"__triton_nested_gemm_fusion","num_warps":"2"}}
}
"""


def test_gpu_instructions_by_hand() -> None:
    hlo = Hlo(GPU)
    traffic = {part.target: part for part in hlo.traffic()}
    images, kernel, moments = 64 * 32 * 2, 32 * 16 * 2, 2 * 32 * 4
    assert traffic["__cudnn$convForward"].hbm_size == 2 * images + kernel
    assert traffic["__gpu$xla.gpu.triton"].hbm_size == 2 * images + moments
    product = traffic["__triton_nested_gemm_fusion"]
    assert (product.op_name, product.hbm_size) == ("step/conv2/dot_general", images + kernel + 64 * 16 * 2)
    assert hlo.collectives() == [Collective("all-reduce", 2 * moments, 1)]
    kernels = [parse_machine("h100").kernel(part) for part in hlo.traffic()]
    assert kernels == ["cuDNN convolution", "depthwise kernel", None, "matrix product"]


def test_real_program_of_eight_devices() -> None:
    mesh = sharding.create_mesh()
    batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def column_sums(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(x @ w, axis=0)

    step = jax.jit(column_sums, in_shardings=(batch, whole), out_shardings=whole)
    shapes = jax.ShapeDtypeStruct((1024, 64), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32)
    compiled = step.lower(*shapes).compile()
    hlo = Hlo(compiled.as_text())
    assert hlo.collectives() == [Collective("all-reduce", 32 * 4, 1)]
    # One device has 128 rows. XLA may write the product to memory and read it again.
    least = (128 * 64 + 64 * 32 + 32) * 4 + 2 * 32 * 4
    size = sum(part.size for part in hlo.traffic())
    assert least <= size <= least + 2 * 128 * 32 * 4 + 2048
    assert size == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.01)


def test_loops_count_their_trips() -> None:
    def powers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    shapes = jax.ShapeDtypeStruct((128, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    hlo = Hlo(jax.jit(powers).lower(*shapes).compile().as_text())
    products = [part for part in hlo.traffic() if part.op_name.endswith("dot_general")]
    assert sum(part.times for part in products) == 5
    assert sum(part.size for part in products) == 5 * (2 * 128 * 64 + 64 * 64) * 4
