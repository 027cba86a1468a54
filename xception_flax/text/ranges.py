"""Checks of the range of a user's number, called where the number is used.

A number must also fit into float32, in which all rates, shares and sizes of a recipe are computed.
"""

import math

import numpy as np

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

# Of float32's normal numbers. Most devices treat smaller ones as 0, and dividing by them gives infinity.
SMALLEST, LARGEST = 2.0**-126, 2.0**128 - 2.0**104


def check_range(
    name: str, value: float, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Raises UserError unless `value` is from `low` to `high` and fits into float32.

    Args:
      name: as the user knows it, such as 'optimizer.learning_rate'.
      value: an integer or a float. NaN and infinity are never in the range.
      low: the least value.
      high: the greatest value; by default float32's.
      above: exclude `low` itself.
      below: exclude `high` itself.
    """
    inside = (value > low if above else value >= low) and (value < high if below else value <= high)
    finite = isinstance(value, int) or math.isfinite(value)
    if not inside or not finite:
        if high < math.inf:
            expected = f"in {'(' if above else '['}{_bound(low)}, {_bound(high)}{')' if below else ']'}"
        elif above and low == 0:
            expected = "positive" if finite else "positive and finite"
        elif low == 0:
            expected = "0 or positive" if finite else "0 or positive, and finite"
        else:
            expected = f"{'above' if above else 'at least'} {_bound(low)}"
        raise UserError(f"{name} must be {expected}, got {written(value)}.")
    check_number(name, value)
    if below and np.float32(value) >= high:  # a decay of 1 - 1e-12 would round to 1, and we divide by 1 - decay
        raise UserError(f"{name} must be below {_bound(high)} in float32 too, which rounds to it; got {value}.")


def check_number(name: str, value: float) -> None:
    """Raises UserError if float32 cannot hold `value`: NaN, infinity, too large or too near to 0."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}.")
    if abs(value) > LARGEST:
        raise UserError(f"{name} must be at most {LARGEST:.2g}, float32's largest number, got {written(value)}.")
    if 0 < abs(value) < SMALLEST:
        raise UserError(f"{name} must not be nearer to 0 than {SMALLEST:.2g}, float32's smallest number, got {value}.")


def _bound(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
