"""Measures this network on one GPU: correctness of each lowering, operations, forward pass and training step.

Each contender is a process of its own, one at a time. Images are noise that is already on the device: no figure
includes reading or moving them. One row more has this project's training step with batches that are moved as train.py
moves them. The most valuable jobs are measured first, and the JSON is written anew after each record, so an interrupted
run loses nothing. What does not fit into --minutes has a row that says so.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.gpu_contenders import TIMM, Job, Record, timed_lowerings
from benchmarks.worker import ROOT
from xception_flax.text.lookup import suggest

EXAMPLES = """\
  python -m benchmarks.gpu --json gpu.json
  python -m benchmarks.gpu --only correctness,xception_flax_stock,timm_compile --mode train --batch 128
  python -m benchmarks.gpu --dry-run"""

LIMIT_SECONDS = 180  # of a process, compilation included
LEAST_SECONDS = 15  # with less time left, no process is started
OURS = "xception_flax_"
NOT_BY_DEFAULT = ("timm_max_autotune",)  # it compiles for minutes


class Process:
    """A process of `gpu_contenders`: it gets ready at once, and measures when it is told to."""

    def __init__(self, job: Job, folder: Path, dry_run: bool) -> None:
        self._log = folder / f"{job.subject}_{job.mode}_{job.batch}.log"
        own = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the next one gets ready beside it
            "JAX_PLATFORMS": "cpu" if dry_run else "cuda",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile time is measured
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }
        if job.subject == "correctness":  # every algorithm must be right, and autotuning takes minutes
            own["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_contenders", json.dumps(job._asdict())],
                cwd=ROOT,
                env=os.environ | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a signal reaches its children too
            )
        self._ended_by_limit = False

    def records(self, limit: float) -> Iterator[Record]:
        """Lets it measure, for `limit` seconds at most, and ends it; the last record may be a failure."""

        def end_by_limit() -> None:
            self._ended_by_limit = True
            self._kill()

        timer = threading.Timer(limit, end_by_limit)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has failed already, and its output says why
                self._process.stdin.write("go\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                record = json.loads(line)
                if record["kind"] == "end":
                    return
                yield record
                if record["kind"] == "failure":
                    return
            if self._ended_by_limit:
                yield {"kind": "failure", "failure": f"stopped after {limit:.0f} s"}
                return
            code = self._process.wait()
            name = signal.Signals(-code).name if code < 0 else f"code {code}"
            yield {"kind": "failure", "failure": f"its process ended by {name}", "log": self._last_words()}
        finally:
            timer.cancel()
            self.end()

    def end(self) -> None:
        """Ends the process and its children; a second time does nothing."""
        if not self._process.stdout.closed:
            self._kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Results:
    """Everything measured so far; each addition writes the file anew and prints a line."""

    def __init__(self, path: Path | None, options: argparse.Namespace) -> None:
        self._path = path

        self.all: dict[str, Any] = {
            "machine": command.machine(),
            "options": command.to_json(options) | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
            "ceilings": {},
            **{name: [] for name in ("correctness", "rows", "operations", "profiles")},
        }

    def add(self, job: Job, record: Record) -> None:
        kind, record = record["kind"], {name: value for name, value in record.items() if name != "kind"}
        of = {"contender": job.subject, "mode": record.pop("mode", job.mode), "batch": job.batch}
        if kind == "ceilings":
            self.all["ceilings"] = record
        elif kind in ("correctness", "operation"):
            self.all["correctness" if kind == "correctness" else "operations"].append(record)
        else:
            self.all["profiles" if kind == "profile" else "rows"].append(of | record)
        print(_line(kind, of, record), flush=True)
        if self._path:
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps(self.all, indent=1) + "\n")
            os.replace(partial, self._path)

    def wrong(self) -> set[str]:
        """Lowerings that do not compute what 'stock' computes."""
        return {record["lowering"] for record in self.all["correctness"] if not record["same"]}

    def failed(self) -> bool:
        """Whether anything failed or is wrong, apart from skipped jobs."""
        records = [*self.all["rows"], *self.all["operations"]]
        return bool(self.wrong()) or any("failure" in r and not r.get("skipped") for r in records)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write every number to this file too")
    arguments.add_argument("--minutes", type=command.positive(float), default=8.0, metavar="M", help="for all (8)")
    arguments.add_argument("--only", metavar="NAME,...", help=f"of these (all but {', '.join(NOT_BY_DEFAULT)})")
    arguments.add_argument(
        "--batch", default="128,32,1,256", metavar="N,...", help="images, in this order (%(default)s)"
    )
    arguments.add_argument("--mode", choices=("train", "forward"), help="only this mode (both)")
    arguments.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does it run?")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parser()
    options = arguments.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        arguments.error(f"--json: there is no folder {options.json.absolute().parent}.")
    subjects = ["correctness", "operations", *(f"{OURS}{name}" for name in timed_lowerings()), "plain_linen", *TIMM]
    chosen = options.only.split(",") if options.only else [name for name in subjects if name not in NOT_BY_DEFAULT]
    for name in chosen:
        if name not in subjects:
            arguments.error(f"unknown name {name!r}; {suggest(name, subjects)}")
    try:
        batches = [command.positive(int)(text) for text in options.batch.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        arguments.error(f"--batch takes numbers of images, such as 128,32, got {options.batch!r}.")

    results, deadline = Results(options.json, options), time.monotonic() + 60 * options.minutes
    measure(jobs(chosen, batches, options), results, deadline, options.dry_run)
    print(f"\n{report(results.all)}")
    return int(results.failed())


def jobs(chosen: Sequence[str], batches: Sequence[int], options: argparse.Namespace) -> list[Job]:
    """Returns the jobs, the most valuable first."""
    tiny = dict(tiny=True, size=64, chain_seconds=0.02) if options.dry_run else {}
    batches = [2] if options.dry_run else batches
    modes = [options.mode] if options.mode else ["train", "forward"]
    contenders = [name for name in chosen if name not in ("correctness", "operations")]

    def of_contenders(mode: str, batch: int) -> list[Job]:
        return [Job(name, mode, batch, **tiny) for name in contenders if mode in modes]

    first, *others = batches
    correctness = Job("correctness", batch=2 if options.dry_run else 8, **{"size": 139} | tiny)
    operations = Job("operations", batch=first, **{"chain_seconds": 0.05} | tiny)
    return [
        *([correctness] if "correctness" in chosen else []),
        *of_contenders("train", first),
        *([operations] if "operations" in chosen else []),
        *(job for batch in batches for job in of_contenders("forward", batch)),
        *(job for batch in others for job in of_contenders("train", batch)),
    ]


def measure(todo: Sequence[Job], results: Results, deadline: float, dry_run: bool) -> None:
    """Runs one process after the other; meanwhile the next one imports and traces."""

    def why_not(job: Job) -> str:
        if job.subject.removeprefix(OURS) in results.wrong() and job.subject.startswith(OURS):
            return "not timed: it does not compute the same"
        return "" if deadline - time.monotonic() > LEAST_SECONDS else "left out: no time left"

    waiting: dict[int, Process] = {}
    with tempfile.TemporaryDirectory() as folder:

        def started(i: int) -> Process:
            return waiting.pop(i, None) or Process(todo[i], Path(folder), dry_run)

        try:
            for i, job in enumerate(todo):
                if reason := why_not(job):
                    results.add(job, {"kind": "failure", "failure": reason, "skipped": True})
                    continue
                process = started(i)
                waiting[i] = process  # so that it is ended whatever happens
                if i + 1 < len(todo) and not why_not(todo[i + 1]):
                    waiting[i + 1] = started(i + 1)
                left = deadline - time.monotonic()
                for record in process.records(left if dry_run else min(LIMIT_SECONDS, left)):
                    results.add(job, record)
        finally:
            for process in waiting.values():
                process.end()


# What is printed -----------------------------------------------------------------------------------


def _line(kind: str, of: Record, record: Record) -> str:
    name = " ".join(str(value) for value in of.values() if value)
    if "failure" in record:
        return (
            f"{name}: {' '.join(str(record[key]) for key in ('case', 'lowering') if key in record)} {record['failure']}"
        )
    if kind == "correctness":
        words = f"{record['case']}, {record['dtype']}, {record['lowering']}"
        return f"{words}: {max(record['errors'].values()):.1e}{'' if record['same'] else ' NOT THE SAME'}"
    if kind == "operation":
        words = f"{record['case']}, {record['part']}, {record['lowering']}"
        return f"{words}: {1e6 * record['seconds']:.0f} us, {record['gb_per_second']:.0f} GB/s"
    if kind == "ceilings":
        return f"copy {record['copy_gb_per_second']:.0f} GB/s, product {record['matmul_tflops_bf16']:.0f} TFLOP/s"
    if kind == "profile":
        return f"{name}: kernels take {record['kernel_ms']:.1f} ms a step"
    if "put_seconds" in record:
        rate = record["batch_bytes"] / record["put_seconds"] / 1e9
        return f"{name}: {record['images_per_second']:.1f} images/s, a batch alone is moved at {rate:.1f} GB/s"
    return f"{name}: {record['images_per_second']:.1f} images/s, first run {record['first_seconds']:.0f} s"


def report(results: dict[str, Any]) -> str:
    """Returns the tables in Markdown."""
    parts = []
    if results["correctness"]:
        parts.append(_correctness_table(results["correctness"]))
    if results["operations"]:
        parts.append(_operations_table(results["operations"], results["ceilings"]))
    parts += [f"{row['contender']}: {row['failure']}" for row in results["rows"] if not row["mode"]]
    groups = dict.fromkeys((row["mode"], row["batch"]) for row in results["rows"] if row["mode"])
    parts += [_rows_table([row for row in results["rows"] if (row["mode"], row["batch"]) == group]) for group in groups]
    return "\n\n".join(parts)


def _correctness_table(records: Sequence[Record]) -> str:
    """Returns the largest error of each lowering and type, of operations and of the network."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["lowering"], record["dtype"]), []).append(record)

    def largest(group: Sequence[Record], network: bool) -> str:
        of = [r["errors"].values() for r in group if "errors" in r and r["case"].startswith("network") == network]
        return f"{max(map(max, of)):.1e}" if of else "-"

    rows = [
        (
            f"{lowering}, {dtype}",
            largest(group, False),
            largest(group, True),
            "yes" if all(r["same"] for r in group) else "NO",
        )
        for (lowering, dtype), group in groups.items()
    ]
    return command.markdown(("largest error", "operations", "network", "the same"), rows)


def _operations_table(records: Sequence[Record], ceilings: Record) -> str:
    lowerings = list(dict.fromkeys(record["lowering"] for record in records))
    cells: dict[str, dict[str, str]] = {}
    for r in records:
        text = f"{1e6 * r['seconds']:.0f} us, {r['gb_per_second']:.0f} GB/s" if "seconds" in r else "failed"
        cells.setdefault(f"{r['case']}, {r['part']}", {})[r["lowering"]] = text
    copy = f"copy {ceilings['copy_gb_per_second']:.0f} GB/s" if ceilings else ""
    rows = [(name, *(of.get(lowering, "-") for lowering in lowerings)) for name, of in cells.items()]
    return command.markdown((copy, *lowerings), rows)


def _rows_table(rows: Sequence[Record]) -> str:
    mode, batch = rows[0]["mode"], rows[0]["batch"]
    measured = sorted((row for row in rows if "failure" not in row), key=lambda row: -row["images_per_second"])
    header = (f"{mode}, {batch} images", "images/s", "of chains", "ms", "of the best", "first run s", "peak GB")

    def line(row: Record) -> tuple[str, ...]:
        low, high = (batch / seconds for seconds in (max(row["lap_seconds"]), min(row["lap_seconds"])))
        peak = row["peak_bytes"]
        return (
            row["contender"],
            f"{row['images_per_second']:,.1f}",
            f"{low:,.1f} to {high:,.1f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['images_per_second'] / measured[0]['images_per_second']:.2f}",
            f"{row['first_seconds']:.1f}",
            f"{peak / 1e9:.2f}" if peak else "-",
        )

    table = command.markdown(header, [line(row) for row in measured])
    return "\n".join([table, *(f"| {row['contender']} | {row['failure']} |" for row in rows if "failure" in row)])


if __name__ == "__main__":
    command.run(main)
