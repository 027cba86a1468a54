"""The parts of a recipe: groups, each the keyword arguments of one function, and the keys of the training loop."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from xception_flax import data, models
from xception_flax.recipes.signatures import Key, keys_of
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.ranges import LARGEST, check_range
from xception_flax.text.values import Endless
from xception_flax.training import checkpoint, losses, metrics, mixing, optimizers, sharding, steps

WATCHDOG_ACTIONS = ("report", "stop")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The keys of a recipe outside of its groups.

    Attributes:
      batch_size: images per step, over all devices of all hosts.
      epochs: length of the run, in passes over the training split; may be a fraction.
      seed: of initial weights, data order, augmentation, mixing and dropout.
      log_every_steps: steps between two lines of training metrics.
      eval_every_epochs: epochs between two evaluations; the end is always evaluated, and at inf nothing else.
      checkpoint_every_epochs: epochs between two checkpoints; the end is always saved, and at inf nothing else.
      checkpoint_every_minutes: most minutes between two checkpoints beside those, to the next line of training metrics;
        at inf there are no others. An epoch of ImageNet may take hours.
      patience_epochs: the run ends early if no evaluation for so many epochs was better than the best before; at inf it
        never does. The schedule of the learning rate is that of all `epochs`.
      patience_metric: what should become better: 'loss' or one of the metrics; '' for that of the best checkpoint.
      watchdog_minutes: if the run stands still for so long, waiting for a batch, a step, a save or another process, the
        stack of each thread is written into the workdir; never at inf.
      watchdog_action: what else happens then: 'report' says so, and the run goes on if it can; 'stop' ends it with exit
        code 75, and the same command goes on from the last checkpoint.
      profile: steps to trace into `workdir/profile`, as `FIRST:LAST`, both included; '' for none. The
        first step compiles, and its trace is large.
    """

    batch_size: int
    epochs: float
    seed: int = 0
    log_every_steps: int = 50
    eval_every_epochs: Endless = 1.0
    checkpoint_every_epochs: Endless = 1.0
    checkpoint_every_minutes: Endless = LARGEST
    patience_epochs: Endless = LARGEST
    patience_metric: str = ""
    watchdog_minutes: Endless = 30.0
    watchdog_action: str = "report"
    profile: str = ""

    def __post_init__(self) -> None:
        intervals = ("eval_every_epochs", "checkpoint_every_epochs", "checkpoint_every_minutes", "patience_epochs")
        for name in ("batch_size", "epochs", "log_every_steps", "watchdog_minutes", *intervals):
            check_range(f"recipe key {name!r}", getattr(self, name), 0, above=True)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"recipe key 'seed' must be in [0, 2**32), got {written(self.seed)}.")
        if self.watchdog_action not in WATCHDOG_ACTIONS:
            raise UserError(
                f"unknown watchdog_action {written(self.watchdog_action)}; "
                f"{suggest(self.watchdog_action, WATCHDOG_ACTIONS)}"
            )
        profiled_steps(self.profile)


@dataclasses.dataclass(frozen=True)
class Init:
    """The initial weights of a run. It stands for `weights.initial.load`, which modules of this folder cannot import.

    Attributes:
      weights: 'random'; 'keras', the published weights of this network; or another source as of
        `weights.source.open_source`: a file of Keras, timm or torch, 'timm:NAME', 'hf:OWNER/NAME', or the workdir of a
        run, whose averaged weights are taken if it has them.
      checkpoint: if `weights` is a workdir: latest, best or a step.
      bn_batches: batches of training images over which the statistics of batch normalization are computed anew before
        the first step, with the weights as they are, to stay so (with model.bn_frozen); 0 leaves them.
    """

    weights: str = "random"
    checkpoint: str = "latest"
    bn_batches: int = 0


def profiled_steps(profile: str) -> range:
    """Returns the steps that the key `profile` names.

    Raises:
      UserError: it is neither empty nor `FIRST:LAST`.
    """
    if not profile:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", profile)  # a step number has at most 10 digits
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"recipe key 'profile' must be FIRST:LAST, got {written(profile)}; 10:12 traces the steps 10, 11 and 12."
        )
    return range(first, last + 1)


class Group(NamedTuple):
    """The function that takes a group of a recipe. The keys are its parameters between `/` and `*`.

    If `selector` is set, the value of that key names an entry of `table`, whose keys belong to the group too.
    """

    function: Callable[..., Any]
    selector: str = ""
    table: Mapping[str, Callable[..., Any]] = MappingProxyType({})

    def keys(self, choice: str = "") -> dict[str, Key]:
        """Returns the keys of the function and of the entry `choice`. If both have a key, the function's counts."""
        own = keys_of(self.function)
        entry = keys_of(self.table[choice]) if self.selector else {}
        return {**own, **{name: key for name, key in entry.items() if name not in own}}

    def takes(self, key: str) -> bool:
        """Whether the function or any entry of the table has such a key."""
        return any(key in self.keys(choice) for choice in self.table or ("",))


LOOP = Group(Loop)

#: The groups of a recipe, each with the function whose keywords are its keys.
GROUPS = {
    "model": Group(models.create_model, "name", models.MODELS),
    "init": Group(Init),
    "normalize": Group(steps.create_normalizer),
    "loss": Group(losses.create_loss, "name", {name: entry.function for name, entry in losses.LOSSES.items()}),
    "metrics": Group(metrics.create_metrics, "name", {name: entry.function for name, entry in metrics.METRICS.items()}),
    "optimizer": Group(optimizers.create_optimizer, "name", optimizers.OPTIMIZERS),
    "schedule": Group(optimizers.create_schedule, "name", optimizers.SCHEDULES),
    "mix": Group(mixing.make_mixing),
    "step": Group(steps.make_train_step),
    "data": Group(data.load, "source", data.SOURCES),
    "mesh": Group(sharding.create_mesh),
    "checkpoint": Group(checkpoint.open_manager),
}

PARTS = {"": LOOP, **GROUPS}  # all keys of a recipe

# Keys that change how a result is computed or shown, but not the result. They may change when a run is resumed.
# on_bad_image and on_nonfinite are among them, because a run that has not stopped has met no bad image or value.
OPERATIONAL = (
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "data.on_bad_image",
    "data.path",
    "checkpoint_every_minutes",
    "log_every_steps",
    "profile",
    "step.on_nonfinite",
    "watchdog_minutes",
    "watchdog_action",
)

OPERATIONAL_GROUPS = ("mesh", "checkpoint")

# Keys that may differ between the hosts of a run.
PER_HOST = ("data.data_dir", "data.num_threads", "data.num_workers", "data.path")
