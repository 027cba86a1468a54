"""What a grid tries."""

import pytest

from xception_flax.data.transforms import parse_transforms
from xception_flax.reports import grid
from xception_flax.text.errors import UserError


def test_the_given_chain_comes_first_and_each_other_runs():
    """Five fractions, two kernels, with and without antialiasing; of `resize` the whole image too."""
    for given, count, sample in (
        ("center_crop", 21, "center_crop(fraction=0.95, kernel=bicubic, antialias=True)"),
        ("resize", 25, "resize(kernel=bicubic, antialias=False)"),
        (
            "resize_center_crop(resize_size=36, kernel=bicubic)",
            21,
            "resize_center_crop(resize_size=36, kernel=bilinear, antialias=True)",  # 32 / 0.875, rounded down
        ),
        (
            "center_crop(image_size=32) | flip_left_right",
            21,
            "center_crop(image_size=32, fraction=0.8, kernel=bilinear, a",
        ),
    ):
        found = grid.chains(given, 32)
        assert found[0] == given
        assert len(found) == len(set(found)) == count
        assert any(chain.startswith(sample) for chain in found)
        for chain in found:
            parse_transforms(chain, 32)
    given = "resize_center_crop(resize_size=50, image_size=40)"
    assert grid.chains(given, 32)[2].startswith("resize_center_crop(image_size=40, resize_size=50, ")  # 40 / 0.8


def test_a_size_that_is_not_square_is_varied_on_both_sides():
    """28 / 0.8 = 35 and 40 / 0.8 = 50."""
    for given in ("resize_center_crop(resize_size=64)", 'resize_center_crop(image_size="28x40", resize_size=64)'):
        found = grid.chains(given, (28, 40))
        assert any("resize_size=(35, 50), kernel=bicubic, antialias=False" in chain for chain in found)
        for chain in found:
            parse_transforms(chain, (28, 40))


@pytest.mark.parametrize("given", ["flip_left_right", "resize | center_crop", "random_resized_crop"])
def test_what_cannot_be_varied(given):
    with pytest.raises(
        UserError, match="--grid varies one resize, center_crop or resize_center_crop in the transforms"
    ):
        grid.chains(given, 32)


def test_of_equal_scores_the_lower_loss_is_first():
    trials = [grid.Trial("a", 0.5, 1.0, None), grid.Trial("b", 0.6, 2.0, None), grid.Trial("c", 0.6, 1.0, None)]
    assert [trial.transforms for trial in grid.best_first(trials)] == ["c", "b", "a"]
