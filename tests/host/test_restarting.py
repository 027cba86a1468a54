"""What is started again, how often, and what stops it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import shell
from xception_flax.host import restarting
from xception_flax.host.processes import TRY_AGAIN


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(restarting, "FIRST_WAIT", 0.01)


# Each start appends a line to the file, and does what stands there under its number.
PROGRAM = """
import os, sys
file, ends = sys.argv[1], sys.argv[2].split(",")
with open(file, "a") as log:
    log.write("started\\n")
end = ends[min(len(open(file).readlines()), len(ends)) - 1]
os.kill(os.getpid(), int(end[1:])) if end.startswith("-") else sys.exit(int(end))
"""


def test_a_killed_supervisor_asks_its_process_to_stop(tmp_path):
    """SIGKILL leaves it no time to do so itself."""
    program = (
        "import os, signal, sys, time\n"
        "from xception_flax.host import parents\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').close(), os._exit(0)))\n"
        "parents.end_with_named()\n"
        "assert parents.PARENT not in os.environ  # a reader of data has another parent\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    asked = tmp_path / "asked"
    command = [sys.executable, "-c", program, str(asked)]
    supervisor = shell.start(
        "-c", f"from xception_flax.host import restarting\nrestarting.run({command!r}, 1, lambda: 0)"
    )
    assert supervisor.stdout.readline() == "ready\n"
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 60
    while not asked.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def starts(file: Path) -> int:
    return len(file.read_text().splitlines())


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "started"),
    [
        ("0", 3, 0, 1),
        ("-9,1,75,0", 3, 0, 4),  # killed, an exception, a dead host
        ("-11,-6,0", 1, 128 + signal.SIGABRT, 2),  # one too many
        ("2,0", 3, 2, 1),  # a user's mistake stays one
        ("-15,0", 3, 128 + signal.SIGTERM, 1),  # somebody stopped it
        ("143,0", 3, 143, 1),  # after its checkpoint
    ],
)
def test_what_may_pass_is_started_again(tmp_path, ends, restarts, code, started):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "log"), ends]
    assert restarting.run(command, restarts, lambda: 0) == code
    assert starts(tmp_path / "log") == started


def test_progress_makes_the_count_begin_anew(tmp_path, capfd):
    """Five failures with one restart: after all but the last there is a newer checkpoint."""
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", PROGRAM, str(log), "-9"]
    assert restarting.run(command, 1, lambda: min(starts(log), 4)) == 128 + signal.SIGKILL
    assert starts(log) == 5
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        *["the run ended with SIGKILL; start 1 of 1 without a new checkpoint, in 0.01 s"] * 4,
        "the run ended with SIGKILL, after 1 start without a new checkpoint: not started again; the same command goes "
        "on",
    ]


@pytest.mark.parametrize("when", ["running", "waiting"])
def test_a_signal_stops_it_and_is_passed_on(tmp_path, monkeypatch, when):
    """The command gets it once, and ends as it likes; between two starts there is none to get it."""
    ready = tmp_path / "ready"
    if when == "running":
        program = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
open({str(ready)!r}, "w").close()
time.sleep(600)
"""
    else:
        monkeypatch.setattr(restarting, "FIRST_WAIT", 100.0)
        program = f"open({str(ready)!r}, 'w').close(); raise SystemExit({TRY_AGAIN})"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    begin = time.monotonic()
    assert restarting.run([sys.executable, "-c", program], 3, lambda: 0) == {"running": 7, "waiting": 143}[when]
    assert time.monotonic() - begin < 60
    thread.join()


def test_a_hangup_that_nohup_ignores_stops_neither(tmp_path):
    """The terminal is closed: `nohup` had SIGHUP ignored before, in the supervisor and in what it starts."""
    end = tmp_path / "end"
    program = (
        "import os, signal, sys, time\n"
        "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
    )
    command = [sys.executable, "-c", program, str(end)]
    supervisor = shell.start(
        "-c",
        "import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        f"from xception_flax.host import restarting\nsys.exit(restarting.run({command!r}, 1, lambda: 0))",
    )
    assert supervisor.stdout.readline() == "True\n"
    supervisor.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    end.touch()
    assert shell.finish(supervisor)[0] == 0
