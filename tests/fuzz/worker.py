"""The process that reads inputs: one after the other, within limits. It may crash; its parent goes on.

It gets lines of JSON, {"kind", "seed"} or {"kind", "path"}, and answers each with a line: {"outcome": 'accepted',
'refused' or 'finding', "message", "seconds", "digest", "folder"}. The input is in `SCRATCH/input` while it is read.
"""

import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import kinds, planted
from xception_flax.text.errors import UserError

MEMORY = 3 * 2**30  # bytes that an input may take beside what the process has; the largest image takes a third
CPU_SECONDS = 25  # that an input may take: libhdf5 loops for ever on some files, and `weights.reading` ends it after 20
MAX_MESSAGE = 2000  # letters of an error, of one or two lines


def main(scratch: str) -> None:
    """Reads inputs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    faulthandler.enable()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(scratch) / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = planted.KINDS[request["kind"]] if request["kind"] in planted.KINDS else _known()[request["kind"]]
        if "path" in request:
            shutil.copytree(request["path"], folder, dirs_exist_ok=True)
        else:
            kinds.write(kind.make(kinds.generator(request["kind"], request["seed"])), folder)
        said = {"digest": digest(folder), "folder": str(folder)}  # before it is read, which may change the files
        answers.write(json.dumps(attempt(kind, folder) | said) + "\n")
        answers.flush()


@functools.cache
def _known() -> dict[str, kinds.Kind]:
    return kinds.all_kinds()


def digest(folder: Path) -> str:
    """Of all files of an input, by which two inputs are the same."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(os.fsencode(path.relative_to(folder)) + b"\0" + path.read_bytes())
    return found.hexdigest()


def attempt(kind: kinds.Kind, folder: Path) -> dict[str, Any]:
    """Reads an input, and says how that ended."""
    begun, cpu = time.monotonic(), _cpu_seconds()
    outcome, message = "accepted", ""
    try:
        with _limited_memory():
            kind.read(folder)
    except UserError as error:
        outcome, message = "refused", str(error)
        if not message.strip() or len(message) > MAX_MESSAGE:
            outcome, message = "finding", f"a message of {len(message)} letters: {message[:300]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in where if "xception_flax" in f.filename]
        outcome, message = "finding", f"{type(error).__name__}: {str(error)[:300]} ({' < '.join(reversed(ours[-3:]))})"
    used = _cpu_seconds() - cpu
    if outcome != "finding" and used > CPU_SECONDS:
        outcome, message = "finding", f"it took {used:.1f} s of the processor"
    # The kernel counts for a child what its parent had when it was started, so what this process took is no finding.
    own, children = (
        resource.getrusage(whose).ru_maxrss * 1024 for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    if outcome != "finding" and children > max(MEMORY, own):
        outcome, message = "finding", f"a process that it started took {children / 2**30:.1f} GiB"
    return {"outcome": outcome, "message": message, "seconds": time.monotonic() - begun}


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(sys.argv[1])
