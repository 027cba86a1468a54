"""The curves of a run, drawn from its history."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from xception_flax.display.lettering import Lettering
from xception_flax.host.files import file_errors
from xception_flax.runs import history
from xception_flax.runs.workdir import CURVES, HISTORY
from xception_flax.text import naming
from xception_flax.training.metrics import METRICS

TRAIN_COLOR, EVAL_COLOR, RATE_COLOR = "#4c78a8", "#e45756", "#72b7b2"


def draw_run(workdir: Path) -> None:
    """Draws curves.png of a run from its metrics.jsonl, if that is there.

    Raises:
      UserError: metrics.jsonl cannot be read, or curves.png cannot be written.
    """
    if not (records := history.read_kept(workdir / HISTORY)):
        return
    with file_errors(workdir / CURVES, "written"):
        draw_curves(records, naming.shown(workdir), workdir / CURVES)


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draws loss, accuracy and learning rate over the steps, from the records of metrics.jsonl."""
    named = {key for record in records for key in record}
    shown = [entry for entry in METRICS.values() if f"eval/{entry.best}" in named]
    # An entry may have the metrics of another and more: the run's is the one that names most of what is there.
    quality = max(
        shown,
        key=lambda entry: sum(f"eval/{name}" in named for name in entry.shares),
        default=next(iter(METRICS.values())),
    )
    figure, (loss, score, rate) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _plot(loss, records, "train/loss", TRAIN_COLOR, "training")
    _plot(loss, records, "eval/loss", EVAL_COLOR, "evaluation")
    loss.set(title="loss (nats)", xlabel="step", yscale="log")
    _plot(score, records, f"train/{quality.best}", TRAIN_COLOR, "training", scale=100)
    evaluated = _plot(score, records, f"eval/{quality.best}", EVAL_COLOR, "evaluation", scale=100)
    score.margins(y=0.15)  # room for the number, above or below all points
    if evaluated:
        above = evaluated[-1][1] >= evaluated[-2:][0][1]  # off its own line, which comes from the left
        score.annotate(
            f"{evaluated[-1][1]:.2f} %",
            evaluated[-1],
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color=EVAL_COLOR,
        )
    score.set(title=f"{quality.title} (%)", xlabel="step")
    _plot(rate, records, "train/learning_rate", RATE_COLOR, None)
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    for axes in (loss, score, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # of a short run too
    low, high = loss.get_ylim()
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    for axes in (loss, score):
        if axes.lines:
            axes.legend(frameon=False)
    lettering = Lettering([title])
    lines = lettering.wrap(lettering.drawable(title), 12 * 72, 12)
    figure.set_size_inches(13, 3.8 + 0.2 * (len(lines) - 1))
    lettering.write(figure.suptitle, "\n".join(lines), 12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, color: str, label: str | None, scale: float = 1.0
) -> list[tuple[float, float]]:
    """Plots one key and returns its points; none if no record has the key."""
    points = [(r["step"], scale * r[key]) for r in records if r.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if len(points) < 40 else None, ms=3)
    return points
