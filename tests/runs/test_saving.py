"""When a checkpoint is due."""

import math

import pytest

from xception_flax.runs import saving
from xception_flax.text.ranges import LARGEST


@pytest.mark.parametrize("minutes", [2.0, LARGEST])
def test_a_checkpoint_is_due_after_minutes(monkeypatch, minutes):
    """From the start, and from each save on; never at inf, which a recipe has as the largest number."""
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    clock, due = saving.SaveClock(minutes), []
    for seconds in (0, 119, 1, 60):
        now += seconds
        due.append(clock.is_due())
    assert due == ([False, False, True, True] if minutes == 2 else [False] * 4)
    clock.saved()
    due = []
    for seconds in (0, 119, 1):
        now += seconds
        due.append(clock.is_due())
    assert due == [False, False, minutes == 2]
    assert math.isfinite(LARGEST)
