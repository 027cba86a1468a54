"""Pictures for people: the curves of a run, the images a network got wrong, the images it learns from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is opened

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from xception_flax import naming
from xception_flax.lettering import Lettering, embedded

matplotlib.rcParams["text.usetex"] = False  # which a user's own settings may ask for, and names are no LaTeX

COLUMN_INCHES, CAPTION_SIZE, TITLE_SIZE = 1.75, 9, 10  # of an image; of letters, in points
CAPTION_POINTS = 72 * COLUMN_INCHES - 8  # what a caption may take up

TRAIN_COLOR, EVAL_COLOR, RATE_COLOR = "#4c78a8", "#e45756", "#72b7b2"


def check_path(path: Path) -> None:
    """Raises ValueError where no picture can be written to `path`; leaves no file."""
    kinds = sorted({*FigureCanvasAgg.get_supported_filetypes()} - {"pgf"})  # which LaTeX would have to read
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
    lettering = Lettering([title])
    lines = lettering.wrap(lettering.drawable(title), 12 * 72, 12)
    lettering.write(figure.suptitle, "\n".join(lines), 12)
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
      truths: names of the true classes, as they are in the data.
      predictions: names of the predicted classes, likewise.
      confidences: probability of each prediction, 0 to 1.
      title: of the whole picture; may have several lines.
      path: of the PNG file.

    Raises:
      ValueError: the file cannot be written.
    """
    truths, predictions = ([naming.shown(name) for name in names] for names in (truths, predictions))
    lettering = Lettering([title, *truths, *predictions])

    def fitted(names: Sequence[str], beside: str) -> list[str]:
        names = [lettering.drawable(name) for name in names]
        short = lettering.cut(names, CAPTION_POINTS - lettering.width(beside, CAPTION_SIZE), CAPTION_SIZE)
        return [embedded(short[name]) for name in names]

    captions = [
        f"is {truth}\nsaid {prediction} ({100 * confidence:.0f} %)"
        for truth, prediction, confidence in zip(
            fitted(truths, "is "), fitted(predictions, "said  (100 %)"), confidences, strict=True
        )
    ]
    _draw_images(images, captions, title, path, lettering)


def draw_images(images: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path) -> None:
    """Draws images, eight in a row, each with its caption above it.

    Args:
      images: uint8 `[H, W, C]` each; may be empty.
      captions: of each; lines that are wider than their image are cut.
      title: of the whole picture; may have several lines.
      path: of the PNG file.

    Raises:
      ValueError: the file cannot be written.
    """
    _draw_images(images, captions, title, path, Lettering([title, *captions]))


def _draw_images(
    images: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path, lettering: Lettering
) -> None:
    columns = max(1, min(8, len(images)))
    rows = -(-len(images) // columns)
    # As wide as the images, and at least as wide as the title: 35 letters are less than 3.5 inches.
    width = max(COLUMN_INCHES * columns, 3.5)
    lines = lettering.wrap(lettering.drawable(title), 72 * width - 8, TITLE_SIZE)
    captions = [lettering.drawable(caption) for caption in captions]
    short = lettering.cut([line for c in captions for line in c.split("\n")], CAPTION_POINTS, CAPTION_SIZE)
    captions = ["\n".join(short[line] for line in caption.split("\n")) for caption in captions]
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
        lettering.write(axes.set_title, caption, CAPTION_SIZE)
    lettering.write(figure.suptitle, "\n".join(lines), TITLE_SIZE)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise _not_writable(path, error) from None
    finally:
        plt.close(figure)
