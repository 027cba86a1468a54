"""Runs commands as a user does: in processes of their own, or by their entry point in this one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from xception_flax.commands import cli
from xception_flax.training import sharding

ROOT = Path(__file__).parents[1]

started: list[subprocess.Popen] = []  # `conftest.none_is_left` kills those that a failed test leaves behind


def environment(devices: int | None = None, root: Path = ROOT) -> dict[str, str]:
    """Returns the environment of a process. With `devices` it has so many CPU devices and compiles as a user's does."""
    own = {"PYTHONPATH": str(root), "COLUMNS": "120"}
    if devices is not None:
        own["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | own


def start(*arguments: object, devices: int | None = None, root: Path = ROOT) -> subprocess.Popen:
    """Starts Python with `arguments` in a process group of its own, in the clone or a copy of it at `root`."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(devices, root),
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    return process


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for the end of a process; returns its code, its output and its errors."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def run(*arguments: object, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with `arguments` to its end; `variables` change its environment."""
    command, changed = [sys.executable, *map(str, arguments)], environment() | variables
    return subprocess.run(command, env=changed, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen) -> None:
    """Waits for a condition that `process` brings about."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> set[int]:
    """Returns the worker processes of `pid`: those that Python has spawned, without its tracker of shared memory."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"spawn_main" in command:
            found.add(int(path.parent.name))
    return found


def pause(process: subprocess.Popen) -> None:
    """Stops a process, and waits until it stands still: the signal alone leaves it a moment to write in."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Commands in this process have one device, as a reader's have. With the eight of the tests a step takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", partial(sharding.create_mesh, devices=jax.devices()[:1]))
        yield


def call(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[Sequence[str] | None], int],
    *arguments: object,
) -> tuple[int, str, str]:
    """Calls the entry point of a command in this process; returns its code, its output and its errors."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    return ended.value.code, *capsys.readouterr()
