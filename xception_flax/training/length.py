"""The length of a run, in epochs and in steps."""

import math
from typing import NamedTuple

from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError

MAX_STEPS = 2**31 - 1  # a step is counted in 32 bits


class RunLength(NamedTuple):
    """The length of a run.

    Attributes:
      batch_size: images per step.
      num_images: images per epoch.
      total_steps: of the whole run.
    """

    batch_size: int
    num_images: int
    total_steps: int

    def ends_interval(self, step: int, every_epochs: float) -> bool:
        """Whether step `step`, counted from 1, completes a multiple of `every_epochs`."""
        interval = every_epochs * (self.num_images / self.batch_size)  # in steps
        # The small term absorbs rounding of the division, so that every multiple of 0.2 epochs is also one of 0.1.
        return math.floor(step / interval + 1e-9) > math.floor((step - 1) / interval + 1e-9)


def create_length(epochs: float, batch_size: int, num_images: int) -> RunLength:
    """Returns the length of a run of `epochs` passes over `num_images`, rounded to whole steps, at least one.

    Raises:
      UserError: there are more than `MAX_STEPS` steps.
    """
    total_steps = max(1, round(epochs * num_images / batch_size))
    if total_steps > MAX_STEPS:
        raise UserError(
            f"epochs={epochs:g} of {counted(num_images, 'image')} are {total_steps:.3g} steps of "
            f"batch_size={batch_size:,}; a step is counted in 32 bits, up to {MAX_STEPS:,}."
        )
    return RunLength(batch_size, num_images, total_steps)
