"""The report of a compiled step: kinds of layers, a bound on its time, the largest batch."""

from pathlib import Path

import numpy as np
import pytest

from xception_flax import MODELS, create_model, data
from xception_flax.models import costs
from xception_flax.planning import machines, tpus
from xception_flax.planning import report as reporting
from xception_flax.planning.hlo import Collective
from xception_flax.recipes import reading

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


def test_shapes_are_those_of_the_data(tmp_path: Path) -> None:
    images = np.zeros((6, 8, 8), np.uint8)
    several = tmp_path / "several.npz"
    np.savez(several, train_images=images, train_labels=np.eye(6, dtype=np.int32))
    overrides = ["model.num_classes=6", "loss.name=sigmoid", "metrics.name=multi_label", "batch_size=4"]
    overrides += ["data.source=arrays", f"data.path={several}"]
    for keys in ([], overrides, ["data.on_bad_image=replace"]):
        config = reading.load(DIGITS, [f"--config.{text}" for text in keys])
        split = data.load(**config.data, train=True, batch_size=config.batch_size)
        assert reporting.batch_shapes(config) == split.batch_shapes


def test_largest_batch() -> None:
    calls: list[int] = []

    def memory(images: int, an_image: int = 100, more: int = 0) -> int:
        calls.append(images)
        return 1000 + an_image * images + more * images**2

    # 1000 + 100 n <= 16,000: n is at most 150, and the multiple of 8 below is 144. It is the first guess from the line.
    assert reporting.largest_batch(memory, 16_000, first=64, state=1000) == (144, 152)
    assert calls == [64, 144, 152]
    # Nothing fits; the first batch does not fit and a smaller one does; the first batch is no multiple of 8.
    assert reporting.largest_batch(memory, 1100, first=64, state=1000) == (0, 8)
    assert reporting.largest_batch(memory, 4000, first=128, state=1000) == (24, 32)
    assert reporting.largest_batch(memory, 16_000, first=6, state=1000) == (144, 152)
    # Memory that is not linear: 1000 + 100 n + n^2 <= 60,000 up to n = 197.9.
    calls.clear()
    assert reporting.largest_batch(lambda n: memory(n, more=1), 60_000, first=64, state=1000) == (192, 200)
    assert len(calls) <= reporting.MAX_COMPILATIONS
    # A chip so large that every batch that is tried fits.
    fits, fails = reporting.largest_batch(memory, 10**12, first=8, state=1000)
    assert (fits, fails) == (8 * 4 ** (reporting.MAX_COMPILATIONS - 1), None)


def test_every_layer_has_a_kind() -> None:
    for name in MODELS:
        layers = costs.list_layers(create_model(name, num_classes=10), (96, 96, 3))
        assert {layer.module for layer in layers} <= set(reporting.KINDS)


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        ("jvp(Xception)/Xception.endpoints/block1_conv1/conv_general_dilated", "regular conv."),
        ("transpose(jvp(Xception))/Xception.endpoints/block2/block2_sepconv1/depthwise/jit(f)/conv", "depthwise conv."),
        ("transpose(jvp(Xception))/Xception.endpoints/block2/block2_sepconv1/pointwise/dot_general", "pointwise conv."),
        (
            "while/body/closed_call/jvp(Xception)/Xception.endpoints/block2/block2_residual/dot_general",
            "pointwise conv.",
        ),
        ("jvp(Xception)/Xception.endpoints/block2/block2_sepconv1_bn/reduce_sum", "batch norm."),
        ("jvp(Xception)/Xception.endpoints/predictions/dot_general", "classifier"),
        ("transpose(jvp(Xception))/Xception.endpoints/block2/select_and_scatter", "between layers"),
        ("jvp(jit(log_softmax))/reduce_sum", "input, loss"),
        (
            "jvp(Xception)/Xception.endpoints/block2/block2_sepconv2.normalized/fused_separable/shard_map/forward_kernel",
            "separable, fused",
        ),
        # A chain of layers on a GPU, where the next layer's normalization is applied: its convolutions, and the rest.
        (
            "jvp(Xception)/Xception.endpoints/block2/block2_sepconv2.normalized/depthwise/jit(_lowered)/depthwise_forward",
            "depthwise conv.",
        ),
        (
            "transpose(jvp(Xception))/Xception.endpoints/block2/block2_sepconv2.normalized/pointwise/jit(_lowered)/dot_general",
            "pointwise conv.",
        ),
        ("jvp(Xception)/Xception.endpoints/block2/block2_sepconv2.normalized/jit(_lowered)/reduce", "batch norm."),
        ("transpose(jvp(Xception))/Xception.endpoints/block2/block2_sepconv2.normalized/add_any", "batch norm."),
        ("add", "optimizer"),
    ],
)
def test_kinds_by_where_an_operation_is_from(op_name: str, kind: str) -> None:
    layers = costs.list_layers(create_model("xception", num_classes=10, width=0.125), (96, 96, 3))
    paths = {"/".join(layer.path): reporting.KINDS[layer.module] for layer in layers}
    assert reporting.kind_of(f"jit(train_step)/{op_name}", paths, "Xception") == kind


def test_the_bound_by_hand() -> None:
    chip = tpus.CHIPS["v5e"]
    where = tpus.Slice("v5e:2x4", chip, (2, 4))
    kinds = {
        "pointwise conv.": reporting.Cost(1.97e12, 81_900_000),
        "batch norm.": reporting.Cost(0, 1_638_000_000),
    }
    report = reporting.Report(10**9, 10**6, 2e12, 2e9, kinds, {}, [Collective("all-reduce", 90_000_000, 2)])
    result = reporting.estimate(report, where, images_a_chip=16, dtype="bfloat16")
    # 1.97 of 197 TFLOP/s: 10 ms against 0.1 ms of memory; 1.638 of 819 GB/s: 2 ms; two all-reduces of 2 ms.
    assert result["kinds"]["pointwise conv."]["seconds"] == pytest.approx(10e-3)
    assert result["kinds"]["batch norm."]["seconds"] == pytest.approx(2e-3)
    assert result["collective_seconds"] == pytest.approx(4e-3)
    assert result["step_seconds"] == pytest.approx(16e-3)
    assert result["images_per_second_per_chip"] == pytest.approx(1000)
    assert result["bound"] == "arithmetic"
    assert result["collectives"] == {"all-reduce": {"count": 2, "bytes": 180_000_000}}


@pytest.mark.parametrize(
    ("name", "dtype", "peak_dtype", "milliseconds"),
    [
        ("h100", "bfloat16", "bfloat16", 1),
        ("h100", "float32", "float32", 2),  # TF32
        ("b200", "float32", "bfloat16", 989.4 / 2250),  # its peak in TF32 is not known
        ("v5e:1x1", "float32", "float32", 989.4 / 197),  # one pass in bfloat16
    ],
)
def test_the_peak_is_that_of_the_type(name: str, dtype: str, peak_dtype: str, milliseconds: float) -> None:
    report = reporting.Report(0, 0, None, None, {"pointwise conv.": reporting.Cost(989.4e9, 0)}, {}, [])
    result = reporting.estimate(report, machines.parse_machine(name), 1, dtype)
    assert result["peak_dtype"] == peak_dtype
    assert result["step_seconds"] == pytest.approx(1e-3 * milliseconds)
