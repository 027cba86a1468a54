"""The length of a run: the number of its steps, and where intervals of epochs end."""

import math

import pytest

from xception_flax.text.errors import UserError
from xception_flax.training.length import MAX_STEPS, RunLength, create_length


def test_a_run_has_whole_steps_and_at_least_one():
    """100 epochs of ImageNet at batch size 1,536 are 83,409.0 steps. Then 0.49, 1 and 2.51 steps."""
    assert create_length(100.0, 1536, 1_281_167) == RunLength(1536, 1_281_167, 83_409)
    assert [create_length(epochs, 10, 100).total_steps for epochs in (0.049, 0.1, 0.251)] == [1, 1, 3]
    assert create_length(float(MAX_STEPS), 1, 1).total_steps == MAX_STEPS
    with pytest.raises(UserError, match=r"are 2\.15e\+09 steps of batch_size=1; .* up to 2,147,483,647"):
        create_length(float(MAX_STEPS + 1), 1, 1)


@pytest.mark.parametrize("num_images", [100, 103, 1257])
def test_an_interval_ends_where_its_multiples_do(num_images):
    """A step ends an interval if, after it, `step * batch_size` images make up another whole interval."""
    run = RunLength(10, num_images, 1000)
    for every in (0.1, 0.3, 1.0, 2.5):
        ends = [step for step in range(1, 1001) if run.ends_interval(step, every)]
        interval = every * num_images / 10
        expected = {math.ceil(k * interval - 1e-6) for k in range(1, int(1000 / interval + 1e-6) + 1)}
        assert ends == sorted(expected)
    ends = {every: {s for s in range(1, 1001) if run.ends_interval(s, every)} for every in (0.1, 0.2, 0.3)}
    assert ends[0.2] <= ends[0.1]
    assert ends[0.3] <= ends[0.1]
    assert not any(run.ends_interval(step, math.inf) for step in range(1, 1001))
