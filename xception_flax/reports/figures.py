"""The pictures of a report, as the content of PNG files."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from xception_flax.display.lettering import Lettering, embedded
from xception_flax.reports.predictions import Predictions
from xception_flax.reports.ranking import GRID
from xception_flax.reports.scores import BINS, Scores
from xception_flax.text import naming

if TYPE_CHECKING:
    from scipy import sparse

INK, GRAY, ACCENT = "#222222", "#8a8f98", "#2f5d8a"
LINES = ("#2f5d8a", "#c8553d", "#5b8c5a", "#8f6aa3", "#c9a227", "#3c9aa8", "#a3566e", "#6b6f76", "#7d8f2e", "#44508f")

MAX_NAMED = 30  # classes, in a confusion matrix with their names and numbers
MAX_CURVES = len(LINES)  # classes with a curve of their own; of more the mean and the spread

SCALE = 160  # dots per inch: sharp on a screen of two dots a pixel


def confusion(scores: Scores, class_names: Sequence[str]) -> bytes:
    """Draws the confusion matrix: shades are shares of the true class.

    Up to `MAX_NAMED` classes have their names and the number of images in each cell. Of more, shades alone are shown.
    """
    matrix, count = scores.confusion, len(class_names)
    names = [naming.shown(name) for name in class_names]
    if count <= MAX_NAMED:
        counts = matrix.toarray()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        side = 1.6 + 0.42 * count if count > 5 else 3.6
        figure, axes = plt.subplots(figsize=(side + 0.9, side), layout="constrained")
        axes.imshow(shares, cmap="Blues", norm=Normalize(0, 1.15), aspect="equal")
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, f"{counts[row, column]:,.0f}", ha="center", va="center", color=color, fontsize=8)
        _name_ticks(axes, names)
    else:
        figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
        shares, step = _blocks(matrix, scores.classes.support)
        image = axes.imshow(
            np.ma.masked_equal(shares, 0),
            cmap="Blues",
            norm=LogNorm(1e-3, 1),
            extent=(-0.5, count - 0.5, count - 0.5, -0.5),
            interpolation="nearest",
        )
        bar = figure.colorbar(image, shrink=0.8, label="share of the true class" + (", mean" if step > 1 else ""))
        bar.outline.set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set_color("#c9ccd1")
    axes.tick_params(length=0, colors=INK)
    return _png(figure)


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    lettering = Lettering(names)
    drawable = [lettering.drawable(name) for name in names]
    short = lettering.cut(drawable, 90, 8)
    axes.set_xticks(range(len(names)))
    axes.set_yticks(range(len(names)))
    labels = [short[name] for name in drawable]
    upright = max(lettering.width(label, 8) for label in labels) < 26
    axes.set_xticklabels(labels, rotation=0 if upright else 90, fontsize=8, **lettering.style)
    axes.set_yticklabels(labels, fontsize=8, **lettering.style)


def _blocks(matrix: "sparse.csr_array", support: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the shares of each true class, in at most 1,000 rows and columns: of more the mean of blocks."""
    cells = matrix.tocoo()
    step = -(-len(support) // 1000)
    side = -(-len(support) // step)
    shares = np.zeros((side, side))
    np.add.at(shares, (cells.row // step, cells.col // step), cells.data / np.maximum(support[cells.row], 1))
    return shares / step, step


def curves(scores: Scores, predictions: Predictions) -> bytes:
    """Draws ROC and precision-recall curves, each class against all others.

    Up to `MAX_CURVES` classes have a curve each. Of more, there are the mean of all and where eight of ten lie.
    """
    from sklearn import metrics

    p, names = predictions, [naming.shown(name) for name in predictions.class_names]
    figure, (roc, recall) = plt.subplots(1, 2, figsize=(9.6, 4.3), layout="constrained")
    roc.plot([0, 1], [0, 1], color="#c9ccd1", lw=1, ls="--")
    classes = scores.classes
    defined = np.flatnonzero(~np.isnan(classes.auc[:, 0]))
    if len(names) <= MAX_CURVES:
        lettering = Lettering(names)
        short = lettering.cut([lettering.drawable(name) for name in names], 80, 8)
        for i in defined:
            truth = p.labels[p.finite, i] > 0 if p.several_labels else p.labels[p.finite] == i
            values = p.probabilities[p.finite, i]
            false, true, _ = metrics.roc_curve(truth, values)
            precision, recalls, _ = metrics.precision_recall_curve(truth, values)
            name = short[lettering.drawable(names[i])]
            for axes, x, y, area in (
                (roc, false, true, classes.auc[i, 0]),
                (recall, recalls, precision, classes.average_precision[i, 0]),
            ):
                label = f"{embedded(name)}  {area:.3f}"
                style = "default" if axes is roc else "steps-post"
                axes.plot(x, y, color=LINES[i], lw=1.4, label=label, drawstyle=style)
        for axes, title in ((roc, "area under it"), (recall, "average precision")):
            if axes.get_legend_handles_labels()[0]:
                legend = axes.legend(frameon=False, title=title, title_fontsize=8, fontsize=8, loc="best")
                for text in legend.get_texts():
                    text.set(**lettering.style)
    else:
        for axes, sampled in ((roc, scores.roc), (recall, scores.precision_recall)):
            sampled = sampled[~np.isnan(sampled).any(-1)]
            if not len(sampled):
                continue
            low, high = np.quantile(sampled, [0.1, 0.9], axis=0)
            axes.fill_between(GRID, low, high, color=ACCENT, alpha=0.15, lw=0, label="80 % of the classes")
            axes.plot(GRID, sampled.mean(0), color=ACCENT, lw=1.8, label="mean of all classes")
            axes.legend(frameon=False, fontsize=8, loc="best")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    recall.set(xlabel="recall", ylabel="precision", title="precision and recall")
    for axes in (roc, recall):
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
        _plain(axes)
    return _png(figure)


def reliability(scores: Scores) -> bytes:
    """Draws how often the network is right at each confidence, and how often it is that confident."""
    c = scores.calibration
    figure, (share, number) = plt.subplots(
        2, 1, figsize=(4.6, 5.0), layout="constrained", sharex=True, height_ratios=(3.2, 1)
    )
    edges = np.linspace(0, 1, BINS + 1)
    there = c.counts > 0
    share.plot([0, 1], [0, 1], color="#c9ccd1", lw=1, ls="--")
    share.bar(edges[:-1][there], c.shares[there], 1 / BINS, align="edge", color=ACCENT, alpha=0.25, edgecolor=ACCENT)
    share.plot(c.confidences[there], c.shares[there], "o", ms=4, color=ACCENT)
    share.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    number.bar(edges[:-1], c.counts, 1 / BINS, align="edge", color=GRAY, alpha=0.6, edgecolor="white")
    number.set(xlabel="confidence", ylabel="number")
    number.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (share, number):
        _plain(axes)
    return _png(figure)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9ccd1")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.title.set(fontsize=10, color=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=SCALE)
    plt.close(figure)
    return content.getvalue()
