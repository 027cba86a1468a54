"""Tries inputs that are damaged or made to hurt, for a time, and counts what becomes of them.

    python -m tests.fuzz --minutes 10 --json fuzz.json
    python -m tests.fuzz --only png --seed 7

Each input is the same for the same kind and seed. Those that are a finding are printed, and kept in `--keep`; an input
of the tests is `tests/fuzz/found/KIND/NAME`. The exit code is 1 if there is a finding.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import running
from tests.fuzz.kinds import Kind, all_kinds


def main(argv: Sequence[str]) -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    length = arguments.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="how long to try (1)")
    length.add_argument("--inputs", type=int, help="how many to try instead")
    arguments.add_argument("--seed", type=int, default=0, help="of the first input of each kind")
    arguments.add_argument("--only", action="append", metavar="NAME", help="this kind alone; may be repeated")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write counts and findings, as they are made")
    arguments.add_argument("--keep", type=Path, default=Path("fuzz_findings"), help="folder for the files of findings")
    arguments.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    arguments.set_defaults(argv=argv)
    given = arguments.parse_args(argv)
    known = all_kinds()
    if unknown := set(given.only or ()) - set(known):
        arguments.error(f"no kind {', '.join(unknown)}; there are {', '.join(known)}")
    kinds = {name: kind for name, kind in known.items() if not given.only or name in given.only}
    return _try(kinds, given)


def inputs(kinds: dict[str, Kind], seed: int) -> Iterator[running.Input]:
    """Yields inputs without end: of each kind in its share, with seeds one after the other."""
    draw, seeds = random.Random(seed), dict.fromkeys(kinds, seed)
    names, shares = list(kinds), [kind.share for kind in kinds.values()]
    while True:
        (name,) = draw.choices(names, shares)
        yield running.Input(name, seeds[name])
        seeds[name] += 1


def _until(items: Iterator[running.Input], end: float, count: float) -> Iterator[running.Input]:
    given = 0
    while given < count and time.monotonic() < end:
        yield next(items)
        given += 1


def _try(kinds: dict[str, Kind], given: argparse.Namespace) -> int:
    begun = told = time.monotonic()
    seconds = float("inf") if given.inputs else 60 * (given.minutes or 1)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    findings: list[dict[str, Any]] = []
    chosen = _until(inputs(kinds, given.seed), begun + seconds, given.inputs or float("inf"))
    for done, result in enumerate(running.run(chosen, given.workers, given.keep), start=1):
        counts[result.input.kind][result.outcome] += 1
        if result.outcome == "finding":
            findings.append({"kind": result.input.kind, "seed": result.input.seed, "message": result.message})
            print(f"\nFOUND {result.input.kind} --seed {result.input.seed}: {result.message}", flush=True)
        if (now := time.monotonic()) - told >= 5 or result.outcome == "finding":
            told, passed = now, now - begun
            left = (given.inputs - done) / (done / passed) if given.inputs else max(0.0, seconds - passed)
            print(f"{done:,} inputs, {done / passed:.1f} a second, {len(findings)} findings, {left:.0f} s left",
                  file=sys.stderr, flush=True)  # fmt: skip
            _write(given, counts, findings, passed)
    _write(given, counts, findings, time.monotonic() - begun)
    print(_table(counts))
    return 1 if findings else 0


def _write(given: argparse.Namespace, counts: Any, findings: list[dict[str, Any]], seconds: float) -> None:
    if given.json is None:
        return
    total = sum((counts[kind] for kind in counts), Counter())
    whole = {
        "command": ["python", "-m", "tests.fuzz", *given.argv],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        "inputs": sum(total.values()),
        "total": total,
        "kinds": {kind: counts[kind] for kind in sorted(counts)},
        "findings": findings,
    }
    partial = given.json.with_name(given.json.name + ".partial")
    partial.write_text(json.dumps(whole, indent=2) + "\n")
    partial.replace(given.json)


def _table(counts: dict[str, Counter[str]]) -> str:
    total = sum((counts[kind] for kind in counts), Counter())
    rows = [*((kind, counts[kind]) for kind in sorted(counts)), ("all", total)]
    lines = [f"{'kind':<20}{'inputs':>8}{'accepted':>10}{'refused':>9}{'findings':>10}"]
    for kind, row in rows:
        cells = (sum(row.values()), row["accepted"], row["refused"], row["finding"])
        lines.append("{:<20}{:>8,}{:>10,}{:>9,}{:>10,}".format(kind, *cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
