"""TPU slices: their names, rings and links, and the message without libtpu."""

import importlib.util

import pytest

from xception_flax.planning import tpus
from xception_flax.text.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "rings"),
    [
        ("v5e:2x4", 8, (False, False)),
        ("v5e:8x16", 128, (False, True)),
        ("v6e:16x16", 256, (True, True)),
        ("v4:2x2x1", 4, (False, False, False)),
        ("v5p:4x4x8", 128, (True, True, True)),
        ("v4:2x4x4", 32, (False, False, False)),  # less than a cube, so without switches
        ("v5p:8x16x16", 2048, (True, True, True)),
        ("v5e:1x1", 1, (False, False)),
    ],
)
def test_slices(name: str, chips: int, rings: tuple[bool, ...]) -> None:
    where = tpus.parse_slice(name)
    assert (where.num_chips, where.rings) == (chips, rings)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "of v5e there are: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16.$"),
        ("v5e:3x3", "no slice 'v5e:3x3'"),
        ("v5e:32x32", "no slice 'v5e:32x32'"),
        ("v4:2x2", "of v4 there are: 2x2x1, .*, 8x8x8, and larger ones whose sides divide by 4.$"),
        ("v5e:2xfour", "no slice"),
        ("v5e:0x4", "no slice"),
        ("v5p:4x4x6", "no slice"),
        ("v4:4x4x400", "no slice"),
        ("v5e:" + "9" * 5000 + "x9", "no slice"),
    ],
)
def test_no_slices(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tpus.parse_slice(name)


def test_collectives_by_hand() -> None:
    # 2 x 4 without rings: 45 GB/s on each of two sides; the longest way is 1 + 3 hops. An all-reduce is two passes.
    line = tpus.parse_slice("v5e:2x4")
    assert line.collective_seconds("all-gather", 90_000_000) == pytest.approx(1e-3)
    assert line.collective_seconds("all-reduce", 90_000_000) == pytest.approx(2e-3)
    assert line.collective_seconds("all-reduce", 4) == pytest.approx(2 * 4e-6)
    # 16 x 16: two rings, both ways at once; halfway round each is 8 hops.
    torus = tpus.parse_slice("v5e:16x16")
    assert torus.collective_seconds("all-reduce", 90_000_000) == pytest.approx(1e-3)
    assert torus.collective_seconds("reduce-scatter", 4) == pytest.approx(16e-6)
    assert tpus.parse_slice("v5e:1x1").collective_seconds("all-reduce", 10**9) == 0


def test_chips_are_as_specified() -> None:
    # GB of HBM, its GB/s, TFLOP/s in bfloat16, GB/s of all links one way: cloud.google.com/tpu/docs/v4 and so on.
    specified = {
        "v4": (32, 1200, 275, 300),
        "v5e": (16, 819, 197, 200),
        "v5p": (95, 2765, 459, 600),
        "v6e": (32, 1640, 918, 400),
    }
    assert set(tpus.CHIPS) == set(specified)
    for name, (memory, bandwidth, teraflops, links) in specified.items():
        chip = tpus.CHIPS[name]
        assert 0.95 * memory <= chip.usable_bytes / 2**30 < 1.01 * memory
        assert chip.hbm_bytes_per_second == bandwidth * 1e9
        assert chip.peaks["bfloat16"] == teraflops * 1e12
        # The links are a tenth faster in these documents than in the book, which counts what arrives.
        neighbours = 2 * len(chip.shapes[0].split("x"))
        assert 0.85 * links <= neighbours * chip.link_bytes_per_second / 1e9 <= links


def test_missing_libtpu_is_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs libtpu") as caught:
        tpus.parse_slice("v5e:2x4").devices()
    assert str(caught.value).splitlines()[1:] == ["pip install -e '.[tpu]'"]
