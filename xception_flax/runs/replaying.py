"""Computes a step of a run again, from the nearest older checkpoint, to see where it went wrong.

Data, order, augmentation and random keys are functions of the seed and the step, so the step is the same one: to the
bit on the same devices, and otherwise up to rounding. Nothing is written.
"""

import contextlib
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.data import sampling
from xception_flax.data.batch import Batch
from xception_flax.display import console
from xception_flax.models import ops
from xception_flax.runs import history
from xception_flax.runs.saving import check_same_data
from xception_flax.runs.workdir import CHECKPOINTS, HISTORY
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint, metrics, sharding
from xception_flax.training.metrics import Sum
from xception_flax.training.mixing import is_cutmix, mixing_key
from xception_flax.training.probing import Layer, Probed
from xception_flax.training.program import Program, create_program, make_probe
from xception_flax.training.state import TrainState

STEPS_IN_FLIGHT = 2  # as in train.py
MAX_LISTED = 3  # arrays in a message

# (program, mesh, training split) -> the state before the first step.
Begin = Callable[[Program, Mesh, data.Split], TrainState]


class Example(NamedTuple):
    """An image of the batch.

    Attributes:
      row: its place in the batch.
      index: its number in the split.
      name: of its file or record; 'image INDEX' where there is none.
      labels: the names of its classes.
      no_class: its labels that are the number of no class.
      counts: whether it counts: False for one that could not be decoded.
      pixels_finite: whether its pixels, mixed and normalized, are finite.
      loss: its own.
      mixed_with: the row of the image that it was mixed with; None for none.
    """

    row: int
    index: int
    name: str
    labels: tuple[str, ...]
    no_class: tuple[int, ...]
    counts: bool
    pixels_finite: bool
    loss: float
    mixed_with: int | None

    @property
    def suspicious(self) -> bool:
        """Whether it may be why a step is not finite."""
        return bool(self.no_class) or not self.pixels_finite or not math.isfinite(self.loss)


class Replayed(NamedTuple):
    """A step that was computed again.

    Attributes:
      step: its number; 1 is the first.
      start: the step of the checkpoint that it was computed from; 0 for the initial weights.
      devices: that computed it, in words.
      values: 'loss', 'gradient_norm' and the metrics of the step, as the step itself gives them.
      probed: the step from inside.
      batch: as it came from the data, not mixed.
      examples: the images of the batch.
      mixing: how the batch was mixed, in words; '' if the recipe mixes none.
      before, after: arrays of the state before and after the step that are not finite.
      earlier: the first step on the way that was not finite; None if there was none.
      earlier_update: whether only the update of that step was not, its loss and gradient were.
      skipped: whether the step changed nothing, by `step.on_nonfinite=skip`.
      notes: how this replay differs from the run, and whether it found what the run has.
    """

    step: int
    start: int
    devices: str
    values: dict[str, float]
    probed: Probed
    batch: dict[str, np.ndarray]
    examples: list[Example]
    mixing: str
    before: list[str]
    after: list[str]
    earlier: int | None
    earlier_update: bool
    skipped: bool
    notes: list[str]

    def first(self) -> str:
        """Returns what is the first that is not finite, forward and then backward; '' if all is finite."""
        if self.before:
            return f"the state before the step: {_listed(self.before)}"
        if not self.probed.pixels.all():
            return f"the input: pixels of {counted(int((~self.probed.pixels).sum()), 'image')}"
        for layer in self.probed.layers:
            if layer.output.not_finite:
                return f"forward, the output of {layer.name}: {_share(layer.output.not_finite, layer)}"
        if not math.isfinite(self.probed.loss + self.probed.penalty):
            return f"the loss: {self.probed.loss} with a penalty of {self.probed.penalty}"
        for layer in reversed(self.probed.layers):
            if layer.output_gradient.not_finite:
                return f"backward, the gradient of the output of {layer.name}"
            if layer.weight_gradient is not None and layer.weight_gradient.not_finite:
                return f"backward, the gradient of the weights of {layer.name}"
        if not math.isfinite(self.values.get("gradient_norm", 0.0)):
            return "the norm of the gradient, though each of its values is finite"
        if self.skipped:
            return "the update, which was left out (step.on_nonfinite=skip)"
        return f"the update: the new values of {_listed(self.after)}" if self.after else ""


def origin(start: int) -> str:
    """Returns in words what `Replayed.start` means."""
    return f"the checkpoint of step {start:,}" if start else "the initial weights"


def _share(count: int, layer: Layer) -> str:
    return f"{counted(count, 'value')} in {counted(int(layer.images.sum()), 'image')}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def replay(workdir: Path, config: ConfigDict, step: int | None, begin: Begin, *, own_mesh: bool = False) -> Replayed:
    """Computes a step of the run in `workdir` again. The run may be going on.

    Args:
      workdir: of the run.
      config: its recipe; where the data is may be another place.
      step: which one, from 1 on; None to look for the first one after the newest checkpoint that is not finite, up to
        where the run would have recorded next.
      begin: makes the initial state, where no checkpoint is older than the step.
      own_mesh: take the mesh of `config` as it is, instead of the one that the run had, or what there is.

    Raises:
      UserError: there is no such step, it cannot be computed here, or none was found.
    """
    with contextlib.ExitStack() as stack:
        run = _rebuild(workdir, config, step, stack, own_mesh)
        start, program = run.start, run.program

        def first_state() -> TrainState:
            if not start:
                return begin(program, run.mesh, run.split)
            with _advice(start):
                return checkpoint.restore_state(run.manager, program.abstract_state, start)

        end = step if step is not None else _next_record(run)
        if end > program.length.total_steps:
            what = "it is finished" if step is None else f"there is no step {step:,}"
            steps = program.length.total_steps
            raise UserError(f"the run in {workdir} has {counted(steps, 'step')}, and {what}; give --step 1 to {steps}.")
        state = first_state()
        console.say(f"from {origin(start)}, {counted(end - start, 'step')}")
        with console.waiting("compiling the step"):
            abstract_batch = sharding.abstract_batch(run.mesh, run.split.batch_shapes)
            train_step = program.train_step.lower(program.abstract_state, abstract_batch).compile()
        found = _walk(train_step, run, state, end, searching=step is None)
        if found is None:
            raise UserError(
                f"all steps from {start + 1:,} to {end:,} of {workdir} are finite, where it would have recorded next; "
                "give the step to look at by --step."
            )
        at, before, batch, after, sums = found
        not_finite_before = checkpoint.not_finite(before)
        earlier = next((i for i, s in enumerate(sums[:-1], start + 1) if not _is_finite(s)), None)
        earlier_update = False
        # An update that overflows shows in no loss or gradient of its own step: look at the states too.
        if not_finite_before:
            first = _walk(train_step, run, first_state(), earlier or at - 1, searching=True)
            if first is not None:
                earlier, earlier_update = first[0], _is_finite(first[-1][-1])
        notes = [*run.notes, *_compared(run.recorded, start, sums)]
        if at in run.saved:
            notes.append(f"checkpoint of step {at:,}: {_same_state(run, after)}")
        on_devices = sharding.global_batch(run.mesh, batch)
        with console.waiting("looking at each layer"):
            probed = jax.block_until_ready(make_probe(run.config, program, run.mesh, run.shares)(before, on_devices))
        return Replayed(
            step=at,
            start=start,
            devices=f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
            values={name: s.total / s.count for name, s in sums[-1].items() if s.count},
            probed=probed,
            batch=batch,
            examples=_examples(run.split, at, batch, probed),
            mixing=_mixing(run.config, at, probed),
            before=not_finite_before,
            after=checkpoint.not_finite(after),
            earlier=earlier,
            earlier_update=earlier_update,
            skipped=bool(sums[-1].get("skipped_steps", Sum(0.0, 1.0)).total),
            notes=notes,
        )


# The run, as it can be computed here ---------------------------------------------------------------


class _Run(NamedTuple):
    """What computes the steps of a run again.

    Attributes:
      config: its recipe, with the lowering that computes here.
      split: its training data.
      shares: of the classes, if the loss is weighted by them.
      mesh: of the devices here.
      program: compiled for them.
      manager: of its checkpoints; None if there is none.
      saved: the steps that have a checkpoint.
      start: the newest of them that is older than the step; 0 for none.
      recorded: the records of training.
      notes: how it differs from the run.
    """

    config: ConfigDict
    split: data.Split
    shares: np.ndarray | None
    mesh: Mesh
    program: Program
    manager: checkpoint.Checkpoints | None
    saved: list[int]
    start: int
    recorded: list[dict[str, Any]]
    notes: list[str]


def _rebuild(workdir: Path, config: ConfigDict, step: int | None, stack: contextlib.ExitStack, own_mesh: bool) -> _Run:
    """Returns the run in `workdir`; the arguments are those of `replay`, and `stack` closes its checkpoints."""
    config, notes, manager = config.copy_and_resolve_references(), [], None
    split = data.load(**config.data, batch_size=config.batch_size, seed=config.seed, train=True)
    names = split.class_names
    if config.model.num_classes != len(names):
        raise UserError(f"the data has {counted(len(names), 'class')}, the run {config.model.num_classes}.")
    if checkpoint.has_steps(workdir / CHECKPOINTS):
        best_metric = metrics.METRICS[config.metrics.name].best
        opened = checkpoint.open_manager(workdir / CHECKPOINTS, best_metric=best_metric, read_only=True)
        manager = stack.enter_context(opened)
    saved = checkpoint.steps_in(manager) if manager is not None else []
    start = max((s for s in saved if step is None or s < step), default=0)
    shape = None
    if start:
        with _advice(start):
            shape, meta = checkpoint.mesh_shape(manager, start), checkpoint.read_meta(manager, start)
        check_same_data(meta, split, workdir)
    mesh = sharding.create_mesh(**config.mesh) if own_mesh else _mesh(config, shape)
    if shape is not None and math.prod(shape) != mesh.size:
        notes.append(
            f"the run computed on {counted(math.prod(shape), 'device')}, this is on {mesh.size}: sums may be "
            "rounded otherwise"
        )
    sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)
    try:
        ops.check_lowering(config.step.lowering, mesh.devices.flat[0].device_kind)
    except UserError as error:
        notes.append(f"computed with step.lowering='platform', which may round otherwise: {error}")
        config.step.lowering = "platform"
    shares = sampling.class_shares(split.source) if config.loss.class_weights == "balanced" else None
    recorded = history.read_kept(workdir / HISTORY)
    return _Run(
        config=config,
        split=split,
        shares=shares,
        mesh=mesh,
        program=create_program(config, mesh, split.image_shape, split.num_images, shares),
        manager=manager,
        saved=saved,
        start=start,
        recorded=[record for record in recorded if "train/learning_rate" in record],
        notes=notes,
    )


@contextlib.contextmanager
def _advice(start: int) -> Iterator[None]:
    """Says what to do here about a damaged checkpoint, in place of what to do in training."""
    try:
        yield
    except UserError as error:
        raise UserError(error.reason, advice=f"give --step {start} or less, which begins at an older one") from None


def _same_state(run: _Run, state: TrainState) -> str:
    """Returns in words whether `state` is what the checkpoint of its step has."""
    try:
        different = checkpoint.differs(run.manager, state)
        if not different:
            return "the state has its checksums, bit for bit"
        said = f"the state differs from it in {_listed(different)}"
        saved = checkpoint.restore_state(run.manager, run.program.abstract_state, int(state.step))
    except UserError as error:
        return f"was not compared, {error.reason}"
    return f"{said}, by {_largest_difference(state, saved):.1g} of an array's largest value at most"


def _largest_difference(state: TrainState, saved: TrainState) -> float:
    """Returns the largest difference of two values, as a share of the largest value of the saved array."""
    largest = 0.0
    for here, there in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
        here, there = np.asarray(here, np.float64), np.asarray(there, np.float64)
        if (differ := here != there).any():
            difference = np.abs(here[differ] - there[differ]).max() / np.abs(there).max()
            largest = max(largest, float(difference) if math.isfinite(difference) else math.inf)
    return largest


def _mesh(config: ConfigDict, shape: tuple[int, ...] | None) -> Mesh:
    """Returns the mesh that the run had, on the first devices; with too few, one of as many as can share a batch."""
    devices, images = jax.devices(), config.batch_size // config.step.accumulation_steps
    if shape is None:
        with contextlib.suppress(UserError):  # of a recipe for more devices
            mesh = sharding.create_mesh(**config.mesh)
            if images % mesh.size == 0:
                return mesh
    elif len(shape) == 2 and math.prod(shape) <= len(devices):
        return sharding.create_mesh(*shape, devices=devices[: math.prod(shape)])
    count = max(n for n in range(1, len(devices) + 1) if images % n == 0)
    return sharding.create_mesh(count, devices=devices[:count])


def _next_record(run: _Run) -> int:
    """Returns the first step, after the newest checkpoint and the newest record, that the run would have looked at."""
    config, length = run.config, run.program.length
    newest = max([run.start, *(record["step"] for record in run.recorded)])
    ends = (config.eval_every_epochs, config.checkpoint_every_epochs)
    for step in range(newest + 1, length.total_steps + 1):
        if step % config.log_every_steps == 0 or any(length.ends_interval(step, every) for every in ends):
            return step
    return max(newest + 1, length.total_steps)


# Steps ---------------------------------------------------------------------------------------------


# The last step, the state before it, its batch, the state after it, and the sums of all steps.
Walked = tuple[int, TrainState, Batch[np.ndarray], TrainState, list[dict[str, Sum]]]


def _walk(
    train_step: Callable[[TrainState, Batch[jax.Array]], tuple[TrainState, dict[str, Sum]]],
    run: _Run,
    state: TrainState,
    end: int,
    *,
    searching: bool,
) -> Walked | None:
    """Computes the steps after `run.start` up to `end`; if `searching` only up to the first that is not finite.

    Returns None if `searching` and all are finite. It takes the memory of `state`.
    """
    sums: list[dict[str, Sum]] = []
    pending: deque[dict[str, Sum]] = deque()
    with (
        contextlib.closing(run.split.batches(run.start)) as batches,
        console.counting("replaying", end - run.start, "step") as advance,
    ):
        for step in range(run.start + 1, end + 1):
            batch = next(batches)
            kept = searching or step == end
            before = jax.tree.map(jnp.copy, state) if kept else None  # the step takes the memory of its argument
            state, of_step = train_step(state, sharding.global_batch(run.mesh, batch))
            pending.append(of_step)
            while len(pending) > (0 if kept else STEPS_IN_FLIGHT):
                sums.append(_on_host(pending.popleft()))
            advance(1)
            wrong = searching and (not _is_finite(sums[-1]) or bool(checkpoint.not_finite(state)))
            if wrong or (step == end and not searching):
                assert before is not None  # kept of this step
                return step, before, batch, state, sums
    return None


def _on_host(sums: Mapping[str, Sum]) -> dict[str, Sum]:
    return {name: Sum(float(total), float(count)) for name, (total, count) in jax.device_get(dict(sums)).items()}


def _is_finite(sums: Mapping[str, Sum]) -> bool:
    """Whether loss and gradient of a step are finite. One that was skipped is not."""
    skipped = sums.get("skipped_steps", Sum(0.0, 1.0)).total
    return not skipped and math.isfinite(sums["loss"].total) and math.isfinite(sums["gradient_norm"].total)


def _compared(recorded: Sequence[Mapping[str, Any]], start: int, sums: Sequence[Mapping[str, Sum]]) -> list[str]:
    """Returns a line on whether the means of the replayed steps are those that the run recorded; [] without records.

    A record is the mean since the one before it, or since the run was resumed.
    """
    compared, largest, end = 0, 0.0, start + len(sums)
    for previous, record in itertools.pairwise([{"step": 0}, *recorded]):
        if start < record["step"] <= end:
            begins = range(max(previous["step"], start), record["step"])
            found = min(_difference(record, sums[begin - start : record["step"] - start]) for begin in begins)
            # A record that began before the checkpoint has steps that were not computed again, unless the run was
            # resumed from there.
            if previous["step"] >= start or not found:
                compared, largest = compared + 1, max(largest, found)
    if not compared:
        return []
    said = "equal, to the last digit"
    if largest:
        said = f"differ by {largest:.1g} of a value, at most"
    if math.isinf(largest):
        said = "differ: a value is finite in the run and not here, or the reverse"
    return [f"{counted(compared, 'record')} of the run: {said}"]


def _difference(record: Mapping[str, Any], sums: Sequence[Mapping[str, Sum]]) -> float:
    """Returns the largest difference between a record and the means of steps, relative to the record.

    It is infinite where a value is finite in one of the two alone; one that is finite in neither is left out.
    """
    totals = metrics.Accumulator()
    for each in sums:
        totals.add(each)
    largest = 0.0
    for name, mean in totals.means().items():
        there = record.get(f"train/{name}")
        if name == "skipped_steps" or there is None:
            continue
        if math.isfinite(mean) != math.isfinite(there):
            return math.inf
        if not math.isfinite(mean):
            continue
        largest = max(largest, abs(mean - there) / max(abs(there), sys.float_info.min))
    return largest


# Images --------------------------------------------------------------------------------------------


def _examples(split: data.Split, step: int, batch: Batch[np.ndarray], probed: Probed) -> list[Example]:
    names, found = split.class_names, []
    mixed = "share" in probed.batch and probed.batch["share"][0] < 1
    for row, index in enumerate(split.indices(step - 1).tolist()):
        label = batch["labels"][row]
        numbers = np.flatnonzero(label).tolist() if label.ndim else [int(label)]
        found.append(
            Example(
                row=row,
                index=index,
                name=str(split.source[index].get("name", f"image {index}")),
                labels=tuple(names[number] for number in numbers if 0 <= number < len(names)),
                no_class=tuple(number for number in numbers if not 0 <= number < len(names)),
                counts=bool(batch["mask"][row]) if "mask" in batch else True,
                pixels_finite=bool(probed.pixels[row]),
                loss=float(probed.losses[row]),
                mixed_with=row ^ 1 if mixed else None,
            )
        )
    return found


def _mixing(config: ConfigDict, step: int, probed: Probed) -> str:
    """Returns how the batch was mixed, in words; '' if the recipe mixes none."""
    if "share" not in probed.batch:
        return ""
    share = float(probed.batch["share"][0])
    if share == 1:
        return "this batch was not mixed"
    kind = "CutMix" if bool(is_cutmix(mixing_key(config.seed, step - 1), **config.mix)) else "mixup"
    return f"{kind}: images 2 i and 2 i + 1 were mixed, shares {share:.3f} and {1 - share:.3f}"
