"""Several processes as one run: what must be equal, and that no process is left waiting."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from xception_flax.commands import cli
from xception_flax.host import processes
from xception_flax.text.errors import UserError

ROOT = Path(__file__).parents[2]


def test_what_differs_is_said():
    alike = {"jax": "0.10", "seed": 0, "names": ["a", "b"]}
    assert processes.differences([alike, dict(alike), dict(alike)]) == []
    assert processes.differences([alike, alike | {"seed": 1}, alike]) == [
        "seed is 0 on 2 processes (0, 2), 1 on process 1",
    ]
    assert processes.differences([alike | {"new": None}, alike | {"names": ["b", "a"]}]) == [
        'names is ["a", "b"] on process 0, ["b", "a"] on process 1',
        "new is null on process 0, missing on process 1",
    ]
    (many,) = processes.differences([{"x": i == 7} for i in range(8)])
    assert many == "x is false on 7 processes (0, 1, 2, 3, 4, ...), true on process 7"
    (long,) = processes.differences([{"x": "a" * 200 + last} for last in "12"])
    assert re.fullmatch(
        r'x is ("a{79}\.\.\.) \(SHA-256 (\w{8})\) on process 0, \1 \(SHA-256 (?!\2)\w{8}\) on .* 1', long
    )


def test_who_gives_no_sign_for_too_long():
    """Of three processes one never comes, and one gives no sign after 10 seconds."""
    signs = processes.Signs(3, silent_seconds=75)
    found = {now: signs.silent({"s/0": f"{now}", "s/1": f"{min(now, 10)}"}, now) for now in range(0, 90, 2)}
    assert found == {now: [2] if 75 < now <= 85 else [1, 2] if now > 85 else [] for now in range(0, 90, 2)}
    assert signs.silent({"s/0": "90", "s/1": "90", "s/2": "0"}, 90) == []


def test_who_was_away_itself_has_no_silence_to_report():
    """All hosts are suspended for an hour: the first to go on finds the signs of before; then one of them is dead."""
    signs = processes.Signs(2, silent_seconds=20)
    assert signs.silent({"s/0": "0", "s/1": "0"}, 0) == []
    assert [signs.silent({"s/0": f"{now}", "s/1": "0"}, now) for now in range(3600, 3622, 2)] == [[]] * 11
    assert signs.silent({"s/0": "3622", "s/1": "0"}, 3622) == [1]


def test_who_was_away_itself_waits_again_for_the_first(monkeypatch):
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.01)
    watch = processes._Watch()
    watch._heard = before = time.monotonic()
    with watch._waiting():
        pass
    assert watch._heard == before
    with watch._waiting():
        time.sleep(0.1)
    assert watch._heard >= before + 0.1


def test_silence_is_longer_than_a_few_signs():
    parser = cli.parser("train.py", None, "")
    assert parser.parse_args([]).silent_seconds == 75
    assert parser.parse_args(["--silent-seconds=10"]).silent_seconds == 10
    with pytest.raises(
        UserError, match=r"--silent-seconds: must be at least 10, since .* sign of life each 2 s, got 9;"
    ):
        parser.parse_args(["--silent-seconds=9"])


@pytest.mark.parametrize("seconds", [10, 75, 600])
def test_jax_ends_nobody_before_we_do(seconds):
    """With process 0 stopped, JAX aborted the other 12.3 to 20.7 s later with a timeout of 20: from half of it on."""
    first = processes._patience(seconds)["heartbeat_timeout_seconds"] / 2
    assert first >= seconds + processes.LOOK_SECONDS + 20


@pytest.mark.parametrize(
    ("address", "count", "number", "message"),
    [
        ("localhost", 2, 0, r"--coordinator must be HOST:PORT, such as 10\.0\.0\.1:1234, got 'localhost'\."),
        (":1234", 2, 0, "--coordinator must be HOST:PORT"),
        ("localhost:0", 2, 0, "--coordinator must be HOST:PORT"),
        ("localhost:70000", 2, 1, "--coordinator must be HOST:PORT"),
        ("localhost:1234", 2, 2, "--process-id must be from 0 to --num-processes less one, got 2 of 2"),
        ("localhost:1234", 2, -1, "--process-id must be from 0 to --num-processes less one, got -1 of 2"),
        ("localhost:1234", 0, 0, "--process-id must be from 0 to --num-processes less one, got 0 of 0"),
    ],
)
def test_what_cannot_be_connected(address, count, number, message):
    with pytest.raises(UserError, match=message):
        processes.connect(address, count, number)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"process 0 cannot listen on port {port}: Address already in use; take"):
            processes.connect(f"localhost:{port}", 2, 0)


def test_one_process_agrees_with_itself(tmp_path):
    processes.agree("nothing", lambda: pytest.fail("not to be asked"))
    processes.check_shared(tmp_path)
    processes.end(2, "error: nobody else.")
    processes.leave()
    assert processes.per_host() == 1
    assert list(tmp_path.iterdir()) == []
    assert processes.differences([processes.software(), processes.software()]) == []


def test_without_a_route_it_does_not_spin(monkeypatch):
    """No connection can be made to the address of all hosts, which the system says at once."""
    everyone = types.SimpleNamespace(coordinator_address="255.255.255.255:1234")
    monkeypatch.setattr(processes, "_client_state", lambda: everyone)
    watch = processes._Watch()
    watch._silent_seconds, watch._heard = processes.SILENT_SECONDS, time.monotonic()
    threading.Timer(1, watch.ignore).start()
    begin = time.thread_time()
    watch._watch_first()
    assert time.thread_time() - begin < 0.1  # of a second; without a wait it was 0.8


# Real processes ------------------------------------------------------------------------------------

START = """
import argparse, os, pathlib, signal, sys
import numpy as np
import jax
from jax import monitoring
from jax.experimental import multihost_utils
from xception_flax.commands import cli
from xception_flax.host import processes
from xception_flax.text import lookup
me, address = int(sys.argv[1]), sys.argv[2]
processes.SHARED_SECONDS = processes.LOOK_SECONDS = 0.5
def start(silent_seconds=75):
    connected = dict(coordinator=address, num_processes=2, process_id=me, distributed=False)
    cli.start(argparse.Namespace(**connected, silent_seconds=silent_seconds))
def refused(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        print(error, flush=True)
def main(argv):
"""


def run(numbers: list[int], body: str, environment: dict[str, str] | None = None) -> list[tuple[int, list[str], str]]:
    """Runs `body` in processes with these numbers of a run of two; returns their code, output and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = START + "".join(f"    {line}\n" for line in body.strip().splitlines()) + "cli.run(main)\n"
    alone = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), address],
            env=os.environ | alone | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            said = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
            results.append((process.returncode, said, err.replace(address, "ADDRESS")))
    finally:
        for process in processes:
            process.kill()
    return results


def test_two_that_differ_and_one_that_fails(tmp_path):
    """A comparison fails on both, and when one process fails the other does not wait for it in a collective.

    Both are told to share a cache of compiled programs. Neither asks it for a program, so each always runs what it has
    compiled itself.
    """
    body = f"""
counts = []
monitoring.register_event_listener(lambda event, **_: counts.append(event) if "compilation_cache" in event else None)
start()
processes.agree("equal", lambda: {{"one": 1, "code": processes.software()}})
refused(processes.agree, "seed", lambda: {{"seed": me}})
processes.check_shared(pathlib.Path({str(tmp_path)!r}))
assert processes.per_host() == 2
assert multihost_utils.process_allgather(np.int32(me)).tolist() == [0, 1]
print([event for event in counts if event.endswith(("hits", "misses", "use_cache"))])
if me:
    lookup.lookup({{}}, "photos", "folder")
multihost_utils.process_allgather(np.zeros(7))
"""
    (code, out, err), (code_of_1, out_of_1, err_of_1) = run(
        [0, 1], body, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    )
    differ = "the processes of this run are not alike: seed is 0 on process 0, 1 on process 1. Start the same on "
    assert out == out_of_1 == [f"{differ}every host.", "[]"]
    assert (code_of_1, err_of_1) == (2, "error: unknown folder 'photos'; there are: none.\n")
    assert (code, err) == (2, "error: process 1 has failed, and ends all: unknown folder 'photos'; there are: none.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_of_each_hosts_own_and_one_that_is_killed(tmp_path):
    """Both refuse the folders that are not shared. Then process 0 reports the death of process 1."""
    for i in "01":
        (tmp_path / i).mkdir()
    body = f"""
start(silent_seconds=8)  # long enough for a busy machine
refused(processes.check_shared, pathlib.Path({str(tmp_path)!r}) / str(me))
if me:
    os.kill(os.getpid(), signal.SIGKILL)
multihost_utils.process_allgather(np.zeros(7))
"""
    (code, out, err), (code_of_1, out_of_1, _) = run([0, 1], body)
    for i, said in enumerate((out, out_of_1)):
        assert said == [
            f"{tmp_path / str(i)} is not one folder for all: process 1 cannot see there what process 0 wrote 0.5 s "
            "before. Take a folder of a file system that all hosts share."
        ]
    assert code_of_1 == -signal.SIGKILL
    assert code == processes.TRY_AGAIN == 75, err
    assert err == (
        "error: nothing has been heard of process 1 for 8 s: killed, or the machine or the network is down; see what "
        "was said there last. The same command on all goes on from the last checkpoint.\n"
    )
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "0", tmp_path / "1"]


def test_a_death_is_said_where_the_next_collective_fails_of_it():
    """gloo raises at once when a peer is gone, but says neither which one nor what to do."""
    body = """
processes.STILL_SECONDS = 3  # six signs of life
start()
multihost_utils.process_allgather(np.zeros(7))
if me:
    os.kill(os.getpid(), signal.SIGKILL)
multihost_utils.process_allgather(np.zeros(7))
"""
    (code, _, err), (code_of_1, _, _) = run([0, 1], body)
    assert code_of_1 == -signal.SIGKILL
    assert (code, err.splitlines()[-1]) == (
        processes.TRY_AGAIN,
        "error: nothing has been heard of process 1 for 3 s: killed, or the machine or the network is down; see what "
        "was said there last. The same command on all goes on from the last checkpoint.",
    ), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("before", "waits"),
    [
        ("", "multihost_utils.process_allgather(np.zeros(7))"),
        ("", "while True: sum(range(100))"),
        ("processes._Watch._watch_first = lambda self: None", "import time; time.sleep(100)"),
    ],
    ids=["collective", "busy", "JAX is first"],
)
def test_the_death_of_the_first_is_said(before, waits):
    """JAX aborts with a stack trace, since its coordinator is in process 0. It may see it before our thread does."""
    body = f"""
{before}
start()
multihost_utils.process_allgather(np.zeros(7))
if me == 0:
    os.kill(os.getpid(), signal.SIGKILL)
{waits}
"""
    (code_of_0, _, _), (code, _, err) = run([0, 1], body)
    assert code_of_0 == -signal.SIGKILL
    assert (code, err.splitlines()[-1]) == (
        processes.TRY_AGAIN,
        "error: process 0 has gone: killed, or its machine is down; see what was said there last. The same command on "
        "all goes on from the last checkpoint.",
    ), err


def test_the_death_of_the_first_changes_no_end():
    """Process 1 has failed, and waits until process 0, which dies, has heard of it. JAX aborts those that wait."""
    body = """
start()
multihost_utils.process_allgather(np.zeros(7))
import time
if me:
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(60)  # it does not look again before JAX does
    raise lookup.UserError("the reason")
processes._watching.ignore()
while not processes._client().key_value_dir_get(processes._HEARD):  # it is leaving
    pass
time.sleep(1)  # it has looked whether this one is too, and sleeps
os.kill(os.getpid(), signal.SIGKILL)
"""
    (code_of_0, _, _), (code, _, err) = run([0, 1], body)
    assert code_of_0 == -signal.SIGKILL
    assert (code, "error: the reason" in err.splitlines()) == (2, True), err
    assert "Terminating process because the JAX distributed service detected fatal errors" in err, "it was not JAX"


def test_a_first_that_stands_still_is_left():
    """Process 0 is stopped, which closes no connection; the other has ended when it goes on."""
    body = """
start(silent_seconds=5)
multihost_utils.process_allgather(np.zeros(7))
if me:
    print(os.getpid(), flush=True)
    multihost_utils.process_allgather(np.zeros(7))
import subprocess
subprocess.Popen(["sh", "-c", f"sleep 12; kill -CONT {os.getpid()}"], start_new_session=True)
os.kill(os.getpid(), signal.SIGSTOP)
multihost_utils.process_allgather(np.zeros(7))
"""
    (code_of_0, _, err_of_0), (code, _, err) = run([0, 1], body)
    said = "error: nothing has been heard of process {} for {} s: killed, or the machine or the network is down; see"
    assert (code, err.splitlines()[-1][: len(said.format(0, 5))]) == (processes.TRY_AGAIN, said.format(0, 5)), err
    assert code_of_0 == processes.TRY_AGAIN, err_of_0
    assert said[:38] in err_of_0


def test_ctrl_c_and_a_defect_are_said_by_the_other():
    """JAX adds a note to an error that passes through `jit`; the note is not the reason."""
    body = """
start()
multihost_utils.process_allgather(np.zeros(7))
if me:
    {}
multihost_utils.process_allgather(np.zeros(7))
"""
    wrong = body.format("jax.jit(lambda: jax.numpy.zeros(3) + jax.numpy.zeros(4))()")
    (code, _, err), (code_of_1, _, err_of_1) = run([0, 1], wrong)
    reason = "TypeError: add got incompatible shapes for broadcasting: (3,), (4,)."
    assert (code, code_of_1) == (1, 1)
    assert f"\n{reason}\n" in err_of_1
    assert err.splitlines()[-1] == f"error: process 1 has failed, and ends all: {reason}"
    (code, _, err), (code_of_1, _, _) = run([0, 1], body.format("os.kill(os.getpid(), signal.SIGINT)"))
    assert (code, code_of_1) == (130, 130)
    assert err.splitlines()[-1] == "error: process 1 has failed, and ends all: it was interrupted"


def test_a_full_disk_of_one_host_is_said_by_both(tmp_path):
    """Each writes a part of the checkpoint. Orbax says nothing before both have waited for each other in vain."""
    body = f"""
import resource, time
from xception_flax.training import checkpoint
from xception_flax.training.state import TrainState
start()
mesh = jax.make_mesh((2,), ("fsdp",))
split = jax.NamedSharding(mesh, jax.P("fsdp"))
x = jax.make_array_from_callback((2, 4096), split, lambda index: np.random.default_rng(0).random((1, 4096)))
whole = jax.device_put(np.int32(1), jax.NamedSharding(mesh, jax.P()))
state = TrainState(whole, {{"x": x}}, {{}}, (), None, None)
with checkpoint.open_manager(pathlib.Path({str(tmp_path)!r}) / "checkpoints", best_metric="top1") as manager:
    if me:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    checkpoint.save(manager, state, {{"class_names": []}}, None)
    time.sleep(100)
"""
    (code, _, err), (code_of_1, _, err_of_1) = run([0, 1], body)
    assert (code, code_of_1) == (2, 2), err_of_1
    reason = f"a checkpoint could not be written to {tmp_path}/checkpoints: File too large; there is no earlier one."
    assert err_of_1.splitlines()[-1] == f"error: {reason}"
    assert err.splitlines()[-1] == f"error: process 1 has failed, and ends all: {reason}"
    assert not any(path.name.isdecimal() for path in (tmp_path / "checkpoints").iterdir())


def test_tasks_of_slurm_find_each_other():
    """In the environment that `srun` gives each task; the job's number gives the port, as JAX says."""
    body = """
os.environ |= {"SLURM_JOB_ID": address.rpartition(":")[2], "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
os.environ |= {"SLURM_PROCID": str(me), "SLURM_LOCALID": str(me), "SLURM_STEP_NUM_NODES": "1"}
cli.start(argparse.Namespace(
    coordinator=None, num_processes=None, process_id=None, distributed=True, silent_seconds=75))
print(jax.process_index(), multihost_utils.process_allgather(np.int32(me)).tolist())
"""
    results = run([0, 1], body)
    assert [(code, out) for code, out, _ in results] == [(0, ["0 [0, 1]"]), (0, ["1 [0, 1]"])], results


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_waits_says_so_and_can_be_interrupted(number):
    body = "import os, signal, threading\nprocesses.QUIET_SECONDS = 1\n"
    body += "threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start()\nstart()"
    ((code, _, err),) = run([number], body)
    assert (code, err) == (-signal.SIGINT, "waiting for the other processes, at most 300 s\n")


@pytest.mark.parametrize(
    ("number", "reason"),
    [(0, "process 1 has not come to ADDRESS"), (1, "process 0 does not answer at ADDRESS: Connection refused")],
)
def test_one_that_waits_for_nobody(number, reason):
    ((code, _, err),) = run([number], "processes.START_SECONDS = 2\nstart()")
    assert (code, err) == (
        processes.TRY_AGAIN,
        f"error: process {number} of 2 has waited 2 s; {reason}. Start the same command on every host, with "
        "--coordinator each with its own --process-id; look at the output there.\n",
    )
