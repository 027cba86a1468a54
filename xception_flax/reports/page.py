"""The report of an evaluation: one HTML page that needs no other file and no network."""

import base64
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xception_flax.display import console
from xception_flax.reports.comparing import Comparison
from xception_flax.reports.scores import Scores
from xception_flax.text import naming
from xception_flax.text.counting import counted

MAX_LISTED = 15  # pairs that are confused, classes that do worst

TITLES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "exact_match": "all labels right",
    "balanced_accuracy": "balanced accuracy",
    "macro_recall": "macro recall",
    "macro_precision": "macro precision",
    "macro_f1": "macro F1",
    "macro_roc_auc": "macro ROC AUC",
    "mean_average_precision": "mean average precision",
    "expected_calibration_error": "calibration error (ECE)",
    "brier": "Brier score",
}
SHARES = (
    "top1",
    "top5",
    "exact_match",
    "balanced_accuracy",
    "macro_recall",
    "macro_precision",
    "expected_calibration_error",
)

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 4rem; color: #222; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "Noto Sans", sans-serif }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.8rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #dfe2e6 }
p { margin: .4rem 0; max-width: 46rem } .sub, figcaption, .note { color: #666c75 }
.note, figcaption { font-size: .87rem }
figure { margin: .8rem 0 } img { max-width: 100%; height: auto; display: block }
.numbers { display: flex; flex-wrap: wrap; gap: .9rem 2.4rem; margin: 1.4rem 0 }
.numbers div { min-width: 9.5rem } .numbers b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums } .numbers small { color: #666c75; font-size: .82rem; display: block }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .8rem .22rem 0; text-align: right; border-bottom: 1px solid #eceef1; vertical-align: top }
th { font-weight: 600; border-bottom-color: #c9ccd1; white-space: nowrap } th.sorts { cursor: pointer }
th:first-child, td:first-child, .text td, .text th { text-align: left }
.text td:first-child { color: #666c75; white-space: nowrap }
.text td + td { overflow-wrap: anywhere }
bdi { display: inline-block; max-width: 13rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  vertical-align: bottom } .sub bdi, h1 bdi, .text bdi { max-width: 100%; white-space: normal }
td small { color: #8a8f98; display: block; font-size: .76rem; white-space: nowrap }
.wide td, .pair td { white-space: nowrap }
.pair { display: flex; flex-wrap: wrap; gap: 0 3.5rem }
.pairs :is(th, td):nth-child(2) { text-align: left }
"""

# Sorts a table by the column whose head is clicked, and the other way at the next click.
SCRIPT = """
for (const head of document.querySelectorAll("th.sorts")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const key = row => { const v = row.cells[column].dataset.v; return v === "" ? -Infinity : isNaN(v) ? v : +v };
  const below = (a, b) => typeof a === typeof b ? a < b : typeof a === "number";  // numbers before text
  const order = ([a], [b]) => (below(a, b) ? -1 : below(b, a) ? 1 : 0) * (up === "1" ? 1 : -1);
  [...body.rows].map(row => [key(row), row]).sort(order).forEach(pair => body.append(pair[1]));
};
"""

# The browser itself refuses everything that is not in this page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    scores: Scores,
    class_names: Sequence[str],
    about: Mapping[str, Any],
    results: Mapping[str, float],
    pictures: Mapping[str, bytes],
    comparison: Comparison | None,
) -> str:
    """Returns the page as text of HTML.

    Args:
      scores: from `scores.compute`.
      class_names: of the network.
      about: as of `record.record`.
      results: of `training.evaluation.evaluate`.
      pictures: PNG files: 'confusion', 'curves', 'reliability', 'mistakes', where there are such.
      comparison: with another network, if there is one.
    """
    data = about["data"]
    images = counted(scores.count, "image")
    bad = f", {results['bad_images']:,} bad images left out" if results.get("bad_images") else ""
    several = scores.confusion is None
    parts = [
        f"<h1>{_name(about['title'])}</h1>",
        f'<p class="sub">{_text(data["source"])}, split {_name(data["split"])}, {images} of '
        f"{counted(len(class_names), 'class')}{bad}</p>",
        _headline(scores, results),
        '<p class="note">In parentheses 95 % intervals: Wilson\'s for shares of images, otherwise 1.96 standard errors '
        f"of {scores.resamples:,} bootstrap resamples of the images, which is too narrow for few images. A score that "
        "is the same in all resamples has none. They say how far other images of the same kind would move the number, "
        "and nothing of images of another kind.</p>",
    ]
    if scores.not_finite:
        parts.append(
            f"<p>{counted(scores.not_finite, 'image')} with a NaN or infinite logit: counted as wrong, and left "
            "out of all scores of probabilities.</p>"
        )
    if comparison is not None:
        parts += _compared(comparison, scores.count)
    if "confusion" in pictures:
        parts += _confusion(scores, class_names, pictures["confusion"])
    parts += [
        "<h2>Ranking</h2>",
        _picture(pictures["curves"], "ROC and precision-recall curves, one class against all others."),
        "<h2>Calibration</h2>",
        _picture(
            pictures["reliability"],
            "Reliability: the share that is right in 15 bins of confidence. Below the dashed line the network is more "
            f"confident than right. Expected calibration error {_percent(scores.calibration.error)}."
            + (" A confidence is the probability of any class of any image." if several else ""),
        ),
    ]
    if "mistakes" in pictures:
        parts += [
            "<h2>Mistakes</h2>",
            _picture(pictures["mistakes"], "The first images whose most likely class is not the true one."),
        ]
    parts += [
        "<h2>Classes</h2>",
        '<p class="note">A click on a head sorts by its column.</p>',
        _classes(scores, class_names),
    ]
    parts += ["<h2>What was evaluated</h2>", _described(about)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(about['title'])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _headline(scores: Scores, results: Mapping[str, float]) -> str:
    cells = []
    for key, score in scores.overall.items():
        form = _percent if key in SHARES else _three
        cells.append((form(score.value), TITLES[key], _interval(score[1:], form)))
    if "map" in results:
        cells.append((_three(results["map"]), "MAP of each image (map)", ""))
    cells.append((_three(results["loss"]), "loss (nats)", ""))
    return (
        '<div class="numbers">'
        + "".join(
            f"<div><small>{title}</small><b>{value}</b><small>{interval}&nbsp;</small></div>"
            for value, title, interval in cells
        )
        + "</div>"
    )


def _compared(c: Comparison, count: int) -> list[str]:
    value, *bounds = c.difference
    rows = [
        ("the other", _name(c.other)),
        ("its top-1 accuracy", _percent(c.other_top1)),
        ("difference", f"{100 * value:+.2f} points {_interval(bounds, lambda v: f'{100 * v:+.2f}')}"),
        ("only this one right", counted(c.only_this, "image")),
        ("only the other right", counted(c.only_other, "image")),
        ("both right, none right", f"{c.both:,}, {c.neither:,}"),
        ("McNemar's exact test", f"p = {c.p_value:.3g}"),
    ]
    return ["<h2>Comparison on the same images</h2>", _table(rows)]


def _confusion(scores: Scores, names: Sequence[str], picture: bytes) -> list[str]:
    parts = [
        "<h2>Confusion</h2>",
        _picture(picture, "Rows are true classes, columns what was predicted; shades are shares of the true class."),
    ]
    cells = scores.confusion.tocoo()
    off = cells.row != cells.col
    order = np.lexsort((cells.col[off], cells.row[off], -cells.data[off]))[:MAX_LISTED]
    support = scores.classes.support
    pairs = [
        (_named(names[row]), _named(names[column]), f"{number:,.0f}", _percent(number / support[row]))
        for row, column, number in zip(
            *(values[off][order] for values in (cells.row, cells.col, cells.data)), strict=True
        )
    ]
    if len(names) > 2:
        recall = scores.classes.recall
        known = np.flatnonzero(~np.isnan(recall[:, 0]))
        worst = known[np.argsort(recall[known, 0], kind="stable")][:MAX_LISTED]
        worst = [
            (
                _named(names[i]),
                f"{_percent(recall[i, 0])} <small>{_interval(recall[i, 1:], _percent)}</small>",
                f"{support[i]:,}",
            )
            for i in worst
        ]
        parts.append('<div class="pair">')
        if pairs:
            parts.append(
                "<div><p>Most often confused</p>"
                + _plain(("is", "said", "images", "of the class"), pairs, "pairs")
                + "</div>"
            )
        parts.append(
            "<div><p>Least often recognized</p>" + _plain(("class", "recall", "images"), worst) + "</div></div>"
        )
    return parts


def _classes(scores: Scores, names: Sequence[str]) -> str:
    c = scores.classes
    heads = ("class", "images", "predicted", "correct", "precision", "recall", "F1", "ROC AUC", "average precision")
    rows = []
    for i, name in enumerate(names):
        cells = [f'<td data-v="{_text(name)}">{_named(name)}</td>']
        cells += [f'<td data-v="{v[i]}">{v[i]:,}</td>' for v in (c.support, c.predicted, c.correct)]
        for values, form in (
            (c.precision, _percent),
            (c.recall, _percent),
            (c.f1, _three),
            (c.auc, _three),
            (c.average_precision, _three),
        ):
            value = values[i, 0]
            sortable = "" if math.isnan(value) else f"{value:.9g}"
            cells.append(f'<td data-v="{sortable}">{form(value)} <small>{_interval(values[i, 1:], form)}</small></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th class="sorts">{name}</th>' for name in heads)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _described(about: Mapping[str, Any]) -> str:
    preprocessing, weights, data = about["preprocessing"], about["weights"], about["data"]
    rows = [
        ("network", _text(about["network"])),
        ("source", _name(about["source"])),
        *((f"weights, {key}", _name(value)) for key, value in weights.items() if value is not None),
        *((f"data, {key}", _name(value)) for key, value in data.items() if value is not None),
        *((f"preprocessing, {key}", _name(value)) for key, value in preprocessing.items() if value is not None),
        ("device", _text(f"{about['devices']} x {about['device']}, {counted(about['processes'], 'process')}")),
        ("libraries", _text(", ".join(f"{key} {value}" for key, value in about["libraries"].items() if value))),
        ("date", _text(about["date"])),
    ]
    return _table(rows)


# Pieces --------------------------------------------------------------------------------------------


def _text(text: object) -> str:
    return html.escape(naming.harmless(str(text)))


def _name(name: object) -> str:
    """A text of the user's, in whatever direction it runs."""
    return f"<bdi>{_text(name)}</bdi>"


def _named(name: str) -> str:
    """The name of a class, cut by the browser if it is long; the whole name shows below the pointer."""
    shown = html.escape(naming.shown(name))
    return f'<bdi title="{shown}">{shown}</bdi>'


def _picture(content: bytes, caption: str) -> str:
    width = int.from_bytes(content[16:20])  # of the PNG's header
    source = base64.b64encode(content).decode()
    return (
        f'<figure><img width="{width * 96 // 160}" alt="" src="data:image/png;base64,{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return (
        '<table class="text"><tbody>'
        + "".join(f"<tr><td>{k}</td><td>{v}</td></tr>" for k, v in rows)
        + "</tbody></table>"
    )


def _plain(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{body}</tbody></table>"
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else console.percent(value)


def _three(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _interval(bounds: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = bounds
    if math.isnan(low):
        return ""
    return f"({form(low).removesuffix(' %')} to {form(high)})"
