"""The record of an evaluation, as JSON: every score with its interval, and what it is of."""

import datetime
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xception_flax import __version__, data
from xception_flax.data.sources.folder import Files
from xception_flax.data.sources.source import Source
from xception_flax.data.sources.table import Rows
from xception_flax.data.sources.tfds import REENCODED
from xception_flax.host import processes
from xception_flax.inference.subject import Subject
from xception_flax.reports import intervals
from xception_flax.reports.comparing import Comparison
from xception_flax.reports.scores import BINS, THRESHOLD, Classes, Scores
from xception_flax.text import naming
from xception_flax.training import checksums

LIBRARIES = (*processes.LIBRARIES, "opencv-python-headless", "scikit-learn", "scipy")

MAX_LINE = 120  # letters of a value that stands in one line

MAX_MATRIX = 1000  # classes, whose confusion matrix is written whole; of more only the cells that are not 0

UNDEFINED = {  # why a score of a class is not a number; the first that fits
    "precision": ("never predicted",),
    "recall": ("no images",),
    "f1": ("no images and never predicted",),
    "roc_auc": ("no images", "no images of other classes"),
    "average_precision": ("no images",),
}

NO_INTERVAL = "no interval: the score is the same in every resample"
NO_INTERVAL_OF = {"expected_calibration_error": "no interval: the score is biased upwards, in a resample more so"}

DEFINITIONS = {
    "precision, recall, f1": "scikit-learn's precision_recall_fscore_support",
    "roc_auc, average_precision": "as scikit-learn's roc_auc_score and average_precision_score, one class against all",
    "macro": "the mean over the classes in which the score is defined; balanced_accuracy is the macro recall",
    "expected_calibration_error": f"{BINS} bins of equal width of the probability of the predicted class "
    "(several labels: of every class); the mean over images of |share right - mean probability| of its bin",
    "brier": "the mean over images of the sum over classes of (probability - truth)^2, from 0 to 2 for one label",
    "several labels": f"a class is predicted from a probability of {THRESHOLD:g} on",
}


def file_names(source: Source) -> list[str] | None:
    """Returns the path of each image below the folder of all; None for sources without files.

    So a copy of the folder elsewhere has the same names.
    """
    source = getattr(source, "source", source)  # of `Renumbered`
    if isinstance(source, Rows) and source.names is None:
        paths: Sequence[str] = [source.path(i) for i in range(len(source))]
    elif isinstance(source, Files):
        paths = source.paths
    else:
        return None
    above = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [naming.canonical(os.path.relpath(path, above)) for path in paths]


def fingerprint(split: data.Split, class_names: Sequence[str], labels: np.ndarray) -> str:
    """Returns a SHA-256 that two evaluations share if they are of the same images.

    It covers the number of images, the names of files and of true classes of all, and the content of 16. The numbers
    of the classes, which differ between networks, do not count; nor does the order, where files have names.

    Args:
      split: with the data's own numbers of classes.
      class_names: of `labels`.
      labels: of all images, `[N]`, or `[N, num_classes]` of 0 and 1.
    """
    names = [naming.composed(name) for name in class_names]
    if labels.ndim == 1:
        truths: list[Any] = [names[label] for label in labels]
    else:
        truths = [sorted(names[i] for i in np.flatnonzero(row)) for row in labels]
    files = file_names(split.source)
    order = range(len(truths)) if files is None else sorted(range(len(files)), key=lambda i: (files[i], truths[i]))
    in_order = None if files is None else [files[i] for i in order]
    whole = [*split.identity(order).values(), in_order, [truths[i] for i in order]]
    return hashlib.sha256(naming.to_json(whole).encode()).hexdigest()


def describe(subject: Subject, config: ConfigDict, checkpoint: str) -> dict[str, Any]:
    """Returns what is evaluated, and by what, as JSON. Each process must call it."""
    said = dict(subject.said)
    weights = {"sha256": checksums.sha256(subject.variables), "file_sha256": said.pop("sha256", None)}
    source = said.pop("source", None)
    if "step" in said:
        weights |= {"checkpoint": checkpoint} | said
    preprocessing = subject.preprocessing._asdict()
    of_data = {"source": config.data.source, "split": config.data.eval_split, "images": subject.split.num_images}
    if (reencoding := data.reencoding_of(subject.split.source)) is not None:
        of_data[REENCODED] = str(reencoding)
    return {
        "title": subject.title,
        "source": source or subject.title.rpartition(", step ")[0],
        "network": subject.network,
        "weights": weights,
        "preprocessing": preprocessing,
        "data": of_data,
        "libraries": {"xception_flax": __version__} | {name: _version(name) for name in LIBRARIES},
        "device": subject.mesh.devices.flat[0].device_kind,
        "devices": subject.mesh.size,
        "processes": jax.process_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # another package has this library, such as opencv-python
        return None


def record(
    scores: Scores,
    class_names: Sequence[str],
    about: Mapping[str, Any],
    results: Mapping[str, float],
    comparison: Comparison | None,
) -> str:
    """Returns the record as text of JSON.

    Args:
      scores: from `scores.compute`.
      class_names: of the network.
      about: from `describe`, with the fingerprint.
      results: of `training.evaluation.evaluate`.
      comparison: with another network, if there is one.
    """
    whole = {
        "format": "xception_flax evaluation 1",
        "count": scores.count,
        "bad_images": results.get("bad_images", 0),
        "not_finite": scores.not_finite,
        "loss": _number(results["loss"]),
        **({"map": _number(results["map"])} if "map" in results else {}),
        "scores": {
            name: _score(score, "no class has it defined", NO_INTERVAL_OF.get(name, NO_INTERVAL))
            for name, score in scores.overall.items()
        },
        "intervals": {
            "confidence": intervals.CONFIDENCE,
            "shares of images, precision, recall": "Wilson's score interval",
            "others": "1.96 standard errors of a bootstrap over images, cut at the ends of the scale; too "
            "narrow for few images",
            "resamples": scores.resamples,
            "seed": intervals.SEED,
        },
        "definitions": DEFINITIONS,
        "of": about,
        **({"comparison": comparison._asdict()} if comparison else {}),
        "calibration": {
            "counts": scores.calibration.counts.tolist(),
            "confidences": [_number(value) for value in scores.calibration.confidences],
            "shares": [_number(value) for value in scores.calibration.shares],
        },
        "classes": _classes(scores.classes, class_names, scores.count),
        **_confusion(scores),
    }
    return _json(whole) + "\n"


def _json(value: Any, depth: int = 0) -> str:
    """Returns JSON with a line for each class and each row of a matrix: to be read, and compared by `diff`."""
    text = naming.to_json(value, allow_nan=False)
    numbers = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
    if len(text) <= MAX_LINE or numbers or not isinstance(value, dict | list):
        return text
    space = " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{naming.to_json(key)}: {_json(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(space + part for part in parts) + f"\n{' ' * depth}}}"
    return "[\n" + ",\n".join(space + naming.to_json(item, allow_nan=False) for item in value) + f"\n{' ' * depth}]"


def _classes(classes: Classes, names: Sequence[str], count: int) -> list[dict[str, Any]]:
    columns = {
        "precision": classes.precision,
        "recall": classes.recall,
        "f1": classes.f1,
        "roc_auc": classes.auc,
        "average_precision": classes.average_precision,
    }
    rows = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"name": name}
        row |= {key: int(getattr(classes, key)[i]) for key in ("support", "predicted", "correct")}
        for key, values in columns.items():
            reasons = UNDEFINED[key]
            row[key] = _score(values[i], reasons[-1] if classes.support[i] == count else reasons[0])
        rows.append(row)
    return rows


def _confusion(scores: Scores) -> dict[str, Any]:
    if scores.confusion is None:
        return {}
    matrix = scores.confusion.astype(int)
    if matrix.shape[0] <= MAX_MATRIX:
        return {"confusion_matrix": {"rows": "true", "columns": "predicted", "counts": matrix.toarray().tolist()}}
    cells = matrix.tocoo()
    return {
        "confusion_matrix": {
            "rows": "true",
            "columns": "predicted",
            "cells": np.column_stack([cells.row, cells.col, cells.data]).tolist(),
        }
    }


def _score(score: Sequence[float], why: str, no_interval: str = NO_INTERVAL) -> dict[str, Any]:
    """Returns value and interval; null and the reason where there is no value, or no interval."""
    value, low, high = map(_number, score)
    if value is None:
        return {"value": None, "why": why}
    return {"value": value, "low": low, "high": high} | ({"why": no_interval} if low is None else {})


def _number(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
