"""Trains a network by a recipe.

All that a run leaves is in its workdir: config.json (the whole recipe, every default filled in),
metrics.jsonl, tensorboard/, checkpoints/, curves.png. The same command again goes on where the run
stopped.
"""

import signal

from xception_flax.host import signals
from xception_flax.text.errors import UserError

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signals.stop_at_once)  # before the imports below, which take seconds

import collections
import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.host import allocator, processes
from xception_flax.host.files import file_errors
from xception_flax.models import costs
from xception_flax.recipes import groups, reading
from xception_flax.recipes.comparing import alike
from xception_flax.runs import curves, history, profiling, progress
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
)
from xception_flax.text import naming
from xception_flax.training import checkpoint, metrics, sharding
from xception_flax.training.evaluation import evaluate
from xception_flax.training.program import create_program
from xception_flax.weights import initial

EXAMPLES = """\
  python train.py --config configs/digits.py --workdir runs/digits
  python train.py --config configs/imagenet.py --workdir /shared/runs/1 --distributed
  python train.py --config configs/folder.py:photos --workdir runs/photos --config.epochs=30
  python train.py --config configs/digits.py --workdir runs/lr --config.optimizer.learning_rate=0.1"""

OUT_OF_MEMORY = (
    "Lower batch_size or data.image_size, compute a batch in parts (step.accumulation_steps=4), set "
    "model.dtype=bfloat16, each in a new workdir; or take more devices, and split the state over them by mesh.fsdp."
)

# Steps that may be under way at once. The host runs ahead of the devices by this much and no more:
# enough to keep them busy, little enough that collectives on CPU devices never starve for threads.
MAX_STEPS_IN_FLIGHT = 2


def main(argv: list[str]) -> int:
    parser = cli.parser("train.py", __doc__, EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the recipe, and its argument")
    parser.add_argument(
        "--workdir", required=True, type=cli.directory, help="folder of the run; made if it is not there"
    )
    parser.add_argument("--config.KEY=VALUE", dest="ignored", metavar="", help="override a key of the recipe")
    arguments, overrides = parser.parse_known_args(argv)
    config = reading.load(arguments.config, overrides)
    cli.start(arguments)
    with cli.out_of_memory(OUT_OF_MEMORY):
        return train(config, arguments.workdir)


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs a resolved recipe to its end, from the newest checkpoint in `workdir` if there is one.

    Returns:
      The exit code: 0 at the end, 128 + N after signal N, with a checkpoint written.

    Raises:
      ValueError: the recipe cannot be run here; nothing has been written but, at most, an empty run's config.json.
    """
    check_workdir(workdir, config)
    processes.agree("recipe", lambda: alike(config) | processes.software())
    first_host = jax.process_index() == 0
    mesh = sharding.create_mesh(**config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)

    # Data.
    load = dict(
        **config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        processes_per_host=sharding.processes_per_host(),
    )
    train_data, eval_data = data.load(**load, train=True), data.load(**load, train=False)
    if len(train_data.class_names) < 2:
        raise UserError(f"the data has one class only, {train_data.class_names[0]!r}; expected two or more.")
    data.check_class_names(train_data.class_names, eval_data)
    begun = has_checkpoints(workdir)
    same = {"whether the workdir has checkpoints": begun}
    processes.agree("data", lambda: train_data.identity() | eval_data.identity() | same)
    if config.model.num_classes != len(train_data.class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but the data has {len(train_data.class_names)} classes; "
            f"set --config.model.num_classes={len(train_data.class_names)}."
        )

    steps_per_epoch = train_data.num_images / config.batch_size

    def is_due(step: int, every_epochs: float) -> bool:
        """Whether a multiple of `every_epochs` ends within this step; every second is due where every first is."""
        interval = every_epochs * steps_per_epoch
        return math.floor(step / interval + 1e-9) > math.floor((step - 1) / interval + 1e-9)

    # Network, loss, optimizer, steps.
    program = create_program(config, mesh, train_data.image_shape, train_data.num_images)
    init, abstract_state, weights = program.init, program.abstract_state, program.weights
    train_step, eval_step, learning_rate = program.train_step, program.eval_step, program.learning_rate
    total_steps = program.total_steps
    profiled = groups.profiled_steps(config.profile)
    if profiled and profiled[-1] > total_steps:
        raise UserError(f"profile={config.profile} is not within the {total_steps} steps of this run.")
    sharding.check_memory(mesh, abstract_state)
    # Traced from shapes, before anything is compiled or written: what does not fit together shows here.
    abstract_batch = sharding.abstract_batch(mesh, train_data.batch_shapes)
    jax.eval_shape(train_step, abstract_state, abstract_batch)
    jax.eval_shape(eval_step, abstract_state.variables(weights), sharding.abstract_batch(mesh, eval_data.batch_shapes))

    def load_initial() -> initial.Pretrained:
        return initial.load(
            **config.init,
            **config.normalize,
            model=program.model,
            image_shape=train_data.image_shape,
            mesh=mesh,
            class_names=train_data.class_names,
        )

    # A run that goes on has its own; one that begins finds out before anything is written.
    loaded, dark = None, []
    if not begun:
        dark = [split.check_max_value() for split in (train_data, eval_data)]
        loaded = load_initial()

    # Workdir, checkpoint.
    with contextlib.ExitStack() as stack:
        if first_host:
            stack.enter_context(claim(workdir, config))
        processes.check_shared(workdir)
        manager = stack.enter_context(
            checkpoint.open_manager(
                workdir / CHECKPOINTS, best_metric=metrics.BEST[config.metrics.name], **config.checkpoint
            )
        )
        meta = {"class_names": list(train_data.class_names), "num_images": train_data.num_images}
        start_step = manager.latest_step() or 0
        begins_with = loaded.meta() if loaded else None
        processes.agree("start", lambda: {"the newest checkpoint": start_step, "the initial weights": begins_with})
        if start_step:
            saved = checkpoint.read_meta(manager, start_step)
            check_same_data(saved, meta, workdir)
            meta["init"] = saved.get("init")
        if first_host:
            remember(workdir, config)  # the mesh or the place of the data may be new
        if start_step >= total_steps:
            if first_host:
                print(f"{naming.shown(workdir)}: this run is finished ({total_steps} steps); nothing to do.")
                print(naming.harmless(how_to_train_on(workdir)))
                draw_curves(workdir)
            return 0
        # The step is compiled while the state is made or read.
        background = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        compiling = background.submit(train_step.lower(abstract_state, abstract_batch).compile)
        if start_step:
            train_state = checkpoint.restore_state(manager, abstract_state, start_step)
        else:
            loaded = loaded or load_initial()
            train_state = init(jax.random.key(config.seed), loaded.arrays)
            meta["init"], said = loaded.meta(), str(loaded)
            del loaded  # its arrays have been copied

        device_kind = mesh.devices.flat[0].device_kind
        # Of the whole step; nothing is said where the backbone has no backward pass.
        peak = costs.peak_images_per_second(program.model, train_data.image_shape, device_kind, mesh.size)
        report = stack.enter_context(
            progress.RunProgress(
                workdir,
                start_step=start_step,
                total_steps=total_steps,
                batch_size=config.batch_size,
                num_images=train_data.num_images,
                enabled=first_host,
                peak_images_per_second=peak if config.optimizer.backbone_factor else None,
            )
        )
        profiled = range(max(profiled.start, start_step + 1), profiled.stop)
        profile = stack.enter_context(profiling.Profile(profiled, workdir / PROFILE, report, enabled=first_host))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(train_state.params))
        report.say(
            f"{config.model.name}, {parameters:,} parameters, {train_data.num_images:,} images, {total_steps} steps of "
            f"{config.batch_size} on {mesh.size} x {device_kind}, {naming.shown(workdir)}"
        )
        if unread := data.unread_of((train_data.source, eval_data.source)):
            report.say(unread)
        for line in filter(None, dark):
            report.say(line)
        if start_step:
            report.say(f"going on from the checkpoint of step {start_step}")
        elif config.init.weights != "random":
            report.say(said)

        # Loop.
        in_flight: collections.deque = collections.deque()
        stack.enter_context(save_where_input_ends(manager, lambda: train_state, in_flight, meta))
        batches = stack.enter_context(contextlib.closing(train_data.batches(start_step)))
        stop = stack.enter_context(signals.StopRequest(several_processes=jax.process_count() > 1))
        totals = metrics.Accumulator()
        for step in range(start_step + 1, total_steps + 1):
            with profile.step(step, in_flight):
                with report.input_wait():
                    batch = next(batches)
                train_state, sums = compiling.result()(train_state, sharding.global_batch(mesh, batch))
                in_flight.append(sums)
                if len(in_flight) > MAX_STEPS_IN_FLIGHT:
                    totals.add(in_flight.popleft())
            report.advance(step)

            if step == start_step + 1:
                jax.block_until_ready((sums, learning_rate(step)))  # which compiles at its first call too
                report.compiled(step)
                allocator.release_free_memory()

            stopping = stop.signal is not None if jax.process_count() == 1 else manager.reached_preemption(step)
            last = step == total_steps
            evaluating = last or is_due(step, config.eval_every_epochs)
            saving = last or stopping or is_due(step, config.checkpoint_every_epochs)
            recording = last or stopping or step % config.log_every_steps == 0
            if evaluating or saving or recording:
                check_finite(sums, step)
                checkpoint.check_saves(manager)
                if first_host:
                    check_claim(workdir)
            if recording:
                while in_flight:
                    totals.add(in_flight.popleft())
                means = totals.means() | {"learning_rate": float(learning_rate(step - 1))}
                if train_data.masked:
                    seen = totals.count("gradient_norm") * config.batch_size  # once a step
                    means["bad_images"] = round(seen - totals.count("loss"))
                report.train(step, means)
                totals = metrics.Accumulator()

            results = None
            if evaluating:
                with report.pause("evaluation"):
                    results = evaluate(eval_step, train_state.variables(weights), eval_data, mesh)
                report.evaluation(step, results, weights)
            if saving:
                with report.pause("checkpoint"):
                    if first_host:
                        check_claim(workdir)  # an evaluation may have taken an hour
                    report.sync()
                    checkpoint.save(manager, train_state, meta, results)
                report.checkpoint(step)
            if stopping and not last:
                break
        checkpoint.check_saves(manager, wait=True)
        if step < total_steps:
            report.say(f"stopped at step {step}, checkpoint written; the same command goes on from there")
            return 128 + (stop.signal or signal.SIGTERM)  # of several processes one alone may have got it

    if first_host:
        console.show_table(
            "finished",
            {
                **{k: console.percent(v) for k, v in results.items() if k not in progress.NO_SHARES},
                "evaluated": f"split {config.data.eval_split!r}, {results['count']:,} images, {weights} weights",
                **bad_images(workdir, results),
                "curves": naming.shown(workdir / CURVES),
            },
        )
        draw_curves(workdir)  # last: nothing that happens to the picture hides the results
    return 0


@contextlib.contextmanager
def save_where_input_ends(
    manager: Any, state: Callable[[], Any], in_flight: collections.deque, meta: dict[str, Any]
) -> Iterator[None]:
    """Saves what was trained where a bad image, a file or a worker process ends the input, and says so.

    With several processes none can save alone: there the last checkpoint is what is left.
    """
    try:
        yield
    except data.InputError as error:
        step = int(state().step)
        if jax.process_count() == 1 and step > (manager.latest_step() or 0):
            for sums in in_flight:
                check_finite(sums, step)
            checkpoint.save(manager, state(), meta, None)
        checkpoint.check_saves(manager, wait=jax.process_count() == 1)
        last = manager.latest_step()
        left = (
            f"the checkpoint of step {last} is written; the same command goes on from there"
            if last
            else "no step was done"
        )
        raise UserError(f"{error}\nStopped after step {step}; {left}.") from error


def bad_images(workdir: Path, results: dict[str, float]) -> dict[str, str]:
    """Returns the row of the table about what was left out; none where the recipe replaces no bad images."""
    if "bad_images" not in results:
        return {}
    records = history.read_metrics(workdir / HISTORY)
    trained = sum(record.get("train/bad_images", 0) for record in records)
    return {
        "bad images": f"left out: {trained:,} times in training, {results['bad_images']:,} in evaluation; "
        "`xception-flax prepare check` names those of a folder or TFDS data set"
    }


def check_finite(sums: dict[str, metrics.Sum], step: int) -> None:
    """Stops a run whose loss or gradient is no longer a number, before that state is saved."""
    if not float(sums["loss"].count):
        raise UserError(f"none of the images of step {step} can be decoded; look at the data.")
    for name in ("loss", "gradient_norm"):
        value = float(sums[name].total / sums[name].count)
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {step}; checkpoints from before it are kept. Lower "
                "optimizer.learning_rate or clip gradients (optimizer.clip_norm), in a new workdir."
            )


def check_same_data(saved: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError where the checkpoint was trained on other classes or another number of images."""
    for key in ("class_names", "num_images"):
        if saved.get(key) != now[key]:
            raise UserError(
                f"the data has changed since {workdir} was begun: {key} was {str(saved.get(key))[:200]}, now it is "
                f"{str(now[key])[:200]}. Give the same data, or take a new workdir."
            )


def draw_curves(workdir: Path) -> None:
    """Draws curves.png from metrics.jsonl."""
    records = history.read_metrics(workdir / HISTORY)
    with file_errors(workdir / CURVES, "written"):
        curves.draw_curves(records, naming.shown(workdir), workdir / CURVES)


if __name__ == "__main__":
    cli.run(main)
