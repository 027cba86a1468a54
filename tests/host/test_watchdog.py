"""A run that stands still is found, its threads are written down, and it ends where that is wanted."""

import os
import re
import textwrap
import time
from types import SimpleNamespace

import shell
from xception_flax.host.watchdog import Watchdog

STILL = """
import sys, time
from pathlib import Path
from xception_flax.host.watchdog import Watchdog

def wait_for_a_batch():
    time.sleep(600)

with Watchdog(0.005, Path(sys.argv[1]), stop=True) as watchdog:
    watchdog.sign("the batch of step 7")
    wait_for_a_batch()
"""


def test_it_ends_a_process_that_stands_still(tmp_path):
    """In native code too, as most waits are: no exception is needed."""
    file = tmp_path / "stacks.txt"
    begin = time.monotonic()
    result = shell.run("-c", textwrap.dedent(STILL), file)
    assert time.monotonic() - begin < 120
    assert (result.returncode, result.stdout) == (75, "")
    assert result.stderr == (
        "error: the run has stood still for 0.3 seconds, waiting for the batch of step 7; the stack of every thread is "
        f"in {file}. The same command goes on from the last checkpoint, if there is one; give more "
        "watchdog_minutes where this takes longer.\n"
    )
    text = file.read_text()
    assert re.match(
        r"\n[0-9T:+-]{25}, process \d+: the run has stood still for 0.3 seconds, waiting for the batch", text
    )
    assert text.count("most recent call first") == 3  # with the watchdog, and what writes for it
    assert "in wait_for_a_batch" in text


def test_each_silence_is_reported_once(tmp_path, capfd):
    file = tmp_path / "stacks.txt"
    with Watchdog(0.5 / 60, file, stop=False) as watchdog:
        for number in range(2):
            watchdog.sign(f"thing {number}")
            time.sleep(1.5)
        watchdog.sign("another")
        for _ in range(20):  # moving, if slowly
            watchdog.again()
            time.sleep(0.02)
    assert re.findall(r"waiting for (thing \d|another)", file.read_text()) == ["thing 0", "thing 1"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("WARNING: the run has stood still for 0.5 seconds, waiting for thing") for line in lines)


def test_who_was_suspended_has_not_stood_still(tmp_path, capfd, monkeypatch):
    """Of a process that was stopped for longer than is allowed, the watchdog may be the first to run again."""
    waits = iter([0.05, 30.0, 0.05])
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("xception_flax.host.watchdog.time", clock)
    dog = Watchdog(1 / 60, tmp_path / "stacks.txt", stop=True)

    def wait(seconds: float) -> bool:
        assert seconds == 0.05
        clock.now += (waited := next(waits, 0.0))
        return not waited

    monkeypatch.setattr(dog, "_left", SimpleNamespace(wait=wait))
    dog._watch()
    assert not (tmp_path / "stacks.txt").exists()
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_written_is_no_obstacle(tmp_path, capfd):
    with Watchdog(0.1 / 60, tmp_path / "missing" / "stacks.txt", stop=False):
        time.sleep(0.5)
    said = capfd.readouterr().err
    assert "in test_a_file_that_cannot_be_written_is_no_obstacle" in said
    assert "stacks.txt cannot be written: No such file or directory. It goes on" in said


def test_a_file_system_that_stands_still_is_no_obstacle(tmp_path):
    """As a pipe that nobody reads, which blocks where it is opened."""
    os.mkfifo(file := tmp_path / "stacks.txt")
    program = "from xception_flax.host import watchdog\nwatchdog.WRITE_SECONDS = 0.5\n"
    result = shell.run("-c", program + textwrap.dedent(STILL), file)
    assert result.returncode == 75
    assert "in wait_for_a_batch" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "error: the run has stood still for 0.3 seconds, waiting for the batch of step 7; the stack of every thread is "
        f"above, since {file} cannot be written: its file system stands still. The same command goes on"
    )
