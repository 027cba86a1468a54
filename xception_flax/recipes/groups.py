"""What a recipe is made of: groups, each the keywords of one function, and the keys of the loop."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from xception_flax import data, models
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.ranges import check_range
from xception_flax.training import checkpoint, losses, metrics, mixing, optimizers, sharding, steps


@dataclasses.dataclass(frozen=True)
class Loop:
    """The keys of a recipe outside of its groups: how long, how often, how many at a time.

    Attributes:
      batch_size: images a step, over all devices of all hosts.
      epochs: length of the run, in passes over the training split; may be a fraction.
      seed: of initial weights, data order, augmentation, mixing and dropout.
      log_every_steps: steps between two lines of training metrics.
      eval_every_epochs: epochs between two evaluations; the end is always evaluated, and at inf nothing else.
      checkpoint_every_epochs: epochs between two checkpoints; the end is always saved, and at inf nothing else.
      profile: steps to trace into `workdir/profile`, as `FIRST:LAST`, both included; '' for none. The
        first step compiles, and its trace is large.
    """

    batch_size: int
    epochs: float
    seed: int = 0
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    checkpoint_every_epochs: float = 1.0
    profile: str = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs"):
            check_range(f"recipe key {name!r}", getattr(self, name), 0, above=True)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"recipe key 'seed' must be in [0, 2**32), got {written(self.seed)}.")
        profiled_steps(self.profile)


@dataclasses.dataclass(frozen=True)
class Init:
    """What a run begins with; read by `weights.initial.load`.

    Attributes:
      weights: 'random'; 'keras', the published weights from Keras' own cache (`~/.keras/models`, or
        `KERAS_HOME`); a file of Keras (.h5) or timm (.safetensors, .npz); or the workdir of a run, of which
        the averaged weights are taken where it has them.
      checkpoint: of a workdir: latest, best or a step.
    """

    weights: str = "random"
    checkpoint: str = "latest"


def profiled_steps(profile: str) -> range:
    """Returns the steps that the key `profile` names.

    Raises:
      ValueError: it is neither empty nor `FIRST:LAST`.
    """
    if not profile:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", profile)  # as many digits as the last step can have
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"recipe key 'profile' must be FIRST:LAST, got {written(profile)}; 10:12 traces the steps 10, 11 and 12."
        )
    return range(first, last + 1)


class Group(NamedTuple):
    """The function that a group of a recipe feeds.

    Where `selector` is set, that key names an entry of `table`, and the group also takes the
    keywords of the entry. `supplied` are the parameters that the program gives and no recipe can.
    """

    function: Callable[..., Any]
    supplied: frozenset[str] = frozenset()
    selector: str = ""
    table: Mapping[str, Callable[..., Any]] = MappingProxyType({})


def _group(function: Callable[..., Any], supplied: str = "", **choice: Any) -> Group:
    return Group(function, frozenset(supplied.split()), **choice)


GROUPS = {
    "model": _group(models.create_model, "parent", selector="name", table=models.MODELS),
    "init": _group(Init),
    "normalize": _group(steps.create_normalizer),
    "loss": _group(losses.create_loss),
    "metrics": _group(metrics.create_metrics, selector="name", table=metrics.METRICS),
    "optimizer": _group(optimizers.create_optimizer, "schedule", selector="name", table=optimizers.OPTIMIZERS),
    "schedule": _group(optimizers.create_schedule, "run", selector="name", table=optimizers.SCHEDULES),
    "mix": _group(mixing.make_mixing),
    "step": _group(
        steps.make_train_step, "model tx loss metrics normalize abstract_state mesh seed mix backbone_frozen"
    ),
    "data": _group(
        data.load,
        "train batch_size seed process_index process_count processes_per_host split",
        selector="source",
        table=data.SOURCES,
    ),
    "mesh": _group(sharding.create_mesh, "devices"),
    "checkpoint": _group(checkpoint.open_manager, "folder best_metric read_only"),
}


LOOP = _group(Loop)


# Keys that change how a result is computed or shown and not the result: free to differ on resuming.
# On bad images: what a run that did not stop has read is the same.
OPERATIONAL = (
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "data.on_bad_image",
    "log_every_steps",
    "profile",
)


OPERATIONAL_GROUPS = ("mesh", "checkpoint")


# Keys that each host of a run may have of its own.
PER_HOST = ("data.data_dir", "data.num_threads", "data.num_workers")


# Keys of which infinity means something: at the end alone. JSON has none, so it becomes float32's largest number.
ENDLESS = ("eval_every_epochs", "checkpoint_every_epochs")
