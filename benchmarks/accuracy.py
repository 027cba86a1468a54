"""What benchmarks of accuracy share: programs of this project to their end, and a file of runs, a JSON line each."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.command import Progress
from benchmarks.worker import ROOT, WorkerError


def follow(progress: Progress, *arguments: str) -> None:
    """Runs Python with these arguments to its end, in the clone's folder, and shows the steps that it reports.

    Raises:
      WorkerError: it ended with an error.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        last = ""
        for line in process.stderr:
            last = line.strip() or last
            if line.startswith("step "):
                progress.show(line.strip())
        code = process.wait()
    finally:
        process.kill()
    if code:
        raise WorkerError(f"{' '.join(arguments)} ended with code {code}: {last}")


def read(results: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file, none where there is no file.

    Raises:
      WorkerError: it is no file of JSON lines.
    """
    try:
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    except (OSError, ValueError) as error:
        raise WorkerError(f"{results}: expected a line of JSON for each run ({error}); name another file.") from None


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that a number may depend on."""
    return {library: metadata.version(library) for library in ("jax", "flax", "optax")}
