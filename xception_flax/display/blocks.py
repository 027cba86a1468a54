"""A network as a row of blocks, with what each of them costs."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from xception_flax.display.lettering import FONT
from xception_flax.display.pictures import write

INK, GRAY, FILL, EDGE = "#222222", "#8a8f98", "#c9d9e8", "#2f5d8a"

COLUMN_INCHES = 1.12
DPI = 160

MAX_LAYERS = 4  # named in a block; of more, the first ones and how many there are besides
FLAT = 0.06  # height of a block without pixels
STACKED = 3  # sheets of a block that stands for several


class Block(NamedTuple):
    """A column of the picture.

    Attributes:
      name: of the block, or 'first ... last' of several.
      count: how many equal ones it stands for.
      shape: of the output, `(H, W, C)` or `(C,)`.
      layers: names of its layers, in the order of computation.
      costs: by name, the number and how it is written.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    layers: Sequence[str]
    costs: dict[str, tuple[float, str]]


def draw_blocks(image_shape: tuple[int, int, int], blocks: Sequence[Block], title: str, path: Path) -> None:
    """Draws the blocks from left to right, and below each its share of every cost.

    Height and width of a block grow with the square roots of the output's height and channels.

    Args:
      image_shape: `(H, W, C)` of the input.
      blocks: with the same costs each.
      title: of the picture.
      path: of the file; its suffix is the format.

    Raises:
      UserError: the file cannot be written.
    """
    names = list(blocks[0].costs)
    columns = [Block("image", 1, image_shape, [], {}), *blocks]
    with plt.rc_context({"font.family": FONT, "svg.hashsalt": "blocks", "svg.fonttype": "none"}):
        lines = max(min(len(block.layers), MAX_LAYERS) for block in columns)
        deep = 0.2 + 0.075 * lines  # below the blocks, for their texts; a block is up to one high
        heights = [2.3 * (1.15 + deep)] + [0.72] * len(names)
        figure, (top, *below) = plt.subplots(
            1 + len(names),
            figsize=(COLUMN_INCHES * len(columns) + 0.6, sum(heights) + 0.3),
            height_ratios=heights,
            sharex=True,
            layout="constrained",
        )
        top.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-deep, 1.15))
        top.set_title(title, loc="left", fontsize=11, color=INK)
        top.axis("off")
        tallest = max(max(block.shape[0] for block in columns if len(block.shape) == 3), 1)
        widest = max(block.shape[-1] for block in columns)
        for x, block in enumerate(columns):
            _draw(top, x, block, tallest, widest)
        for axes, name in zip(below, names, strict=True):
            _bars(axes, name, [block.costs[name] for block in blocks])
        content = io.BytesIO()
        kind = path.suffix.lower().removeprefix(".")
        figure.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
    write(path, lambda: path.write_bytes(content.getvalue()))


def _draw(axes: Axes, x: float, block: Block, tallest: int, widest: int) -> None:
    """Draws one block with its texts, in a column one wide and, of the block alone, one high."""
    height = math.sqrt(block.shape[0] / tallest) if len(block.shape) == 3 else FLAT
    width = max(0.72 * math.sqrt(block.shape[-1] / widest), 0.05)
    plain = block.name == "image"
    sheets = min(block.count, STACKED)
    for sheet in reversed(range(sheets)):
        corner = (x - width / 2 + 0.05 * sheet, 0.5 - height / 2 + 0.05 * sheet)
        axes.add_patch(
            Rectangle(corner, width, height, facecolor="#e6e6e6" if plain else FILL, edgecolor=GRAY if plain else EDGE)
        )
    top = 0.5 + height / 2 + 0.05 * (sheets - 1)
    name = block.name if block.count == 1 else block.name.replace(" ... ", " ...\n") + f"  x {block.count}"
    axes.text(x, top + 0.03, name, ha="center", va="bottom", fontsize=8.5, color=INK, weight="bold")
    axes.text(x, -0.06, " x ".join(map(str, block.shape)), ha="center", va="top", fontsize=7.5, color=INK)
    named = list(block.layers[:MAX_LAYERS])
    if (more := len(block.layers) - MAX_LAYERS) > 0:
        named[-1] = f"and {more + 1} more"
    axes.text(x, -0.16, "\n".join(named), ha="center", va="top", fontsize=7, color=GRAY, linespacing=1.35)


def _bars(axes: Axes, name: str, costs: Sequence[tuple[float, str]]) -> None:
    """Draws a cost of each block as its share of the sum; the first column is the image's."""
    total = sum(number for number, _ in costs) or 1
    shares = [number / total for number, _ in costs]
    axes.bar(range(1, len(costs) + 1), shares, width=0.55, color=EDGE)
    for x, (share, (_, written)) in enumerate(zip(shares, costs, strict=True), 1):
        axes.text(x, share + 0.04 * max(shares), written, ha="center", va="bottom", fontsize=7.5, color=INK)
    axes.text(0, 0, name, ha="center", va="bottom", fontsize=8.5, color=INK, weight="bold")
    axes.set(ylim=(0, 1.35 * max(shares)), yticks=[], xticks=[])
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(GRAY)
