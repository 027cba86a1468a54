"""Trains a network by a recipe.

All files of a run are in its workdir: config.json (the recipe with every default filled in),
metrics.jsonl, tensorboard/, checkpoints/, curves.png. The same command resumes a run that stopped.
"""

import signal

from xception_flax.host import libraries, signals

if __name__ == "__main__":
    signals.handle_before_imports()
    libraries.check_libraries(training=True)

import argparse
import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli
from xception_flax.data import sampling
from xception_flax.data.batch import Batch
from xception_flax.display import console
from xception_flax.host import allocator, parents, processes, restarting
from xception_flax.host.watchdog import Watchdog
from xception_flax.models import costs
from xception_flax.recipes import groups, reading
from xception_flax.recipes.comparing import alike
from xception_flax.runs import history, profiling, progress
from xception_flax.runs.saving import (
    EVALUATION_DUE,
    SKIPPED,
    SaveClock,
    StopTogether,
    advice_where_not_finite,
    check_same_data,
    samples,
    save_where_input_ends,
    training_data,
)
from xception_flax.runs.workdir import (
    CHECKPOINTS,
    CURVES,
    HISTORY,
    PROFILE,
    check_claim,
    check_workdir,
    claim,
    has_checkpoints,
    how_to_train_on,
    remember,
    stacks,
)
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint, metrics, sharding
from xception_flax.training.evaluation import BrokenOff, evaluate
from xception_flax.training.length import RunLength
from xception_flax.training.patience import Patience
from xception_flax.training.program import Program, create_program, make_statistics
from xception_flax.training.recalibration import recalibrate
from xception_flax.training.state import TrainState
from xception_flax.weights import initial

EXAMPLES = """\
  {program} --config digits --workdir runs/digits
  {program} --config imagenet --workdir /shared/runs/1 --distributed
  {program} --config folder:photos --workdir runs/photos --config.epochs=30
  {program} --config digits --workdir runs/lr --config.optimizer.learning_rate=0.1"""

OUT_OF_MEMORY = (
    "Lower batch_size or data.image_size, compute a batch in parts (step.accumulation_steps=4) or set "
    "model.dtype=bfloat16, in a new workdir. Or use more devices and split the state over them (mesh.fsdp)."
)

NOT_FINITE = "a loss, a gradient or weights that are not finite"
MAX_SKIPPED_IN_A_ROW = 100  # steps, with step.on_nonfinite=skip: more do not pass by themselves

# How many steps the host runs ahead of the devices: enough to keep them busy, and so few that collectives on CPU
# devices never run out of threads.
MAX_STEPS_IN_FLIGHT = 2


def main(argv: list[str], program: str = "python train.py") -> int:
    """Runs the command; `program` is its name in the help."""
    parser = cli.parser(program, __doc__, EXAMPLES.format(program=program))
    cli.add_recipe(parser)
    parser.add_argument("--workdir", required=True, type=cli.directory, help="folder of the run; may be new")
    parser.add_argument(
        "--restarts",
        type=cli.positive,
        metavar="N",
        help="start it again if it is killed or fails by what may pass, up to N times without a new checkpoint",
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.restarts:
        return restarting.run(
            once(argv), arguments.restarts, lambda: checkpoint.newest_step(arguments.workdir / CHECKPOINTS)
        )
    parents.end_with_named()
    config = reading.load(arguments.config, overrides)
    cli.start(arguments)
    try:
        with cli.out_of_memory(OUT_OF_MEMORY):
            return train(config, arguments.workdir)
    except signals.Stopped as stopped:  # while the input stood still
        parents.end_spawned()
        console.say(stopped.left)
        os._exit(128 + stopped.number)  # Python's own end would wait for the threads that read


def once(argv: list[str]) -> list[str]:
    """Returns this command without `--restarts`."""
    restarts = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    restarts.add_argument("--restarts")
    return [sys.executable, __file__, *restarts.parse_known_args(argv)[1]]


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs a resolved recipe to its end, from the newest checkpoint in `workdir` if there is one.

    Returns:
      The exit code: 0 if the run is finished; 128 + N if signal N stopped it, after a checkpoint was written.

    Raises:
      UserError: the recipe cannot be run here. At most the config.json of an empty run has been written.
    """
    with contextlib.ExitStack() as stack:
        # Prepare. Mistakes show here, before anything is written.
        check_workdir(workdir, config)
        checkpoint.check_options(**config.checkpoint)
        stop_where_still = config.watchdog_action == "stop"
        watchdog = stack.enter_context(Watchdog(config.watchdog_minutes, stacks(workdir), stop=stop_where_still))
        watchdog.sign("the other hosts to begin")
        processes.agree("recipe", lambda: alike(config) | processes.software())
        first_host, begun = jax.process_index() == 0, has_checkpoints(workdir)
        if first_host and not begun:
            check_not_lost(workdir)
        mesh = sharding.create_mesh(**config.mesh)
        sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)
        watchdog.sign("the data to be opened, on every host")
        train_data, eval_data = load_data(config, begun)
        shares = class_shares(config, train_data)
        program = create_program(config, mesh, train_data.image_shape, train_data.num_images, shares)
        length, total_steps, weights = program.length, program.length.total_steps, program.weights
        profiled = steps_to_profile(config, total_steps)
        patience = Patience(config.metrics.name, config.patience_metric, config.patience_epochs, length)
        watchdog.sign("the steps to be traced")
        abstract_batch = check_program(program, mesh, train_data, eval_data)
        notes = [data.unread_of((train_data.source, eval_data.source)), describe_images(train_data)]
        notes += [] if begun else [split.check_max_value() for split in (train_data, eval_data)]
        watchdog.sign("the initial weights to be read")
        pretrained = None if begun else load_initial(config, program, mesh, train_data)

        # Begin, or resume from the newest checkpoint.
        if first_host:
            stack.enter_context(claim(workdir, config))
        processes.check_shared(workdir)
        watchdog.sign("the checkpoints to be opened")
        best_metric = metrics.METRICS[config.metrics.name].best
        manager = stack.enter_context(
            checkpoint.open_manager(
                workdir / CHECKPOINTS,
                best_metric=best_metric,
                abstract_state=program.abstract_state,
                **config.checkpoint,
            )
        )
        stack.enter_context(advice_where_not_finite(manager, workdir))
        start = find_start(config, manager, workdir, train_data, eval_data, pretrained)
        start_step, evaluation_due = start.step, start.evaluation_due
        if first_host:
            remember(workdir, config)  # the mesh or the data's folder may have changed
        first_step = start_step if evaluation_due else start_step + 1
        if start_step:
            patience.add_history(history.read_kept(workdir / HISTORY), first_step - 1)
        if start.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise gave_up(start.skipped_in_a_row, start_step)
        if not evaluation_due and (start_step >= total_steps or patience.is_over):
            return already_finished(workdir, start_step)
        # The step is compiled while the state is created or read.
        background = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        compiling = background.submit(program.train_step.lower(program.abstract_state, abstract_batch).compile)
        watchdog.sign("the initial state" if pretrained else f"the checkpoint of step {start_step:,} to be read")
        train_state, note = begin_or_resume(
            config, program, mesh, manager, train_data, start_step, pretrained, watchdog
        )
        if first_host and not start_step:
            notes.append(describe_lost(workdir))
        del pretrained  # the state has copies of its arrays
        report = stack.enter_context(
            open_report(config, workdir, program, mesh, train_data, start_step, unevaluated=evaluation_due)
        )
        for line in filter(None, (describe(config, workdir, program, mesh), *manager.warnings, *notes, note)):
            report.say(line)
        profile = stack.enter_context(profiling.Profile(profiled, workdir / PROFILE, report, enabled=first_host))

        # Loop.
        totals = metrics.Accumulator(MAX_STEPS_IN_FLIGHT, start.skipped_in_a_row)
        save_clock = SaveClock(config.checkpoint_every_minutes)
        batches = stack.enter_context(contextlib.closing(train_data.batches(start_step)))

        def meta() -> dict[str, Any]:
            due = {EVALUATION_DUE: True} if evaluation_due else {}
            skipped = totals.skipped_in_a_row()
            return start.meta | due | ({SKIPPED: skipped} if skipped else {})

        def settle(step: int) -> None:
            for sums in totals.pending:
                metrics.check_finite(sums, step)
            check_claim(workdir)
            if not totals.is_empty:
                record(config, program, train_data, report, totals, step)
            report.sync()

        # A person may look at the output of any host.
        answer = report.say if first_host else console.say
        several = jax.process_count() > 1
        stop = stack.enter_context(signals.StopRequest(several_processes=several, say=answer))
        asked = StopTogether(stop)
        stack.enter_context(save_where_input_ends(manager, lambda: train_state, settle, meta))

        def evaluating(*batch: Any) -> None:
            watchdog.again()
            if asked():  # an evaluation may take longer than the notice that a machine gets
                raise BrokenOff

        for step in range(first_step, total_steps + 1):
            training = step > start_step  # otherwise only the evaluation of this step is missing
            if training:
                with profile.step(step, totals.pending):
                    watchdog.sign(f"the batch of step {step:,}")
                    with report.input_wait(), stop.patience():
                        batch = next(batches)
                    watchdog.sign(f"step {step:,}" + (", which is being compiled" if step == start_step + 1 else ""))
                    train_state, sums = compiling.result()(train_state, sharding.global_batch(mesh, batch))
                    totals.add(sums)
                report.advance(step)
            if step == start_step + 1:
                jax.block_until_ready((sums, program.learning_rate(step)))  # learning_rate compiles here
                report.compiled(step)
                allocator.release_free_memory()

            stopping = asked()
            last = step == total_steps
            recording = training and (last or stopping or step % config.log_every_steps == 0)
            evaluation_due = last or not training or length.ends_interval(step, config.eval_every_epochs)
            saving = last or stopping or length.ends_interval(step, config.checkpoint_every_epochs)
            giving_up = totals.skipped_in_a_row() >= MAX_SKIPPED_IN_A_ROW if recording else False
            saving = saving or giving_up or (recording and save_clock.is_due())
            if training and (recording or evaluation_due or saving):
                metrics.check_finite(sums, step)
                checkpoint.check_saves(manager)
                if first_host:
                    check_claim(workdir)
            if recording:
                record(config, program, train_data, report, totals, step)
            results = None
            if evaluation_due and not stopping and not giving_up:
                watchdog.sign(f"the evaluation after step {step:,}")
                variables = train_state.variables(weights)
                with report.pause("evaluation"), contextlib.suppress(BrokenOff):
                    results = evaluate(
                        program.eval_step, variables, eval_data, mesh, on_batch=evaluating, waiting=stop.patience
                    )
                stopping = results is None
                if stopping and not totals.is_empty:
                    record(config, program, train_data, report, totals, step)
            if results is not None:
                report.evaluation(step, results, weights)
                patience.add(step, results)
                evaluation_due, last = False, last or patience.is_over
            if (saving or last or stopping) and (training or results is not None):
                watchdog.sign(f"the checkpoint of step {step:,}")
                with report.pause("checkpoint"):
                    if first_host:
                        check_claim(workdir)  # an evaluation may have taken an hour
                    report.sync()
                    checkpoint.save(manager, train_state, meta(), results)
                    save_clock.saved()
                report.checkpoint(step)
            if giving_up:
                checkpoint.check_saves(manager, wait=True)
                raise gave_up(totals.skipped_in_a_row(), step)
            if last or stopping:
                break

        # Finish.
        watchdog.sign("the last checkpoint, which is being written")
        checkpoint.check_saves(manager, wait=True)
        if evaluation_due or not last:
            also = ", with its evaluation" if evaluation_due else ""
            report.say(f"stopped at step {step}, checkpoint written; the same command goes on from there{also}")
            return 128 + (stop.signal or signal.SIGTERM)  # perhaps only another process received it
        if step < total_steps:
            report.say(describe_end(patience, length))
    if first_host:
        show_results(config, workdir, results, weights)
    return 0


# Prepare -------------------------------------------------------------------------------------------


def load_data(config: ConfigDict, begun: bool) -> tuple[data.Split, data.Split]:
    """Returns the training split and the evaluation split, which must be the same on all hosts.

    Args:
      begun: whether the workdir has checkpoints; the hosts must agree on this too.

    Raises:
      UserError: the splits have different classes, or fewer than two, or not as many as the recipe; or hosts differ.
    """
    load = dict(
        **config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        processes_per_host=processes.per_host(),
    )
    splits, mistakes = [], []
    for is_train in (True, False):
        try:
            splits.append(data.load(**load, train=is_train))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:  # of both splits at once, since they are mended in the same folder and recipe
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    train_data, eval_data = splits
    if len(train_data.class_names) < 2:
        raise UserError(f"the data has one class only, {train_data.class_names[0]!r}; expected two or more.")
    data.check_class_names(train_data.class_names, eval_data)
    same = {"whether the workdir has checkpoints": begun}
    processes.agree("data", lambda: train_data.identity() | eval_data.identity() | same)
    if config.model.num_classes != (there := len(train_data.class_names)):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but the data has {counted(there, 'class')}; "
            f"set --config.model.num_classes={there}."
        )
    return train_data, eval_data


def class_shares(config: ConfigDict, train_data: data.Split) -> np.ndarray | None:
    """Returns the share of the images that has each class, if the loss balances them.

    Raises:
      UserError: the data set does not know it without reading all images.
    """
    if config.loss.class_weights != "balanced":
        return None
    if (shares := sampling.class_shares(train_data.source)) is None:
        raise UserError(
            f"loss.class_weights=balanced: source {config.data.source!r} does not know how many images each class has; "
            "give a number for each class."
        )
    return shares


def check_program(
    program: Program, mesh: Mesh, train_data: data.Split, eval_data: data.Split
) -> Batch[jax.ShapeDtypeStruct]:
    """Traces both steps, so that mistakes in shapes show before anything is compiled.

    Returns:
      Shape, type and sharding of each array of a training batch.

    Raises:
      UserError: the data does not fit the program, or the state does not fit the devices.
    """
    sharding.check_state_fits(mesh, program.abstract_state)
    abstract_batch = sharding.abstract_batch(mesh, train_data.batch_shapes)
    jax.eval_shape(program.train_step, program.abstract_state, abstract_batch)
    variables = program.abstract_state.variables(program.weights)
    jax.eval_shape(program.eval_step, variables, sharding.abstract_batch(mesh, eval_data.batch_shapes))
    return abstract_batch


def load_initial(config: ConfigDict, program: Program, mesh: Mesh, train_data: data.Split) -> initial.Initial:
    """Returns the weights that the run begins with."""
    return initial.load(
        **config.init,
        **config.normalize,
        model=program.model,
        image_shape=train_data.image_shape,
        mesh=mesh,
        class_names=train_data.class_names,
    )


def steps_to_profile(config: ConfigDict, total_steps: int) -> range:
    """Returns the steps to trace.

    Raises:
      UserError: the run ends before the last of them.
    """
    steps = groups.profiled_steps(config.profile)
    if steps and steps[-1] > total_steps:
        raise UserError(f"profile={config.profile} is not within the {counted(total_steps, 'step')} of this run.")
    return steps


# Begin or resume -----------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
      step: of the newest checkpoint; 0 without one.
      meta: the JSON values for the checkpoints to come.
      evaluation_due: whether an evaluation of this step was broken off, so that it comes first.
      skipped_in_a_row: how many steps up to this one were skipped one after the other; 0 where no more are skipped.
    """

    step: int
    meta: dict[str, Any]
    evaluation_due: bool
    skipped_in_a_row: int


def find_start(
    config: ConfigDict,
    manager: checkpoint.Checkpoints,
    workdir: Path,
    train_data: data.Split,
    eval_data: data.Split,
    pretrained: initial.Initial | None,
) -> Start:
    """Returns where the run begins: at the newest checkpoint, if there is one.

    Args:
      config: the recipe, resolved.
      manager: of the checkpoints of `workdir`.
      workdir: of the run.
      train_data: the training split.
      eval_data: the evaluation split.
      pretrained: the weights that the run begins with; None if it has begun before.

    Raises:
      UserError: hosts differ, the checkpoint is of other data, or the checkpoints are gone.
    """
    start_step = manager.latest_step() or 0
    seen = samples(train_data, eval_data)
    meta = training_data(train_data) | seen | {"init": pretrained.meta() if pretrained else None}
    processes.agree("start", lambda: {"the newest checkpoint": start_step, "the initial weights": meta["init"]})
    if start_step:
        saved = checkpoint.read_meta(manager, start_step)
        check_same_data(saved, train_data, workdir, seen)
        evaluation_due = EVALUATION_DUE in saved and checkpoint.lacks_metrics(manager, start_step)
        counted_on = config.step.on_nonfinite == "skip" and isinstance(saved.get(SKIPPED), int)
        skipped = saved[SKIPPED] if counted_on else 0
        return Start(start_step, meta | {"init": saved.get("init")}, evaluation_due, skipped)
    if pretrained is None:
        raise UserError(f"the checkpoints in {workdir} were removed while this command began; start it again.")
    return Start(0, meta, evaluation_due=False, skipped_in_a_row=0)


def begin_or_resume(
    config: ConfigDict,
    program: Program,
    mesh: Mesh,
    manager: checkpoint.Checkpoints,
    train_data: data.Split,
    start_step: int,
    pretrained: initial.Initial | None,
    watchdog: Watchdog,
) -> tuple[TrainState, str]:
    """Returns the state of step `start_step`, and a line about its origin; '' for random weights."""
    if start_step:
        train_state = checkpoint.restore_state(manager, program.abstract_state, start_step)
        return train_state, f"going on from the checkpoint of step {start_step}"
    train_state = program.init(jax.random.key(config.seed), pretrained.arrays)
    note = str(pretrained) if config.init.weights != "random" else ""
    if config.init.bn_batches:
        train_state = recalibrated(config, program, mesh, train_data, train_state, watchdog)
        note += f"{'; ' if note else ''}statistics of {counted(config.init.bn_batches, 'batch')} (init.bn_batches)"
    return train_state, note


def recalibrated(
    config: ConfigDict,
    program: Program,
    mesh: Mesh,
    train_data: data.Split,
    train_state: TrainState,
    watchdog: Watchdog,
) -> TrainState:
    """Returns the state with statistics of batch normalization of the first training batches; see `recalibration`.

    Raises:
      UserError: each of the batches has a bad image, which is black and would count.
    """
    statistics_step, count = make_statistics(config, program.model, mesh), config.init.bn_batches
    with contextlib.ExitStack() as stack:
        advance = None
        if jax.process_index() == 0:
            what = "statistics of batch normalization"
            advance = stack.enter_context(console.counting(what, count * config.batch_size, "image"))
        batches = stack.enter_context(contextlib.closing(train_data.batches()))

        def on_devices() -> Iterator[Batch[jax.Array]]:
            for number, batch in enumerate(itertools.islice(batches, count), 1):
                watchdog.sign(f"batch {number:,} of {count:,} for statistics of batch normalization")
                if processes.all_say(bool(np.all(batch.get("mask", 1)))):
                    yield sharding.global_batch(mesh, batch)
                if advance is not None:
                    advance(config.batch_size)

        return recalibrate(train_state, statistics_step, on_devices())


# Report --------------------------------------------------------------------------------------------


def open_report(
    config: ConfigDict,
    workdir: Path,
    program: Program,
    mesh: Mesh,
    train_data: data.Split,
    start_step: int,
    *,
    unevaluated: bool,
) -> progress.RunProgress:
    """Returns a context manager that shows and records the run."""
    device_kind = mesh.devices.flat[0].device_kind
    peak = costs.peak_images_per_second(program.model, train_data.image_shape, device_kind, mesh.size)
    return progress.RunProgress(
        workdir,
        start_step=start_step,
        unevaluated=unevaluated,
        **program.length._asdict(),
        enabled=jax.process_index() == 0,
        peak_images_per_second=None if program.frozen else peak,  # the peak is for whole steps
    )


def record(
    config: ConfigDict,
    program: Program,
    train_data: data.Split,
    report: progress.RunProgress,
    totals: metrics.Accumulator,
    step: int,
) -> None:
    """Records the means of the steps since the last record, and begins anew."""
    means = totals.means() | {"learning_rate": float(program.learning_rate(step - 1))}
    if train_data.masked:
        means["bad_images"] = count_masked(totals, config.batch_size)
    if skipped := round(totals.total("skipped_steps")):
        means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        report.say(describe_skipped(skipped, step))
    if "skipped_steps" in means:
        means["skipped_steps"] = skipped
    report.train(step, means)
    totals.clear()


def describe(config: ConfigDict, workdir: Path, program: Program, mesh: Mesh) -> str:
    """Returns a line that describes the run."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    length, device_kind = program.length, mesh.devices.flat[0].device_kind
    return (
        f"{config.model.name}, {parameters:,} parameters, {counted(length.num_images, 'image')}, "
        f"{counted(length.total_steps, 'step')} of {length.batch_size} on {mesh.size} x {device_kind}, "
        f"{naming.shown(workdir)}"
    )


def describe_images(train_data: data.Split) -> str:
    """Returns a line about images that are not the originals, or ''."""
    how = data.reencoding_of(train_data.source)
    return "" if how is None else f"re-encoded images: {how}"


def check_not_lost(workdir: Path) -> None:
    """Raises UserError if a workdir without checkpoints had whole ones, by its records: a mount may be missing."""
    saved = [each["step"] for each in history.read_kept(workdir / HISTORY) if progress.BLOCKING in each]
    if len(saved) > 1:  # the second begins when the first is whole
        raise UserError(
            f"{workdir / CHECKPOINTS} has no checkpoint, and by {HISTORY} {len(saved):,} were written, up to step "
            f"{saved[-1]:,}; put them back (is it a mount?). To begin anew, take a new workdir."
        )


def describe_lost(workdir: Path) -> str:
    """Returns a warning about a run that begins anew because none of its checkpoints is left, or ''."""
    last = max((each["step"] for each in history.read_kept(workdir / HISTORY)), default=0)
    lost = (
        f"WARNING: there is no checkpoint in {naming.shown(workdir)}: the run begins anew, and its records up to step"
    )
    return f"{lost} {last:,} are removed" if last else ""


def count_masked(totals: metrics.Accumulator, batch_size: int) -> int:
    """Returns how many images of the steps in `totals` were left out."""
    steps = totals.count("gradient_norm")  # one for each step
    return round(steps * batch_size - totals.count("loss"))


def describe_skipped(skipped: int, step: int) -> str:
    """Returns a warning."""
    return (
        f"WARNING: {counted(skipped, 'step')} since the last record, up to step {step:,}, gave {NOT_FINITE}: nothing "
        f"was learned there (step.on_nonfinite=skip; after {MAX_SKIPPED_IN_A_ROW} in a row the run ends)"
    )


def gave_up(skipped_in_a_row: int, step: int) -> metrics.NotFinite:
    """Returns the error of a run that has skipped as many steps up to this one."""
    return metrics.NotFinite(
        f"{skipped_in_a_row:,} steps in a row up to step {step:,} gave {NOT_FINITE}, and were skipped, so the weights "
        "are those from before them",
        first_step=step - skipped_in_a_row + 1,
    )


def describe_end(patience: Patience, length: RunLength) -> str:
    """Returns a line about a run that ended early."""
    epoch = patience.best_step * length.batch_size / length.num_images
    return (
        f"ended early: {patience.metric} has not become better since epoch {epoch:.1f}, step {patience.best_step:,} "
        "(patience_epochs)"
    )


def already_finished(workdir: Path, steps: int) -> int:
    """Prints that there is nothing to do and how to train for longer; returns the exit code."""
    if jax.process_index() == 0:
        print(f"{naming.shown(workdir)}: this run is finished ({counted(steps, 'step')}); nothing to do.")
        print(naming.harmless(how_to_train_on(workdir)))
        draw_curves(workdir)
    return 0


def show_results(config: ConfigDict, workdir: Path, results: dict[str, float], weights: str) -> None:
    """Prints the results of a finished run and draws its curves."""
    rows = {
        **{name: console.percent(value) for name, value in results.items() if name in metrics.SHARES},
        "evaluated": f"split {config.data.eval_split!r}, {counted(results['count'], 'image')}, {weights} weights",
    }
    if "bad_images" in results:
        trained = history.count_bad_images(workdir / HISTORY)
        rows["bad images"] = (
            f"left out: {counted(trained, 'time')} in training, {results['bad_images']:,} in evaluation; "
            "`xception-flax prepare check` names those of a folder or TFDS data set"
        )
    console.show_table("finished", rows | {"curves": naming.shown(workdir / CURVES)})
    draw_curves(workdir)  # last: if it fails, the results are already shown


def draw_curves(workdir: Path) -> None:
    """Draws the curves of a run."""
    from xception_flax.runs import curves  # Matplotlib takes a quarter of all imports, and a run needs it at its end

    curves.draw_run(workdir)


if __name__ == "__main__":
    cli.run(main)
