"""What a contender computes: a `Job`, the constants of all jobs, and this project's network.

Contenders import this module in processes that have no other library than their own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_CLASSES = 1000
LEARNING_RATE, MOMENTUM = 0.045, 0.9  # paper, section 4.2

# The two usual readings of Xception. They differ in the padding of the max-pooling for even sizes and in the epsilon
# of batch normalization, which takes no time.
READINGS = {"keras": dict(padding="SAME", bn_epsilon=1e-3), "timm": dict(padding="SYMMETRIC", bn_epsilon=1e-5)}


class Job(NamedTuple):
    """What is to be computed.

    Attributes:
      folder: with the files of `inputs.write`.
      mode: 'forward' (inference) or 'train' (gradients, batch statistics, SGD).
      batch: images.
      size: pixels a side.
      threads: number of threads that compute, and of CPUs that the process may use.
      width: of the network; only this project's can have another than 1.
      middle_repeats: blocks of its middle flow; only this project's can have others than 8.
      network: a name of `MODELS`; only this project has others than Xception, and at width 1.
    """

    folder: str
    mode: str
    batch: int
    size: int
    threads: int
    width: float = 1.0
    middle_repeats: int = 8
    network: str = "xception"

    def load(self, name: str) -> Any:
        return np.load(Path(self.folder) / name)


def network(job: Job, **fields: Any) -> Any:
    """Returns the network as the benchmark runs it: without dropout, which Keras Applications and ONNX do not have."""
    from xception_flax import create_model

    scale = dict(width=job.width, middle_repeats=job.middle_repeats) if job.network == "xception" else {}
    return create_model(job.network, num_classes=NUM_CLASSES, dropout_rate=0.0, **scale, **fields)
