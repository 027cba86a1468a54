"""An evaluation from its first batch to its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xception_flax.host import files
from xception_flax.inference.subject import Subject
from xception_flax.reports import page, predictions, record, scores
from xception_flax.reports.comparing import Comparison
from xception_flax.reports.predictions import Collector, Predictions
from xception_flax.text.errors import UserError
from xception_flax.training import evaluation
from xception_flax.training.metrics import NotFinite


class Paths(NamedTuple):
    """Where the files of an evaluation go; None for those that are not written."""

    page: Path | None = None
    record: Path | None = None
    predictions: Path | None = None
    picture: Path | None = None


def evaluate(subject: Subject) -> tuple[dict[str, float], Predictions]:
    """Returns the results of `training.evaluation.evaluate`, and what the network said of each image.

    Each process must call it; the first has the predictions of all.

    Raises:
      UserError: the reasons of `training.evaluation.evaluate`; where the loss is not finite, what to do.
    """
    collector = Collector(
        subject.class_names,
        subject.split.num_images,
        subject.activation,
        subject.mesh,
        several_labels=subject.several_labels,
    )
    try:
        results = evaluation.evaluate(
            subject.eval_step, subject.variables, subject.split, subject.mesh, on_batch=collector
        )
    except NotFinite as error:
        raise UserError(f"{error}. {subject.advice}") from None
    return results, collector.predictions()


def write(
    said: Predictions,
    subject: Subject,
    about: Mapping[str, Any],
    results: Mapping[str, float],
    comparison: Comparison | None,
    picture: bytes | None,
    paths: Paths,
) -> None:
    """Computes the scores and writes record, predictions and page, each whole or not at all.

    Args:
      said: from `evaluate`, on the first process.
      subject: what was evaluated.
      about: from `record.describe`, with the fingerprint of the data.
      results: from `evaluate`.
      comparison: with another network, if there is one.
      picture: PNG of the mistakes, for the page; None with several labels an image.
      paths: of the files.

    Raises:
      UserError: a file cannot be written.
    """
    names = said.class_names
    found = scores.compute(said, results.get("top5"))
    files.write_whole(paths.record, [record.record(found, names, about, results, comparison).encode()])
    in_file = {"title": about["title"], "split": about["data"]["split"], "fingerprint": about["data"]["fingerprint"]}
    predictions.write(said, record.file_names(subject.data.source), in_file, paths.predictions)
    from xception_flax.reports import figures  # Matplotlib, of an extra: the help does without it

    drawn = {"curves": figures.curves(found, said), "reliability": figures.reliability(found)}
    if found.confusion is not None:
        drawn["confusion"] = figures.confusion(found, names)
    if picture is not None and said.mistakes.images:
        drawn["mistakes"] = picture
    files.write_whole(paths.page, [page.page(found, names, about, results, drawn, comparison).encode()])
