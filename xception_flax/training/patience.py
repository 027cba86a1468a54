"""Early stopping: a run ends when its evaluations have not become better for a while."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.ranges import LARGEST
from xception_flax.training.length import RunLength
from xception_flax.training.metrics import METRICS


class Patience:
    """Decides by the evaluations so far whether a run should end; so a resumed run decides as one that never stopped.

    Attributes:
      metric: that should become better.
      best_step: of the best evaluation, of equal ones the first; 0 before the first evaluation.
    """

    def __init__(self, metrics: str, metric: str, epochs: float, length: RunLength) -> None:
        """Begins without evaluations.

        Args:
          metrics: of the run, a key of `METRICS`.
          metric: 'loss', which should become lower, or one of their shares, which should become higher; '' for the one
            of the best checkpoint.
          epochs: how long it may not become better; `LARGEST` for as long as the run takes.
          length: of the run.

        Raises:
          UserError: there is no such metric.
        """
        known = (*METRICS[metrics].shares, "loss")
        self.metric = metric or METRICS[metrics].best
        if self.metric not in known:
            raise UserError(f"unknown patience_metric {written(metric)}; {suggest(metric, known)}")
        self._steps = math.inf if epochs >= LARGEST else epochs * length.num_images / length.batch_size
        self.best_step, self._best, self._latest = 0, -math.inf, 0

    def add_history(self, records: Iterable[Mapping[str, Any]], last_step: int) -> None:
        """Adds the evaluations up to `last_step` that are among the records of a run."""
        for record in records:
            value = record.get(f"eval/{self.metric}")
            if record["step"] <= last_step and value is not None:
                self.add(record["step"], {self.metric: value})

    def add(self, step: int, results: Mapping[str, Any]) -> None:
        """Adds the results of an evaluation after `step`."""
        value = -results["loss"] if self.metric == "loss" else results[self.metric]
        if value > self._best:
            self.best_step, self._best = step, value
        self._latest = step

    @property
    def is_over(self) -> bool:
        """Whether the latest evaluation was as long after the best one as the run has patience."""
        return self._latest - self.best_step >= self._steps * (1 - 1e-9) if self.best_step else False
