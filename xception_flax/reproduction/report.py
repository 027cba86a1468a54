"""The page about a table: what was decided before, what the results say, what each run cost.

Its bytes follow from the table and the results; nothing is of the moment or the machine on which it is written.
"""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xception_flax.host import files
from xception_flax.host.project import PROJECT
from xception_flax.reproduction.claims import (
    CONFIDENCE,
    EXTENSIONS,
    FACTORS,
    MARGIN,
    MIN_SEEDS,
    MORE_SEEDS,
    SEARCH_SEED,
    Comparison,
    Table,
    Verdict,
    holm,
    together,
)
from xception_flax.reproduction.plan import search, verdict
from xception_flax.reproduction.results import Results, Run
from xception_flax.text.counting import counted

PAGE = "miniature.md"
TABLE, RESULTS = "configs/miniature.py", "results/miniature.jsonl"  # of the project
FOLDER = "images"  # of the pictures, beside the page


def write(results: Results, table: Table, folder: Path, source: Path = PROJECT / RESULTS) -> list[Path]:
    """Writes the page and its figures into a folder, and returns their paths; figures without results are removed.

    Args:
      results: of the file `source`.
      table: of all claims.
      folder: for the page, and for the folder of its figures.
      source: only if it is the project's, and the table too, has the page links to both. The notes of the project's
        table are on its results, and on no other page.

    Raises:
      UserError: a file cannot be written.
    """
    drawn = draw(results, table)
    with files.file_errors(folder / FOLDER, "made"):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in drawn.items():
        path = folder / FOLDER / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            files.write_whole(path, [content])
            written.append(path)
    there = [name for name, content in drawn.items() if content is not None]
    files.write_whole(folder / PAGE, [render(results, table, there, source).encode()])
    return [folder / PAGE, *written]


def draw(results: Results, table: Table) -> dict[str, bytes | None]:
    """Returns the figures by their file's name, PNGs; None for those that have nothing to show yet."""
    from xception_flax.reproduction import figures  # Matplotlib, of an extra: the help does without it

    rows = [
        (table.data_sets[data_set], words(table, comparison), found)
        for data_set in table.data_sets
        for claim in table.claims
        for comparison in claim.comparisons
        if (found := verdict(results, data_set, comparison)).differences
    ]
    drawn: dict[str, bytes | None] = {"miniature_differences.png": figures.differences(rows) if rows else None}
    drawn |= {
        f"miniature_{claim.name}.png": figures.axis(results, table, claim) for claim in table.claims if claim.axis
    }
    return drawn | {"miniature_curves.png": figures.curves(results, table)}


def words(table: Table, comparison: Comparison) -> str:
    """Returns what the page calls a comparison."""
    return table.settings[comparison.setting].title + (f", {comparison.words}" if comparison.words else "")


def render(results: Results, table: Table, pictures: Sequence[str], source: Path = PROJECT / RESULTS) -> str:
    """Returns the page in Markdown; `pictures` are the names of the figures that are there, the rest as of `write`."""
    is_projects_table = table.path.resolve() == (PROJECT / TABLE).resolve()
    ours = is_projects_table and source.resolve() == (PROJECT / RESULTS).resolve()
    titles = {
        "miniature_differences.png": "Every comparison: seeds, mean and interval",
        "miniature_curves.png": "Training loss of every run but those of a search; orange: at the rate of the base",
        **{f"miniature_{claim.name}.png": claim.title for claim in table.claims},
    }
    parts = [
        _HEAD.format(
            table=f"[{TABLE}](../{TABLE})" if ours else f"`{table.path}`",
            results=f"[{RESULTS}](../{RESULTS})" if ours and results.rows else f"`{source}`",  # no link to no file
        ),
        _filled(table.about),
        "## What the results say",
        _summary(results, table),
        _comparisons(results, table),
        *(_notes(table) if ours or not is_projects_table else []),
        *(f"![{titles[name]}]({FOLDER}/{name})" for name in pictures),
        "## Decided before it was run",
        _protocol(results, table),
        "## What each setting costs",
        _costs(results, table),
        "## Learning rates",
        _rates(results, table),
        "## Where it was run",
        _where(results, table),
    ]
    return "\n\n".join(parts) + "\n"


_HEAD = """\
# The paper in miniature

The paper's claims need ImageNet, JFT and 60 GPUs. This page tries them on small networks and small images, on one or
two CPU cores, with several seeds of each. It supports or contradicts a claim at this size only.

`xception-flax reproduce` writes this page: do not edit it. {table} has the
claims, {results} a line for each run.

<!-- not run: takes hours -->
```bash
xception-flax reproduce --budget 10          # minutes; what is missing, as far as that goes
xception-flax reproduce --jobs 2             # two runs at once, each on half of the CPUs
xception-flax reproduce --report             # writes this page from the results, and runs nothing
xception-flax reproduce --only residual --results mine.jsonl --output mine     # one claim, anew
```

All of it takes several hours: a run takes one or two minutes, and a comparison 12 to 20 runs. Each is a process of
`train.py`. Ctrl-C stops it after a checkpoint, and the same command goes on from there. Digits are included; the files
of Fashion-MNIST are read from `--data-dir` (Debian: `apt install dataset-fashion-mnist`). The number of CPUs that a run
has changes how it rounds, and at these rates its accuracy by as much as another seed does: results of `--jobs 2` are
others than those of one job."""


def _summary(results: Results, table: Table) -> str:
    rows = []
    for claim in table.claims:
        found = {d: [verdict(results, d, comparison).word for comparison in claim.comparisons] for d in table.data_sets}
        rows.append((f"{claim.title} ({claim.place})", *(together(found[data_set]) for data_set in table.data_sets)))
    return _table(("claim", *table.data_sets.values()), rows)


def _comparisons(results: Results, table: Table) -> str:
    rows = []
    for claim in table.claims:
        for comparison in claim.comparisons:
            for data_set, title in table.data_sets.items():
                found = verdict(results, data_set, comparison)
                rows.append(
                    (
                        claim.name,
                        f"{words(table, comparison)}, beside {table.settings[comparison.base].title}",
                        title,
                        comparison.expected if comparison.expected != "open" else "(open)",
                        _difference(found),
                        str(len(found.differences)),
                        found.word,
                    )
                )
    note = (
        "A difference is the test accuracy of the first minus that of the second, in percentage points, with the 95 % "
        "interval of its mean."
    )
    header = ("claim", "compared", "data", "claimed", "difference", "seeds", "verdict")
    return f"{_filled(note)}\n\n{_table(header, rows)}"


def _notes(table: Table) -> list[str]:
    """Returns what was written of the results after a look at them, a paragraph a claim."""
    notes = [f"- **{claim.name}.** {claim.note}" for claim in table.claims if claim.note]
    if not notes:
        return []
    said = "Written after a look at the results, where they contradict the paper or may mislead:"
    return [said, "\n".join(_filled(note, "  ") for note in notes)]


def _difference(found: Verdict) -> str:
    if math.isnan(found.mean):
        return ""
    bounds = "" if math.isnan(found.low) else f" ({found.low:+.2f} to {found.high:+.2f})"
    return f"{found.mean:+.2f}{bounds}"


_PROTOCOL = """
**Measure.** Accuracy on the test split, at the last step, by the averaged weights.

**One change.** A setting is the recipe of its base with the changes that `configs/miniature.py` names; a test compares
the recipes. 'Equal' parameters or multiply-adds are so within 1 %.

**Learning rate.** For every setting alike, also the base: the recipe's rate times {factors}, with seed {search_seed},
which no result has, by the accuracy on the validation split at the end; of equal ones, the lower loss. If the best is
at an edge, the grid grows there by a step, at most {extensions} times. The test split takes no part: a search does not
read it.

**Seeds.** 0 to {last}, and to {last_of_more} where those leave a comparison undecided or its mean within two standard
errors of 0. Below {min_seeds} nothing is decided.

**Pairs.** Setting and base with the same seed see the same images in the same order with the same augmentation. The
difference of each pair is taken. Its mean has the {percent:g} % interval of Student's t, to each side at least half a
test image.

**The rule.** 'Better' and 'worse': *agree* if the interval excludes 0 on the claimed side, *disagree* if on the other,
else *undecided*. 'Equal': *agree* if the interval is within {margin:g} points of 0, *disagree* if it is wholly outside,
else *undecided*. A run that diverged leaves its comparison undecided. On a data set a claim has the verdict that all
its comparisons have, and is undecided if they differ; open ones have none.

**Not corrected.** Each verdict is by itself. Where there is no difference, about one comparison in twelve (8.6 %,
simulated) excludes 0 all the same, since it is looked at after {min_seeds} and after {more_seeds} seeds. All
comparisons on a data set share the runs of their base. {holm} The intervals are over seeds: neither over other test
images nor over another search of the rate, which has one seed.
"""


def _protocol(results: Results, table: Table) -> str:
    text = _PROTOCOL.format(
        factors=", ".join(f"{factor:g}" for factor in FACTORS),
        search_seed=SEARCH_SEED,
        extensions=EXTENSIONS,
        last=MIN_SEEDS - 1,
        last_of_more=MORE_SEEDS - 1,
        min_seeds=MIN_SEEDS,
        more_seeds=MORE_SEEDS,
        percent=100 * CONFIDENCE,
        margin=MARGIN,
        holm=_holm(results, table),
    )
    return "\n".join(_filled(f"- {point}", "  ") for point in text.strip().split("\n\n"))


def _holm(results: Results, table: Table) -> str:
    """Returns a sentence on the verdicts that would be left if all comparisons were one test."""
    compared = [
        (f"{words(table, comparison)}, {title}", found)
        for data_set, title in table.data_sets.items()
        for claim in table.claims
        for comparison in claim.comparisons
        if comparison.expected in ("better", "worse")
        and (found := verdict(results, data_set, comparison)).word in ("agree", "disagree", "undecided")
        and found.differences
    ]
    if not compared:
        return ""
    stands = holm([found.differences for _, found in compared])
    kept = [name for (name, found), s in zip(compared, stands, strict=True) if s and not found.low <= 0 <= found.high]
    all_of_them = counted(len(compared), "comparison")
    said = f"these exclude 0: {'; '.join(kept)}" if kept else "none excludes 0"
    return f"By Holm's correction, which takes the {all_of_them} of a claimed difference together, {said}."


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _costs(results: Results, table: Table) -> str:
    rows = []
    for data_set, title in table.data_sets.items():
        for setting in table.settings:
            rate, _ = search(results, data_set, setting)
            found = [row for run, row in results.rows.items() if run[:3] == (data_set, setting, rate)]
            runs = [row for row in found if not _run(row).is_search]
            finals = [row for row in runs if row["test"] is not None]
            if not finals:
                continue
            diverged = len(runs) - len(finals)
            accuracies = [100 * row["test"]["ema"]["top1"] for row in finals]
            rows.append(
                (
                    f"{table.settings[setting].title}, {title}",
                    f"{finals[0]['parameters']:,}",
                    f"{finals[0]['multiply_adds'] / 1e6:.2f}",
                    _least([row["step_seconds"] for row in finals], "{:.3f}"),
                    _least([row["seconds"] for row in finals], "{:.0f}"),
                    f"{statistics.fmean(accuracies):.2f}",
                    f"{len(finals)}" + (f" (and {diverged} diverged)" if diverged else ""),
                )
            )
    header = ("setting", "parameters", "10^6 multiply-adds", "s a step", "s a run", "test accuracy, %", "runs")
    note = (
        "Times are the least of the runs that are counted here, beside other work or not; none where all of them were "
        "stopped in between. Accuracies are means of all seeds, here and in the picture of the towers; a difference "
        "above is of the seeds that both settings have."
    )
    return f"{_filled(note)}\n\n{_table(header, rows)}" if rows else "Not run."


def _least(values: Sequence[float | None], spelling: str) -> str:
    known = [value for value in values if value is not None]
    return spelling.format(min(known)) if known else ""


def _rates(results: Results, table: Table) -> str:
    rows = []
    for data_set, title in table.data_sets.items():
        for setting, entry in table.settings.items():
            rate, _ = search(results, data_set, setting)
            tried = sorted(run for run in results.rows if run[:2] == (data_set, setting) and run.is_search)
            if tried:
                cells = [f"{run.learning_rate:g}: {_validation(results.rows[run])}" for run in tried]
                chosen = f"{rate:g}" if rate is not None else "(not yet)"
                rows.append((f"{entry.title}, {title}", ", ".join(cells), chosen))
    note = "Validation accuracy in percent of each rate that was tried."
    return f"{note}\n\n{_table(('setting', 'tried', 'chosen'), rows)}" if rows else "Not run."


def _validation(row: Mapping[str, Any]) -> str:
    return "diverged" if row["validation"] is None else f"{100 * row['validation']['top1']:.2f}"


def _where(results: Results, table: Table) -> str:
    if not results.rows:
        said = "Nothing was run yet."
    else:
        kinds = [
            f"{table.data_sets[run.data_set]}, {counted(row['machine']['cpus'], 'CPU')} ({row['machine']['cpu']}), "
            + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            for run, row in results.rows.items()
        ]
        said = "\n".join(f"- {counted(kinds.count(kind), 'run')}: {kind}" for kind in sorted(set(kinds)))
        said += "\n\nOther machines and versions of this project round differently; a pair may be of two."
    stale = f"\n\n{counted(results.stale, 'line')} of the results are of other recipes, and count for nothing."
    return said + (stale if results.stale else "")


def _run(row: Mapping[str, Any]) -> Run:
    return Run(row["data_set"], row["setting"], row["learning_rate"], row["seed"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
