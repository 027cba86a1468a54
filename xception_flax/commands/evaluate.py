"""Evaluates a trained network: scores, a page about them, a record, every prediction, a picture of the mistakes."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli, images
from xception_flax.data.sources.folder import ALL
from xception_flax.display import console
from xception_flax.host import files
from xception_flax.inference import subject as subjects
from xception_flax.inference.subject import Subject
from xception_flax.recipes import checking, overrides, reading
from xception_flax.reports import comparing, grid, record, writing
from xception_flax.reports.predictions import MAX_MISTAKES, Predictions
from xception_flax.reports.writing import Paths
from xception_flax.runs import workdir as names
from xception_flax.runs.workdir import read_recipe
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.training.metrics import METRICS, SHARES
from xception_flax.weights.pretrained import IMAGE_SIZE
from xception_flax.weights.source import check_there, is_workdir

EXAMPLES = """\
  xception-flax evaluate runs/digits --split test --weights raw --checkpoint latest
  xception-flax evaluate runs/imagenet --config.data.data_dir=/data/tfds
  xception-flax evaluate mine.keras photos/val --output reports
  xception-flax evaluate runs/second photos/val --compare reports
  xception-flax evaluate mine.keras --config.data.source=folder --config.data.data_dir=photos --split val"""

# Keys of `data` that a network from elsewhere, or the user's word about it, says; and what says it.
SAID = {"image_size": "--image-size", "eval_transforms": "--transforms", "channels": "the weights"}


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax evaluate", __doc__, EXAMPLES)
    _add_arguments(parser)
    arguments, changes = parser.parse_known_args(argv)
    source, changes = _source(arguments), [*_of_folder(arguments, changes), *changes]
    if arguments.split is not None:
        changes.append(f"--config.data.eval_split={arguments.split!r}")
    is_run = arguments.workdir is not None or is_workdir(source)
    if not is_run:
        check_there(source)
    config = _recipe(Path(source), arguments, changes) if is_run else _settings(changes)
    split = _split_name(arguments, config)
    other = comparing.open_other(arguments.compare, split) if arguments.compare is not None else None
    cli.start(arguments)
    with _no_folder_left_empty(arguments.output), cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        paths = _paths(arguments, Path(source) if is_run else Path(), config, split)
        subject = _subject(source, arguments, config, is_run=is_run)
        if subject.several_labels and arguments.picture is not None:
            raise UserError("--picture: no picture is drawn with several labels per image; leave it out.")
        if subject.several_labels and other is not None:
            raise UserError("--compare: McNemar's test is for one label an image; this data has several. Leave it out.")
        if subject.several_labels:
            paths = paths._replace(picture=None)
        if arguments.grid:
            _grid(subject, config)
        else:
            _report(subject, config, paths, other, arguments.checkpoint)
    return 0


# Arguments -----------------------------------------------------------------------------------------


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=images.SOURCE)
    parser.add_argument(
        "folder",
        nargs="?",
        type=cli.directory,
        metavar="FOLDER",
        help="of images, CLASS/*.jpg, all of which are taken, or a table of them; with --split also SPLIT/CLASS/*.jpg",
    )
    parser.add_argument("--workdir", type=cli.directory, help="instead of SOURCE: folder of a run of train.py")
    cli.add_checkpoint(parser)
    parser.add_argument(
        "--output",
        type=cli.directory,
        metavar="DIR",
        help="where report_SPLIT.html, evaluation_SPLIT.json, predictions_SPLIT.parquet and mistakes_SPLIT.png go; "
        "default: the workdir, or else here",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="another place for the picture of the mistakes")
    parser.add_argument("--no-report", action="store_true", help="write the picture alone")
    parser.add_argument(
        "--compare",
        type=cli.directory,
        metavar="OTHER",
        help="with another network on the same images, by what its evaluation wrote: predictions_SPLIT.parquet, "
        "evaluation_SPLIT.json, or their folder",
    )
    parser.add_argument(
        "--grid", action="store_true", help="try crops, kernels and antialiasing; prints a table, and writes nothing"
    )
    parser.add_argument("--split", help="split of the data set, default: the recipe's data.eval_split, or test")
    parser.add_argument(
        "--batch-size", type=cli.positive, metavar="N", help="default: the recipe's, or 32; it changes no result"
    )
    images.add_word(parser)
    cli.add_overrides(parser, what="say where the data is or how it is read (group data, mesh)")


def _source(arguments: argparse.Namespace) -> str:
    """Returns the network that is named; with --workdir the first of the others is the folder."""
    if arguments.workdir is not None:
        if arguments.folder is not None:
            raise UserError(f"--workdir {arguments.workdir} stands instead of SOURCE; give one of them.")
        try:
            arguments.folder = None if arguments.source is None else cli.directory(arguments.source)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"FOLDER: {error}.") from None
        return str(arguments.workdir)
    if not arguments.source:
        raise UserError(f"there is no SOURCE; expected a {images.SOURCE}.")
    return arguments.source


def _of_folder(arguments: argparse.Namespace, changes: Sequence[str]) -> list[str]:
    """Returns the overrides that FOLDER stands for."""
    if arguments.folder is None:
        return []
    values = data.source_at(os.fspath(arguments.folder.expanduser())) | {"eval_split": ALL}
    for key in ("source", "path", *(["data_dir"] if "data_dir" in values else [])):  # paths in a table are below one
        if any(change.startswith(f"--config.data.{key}=") for change in changes):
            raise UserError(f"the data are given twice, by {arguments.folder} and by --config.data.{key}; give one.")
    return [f"--config.data.{key}={value!r}" for key, value in values.items()]


def _recipe(workdir: Path, arguments: argparse.Namespace, changes: Sequence[str]) -> ConfigDict:
    """Returns the recipe of a run, with other data."""
    trained = read_recipe(workdir)
    if said := [name for name, value in images.word(arguments).items() if value is not None]:
        raise UserError(f"{', '.join(said)}: {workdir} is a run, which says this itself; leave it out.")
    channels = trained.data.channels
    config = reading.override(trained, changes, groups=("data", "mesh"))
    if config.data.channels != channels:
        raise UserError(
            f"{workdir} was trained on images of data.channels={channels}, got {config.data.channels}; "
            "leave out --config.data.channels."
        )
    return config


def _settings(changes: Sequence[str]) -> ConfigDict:
    """Returns the groups `data` and `mesh` for a network that is no run; what the network says of the data is open."""
    groups = ("data", "mesh")
    texts = overrides.split(changes, groups)["data"]
    for key, option in SAID.items():
        if key in texts:
            raise UserError(f"--config.data.{key} is what the network takes, and said by {option}; leave it out.")
    if "source" not in texts:
        raise UserError(
            "there are no data; give a folder of images (CLASS/*.jpg) behind the network, or a data set by "
            "--config.data.source=NAME."
        )
    given = {"data": {"image_size": IMAGE_SIZE, "source": ""}, "mesh": {}}
    return ConfigDict({name: checking.resolve_group(name, given[name], changes, groups) for name in groups})


def _split_name(arguments: argparse.Namespace, config: ConfigDict) -> str:
    """Returns what files are named after: one set per split, so that one split does not overwrite another."""
    split = config.data.eval_split
    if arguments.folder is not None and arguments.split is None:
        split = arguments.folder.stem if arguments.folder.is_file() else arguments.folder.name or split
    return naming.decoded(split)


def _paths(arguments: argparse.Namespace, folder: Path, config: ConfigDict, split: str) -> Paths:
    """Returns where the files go, checked before there are results to lose.

    Raises:
      UserError: a file cannot be written, or options do not go together.
    """
    if arguments.grid:
        for option in ("output", "picture", "compare"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} does not go with --grid, which prints a table and writes nothing.")
        return Paths()
    several = "metrics" in config and METRICS[config.metrics.name].several_labels
    if several and arguments.picture is not None:
        raise UserError("--picture: no picture is drawn with several labels per image; leave it out.")
    if arguments.output is not None:
        folder = arguments.output
        if jax.process_index() == 0:
            with files.file_errors(folder, "made"):
                folder.mkdir(parents=True, exist_ok=True)
    elif (
        jax.process_index() == 0 and not (arguments.no_report and arguments.picture) and not os.access(folder, os.W_OK)
    ):
        raise UserError(f"{folder} cannot be written by this user; give another folder by --output DIR.")
    picture = None if several else arguments.picture or folder / names.mistakes_picture(split)
    if picture is not None:
        from xception_flax.display import pictures  # Matplotlib, of an extra: the help does without it

        pictures.check_suffix(picture)
    kinds = dict(page=names.evaluation_page, record=names.evaluation_record, predictions=names.evaluation_predictions)
    report = {} if arguments.no_report else {kind: folder / name(split) for kind, name in kinds.items()}
    paths = Paths(**report, picture=picture)
    if jax.process_index() == 0:
        for path in filter(None, (picture, *paths[:3])):
            files.check_writable(path)
    return paths


@contextlib.contextmanager
def _no_folder_left_empty(folder: Path | None) -> Iterator[None]:
    """Removes what was made of a folder and of those that it lies in, if the block fails and nothing is in them."""
    places = [] if folder is None or jax.process_index() != 0 else [folder, *folder.parents]
    made = [place for place in places if not os.path.exists(place)]
    try:
        yield
    except BaseException:
        for place in made:
            with contextlib.suppress(OSError, ValueError):  # it is not empty, or could not be made
                place.rmdir()
        raise


# What is evaluated ---------------------------------------------------------------------------------


def _subject(source: str, arguments: argparse.Namespace, config: ConfigDict, *, is_run: bool) -> Subject:
    chosen = {"weights": arguments.weights, "batch_size": arguments.batch_size}
    if is_run:
        return subjects.of_run(source, config, checkpoint=arguments.checkpoint, **chosen)

    def load(mesh: jax.sharding.Mesh, batch_size: int) -> images.Predictor:
        arguments.batch_size = batch_size
        return images.load(source, arguments, mesh)

    return subjects.elsewhere(source, config, load, **chosen)


# Results -------------------------------------------------------------------------------------------


def _report(subject: Subject, config: ConfigDict, paths: Paths, other: comparing.Said | None, checkpoint: str) -> None:
    """Evaluates, prints the results, and then writes the files: if one fails, the results are already printed."""
    results, said = writing.evaluate(subject)
    about = record.describe(subject, config, checkpoint)
    if jax.process_index() != 0:
        return
    about["data"]["fingerprint"] = record.fingerprint(subject.data, said.class_names, said.all_labels)
    comparison = None
    if other is not None:
        files_there = record.file_names(subject.data.source)
        comparison = comparing.compare(said, files_there, about["data"]["fingerprint"], other)
    wrong = None if said.several_labels else int((~said.correct).sum())
    console.show_table(about["source"], _rows(subject, config, results, paths, wrong, comparison))
    print(naming.to_json_line(subject.said | {"split": config.data.eval_split, **results}), flush=True)
    picture = None
    if paths.picture is not None:
        title = _title(subject, config, results, said, wrong)
        from xception_flax.display import pictures

        picture = pictures.draw_mistakes(*said.mistakes, title, paths.picture)
    if paths.page is not None:
        with console.waiting("scores and report"):
            writing.write(said, subject, about, results, comparison, picture, paths)


def _rows(
    subject: Subject,
    config: ConfigDict,
    results: dict[str, float],
    paths: Paths,
    wrong: int | None,
    comparison: comparing.Comparison | None,
) -> dict[str, str]:
    of_network, of_data = subject.rows
    rows = {
        **of_network,
        "data": f"{config.data.source}, split {config.data.eval_split!r}, {counted(results['count'], 'image')}",
        **of_data,
        **({"bad images": f"{results['bad_images']:,}, left out"} if "bad_images" in results else {}),
        "transforms": config.data.eval_transforms,
        **{k: console.percent(v) for k, v in results.items() if k in SHARES},
        "loss": f"{results['loss']:.5f}",
    }
    if wrong is not None and paths.picture is not None:
        which = f"the first {MAX_MISTAKES} in" if wrong > MAX_MISTAKES else "see"
        rows["wrong"] = f"{counted(wrong, 'image')}, {which} {naming.shown(paths.picture)}" if wrong else "no image"
    if comparison is not None:
        difference, low, high = (f"{100 * value:+.2f}" for value in comparison.difference)
        rows["compared"] = (
            f"top1 {difference} points (95 %: {low} to {high}) to {comparison.other}, which has "
            f"{console.percent(comparison.other_top1)}"
        )
        rows["alone right"] = (
            f"{counted(comparison.only_this, 'image')} here, {comparison.only_other:,} there; McNemar's exact test: "
            f"p = {comparison.p_value:.3g}"
        )
    written = {"report": paths.page, "record": paths.record, "predictions": paths.predictions}
    return rows | {name: naming.shown(path) for name, path in written.items() if path is not None}


def _title(subject: Subject, config: ConfigDict, results: dict[str, float], said: Predictions, wrong: int) -> str:
    """Returns what the picture of the mistakes says above them."""
    drawn, right = len(said.mistakes.images), (results["count"] - wrong) / results["count"]
    return (
        f"{wrong:,} of {results['count']:,} wrong ({console.percent(right)} right)"
        + (f", the first {drawn}" if drawn < wrong else "")
        + f"\n{config.data.source}, split {config.data.eval_split!r}\n"
        + (subject.rows[0].get("checkpoint") or subject.title)
    )


def _grid(subject: Subject, config: ConfigDict) -> None:
    """Evaluates with other crops, kernels and antialiasing, and prints a table, the best first."""
    usual = "multi_label" if subject.several_labels else "single_label"
    metric = METRICS[config.metrics.name if "metrics" in config else usual].best
    size, given = config.data.image_size, config.data.eval_transforms
    trials = grid.run(subject, given, size, metric)
    if jax.process_index() != 0:
        return
    first, ordered = trials[0], grid.best_first(trials)
    difference = "to the given" if subject.several_labels or metric == "top1" else "top1 to the given"
    columns: dict[str, list[str]] = {"transforms": [], metric: [], "loss": [], difference: []}
    for trial in ordered:
        values = (trial.transforms, console.percent(trial.score), f"{trial.loss:.5f}", _to_given(trial, first))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    console.show_columns(f"{subject.title}: {config.data.source}, split {config.data.eval_split!r}", columns)
    listed = [{"transforms": trial.transforms, metric: trial.score, "loss": trial.loss} for trial in ordered]
    print(naming.to_json_line(subject.said | {"split": config.data.eval_split, "given": given, "grid": listed}))
    print(
        f"The best of {len(trials)} was chosen on these images, so its {metric} is too good for them. Choose on one "
        "split, and report the result on another.",
        file=sys.stderr,
    )


def _to_given(trial: grid.Trial, given: grid.Trial) -> str:
    if trial is given:
        return "given"
    if trial.correct is None:
        return f"{100 * (trial.score - given.score):+.2f}"
    found = comparing.mcnemar(trial.correct, given.correct, "")
    value, low, high = (f"{100 * value:+.2f}" for value in found.difference)
    return f"{value} (95 %: {low} to {high})"
