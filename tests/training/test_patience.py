"""When a run ends early, by hand."""

import pytest

from xception_flax.text.errors import UserError
from xception_flax.text.ranges import LARGEST
from xception_flax.training.length import RunLength
from xception_flax.training.patience import Patience

RUN = RunLength(batch_size=10, num_images=50, total_steps=1000)  # 5 steps an epoch


def over_at(values, *, metric="top1", epochs=2.0):
    """Returns the step at which a run ends whose evaluations after 5, 10, ... steps are these; None if it does not."""
    patience = Patience("single_label", metric, epochs, RUN)
    for step, value in zip(range(5, 1000, 5), values, strict=False):
        patience.add(step, {"top1": 0.0, "loss": 0.0} | {patience.metric: value})
        if patience.is_over:
            return step
    return None


def test_it_ends_when_nothing_is_better_for_so_long():
    assert over_at([0.1, 0.2, 0.3, 0.4, 0.5]) is None
    assert over_at([0.1, 0.5, 0.4, 0.3, 0.6]) == 20  # two epochs after step 10
    assert over_at([0.1, 0.5, 0.4, 0.5001, 0.4, 0.4]) == 30
    assert over_at([0.5, 0.5, 0.5]) == 15  # as good is not better
    assert over_at([0.0, 0.0, 0.0, 0.0]) == 15
    assert over_at([0.5, 0.4], epochs=0.2) == 10
    assert over_at([0.5] * 190, epochs=LARGEST) is None
    assert over_at([0.5, 0.4, 0.3, 0.2], metric="loss") is None
    assert over_at([0.5, 0.6, 0.7, 0.2], metric="loss") == 15
    assert over_at([0.1, 0.5, 0.4, 0.3], metric="") == 20  # that of the best checkpoint, top1


def test_it_goes_on_from_the_records_of_a_run():
    values = {5: 0.1, 10: 0.5, 15: 0.4, 20: 0.3}
    records = [{"step": 4, "train/loss": 2.0}, {"step": 5, "eval/loss": 1.0, "eval/top1": None}]
    records += [{"step": step, "eval/top1": value, "eval/loss": 1.0} for step, value in values.items()]
    for last, best, is_over in ((20, 10, True), (15, 10, False), (5, 5, False), (0, 0, False)):
        patience = Patience("single_label", "top1", 2.0, RUN)
        patience.add_history(records, last)
        assert (patience.best_step, patience.is_over) == (best, is_over)


def test_an_unknown_metric_is_refused():
    with pytest.raises(UserError, match="unknown patience_metric 'top2'; did you mean 'top5' or 'top1'"):
        Patience("single_label", "top2", 1.0, RUN)
    with pytest.raises(UserError, match="unknown patience_metric 'top1'; "):
        Patience("multi_label", "top1", 1.0, RUN)
