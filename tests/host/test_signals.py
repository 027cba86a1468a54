"""Signals: during the imports, twice, and in one of several processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shell import ROOT, environment, finish, pause, wait_until
from xception_flax.host import signals


@pytest.mark.parametrize("command", [["train.py"], ["-m", "xception_flax", "evaluate"]], ids=" ".join)
@pytest.mark.parametrize("module", ["xception_flax.host.signals", "numpy", "jax", "flax.linen", "orbax.checkpoint"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(command, module):
    """Python prints each import on stderr; the signal is sent after that of `module`."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command, "--workdir", "w"],
        env=environment(1),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            break
    process.stderr.readline()  # of the next module; by then the handler is set even for the first `module`
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGINT
    said = [line for line in err.splitlines() if line and not line.startswith("import time:")]
    assert said == ["interrupted"]


def test_a_second_signal_stops_at_once(tmp_path):
    """Also in native code, where Python's own handlers do not run: an hour of hashing stands for compilation."""
    (tmp_path / "s.py").write_text("""
import hashlib
from xception_flax.host import signals
with signals.StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
""")
    command = [sys.executable, str(tmp_path / "s.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(1), text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    pause(process)  # so that both come within a moment, however busy the machine
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # as `timeout` does, which signals the process and then its group
    process.send_signal(signal.SIGCONT)
    status = Path(f"/proc/{process.pid}/status")
    wait_until(lambda: re.search(r"ShdPnd:\t0+\n", status.read_text()), process)  # both have come
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, err) == (128 + signal.SIGTERM, "\ninterrupted\n")


def test_the_first_signal_is_answered_at_once(tmp_path):
    """Also in native code: who sees nothing presses Ctrl-C again. The second says what is left."""
    (tmp_path / "s.py").write_text("""
import hashlib, sys
from xception_flax.host import signals
with signals.StopRequest(say=lambda text: print(text, file=sys.stderr, flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
""")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, str(tmp_path / "s.py")], env=environment(1), text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == f"{signals.ASKED}\n"
    time.sleep(2 * signals.ECHO_SECONDS)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (128 + signal.SIGINT, f"\ninterrupted; {signals.LEFT}\n")


@pytest.mark.parametrize("answered", [False, True])
def test_a_second_signal_needs_no_reader(tmp_path, answered):
    """Nor does it wait until a line about the first, for which there is no room in the pipe, is read."""
    say = "lambda text: os.write(2, bytes(2**20))" if answered else "None"
    (tmp_path / "s.py").write_text(f"""
import os, time
from xception_flax.host import signals
with signals.StopRequest(say={say}) as stop:
    print("ready", flush=True)
    while stop.signal is None:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(600)
""")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, str(tmp_path / "s.py")], env=environment(1), text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    if not answered:
        process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    time.sleep(2 * signals.ECHO_SECONDS)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("pid", "handled"), [(1, signals.REQUESTS), (2, (signal.SIGINT,))])
def test_the_first_process_of_a_container_has_handlers(monkeypatch, pid, handled):
    """Linux ends it by no signal that it does not handle, SIGKILL of the host apart."""
    before = {number: signal.getsignal(number) for number in signals.REQUESTS}
    monkeypatch.setattr(os, "getpid", lambda: pid)
    try:
        signals.handle_before_imports()
        for number in signals.REQUESTS:
            assert (signal.getsignal(number) is signals.stop_at_once) == (number in handled)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_stands_still_is_broken_off(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.2)
    with signals.StopRequest() as stop:
        with stop.patience():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)  # what has ended in time is not broken off
    with signals.StopRequest() as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(signals.Stopped) as stopped, stop.patience():
            threading.Event().wait(60)
    assert stopped.value.number == signal.SIGTERM


def test_what_stands_still_is_broken_off_where_the_main_thread_holds_the_signal_back(monkeypatch):
    """As while processes that read are started: another thread gets it, and the main thread waits for a lock."""
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 1.0)
    begin = time.monotonic()
    with signals.StopRequest() as stop:  # its thread does not hold the signal back
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.REQUESTS)
        try:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(signals.Stopped), stop.patience():
                threading.Event().wait(20)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert 1 < time.monotonic() - begin < 10


def test_one_of_several_processes_passes_ctrl_c_on():
    """It goes to JAX's handler of SIGTERM, once. A second Ctrl-C ends the process, as tested above."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with signals.StopRequest(several_processes=True) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == [signal.SIGTERM] * 2
            assert stop.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
