"""Pictures for people: the curves of a run, the images a network got wrong, the images it learns from."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is opened

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

TRAIN_COLOR, EVAL_COLOR, RATE_COLOR = "#4c78a8", "#e45756", "#72b7b2"


def check_path(path: Path) -> None:
    """Raises ValueError where no picture can be written to `path`; leaves no file."""
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"{path} is no name of a picture; expected one that ends in .png (or .{', .'.join(kinds)}).")
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written: {error.strerror or error}; name another file.")


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draws loss, quality and learning rate over the steps from the records of metrics.jsonl."""
    quality = next((m for m in ("top1", "map") if any(f"eval/{m}" in r for r in records)), "top1")
    figure, (loss, score, rate) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _plot(loss, records, "train/loss", TRAIN_COLOR, "training")
    _plot(loss, records, "eval/loss", EVAL_COLOR, "evaluation")
    loss.set(title="loss (nats)", xlabel="step", yscale="log")
    _plot(score, records, f"train/{quality}", TRAIN_COLOR, "training", scale=100)
    last = _plot(score, records, f"eval/{quality}", EVAL_COLOR, "evaluation", scale=100)
    if last is not None:
        score.annotate(
            f"{last[1]:.2f} %", last, xytext=(-4, -14), textcoords="offset points", ha="right", color=EVAL_COLOR
        )
    score.set(title={"top1": "top-1 accuracy (%)", "map": "mean average precision (%)"}[quality], xlabel="step")
    _plot(rate, records, "train/learning_rate", RATE_COLOR, None)
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    for axes in (loss, score, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    for axes in (loss, score):
        if axes.lines:
            axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, color: str, label: str | None, scale: float = 1.0
) -> tuple[float, float] | None:
    """Plots one key and returns its last point."""
    points = [(r["step"], scale * r[key]) for r in records if r.get(key) is not None]
    if not points:
        return None
    axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if len(points) < 40 else None, ms=3)
    return points[-1]


def draw_mistakes(
    images: Sequence[np.ndarray],
    truths: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """Draws images with what they are and what they were taken for.

    Args:
      images: uint8 `[H, W, C]` each; may be empty.
      truths: names of the true classes.
      predictions: names of the predicted classes.
      confidences: probability of each prediction, 0 to 1.
      title: of the whole picture; may have several lines.
      path: of the PNG file.

    Raises:
      ValueError: the file cannot be written.
    """
    captions = [
        f"is {short(truth)}\nsaid {short(prediction)} ({100 * confidence:.0f} %)"
        for truth, prediction, confidence in zip(truths, predictions, confidences, strict=True)
    ]
    draw_images(images, captions, title, path)


def draw_images(images: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path) -> None:
    """Draws images, eight in a row, each with its caption above it.

    Args:
      images: uint8 `[H, W, C]` each; may be empty.
      captions: of each; lines over 21 letters are cut.
      title: of the whole picture; may have several lines.
      path: of the PNG file.

    Raises:
      ValueError: the file cannot be written.
    """
    columns = max(1, min(8, len(images)))
    rows = -(-len(images) // columns)
    # As wide as the images, and at least as wide as the title: 35 letters are less than 3.5 inches.
    width = max(1.75 * columns, 3.5)
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, int(width * 10))]
    captions = ["\n".join(short(line, 21) for line in caption.split("\n")) for caption in captions]
    height = 1.7 + 0.17 * max((caption.count("\n") + 1 for caption in captions), default=1)
    figure, grid = plt.subplots(
        max(1, rows),
        columns,
        figsize=(width, height * rows + 0.25 * len(lines)),
        layout="constrained" if len(images) else None,  # without images there is nothing to lay out
        squeeze=False,
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=9)
    figure.suptitle("\n".join(lines), fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise _not_writable(path, error) from None
    finally:
        plt.close(figure)


def short(name: str, letters: int = 16) -> str:
    """The name, cut to so many letters."""
    return name if len(name) <= letters else name[: letters - 1] + "…"
