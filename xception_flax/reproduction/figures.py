"""The figures of the page: differences, accuracy along an axis, the curves of all runs."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import xception_flax.display.lettering  # noqa: F401 - before pyplot: it chooses how pictures are drawn
from xception_flax.reproduction.claims import MARGIN, Claim, Table, Verdict, interval
from xception_flax.reproduction.plan import search
from xception_flax.reproduction.results import Results

COLORS = {"agree": "#2f7d5b", "disagree": "#c8553d", "open": "#2f5d8a"}  # others are gray
GRAY, GRID = "#8a8f98", "#e3e5e8"
DPI = 130

LINEAR_UP_TO = 2  # points of accuracy
POINTS = (-50, -20, -5, -2, -1, 0, 1, 2, 5, 20, 50)  # ticks, as far as they are in the picture


def differences(rows: Sequence[tuple[str, str, Verdict]]) -> bytes:
    """Draws each comparison's seeds, mean and interval, the zero line and the margin of equality.

    Args:
      rows: data set, what is compared, verdict; in the order of the page, only those with differences.

    Returns:
      A PNG.
    """
    import matplotlib.pyplot as plt

    data_sets = list(dict.fromkeys(data_set for data_set, _, _ in rows))
    heights = [sum(row[0] == data_set for row in rows) for data_set in data_sets]
    figure, grid = plt.subplots(
        len(data_sets),
        1,
        figsize=(9, 1.0 + 0.7 * len(data_sets) + 0.3 * len(rows)),
        squeeze=False,
        sharex=True,
        layout="constrained",
        height_ratios=[height + 1 for height in heights],
    )
    for axes, data_set in zip(grid[:, 0], data_sets, strict=True):
        of_set = [(words, verdict) for name, words, verdict in rows if name == data_set]
        axes.axvspan(-MARGIN, MARGIN, color="#f1f2f4")
        axes.axvline(0, color=GRAY, linewidth=1)
        for place, (_, verdict) in enumerate(of_set):
            color = COLORS.get(verdict.word, GRAY)
            axes.plot(verdict.differences, [place] * len(verdict.differences), "o", color=color, alpha=0.4, ms=4)
            if not math.isnan(verdict.low):
                axes.plot([verdict.low, verdict.high], [place] * 2, color=color, linewidth=2)
                axes.plot(verdict.mean, place, "D", color=color, ms=6)
        axes.set_yticks(range(len(of_set)), [f"{words}: {verdict.word}" for words, verdict in of_set])
        axes.set(ylim=(len(of_set) - 0.4, -0.6), title=data_set)
        axes.set_xscale("symlog", linthresh=LINEAR_UP_TO, linscale=1.5)  # one wide interval would hide all others
        ticks = [tick for tick in POINTS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
        axes.xaxis.minorticks_off()
        _clean(axes, "x")
    said = f"(dots: seeds; bars: 95 %; gray: less than {MARGIN:g};\nlogarithmic beyond {LINEAR_UP_TO} points)"
    grid[-1, 0].set_xlabel(f"test accuracy minus that of the base, points\n{said}")
    return _png(figure)


def axis(results: Results, table: Table, claim: Claim) -> bytes | None:
    """Draws the test accuracy along the axis of a claim, with intervals over the seeds; None without results.

    Returns:
      A PNG.
    """
    import matplotlib.pyplot as plt

    lines = {
        (data_set, name): [(tick, _accuracies(results, data_set, setting)) for tick, setting in points]
        for data_set in table.data_sets
        for name, points in claim.axis.items()
    }
    data_sets = [d for d in table.data_sets if any(v for (of, _), line in lines.items() if of == d for _, v in line)]
    if not data_sets:
        return None
    figure, grid = plt.subplots(
        1, len(data_sets), figsize=(4.6 * len(data_sets), 3.6), squeeze=False, layout="constrained"
    )
    for axes, data_set in zip(grid[0], data_sets, strict=True):
        for number, (name, color) in enumerate(zip(claim.axis, ("#2f5d8a", "#c8553d"), strict=False)):
            points = [(place, values) for place, (_, values) in enumerate(lines[data_set, name])]
            shift = 0.12 * (number - (len(claim.axis) - 1) / 2)
            # NaN where nothing was run: no line joins points over one that is missing.
            means = [math.fsum(values) / len(values) if values else math.nan for _, values in points]
            axes.plot([place + shift for place, _ in points], means, "o-", color=color, label=name, ms=4)
            for place, values in points:
                if len(values) > 1:
                    _, low, high = interval(values)
                    axes.plot([place + shift] * 2, [low, high], color=color, linewidth=1.5)
        ticks = [tick for tick, _ in next(iter(claim.axis.values()))]
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(title=table.data_sets[data_set], xlabel=claim.axis_title, ylabel="test accuracy, %")
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.legend(frameon=False, fontsize=8)
        _clean(axes, "y")
    return _png(figure)


def curves(results: Results, table: Table) -> bytes | None:
    """Draws the training loss of the runs, a small panel a setting and a line a seed; None without runs.

    Those at another rate than the setting's own, that of its base, are of another color. Searches are left out.

    Returns:
      A PNG.
    """
    import matplotlib.pyplot as plt

    panels = [
        (data_set, setting, rows)
        for data_set in table.data_sets
        for setting in table.settings
        if (rows := _rows(results, data_set, setting, own_rate=False))
    ]
    if not panels:
        return None
    columns = min(6, len(panels))
    figure, grid = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(2.2 * columns, 1.9 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    losses = {
        d: [loss for of, _, rows in panels if of == d for r in rows for _, loss in r["losses"]] for d, _, _ in panels
    }
    for axes, (data_set, setting, rows) in zip(grid.flat, panels, strict=False):
        rate, _ = search(results, data_set, setting)
        for row in rows:
            color = "#2f5d8a" if rate in (None, row["learning_rate"]) else "#e08a2e"
            axes.plot(*zip(*row["losses"], strict=True), linewidth=0.9, alpha=0.7, color=color)
        axes.set(yscale="log", ylim=(min(losses[data_set]) / 1.1, max(losses[data_set]) * 1.1))
        title = f"{table.data_sets[data_set]}\n{table.settings[setting].title.replace(', equal', chr(10) + 'equal')}"
        axes.set_title(title, fontsize=6.5)
        axes.tick_params(labelsize=6, which="both")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        _clean(axes, "y")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("training loss", fontsize=8)
    return _png(figure)


def _rows(results: Results, data_set: str, setting: str, *, own_rate: bool = True) -> list[Mapping[str, Any]]:
    """Returns the rows of a setting with results, by rate and seed; only those at its own learning rate or all."""
    rate, _ = search(results, data_set, setting)
    of = (data_set, setting, rate) if own_rate else (data_set, setting)
    runs = sorted(run for run in results.rows if run[: len(of)] == of and not run.is_search)
    return [results.rows[run] for run in runs if results.rows[run]["test"] is not None]


def _accuracies(results: Results, data_set: str, setting: str) -> list[float]:
    return [100 * row["test"]["ema"]["top1"] for row in _rows(results, data_set, setting)]


def _clean(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID)
    axes.set_axisbelow(True)


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, metadata={"Software": None})  # no version: the same results, the same bytes
    plt.close(figure)
    return content.getvalue()
