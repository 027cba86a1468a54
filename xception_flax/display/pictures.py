"""Pictures for people: the images a network got wrong, the images it learns from."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xception_flax.display.lettering import Lettering, embedded
from xception_flax.text import naming
from xception_flax.text.errors import UserError

COLUMNS = 8  # images in a row
COLUMN_INCHES = 1.75  # width of an image
CAPTION_SIZE, TITLE_SIZE = 9, 10  # of letters, in points
DPI = 110
CAPTION_POINTS = 72 * COLUMN_INCHES - 8  # width of a caption


def check_suffix(path: Path) -> None:
    """Raises UserError unless the suffix of `path` is that of a format of pictures."""
    kinds = sorted({*FigureCanvasAgg.get_supported_filetypes()} - {"pgf"})  # pgf needs LaTeX
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UserError(f"{path} is no name of a picture; expected one that ends in .png (or .{', .'.join(kinds)}).")


def draw_mistakes(
    images: Sequence[np.ndarray],
    truths: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    title: str,
    path: Path,
) -> bytes:
    """Draws images with their true classes and the classes that were predicted; returns the picture as a PNG too.

    Args:
      images: uint8 `[H, W, C]` each; may be empty.
      truths: names of the true classes, as they are in the data.
      predictions: names of the predicted classes, as they are in the data.
      confidences: probability of each prediction, 0 to 1.
      title: of the whole picture; may have several lines.
      path: of the file.

    Raises:
      UserError: the file cannot be written.
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
    content = io.BytesIO()
    with _drawn(images, captions, title, lettering) as figure:
        figure.savefig(content, dpi=DPI)
        if path.suffix.lower() == ".png":
            write(path, lambda: path.write_bytes(content.getvalue()))
        else:
            write(path, lambda: figure.savefig(path, dpi=DPI))
    return content.getvalue()


def draw_images(
    images: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path, *, columns: int = COLUMNS
) -> None:
    """Draws images, some in a row, each with its caption above it.

    Args:
      images: uint8 `[H, W, C]` each; may be empty.
      captions: one an image; lines that are wider than the image are cut.
      title: of the whole picture; may have several lines.
      path: of the PNG file.
      columns: images in a row.

    Raises:
      UserError: the file cannot be written.
    """
    with _drawn(images, captions, title, Lettering([title, *captions]), columns) as figure:
        write(path, lambda: figure.savefig(path, dpi=DPI))


def write(path: Path, save: Callable[[], object]) -> None:
    """Calls `save`, which writes a picture.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        save()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; name another file.") from None


@contextlib.contextmanager
def _drawn(
    images: Sequence[np.ndarray], captions: Sequence[str], title: str, lettering: Lettering, columns: int = COLUMNS
) -> Iterator[Figure]:
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    # At least 3.5 inches, for a title of 35 letters.
    width = max(COLUMN_INCHES * columns, 3.5)
    lines = lettering.wrap(lettering.drawable(title), 72 * width - 8, TITLE_SIZE)
    captions = [lettering.drawable(caption) for caption in captions]
    short = lettering.cut([line for c in captions for line in c.split("\n")], CAPTION_POINTS, CAPTION_SIZE)
    captions = ["\n".join(short[line] for line in caption.split("\n")) for caption in captions]
    tallest = max((image.shape[0] / image.shape[1] for image in images), default=1)  # of those as wide as their column
    height = 1.7 * min(max(tallest, 0.4), 3) + 0.17 * max((caption.count("\n") + 1 for caption in captions), default=1)
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
        # A given height saves measuring the ticks, which are not drawn: a third of the time.
        lettering.write(partial(axes.set_title, y=1), caption, CAPTION_SIZE)
    lettering.write(figure.suptitle, "\n".join(lines), TITLE_SIZE)
    try:
        yield figure
    finally:
        plt.close(figure)
