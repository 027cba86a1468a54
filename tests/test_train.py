"""The whole path from the shell: real processes, real signals, exact resumption, several hosts, mistakes."""

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import cv2
import grain
import jax
import numpy as np
import pytest

import shell
import train
from shell import ROOT, children, environment, finish, on_one_device, pause, wait_until
from shell import call as run
from small_run import DIGITS, LENET, SMALL, start
from workdirs import arrays, evaluations, records
from xception_flax import data
from xception_flax.commands import cli, evaluate
from xception_flax.host import signals
from xception_flax.host.watchdog import Watchdog
from xception_flax.recipes import reading
from xception_flax.runs import history, progress
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import check_workdir, has_checkpoints
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint, sharding


def test_a_run_leaves_what_it_promises(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "curves.png", ".lock"}
    recorded = records(whole)
    assert [r["step"] for r in recorded if "train/loss" in r] == [*range(5, 157, 5), 157]
    assert [r["step"] for r in recorded if "eval/loss" in r] == [40, 79, 118, 157]
    assert [r["step"] for r in recorded if "checkpoint/blocking_seconds" in r] == [20, 40, 59, 79, 99, 118, 138, 157]
    assert recorded[-2]["eval/count"] == 180
    assert {"train/loss", "train/top1", "train/top5", "train/learning_rate", "train/gradient_norm"} <= set(recorded[0])
    assert recorded[-3]["train/loss"] < 0.8 * recorded[0]["train/loss"]
    assert json.loads((whole / "config.json").read_text())["model"]["width"] == 0.02


def test_the_same_command_on_a_finished_run_says_so(whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    (whole / "curves.png").unlink()
    code, out, _ = finish(start(whole))
    assert code == 0
    assert "this run is finished (157 steps); nothing to do" in out
    assert {p for p in whole.rglob("*") if p.is_file() and "tensorboard" not in p.parts} == set(before)
    for path, content in before.items():  # the picture is drawn again; all else is unchanged
        assert path.name in ("curves.png", ".lock") or path.read_bytes() == content


def test_the_parts_of_the_time_add_up(whole_timed):
    """Their sum is not longer than the process took, measured from outside."""
    workdir, seconds = whole_timed
    recorded = records(workdir)
    trained = [r for r in recorded if "train/loss" in r]
    first, steps = trained[0], [b["step"] - a["step"] for a, b in zip([{"step": 1}, *trained], trained, strict=False)]
    in_steps = sum(n * r["train/step_seconds"] for n, r in zip(steps, trained, strict=True))
    stood_still = sum(r.get("eval/seconds", 0) + r.get("checkpoint/blocking_seconds", 0) for r in recorded)
    assert 0 < first["train/first_step_seconds"] + in_steps + stood_still < seconds
    for r in trained:
        assert 0 <= r["train/input_wait_seconds"] <= r["train/step_seconds"]
        assert r["train/images_per_second"] == pytest.approx(16 / r["train/step_seconds"])
        assert "train/mfu" not in r  # no peak is known for CPUs
    assert ["train/first_step_seconds" in r for r in trained] == [True] + [False] * (len(trained) - 1)
    assert all("eval/seconds" in r for r in recorded if "eval/loss" in r)


# Starting again ------------------------------------------------------------------------------------

COUNT_CACHE = """
import collections, pathlib, sys
from jax import monitoring
counts = collections.Counter()
monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
import train
assert train.main(sys.argv[2:]) == 0
pathlib.Path(sys.argv[1]).write_text(f"{counts['cache_hits']} {counts['compile_requests_use_cache']}")
"""


def test_a_second_start_compiles_nothing(tmp_path):
    """With a user's own cache the second run finds each program, and ends bit for bit as the first.

    Each run has five steps of a small network, an evaluation and a checkpoint. It is compiled at LLVM's lowest level;
    at the usual level, the tests of resumption compare a run that compiles with runs that do not.
    """
    counts = {}
    for name in ("cold", "warm"):
        kept = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k and "PERSISTENT_CACHE" not in k}
        command = [sys.executable, "-c", COUNT_CACHE, tmp_path / f"{name}.txt"]
        arguments = ["--config", f"{DIGITS}:lenet", "--workdir", tmp_path / name, *LENET, "--config.epochs=0.0637"]
        arguments += ["--config.schedule.warmup_epochs=0", "--config.log_every_steps=1"]
        result = subprocess.run(
            [*map(str, command + arguments)],
            env=kept | {"XDG_CACHE_HOME": str(tmp_path / "caches"), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        assert "Warning" not in result.stderr
        assert "rror" not in result.stderr
        counts[name] = [int(n) for n in (tmp_path / f"{name}.txt").read_text().split()]
    (cold_hits, cold_requests), (warm_hits, warm_requests) = counts["cold"], counts["warm"]
    assert cold_hits < cold_requests / 10  # a few programs are equal except for their names
    assert warm_hits == warm_requests == cold_requests
    folder = tmp_path / "caches" / "xception_flax" / "jax"
    assert {"jit_train_step", "jit_init", "jit_eval_step"} <= {path.name.partition("-")[0] for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o077 == 0

    expected = arrays(tmp_path / "cold", 5)
    for path, value in arrays(tmp_path / "warm", 5).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    losses = [[r["train/loss"] for r in records(tmp_path / w) if "train/loss" in r] for w in ("cold", "warm")]
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    assert evaluations(tmp_path / "warm") == evaluations(tmp_path / "cold")


def test_a_profile_has_the_chosen_steps_and_no_other(tmp_path, monkeypatch, capsys):
    """Steps 5 to 8 are asked for; a run that resumes from step 6 traces 7 and 8."""
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *LENET, "--config.epochs=0.1019"]  # 8 steps
    arguments += ["--config.schedule.warmup_epochs=0", "--config.checkpoint_every_epochs=0.02545"]  # every second step
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 0, err
    assert not (tmp_path / "profile").exists()
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
    assert saved[-2:] == [6, 8]
    shutil.rmtree(tmp_path / "checkpoints" / "8")

    code, _, err = run(monkeypatch, capsys, train.main, *arguments, "--config.profile=5:8")
    assert code == 0, err
    assert "going on from the checkpoint of step 6" in err
    assert f"profile of steps 7 to 8 in {tmp_path / 'profile'}; to look at it: " in err
    assert json.loads((tmp_path / "config.json").read_text())["profile"] == "5:8"
    (trace,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert len(list(trace.parent.glob("*.trace.json.gz"))) == 1
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    traced = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(e.stats)["step_num"] for e in traced if e.name == "train"] == [7, 8]
    # The devices' own work: each of the eight runs the fusions of the step twice.
    assert sum("fusion" in e.name and not e.name.startswith("$") for e in traced) > 2 * 8 * 10


def test_whether_a_run_has_begun_is_decided_once(tmp_path):
    """A folder for step 0 is no checkpoint. Checkpoints that vanish before they are opened are an error."""
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    assert not has_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / "1").mkdir()
    assert has_checkpoints(tmp_path)
    split = data.load("digits", train=True, batch_size=8, image_size=32, channels=1)
    manager = SimpleNamespace(latest_step=lambda: None)
    with pytest.raises(UserError, match=rf"^the checkpoints in {tmp_path} were removed while this command began;"):
        train.find_start(reading.load(DIGITS), manager, tmp_path, split, split, None)


WORKERS = ["--config.data.num_workers=2", "--config.data.num_threads=1"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def segments(pids: set[int]) -> set[str]:
    """Returns the files of shared memory that these processes have mapped; workers pass their batches in them."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            found.update(re.findall(r"(?m)/dev/shm/psm_\w+$", Path(f"/proc/{pid}/maps").read_text()))
    return found


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stand_still(process: subprocess.Popen) -> tuple[set[int], set[str]]:
    """Stops the trainer and waits until its workers have filled their queues; returns the workers and their segments.

    A worker that is killed before that may leave a segment for good: Python creates one before it tells its tracker.
    """
    pause(process)
    readers, looks, deadline = children(process.pid), [], time.monotonic() + 120
    while len(looks) < 4 or looks.count(looks[-1]) < len(looks):
        assert time.monotonic() < deadline, looks
        looks = [*looks[-3:], segments({process.pid, *readers})]
        time.sleep(1)
    return readers, looks[-1]


def assert_gone(pids: set[int], held: set[str]) -> None:
    """Asserts that soon no worker is left, and no segment that was held."""
    assert held
    deadline = time.monotonic() + 60
    while left := {*filter(is_alive, pids), *filter(os.path.exists, held)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_stopped_and_killed_it_resumes_bit_for_bit(whole, tmp_path):
    """Stopped by SIGTERM, killed by SIGKILL, then run to the end: all arrays and evaluations are as without a stop.

    The first two starts read with worker processes, the last one and the uninterrupted run with threads. SIGTERM goes
    to the whole group, as a terminal or a batch system sends it; SIGKILL goes to the trainer alone, and ends its
    workers too.
    """
    process = start(tmp_path, *WORKERS)
    wait_until(lambda: len(records(tmp_path)) >= 3, process)
    readers, held = stand_still(process)
    os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM, err
    stopped = int(re.search(r"stopped at step (\d+), checkpoint written; the same command goes on", err)[1])
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    assert_gone(readers, held)

    process = start(tmp_path, *WORKERS)
    saved = tmp_path / "checkpoints"
    wait_until(lambda: any(int(p.name) > stopped for p in saved.iterdir() if p.name.isdecimal()), process)
    readers, held = stand_still(process)
    assert len(readers) >= 2  # and those of an evaluation, if one was under way
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert_gone(readers, held)

    code, _, err = finish(start(tmp_path, "--config.data.num_workers=0"))
    assert code == 0, err
    resumed = int(re.search(r"going on from the checkpoint of step (\d+)", err)[1])
    assert stopped < resumed < 157

    expected, result = arrays(whole, 157), arrays(tmp_path, 157)
    assert expected.keys() == result.keys()
    assert len(expected) > 200
    for path, value in expected.items():
        np.testing.assert_array_equal(result[path], value, err_msg=path)
    assert evaluations(whole) == evaluations(tmp_path)
    steps = [r["step"] for r in records(tmp_path)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("stopped", [6, 11])
def test_stopped_in_an_evaluation_it_goes_on_with_that(tmp_path, monkeypatch, capsys, stopped):
    """It is broken off at the batch of the signal, in the middle of a run and at its end; the state is saved.

    The next start is stopped while it makes up for it, the third is killed between the record and the checkpoint, the
    fourth ends as an untouched run: arrays, evaluations, the best checkpoint.
    """
    arguments = ["--config", f"{DIGITS}:lenet", *LENET, "--config.schedule.warmup_epochs=0", "--config.epochs=0.14"]
    arguments += [f"--config.{what}_every_epochs=0.07" for what in ("eval", "checkpoint")]
    untouched, workdir = tmp_path / "untouched", tmp_path / "workdir"
    assert run(monkeypatch, capsys, train.main, *arguments, "--workdir", untouched)[0] == 0
    assert [record["step"] for record in evaluations(untouched)] == [6, 11]
    arguments += ["--workdir", workdir]

    waited_for, again = [], Watchdog.again

    def stop(watchdog: Watchdog, *batch: object) -> None:
        waited_for.append(watchdog._sign[0])
        again(watchdog)
        if waited_for.count(f"the evaluation after step {stopped}") == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(Watchdog, "again", stop)
            code, _, err = run(monkeypatch, capsys, train.main, *arguments)
        assert code == 128 + signal.SIGTERM
        told = (
            f"stopped at step {stopped}, checkpoint written; the same command goes on from there, with its evaluation"
        )
        assert told in err
        assert waited_for.count(f"the evaluation after step {stopped}") == 3  # of 12 batches
        assert checkpoint_steps(workdir) == [step for step in (6, 11) if step <= stopped]
        assert [r["step"] for r in records(workdir) if "train/loss" in r] == ([5, 6] if stopped == 6 else [5, 10, 11])
        assert not (workdir / "checkpoints" / str(stopped) / "metrics").exists()
        assert [record["step"] for record in evaluations(workdir)] == [step for step in (6, 11) if step < stopped]
        waited_for.clear()

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "add_metrics", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main([*map(str, arguments)])
    assert [record["step"] for record in evaluations(workdir)] == [step for step in (6, 11) if step <= stopped]

    code, out, err = run(monkeypatch, capsys, train.main, *arguments)
    assert (code, "finished" in out) == (0, True), err
    assert evaluations(workdir) == evaluations(untouched)
    assert checkpoint_steps(workdir) == checkpoint_steps(untouched)
    expected = arrays(untouched, 11)
    for path, value in arrays(workdir, 11).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    scores = [
        [json.loads((each / "checkpoints" / step / "metrics" / "metrics").read_text()) for step in ("6", "11")]
        for each in (workdir, untouched)
    ]
    assert scores[0] == scores[1]
    assert "this run is finished" in run(monkeypatch, capsys, train.main, *arguments)[1]


@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_an_evaluation_whose_readers_end_comes_first_when_the_run_goes_on(tmp_path, monkeypatch, capsys, what):
    """It is the last one. The state is saved without it; the same command evaluates, and ends as an untouched run.

    The readers are killed, or stand still and the run is asked to stop.
    """
    arguments = ["--config", f"{DIGITS}:lenet", *LENET, "--config.schedule.warmup_epochs=0", "--config.epochs=0.035"]
    arguments += [f"--config.{each}_every_epochs=0.0175" for each in ("eval", "checkpoint")]
    arguments += ["--config.batch_size=4"]  # 45 batches, more than the readers have ready
    untouched, workdir = tmp_path / "untouched", tmp_path / "workdir"
    with on_one_device():
        assert run(monkeypatch, capsys, train.main, *arguments, "--workdir", untouched)[0] == 0
    process = shell.start("tests/aimed.py", f"readers {what}", *arguments, *WORKERS, "--workdir", workdir, devices=1)
    code, _, err = finish(process)
    assert code == (75 if what == "killed" else 128 + signal.SIGTERM), err
    assert re.search("topped after step 11.*the checkpoint of step 11 is written; the same command goes on", err)
    assert [record["step"] for record in evaluations(workdir)] == [6]

    with on_one_device():
        code, out, err = run(monkeypatch, capsys, train.main, *arguments, "--workdir", workdir)
    assert (code, "finished" in out) == (0, True), err
    assert [record["step"] for record in evaluations(workdir)] == [6, 11]
    assert (workdir / "checkpoints" / "11" / "metrics").is_dir()


def interrupt(*anything: object) -> None:
    raise KeyboardInterrupt


def test_a_signal_to_the_group_while_workers_start(tmp_path):
    """Slurm's notice. Workers can ignore it only after Python's imports.

    The first step ends, and is saved. Where a busy machine needs more than five seconds to start them, no step is done.
    """
    process = start(tmp_path, *WORKERS)
    wait_until(lambda: children(process.pid), process)
    os.killpg(process.pid, signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGUSR1, err
    assert re.search(
        r"stopped at step 1, checkpoint written; the same command|stopped after step 0, .*; no step was", err
    )
    assert "Traceback" not in err


def test_ctrl_c_stops_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    process = start(tmp_path)
    wait_until(lambda: len(records(tmp_path)) >= 1, process)
    pause(process)  # so that it holds its workdir while a second run is started there
    try:
        code, _, err = run(monkeypatch, capsys, train.main, "--config", DIGITS, "--workdir", tmp_path, *SMALL)
        assert code == 2
        assert re.match(rf"error: workdir .* is in use by process {process.pid} on .*\.lock\); wait for its end", err)
    finally:
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGINT
    said = [line for line in err.splitlines() if line == signals.ASKED or "checkpoint written" in line]
    assert [line[:7] for line in said] == ["asked t", "stopped"]
    assert "Traceback" not in err


def test_a_killed_run_is_started_again_on_request(whole, tmp_path):
    """SIGKILL, after a checkpoint: it ends bit for bit as the run that was left alone."""
    process = start(tmp_path, "--restarts", "1")
    children_of_it = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: has_checkpoints(tmp_path) and records(tmp_path)[-1]["step"] >= 45, process)
    os.kill(int(children_of_it.read_text()), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert "finished" in out
    assert "train.py: the run ended with SIGKILL; start 1 of 1 without a new checkpoint, in 2 s" in err
    assert "going on from the checkpoint of step" in err
    expected = arrays(whole, 157)
    for path, value in arrays(tmp_path, 157).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


SELDOM = ["--config.eval_every_epochs=2", "--config.checkpoint_every_epochs=2"]


def start_two(
    *workdirs: Path,
    overrides: Sequence[str] = ("", ""),
    lenet: bool = False,
    script: Sequence[str] = ("train.py",),
) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            workdirs[i % len(workdirs)],
            *("--coordinator", address, "--num-processes", "2", f"--process-id={i}"),
            *SELDOM,
            *overrides[i].split(),
            devices=1,
            lenet=lenet,
            script=script,
        )
        for i in range(2)
    ]


def test_two_processes_are_one(tmp_path, monkeypatch, capsys):
    """Two hosts of one device each compute what one host does: the same losses, and one checkpoint.

    Each start compiles anew, so the network is LeNet; test_steps.py has batch normalization over two hosts. During the
    run one host gets Ctrl-C and passes it to JAX as SIGTERM, as if it were preempted. Both hosts save the same step,
    exit with the code of a signal, and resume from there. The other gets SIGTERM in an evaluation: both break it off at
    the same batch, and begin with it.
    """
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    # 236 steps, so that the signal comes before the end; the evaluation follows a record.
    long = "--config.epochs=3 --config.eval_every_epochs=2.036 --config.checkpoint_every_epochs=2.036"
    with on_one_device():
        arguments = ["--config", f"{DIGITS}:lenet", "--workdir", alone, *LENET, *long.split()]
        code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 0, err

    hosts = start_two(shared, overrides=[long] * 2, lenet=True)
    wait_until(lambda: len(records(shared)) >= 2, hosts[0])
    hosts[1].send_signal(signal.SIGINT)
    stopped = [finish(host) for host in hosts]
    assert [code for code, _, _ in stopped] == [128 + signal.SIGTERM, 128 + signal.SIGINT], stopped
    assert "checkpoint written" in stopped[0][2]
    assert [signals.ASKED in err.splitlines() for _, _, err in stopped] == [False, True]

    hosts = start_two(shared, overrides=[long] * 2, lenet=True)
    wait_until(lambda: records(shared)[-1]["step"] == 160, hosts[0])
    hosts[0].send_signal(signal.SIGTERM)
    stopped = [finish(host) for host in hosts]
    assert [code for code, _, _ in stopped] == [128 + signal.SIGTERM] * 2, stopped
    assert "stopped at step 160, checkpoint written; the same command goes on from there, with its" in stopped[0][2]
    assert evaluations(shared) == []

    hosts = start_two(shared, overrides=[long] * 2, lenet=True)
    results = [finish(host) for host in hosts]
    assert [code for code, _, _ in results] == [0, 0], results
    spoken = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for _, out, _ in results]
    assert "finished" in spoken[0]
    assert spoken[1] == []
    assert "going on from the checkpoint of step 160" in results[0][2]
    one, two = ({r["step"]: r["train/loss"] for r in records(w) if "train/loss" in r} for w in (alone, shared))
    assert one.keys() <= two.keys()
    # The order of sums differs: losses are first equal up to rounding, which training then magnifies.
    np.testing.assert_allclose([two[5], two[10]], [one[5], one[10]], rtol=1e-4)
    assert [record["step"] for record in evaluations(shared)] == [160, 236]
    assert checkpoint_steps(shared) == checkpoint_steps(alone) == [160, 236]
    final = [[r for r in records(w) if "eval/loss" in r][-1] for w in (alone, shared)]
    assert final[0]["eval/count"] == final[1]["eval/count"] == 180
    assert final[1]["eval/top1"] == pytest.approx(final[0]["eval/top1"], abs=0.05)

    # One process of eight devices reads what the two have written.
    code, out, err = run(monkeypatch, capsys, evaluate.main, "--workdir", shared)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["top1"] == pytest.approx(final[1]["eval/top1"], abs=1e-9)


def test_two_processes_are_asked_to_stop_at_moments_between_steps(tmp_path):
    """Within a save that follows an evaluation, and before the first step of a run that resumes.

    Orbax asks JAX itself within a save, by its step; and JAX takes a request from before the first step for the first
    call, whatever step that is of.
    """
    each = "--config.eval_every_epochs=0.07 --config.checkpoint_every_epochs=0.07"
    for moment, step in (("save", 7), ("begin", 8)):
        hosts = start_two(tmp_path, overrides=[each] * 2, lenet=True, script=("tests/aimed.py", moment))
        results = [finish(host) for host in hosts]
        assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
        assert f"stopped at step {step}, checkpoint written; the same command goes on from there\n" in results[0][2]
        assert checkpoint_steps(tmp_path)[-1] == step


def test_processes_that_differ_do_not_begin(whole, tmp_path):
    """Nothing is written if their seeds differ, or if only one of their workdirs has checkpoints."""
    seeds = ["--config.seed=0", "--config.seed=1"]
    results = [finish(host) for host in start_two(tmp_path / "new", overrides=seeds)]
    said = "error: the processes of this run are not alike: {}. Start the same on every host."
    differ = said.format("recipe key seed is 0 on process 0, 1 on process 1")
    assert [(code, err.splitlines()[-1]) for code, _, err in results] == [(2, differ)] * 2, results
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "0").mkdir()
    shutil.copytree(whole / "checkpoints", tmp_path / "0" / "checkpoints")
    config = json.loads((whole / "config.json").read_text())
    config |= {"eval_every_epochs": 2.0, "checkpoint_every_epochs": 2.0}
    config["init"]["weights"] = str(whole)
    (tmp_path / "0" / "config.json").write_text(json.dumps(config))
    results = [
        finish(host)
        for host in start_two(tmp_path / "0", tmp_path / "1", overrides=[f"--config.init.weights={whole}"] * 2)
    ]
    differ = said.format("whether the workdir has checkpoints is true on process 0, false on process 1")
    assert [(code, err.splitlines()[-1]) for code, _, err in results] == [(2, differ)] * 2, results
    assert not (tmp_path / "1").exists()


# What goes wrong with the input --------------------------------------------------------------------


def test_a_killed_worker_is_no_reason_to_end_under_restarts(tmp_path):
    """The run saves, is started again, and ends."""
    process = start(tmp_path, "--restarts", "1", "--config.epochs=4", *SELDOM, *WORKERS, lenet=True)
    children_of_it = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: records(tmp_path), process)
    trainer = int(children_of_it.read_text())
    os.kill(min(children(trainer)), signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, "finished" in out) == (0, True), err
    assert "train.py: the run ended with exit code 75; start 1 of 1 without a new checkpoint, in 2 s" in err
    assert [record["step"] for record in evaluations(tmp_path)] == [158, 314]


def test_a_killed_worker_loses_nothing(tmp_path):
    """A worker is killed, as by the system if memory runs out: the trained steps are saved, and the message says so."""
    process = start(tmp_path, *WORKERS)
    wait_until(lambda: len(records(tmp_path)) >= 1, process)
    readers, held = stand_still(process)
    assert len(readers) == 2
    os.kill(min(readers), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == 75, err
    message = (
        r"error: a worker process that reads the data was ended by SIGKILL, as the system does when memory runs "
        r"out\. Take fewer by --config\.data\.num_workers=N.*\n"
        r"Stopped after step (\d+); the checkpoint of step (\d+) is written"
    )
    stopped, saved = map(int, re.search(message, err).groups())
    assert stopped == saved >= 5
    assert "Traceback" not in err
    assert (tmp_path / "checkpoints" / str(saved)).is_dir()
    assert records(tmp_path)[-1]["step"] == saved  # the steps since the last record are in it
    assert_gone(readers, held)


@pytest.mark.parametrize("also", ["asked in the save", "workdir renamed"])
def test_a_killed_worker_and_more(tmp_path, also):
    """A request to stop does not break the save off. Where the workdir is gone nothing is written in its place."""
    workdir = tmp_path / "w"
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", str(workdir), *LENET, *SELDOM, *WORKERS]
    code, _, err = finish(shell.start("tests/aimed.py", f"readers killed, {also}", *arguments, devices=1))
    if also == "workdir renamed":
        assert code == 2, err
        assert err.splitlines()[-1].startswith(f"error: workdir {workdir} was removed, renamed or closed to this run")
        assert [path.name for path in tmp_path.iterdir()] == ["w-elsewhere"]
    else:
        assert code == 75, err
        saved = int(re.search(r"Stopped after step (\d+); the checkpoint of step \1 is written; the same", err)[1])
        assert checkpoint_steps(workdir) == [saved]
        assert records(workdir)[-1]["step"] == saved >= 3


def test_a_bad_image_stops_or_is_replaced(tmp_path, monkeypatch, capsys):
    """One of 24 files is cut: the steps before it are saved, and a run that replaces the image resumes from there."""
    photo = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))[1].tobytes()
    for split, i in itertools.product(("train", "val"), range(24)):
        path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo)
    split = data.load("folder", data_dir=str(tmp_path / "photos"), train=True, batch_size=8, image_size=32)
    order = grain.MapDataset.source(split.source).seed(0).shuffle()
    bad = Path(order[17]["name"])  # of the third batch
    bad.write_bytes(photo[:-30])
    (tmp_path / "photos" / "val" / "a" / "00.jpg").write_bytes(b"")

    overrides = ["--config.model.name=lenet", "--config.model.width=0.25", "--config.data.image_size=32"]
    overrides += ["--config.batch_size=8", "--config.epochs=2", "--config.schedule.name=constant"]
    overrides += ["--config.log_every_steps=1", "--config.step.ema_decay=0"]
    recipe = f"{ROOT / 'configs' / 'folder.py'}:{tmp_path / 'photos'}"
    arguments = ["--config", recipe, "--workdir", tmp_path / "w", *overrides]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 2
    assert re.search(rf"error: {bad}: the image cannot be decoded .*Premature end of JPEG file", err), err
    assert "Stopped after step 2; the checkpoint of step 2 is written; the same command goes on from there." in err
    assert err.count("Traceback") == 0

    code, out, err = run(monkeypatch, capsys, train.main, *arguments, "--config.data.on_bad_image=replace")
    assert code == 0, err
    assert "going on from the checkpoint of step 2" in err
    assert re.search(r"bad images +left out: 2 times in training, 1 in evaluation", out), out
    recorded = records(tmp_path / "w")
    assert [r["train/bad_images"] for r in recorded if r.get("train/bad_images")] == [1, 1]
    assert {(r["eval/count"], r["eval/bad_images"]) for r in recorded if "eval/count" in r} == {(23, 1)}
    code, out, _ = run(monkeypatch, capsys, evaluate.main, "--workdir", tmp_path / "w")
    assert code == 0
    assert (json.loads(out.splitlines()[-1])["count"], json.loads(out.splitlines()[-1])["bad_images"]) == (23, 1)

    for path in (tmp_path / "photos" / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    code, _, err = run(monkeypatch, capsys, evaluate.main, "--workdir", tmp_path / "w")
    assert (code, err.strip()) == (2, "error: none of the 24 images to evaluate on can be decoded.")


def test_a_run_whose_workers_stand_still_ends_on_request(tmp_path):
    """They are stopped in earnest; a stopped process cannot be told from one that waits for a disk."""
    watched = ["--config.data.num_workers=1", "--config.watchdog_minutes=0.3", "--config.watchdog_action=stop"]
    process = shell.start("train.py", "--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *LENET, *watched)
    wait_until(lambda: len(records(tmp_path)) >= 1, process)
    readers = children(process.pid)
    for reader in readers:
        os.kill(reader, signal.SIGSTOP)
    code, _, err = finish(process)
    assert code == 75, err
    still = (
        r"error: the run has stood still for 18 seconds, waiting for the batch of step \d+; the stack of every thread "
    )
    assert re.search(rf"{still}is in {re.escape(str(tmp_path))}/stacks\.txt\. The same command goes on", err), err
    assert re.search(r'train\.py", line \d+ in train$', (tmp_path / "stacks.txt").read_text(), re.MULTILINE)
    wait_until_gone(readers)


def test_data_that_cannot_be_opened_for_ever_end_a_run_on_request(tmp_path):
    """As on a mount whose server has gone. The folder that got the stacks still is a new run's."""
    program = (
        "import time, train\nfrom xception_flax import data\nfrom xception_flax.commands import cli\n"
        "data.load = lambda **_: time.sleep(600)\ncli.run(train.main)"
    )
    watched = ["--config.watchdog_minutes=0.05", "--config.watchdog_action=stop"]
    code, _, err = finish(shell.start("-c", program, "--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *watched))
    assert code == 75, err
    assert "waiting for the data to be opened, on every host; the stack of every thread is in" in err
    assert re.search(r'train\.py", line \d+ in load_data$', (tmp_path / "stacks.txt").read_text(), re.MULTILINE)
    check_workdir(tmp_path, reading.load(DIGITS, []))


def test_a_signal_while_the_input_stands_still(tmp_path):
    """It is not the next step that saves, as there is none."""
    process = start(tmp_path, "--config.epochs=200", *WORKERS, lenet=True)
    wait_until(lambda: len(records(tmp_path)) >= 1, process)
    readers = children(process.pid)
    for reader in readers:
        os.kill(reader, signal.SIGSTOP)
    seen, since = 0, time.monotonic()
    while time.monotonic() - since < 3:  # it uses up the batches that are there
        if seen != (now := len(records(tmp_path))):
            seen, since = now, time.monotonic()
        time.sleep(0.1)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, "Traceback" in err) == (128 + signal.SIGTERM, False), err
    assert time.monotonic() - begin < 60
    left = r"stopped after step (\d+), while it waited for images; the checkpoint of step (\d+) is written; the same"
    stopped, saved = map(int, re.search(left, err).groups())
    assert stopped == saved >= 5
    assert checkpoint.newest_step(tmp_path / "checkpoints") == saved
    wait_until_gone(readers)


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path):
    """As where `2>&1 | tee log` gets Ctrl-C before the run does."""
    process = shell.start(
        "train.py", "--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *LENET, "--config.epochs=200"
    )
    wait_until(lambda: len(records(tmp_path)) >= 1, process)
    process.stderr.close()
    process.stdout.close()
    seen = len(records(tmp_path))
    wait_until(lambda: len(records(tmp_path)) >= seen + 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 128 + signal.SIGINT
    assert checkpoint.newest_step(tmp_path / "checkpoints") == records(tmp_path)[-1]["step"]


def test_checkpoints_by_the_clock_and_a_damaged_one(tmp_path, monkeypatch, capsys):
    """A run that saves by minutes alone is resumed from the newest whole checkpoint, and ends as the first did."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    arguments = ["--config", f"{DIGITS}:lenet", *LENET, "--config.epochs=0.2", "--config.schedule.warmup_epochs=0"]
    arguments += ["--config.log_every_steps=4", "--config.checkpoint_every_epochs=inf"]
    arguments += ["--config.checkpoint_every_minutes=1e-6", "--config.checkpoint.keep_latest=9", "--workdir"]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, whole)
    assert code == 0, err
    saved = sorted(int(path.name) for path in (whole / "checkpoints").iterdir())
    assert saved == [4, 8, 12, 16]

    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "16")
    for step in ("8", "12"):
        (again / "checkpoints" / step / "raw" / "manifest.ocdbt").write_bytes(b"")
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, again)
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "12 cannot be used: raw/manifest.ocdbt is empty; move this folder away to go on from step 8, or train with"
        in err
    )

    # The key may change, as may the clock: neither changes the result.
    changed = ["--config.checkpoint.on_damaged=older", "--config.checkpoint_every_minutes=inf"]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, again, *changed)
    assert code == 0, err
    assert err.count("WARNING: checkpoint ") == 2
    assert "going on from the checkpoint of step 4" in err
    assert sorted(path.name for path in (again / "damaged").iterdir()) == ["12", "8"]
    assert sorted(int(path.name) for path in (again / "checkpoints").iterdir()) == [4, 16]
    expected = arrays(whole, 16)
    for path, value in arrays(again, 16).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)

    # Without its records too, which are made anew from there.
    (again / "metrics.jsonl").unlink()
    code, out, err = run(monkeypatch, capsys, train.main, *arguments, again)
    assert (code, "this run is finished" in out) == (0, True), err
    shutil.copy(whole / "metrics.jsonl", again)

    # Without any checkpoint, though by its records there were whole ones, it does not begin anew.
    shutil.rmtree(again / "checkpoints")
    before = records(again)
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, again)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{again}/checkpoints has no checkpoint, and by metrics.jsonl 4 were written, up to step 16; put them" in err
    assert records(again) == before

    # Where the first may not have been whole it does, and says so: the records of the lost steps go.
    lines = [line for line in (again / "metrics.jsonl").read_text().splitlines(True) if "blocking" not in line]
    (again / "metrics.jsonl").write_text("".join(lines))
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, again)
    anew = f"WARNING: there is no checkpoint in {again}: the run begins anew, and its records up to step 16 are removed"
    assert (code, anew in err.splitlines()) == (0, True), err
    assert [record["step"] for record in records(again) if "train/loss" in record] == [4, 8, 12, 16]


# Mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/digts.py"], "no recipe file 'configs/digts.py'; did you mean 'configs/digits.py'"),
        (["--config.optimizer.learning_rat=1"], "unknown recipe key 'optimizer.learning_rat'.* mean 'learning_rate'"),
        (["--config.batch_size=lots"], "recipe key 'batch_size' must be an integer, got 'lots'"),
        (["--config.model.name=exception"], "unknown model.name 'exception'; did you mean 'xception'"),
        (["--config.optimizer.name=sdg"], "unknown optimizer.name 'sdg'; did you mean 'sgd'"),
        (["--config.data.source=digit"], "unknown data.source 'digit'; did you mean 'digits'"),
        (["--config.data.source=folder", "--config.data.data_dir=/nowhere"], "/nowhere is no directory"),
        (["--config.data.source=folder"], "recipe key 'data.data_dir' is missing"),
        (["--config.batch_size=12"], "batch_size=12 does not divide over 8 devices; .* take 8 or 16"),
        (["--config.data.image_size=31"], "at least 32 x 32 pixels, got 31 x 31; give larger ones"),
        (["--config.model.num_classes=7"], "model.num_classes is 7, but the data has 10 classes"),
        (["--config.mesh.fsdp=3"], "mesh: data=-1 x fsdp=3 must cover the 8 devices exactly; .* take 1 or 2 or 4 or 8"),
        (["--config.batch_size=1264"], "batch_size=1264 is more than the 1,257 images of split 'train'; take at most"),
        # Of two mistakes, that of the workdir is reported.
        (["--workdir", "/proc/nothing", "--config.mesh.fsdp=3"], "workdir /proc/nothing cannot be written"),
        (["--workdir", __file__, "--config.mesh.fsdp=3"], "workdir .*test_train.py is a file; expected a folder"),
        (["--config.normalize.mean=(1.0,2.0)", "--config.normalize.std=(1.0,2.0)"], "mean has 2 values.*1 channels"),
        (["--config.profile=700:708"], "profile=700:708 is not within the 707 steps of this run"),
        (["--config.profile=7"], "recipe key 'profile' must be FIRST:LAST, got '7'; 10:12 traces"),
        (["--config.schedule.warmup_epochs=50"], "warmup_epochs=50 are .* but the whole run has"),
        (["--config.data.train_transforms=rezise"], "unknown transform 'rezise'; did you mean 'resize'"),
        (["--config.loss.name=sigmoid"], r"loss 'sigmoid' takes a row .*, got labels of shape \(64,\)"),
        (["--config.metrics.name=multi_label"], r"metrics 'multi_label' take a row .* set metrics.name=single_label"),
        (["--workdir", "gs://bucket/run"], "argument --workdir: gs://bucket/run is no path of a file system; mount"),
        (["--process-id", "one"], "argument --process-id: invalid int value: 'one'; --help shows"),
        (["--wrokdir=x"], "unknown option '--wrokdir'; did you mean '--workdir'"),
        (["--coordinator", "localhost:1"], "--coordinator, --num-processes and --process-id go together"),
        (["--num-processes", "2", "--process-id", "1"], "--coordinator, --num-processes and --process-id go together"),
        (["--workdir", "/"], "workdir '/' is the root of all folders; take a folder that is for this run alone"),
        (["--workdir", ""], "argument --workdir: must be a path, got ''"),
        (["--config.checkpoint.on_damaged=oldest"], "unknown checkpoint.on_damaged 'oldest'; did you mean 'older'"),
        (["--config.checkpoint.keep_latest=0"], "checkpoint.keep_latest must be at least 1, got 0"),
        (["--config.watchdog_action=kill"], "unknown watchdog_action 'kill'"),
        (["--config.step.on_nonfinite=skp"], "unknown step.on_nonfinite 'skp'; did you mean 'skip'"),
        (["--config.step.accumulation_steps=0"], "step.accumulation_steps must be at least 1, got 0"),
        (["--config.model.width=1e9"], r"model.width=1000000000.0 makes a layer of 3.2e\+10 channels; at most"),
        (["--config.model.width=2000"], "parameters, averages and optimizer take .* GB on each device, which has"),
        (["--config.model.fc_layers=(64,-3)"], r"fc_layers must be positive integers, got \(64, -3\)"),
    ],
)  # fmt: skip
def test_mistakes_with_train(tmp_path, monkeypatch, capsys, arguments, message):
    """One or two lines, exit code 2, and nothing written."""
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "w"
    defaults = ([] if "--config" in arguments else ["--config", DIGITS]) + (
        [] if "--workdir" in arguments else ["--workdir", workdir]
    )
    code, out, err = run(monkeypatch, capsys, train.main, *defaults, *arguments)
    assert (code, out) == (2, "")
    assert re.match(f"error: .*{message}", err), err
    assert err.count("\n") <= 2
    assert not workdir.exists()


def test_transforms_of_another_shape_are_refused_before_an_epoch(tmp_path, monkeypatch, capsys):
    """Also transforms of the evaluation, which comes after hours of training."""
    for chain in ("train", "eval"):
        arguments = [
            "--config",
            DIGITS,
            "--workdir",
            tmp_path / "w",
            f"--config.data.{chain}_transforms=resize(image_size=9)",
        ]
        code, _, err = run(monkeypatch, capsys, train.main, *arguments)
        assert code == 2
        assert re.match(
            rf"error: data\.{chain}_transforms: the transforms made an image of shape \(9, 9, 1\), but", err
        )
        assert not (tmp_path / "w").exists()


def test_without_a_cluster_none_is_joined(tmp_path):
    """In a process of its own, because JAX joins a cluster only before it looks for devices."""
    process = start(tmp_path / "w", "--distributed")
    code, out, err = finish(process)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: --distributed finds no cluster \(TPU pod, Slurm, mpirun\) here: .*\n", err), err
    assert not (tmp_path / "w").exists()


def test_another_recipe_in_an_old_workdir_is_refused(whole, monkeypatch, capsys):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    code, _, err = run(
        monkeypatch,
        capsys,
        train.main,
        *("--config", DIGITS, "--workdir", whole, *SMALL, "--config.seed=5"),
        "--config.mesh.fsdp=3",  # a second mistake, which is not the one reported
    )
    assert code == 2
    assert "holds a run of another recipe; nothing was changed" in err
    assert "seed: 0 -> 5" in err
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_other_data_in_an_old_workdir_is_refused(tmp_path, monkeypatch, capsys):
    """A folder of images may move; its classes and its number of images may not change.

    Files that are not read are reported, and no run begins on images that would be nearly black.
    """
    image = cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    dark = cv2.imencode(".png", np.full((40, 40), 4000, np.uint16))[1].tobytes()
    for name, count in (("a", 4), ("b", 5), ("dark", 4), ("dark_val", 4)):
        for path in (f"{name}/{split}/{c}/{i}.png" for split in ("train", "val") for c in "xé" for i in range(count)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            is_dark = name == "dark" or (name == "dark_val" and "/val/" in path)
            (tmp_path / path).write_bytes(dark if is_dark else image)
    (tmp_path / "a" / "train" / "x" / "0.psd").touch()
    bright = cv2.imencode(".png", np.full((40, 40), 40_000, np.uint16))[1].tobytes()
    for i, content in enumerate((dark, bright, bright)):
        (tmp_path / "a" / "train" / "x" / f"{i}.png").write_bytes(content)

    def command(name):
        overrides = ["--config.model.name=lenet", "--config.model.width=0.25", "--config.data.image_size=32"]
        once = ["--config.batch_size=8", "--config.epochs=1", "--config.schedule.name=constant"]
        recipe = f"{ROOT / 'configs' / 'folder.py'}:{tmp_path / name}"
        arguments = ["--config", recipe, "--workdir", str(tmp_path / "w"), *overrides, *once]
        return run(monkeypatch, capsys, train.main, *arguments)

    for name in ("dark", "dark_val"):
        code, _, err = command(name)
        assert (code, err.count("\n")) == (2, 1)
        assert "the images of 16 bits have values up to 4,000 of 65,535" in err
    assert not (tmp_path / "w").exists()
    code, _, err = command("a")
    assert code == 0
    assert "\n1 of 17 files is not read: 1 .psd (x/0.psd).\n" in err
    assert "\nthe training data: 1 of 3 images of 16 bits looked at have no value in the upper half; if white" in err
    (tmp_path / "a" / "train" / "x" / "1.png").write_bytes(dark)  # does not stop a run that has begun

    # Older checkpoints have the names of classes as they were on the disk.
    (meta,) = (tmp_path / "w" / "checkpoints").glob("*/meta/metadata")
    content = json.loads(meta.read_text())
    assert content["class_names"] == ["x", "\xe9"]
    meta.write_text(json.dumps(content | {"class_names": ["x", "e\u0301"]}))
    code, out, _ = command("a")
    assert (code, "this run is finished (1 step); nothing to do." in out) == (0, True)

    # One image of eight may be repaired; half of them are others, as where two folders were exchanged.
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    other = cv2.imencode(".png", np.full((40, 40, 3), 99, np.uint8))[1].tobytes()
    for path in (tmp_path / "c" / "train" / "x").iterdir():
        path.write_bytes(other)
    code, _, err = command("c")
    assert (code, err.count("\n")) == (2, 1)
    assert "was begun: of 16 training images that were looked at 9 are others. Give the same data, or take" in err
    shutil.rmtree(tmp_path / "c" / "train")
    shutil.copytree(tmp_path / "a" / "train", tmp_path / "c" / "train")
    (tmp_path / "c" / "val" / "x" / "0.png").unlink()
    code, _, err = command("c")
    assert (code, "the number of evaluation images was 8, now it is 7. Give" in err) == (2, True)

    (tmp_path / "a" / "stray.txt").touch()
    code, out, _ = run(monkeypatch, capsys, evaluate.main, "--workdir", tmp_path / "w")
    assert code == 0
    assert re.search(
        r"not read +1 file is not read: 1 \.txt \(a/stray\.txt\)\.", out
    )  # all files of its split are read
    elsewhere = f"--config.data.data_dir={tmp_path / 'dark'}"
    code, _, err = run(monkeypatch, capsys, evaluate.main, "--workdir", tmp_path / "w", elsewhere)
    assert code == 2
    assert "the images of 16 bits have values up to 4,000 of 65,535 (in 8 of 8 that were looked at)" in err
    assert (
        run(monkeypatch, capsys, evaluate.main, "--workdir", tmp_path / "w", elsewhere, "--config.data.max_value=4095")[
            0
        ]
        == 0
    )
    assert restore(tmp_path / "w", sharding.create_mesh(), "latest").class_names == ("x", "\xe9")
    code, _, err = command("b")
    assert code == 2
    assert "error: the data has changed since" in err
    assert "num_images was 8, now it is 10" in err


def test_one_class_is_refused(tmp_path, monkeypatch, capsys):
    """Its loss of 0 and accuracy of 100 % would mean nothing."""
    image = cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        for i in range(8):
            (tmp_path / "photos" / split / "cat" / f"{i}.png").write_bytes(image)
    arguments = ["--config", f"{ROOT / 'configs' / 'folder.py'}:{tmp_path / 'photos'}", "--config.batch_size=8"]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, "--workdir", tmp_path / "w")
    assert (code, err) == (2, "error: the data has one class only, 'cat'; expected two or more.\n")
    assert not (tmp_path / "w").exists()


def test_mistakes_in_both_splits_are_shown_at_once(tmp_path, monkeypatch, capsys):
    for path in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        (tmp_path / "photos" / path).parent.mkdir(parents=True)
        (tmp_path / "photos" / path).write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    (tmp_path / "photos" / "val" / "b").mkdir()
    arguments = ["--config", f"{ROOT / 'configs' / 'folder.py'}:{tmp_path / 'photos'}"]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, "--workdir", tmp_path / "w")
    first, second = err.splitlines()
    assert code == 2
    assert first == (
        "error: batch_size=64 is more than the 2 images of split 'train'; take at most 2: --config.batch_size=2."
    )
    assert second.startswith(f"{tmp_path}/photos/val/b has no image")
    assert not (tmp_path / "w").exists()


def test_a_foreign_folder_is_no_workdir(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    (tmp_path / "slurm-7.out").touch()  # the log of this very run is not foreign
    code, _, err = run(monkeypatch, capsys, train.main, "--config", DIGITS, "--workdir", tmp_path)
    assert code == 2
    assert "has metrics.jsonl and no config.json" in err
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_mistake_from_the_shell_is_no_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n    pass\n")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "broken.py"), "--workdir", "w"]
    result = subprocess.run(command, env=environment(1), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.fullmatch(r"error: recipe .*broken\.py, line 1: .*\n", result.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.py"]


def test_what_does_not_fit_into_memory_is_two_lines(tmp_path, monkeypatch, capsys):
    """No machine has room for 32 PiB. An error that is not about memory keeps its traceback."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *arguments: np.empty(2**55, np.uint8))
        code, _, err = run(patch, capsys, train.main, "--config", DIGITS, "--workdir", tmp_path / "w")
    assert code == 2
    last = err.splitlines()[-2:]
    assert re.match(r"error: it does not fit into memory: .*allocate 32\.0 PiB", last[0]), err
    assert "Lower batch_size" in last[1]
    with (
        pytest.raises(UserError, match=r"not fit into memory: .*Unable to allocate.*\nadvice"),
        cli.out_of_memory("advice"),
    ):
        np.empty(2**55, np.uint8)
    with pytest.raises(UserError, match=r"not fit into memory: RESOURCE_EXHAUSTED"), cli.out_of_memory("advice"):
        jax.device_put(np.broadcast_to(np.uint8(0), 2**50))
    for other in (RuntimeError("INTERNAL: no"), ValueError("RESOURCE_EXHAUSTED: disk"), OSError(28, "No space left")):
        with pytest.raises(type(other)) as raised, cli.out_of_memory("advice"):
            raise other
        assert raised.value is other


@pytest.mark.parametrize("command", [train, evaluate], ids=lambda command: command.__name__)
def test_help_is_worth_reading(monkeypatch, capsys, command):
    """`test_main.py` asks for help from the shell."""
    code, out, err = run(monkeypatch, capsys, command.main, "--help")
    assert (code, err) == (0, "")
    for word in ("--workdir", "--config.KEY=VALUE", "examples:", "--coordinator"):
        assert word in out


@pytest.mark.usefixtures("on_one_device")
def test_a_run_without_progress_ends_early(tmp_path, monkeypatch, capsys):
    """At a learning rate of 0 the first evaluation stays the best. What stopped in between ends where a whole run does.

    Class weights and balanced sampling go along: the digits have 125 or so images of each class.
    """
    overrides = [*LENET, "--config.optimizer.learning_rate=0", "--config.patience_epochs=1", "--config.epochs=9"]
    overrides += [
        "--config.step.ema_decay=0",
        "--config.loss.class_weights=balanced",
        "--config.data.sampling=balanced",
    ]
    command = ["--config", f"{DIGITS}:lenet", *overrides, "--workdir"]
    code, out, err = run(monkeypatch, capsys, train.main, *command, tmp_path / "whole")
    assert code == 0
    # Evaluations after 40, 79 and 118 steps; an epoch has 78.6. The one after step 118 is not a whole epoch later.
    assert "ended early: top1 has not become better since epoch 0.5, step 40 (patience_epochs)" in err
    assert "finished" in out
    expected = evaluations(tmp_path / "whole")
    assert [record["step"] for record in expected] == [40, 79, 118, 158]
    assert len({record["eval/loss"] for record in expected}) == 1
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["loss"]["class_weights"] == "balanced"
    code, out, _ = run(monkeypatch, capsys, train.main, *command, tmp_path / "whole")
    assert (code, "this run is finished (158 steps); nothing to do" in out) == (0, True)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for step in (118, 138, 158):  # as if it had been killed before the checkpoint of step 118
        shutil.rmtree(part / "checkpoints" / str(step), ignore_errors=True)
    left = sorted(int(path.name) for path in (part / "checkpoints").iterdir() if path.name.isdigit())
    assert max(left, default=0) < 118
    code, _, err = run(monkeypatch, capsys, train.main, *command, part)
    assert (code, "ended early: top1" in err) == (0, True)
    assert evaluations(part) == expected


def test_divergence_stops_before_it_is_saved(tmp_path, monkeypatch, capsys):
    overrides = [*LENET, "--config.optimizer.name=sgd", "--config.optimizer.learning_rate=1e30"]
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *overrides]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 2
    assert re.search(r"error: the (loss|gradient_norm) is (nan|inf) at step \d+; .*optimizer\.learning_rate", err)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


# One step whose update overflows. Its loss and gradient are finite, as in any first step.
OVERFLOW = [text for text in LENET if "warmup" not in text] + ["--config.epochs=0.0127"]
OVERFLOW += [f"--config.{text}" for text in ("schedule.name=constant", "optimizer.name=rmsprop")]
OVERFLOW += ["--config.optimizer.learning_rate=3e38"]


def test_steps_that_are_not_finite_are_skipped_on_request(tmp_path, monkeypatch, capsys):
    """A learning rate of 1e30 makes all steps but the first so: they are counted, and none is learned.

    After a hundred in a row the run ends, and what it learned before is saved.
    """
    arguments = ["--config", f"{DIGITS}:lenet", *LENET, "--config.optimizer.learning_rate=1e30", "--workdir"]
    arguments += [tmp_path / "w", "--config.schedule.warmup_epochs=0", "--config.optimizer.clip_norm=None"]
    arguments += ["--config.eval_every_epochs=inf", "--config.checkpoint_every_epochs=inf"]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 2
    assert re.search(r"error: the (loss|gradient_norm) is (nan|inf) at step 5; no checkpoint was written yet\.", err)

    code, _, err = run(monkeypatch, capsys, train.main, *arguments, "--config.step.on_nonfinite=skip")
    assert code == 2
    gave = "gave a loss, a gradient or weights that are not finite"
    first = int(
        re.search(
            rf"^WARNING: ([1-4]) steps since the last record, up to step 5, {gave}: nothing was learned",
            err,
            re.MULTILINE,
        )[1]
    )
    ended = rf"error: (\d+) steps in a row up to step (\d+) {gave}, and were skipped, .*; the checkpoint of step \2[, ]"
    assert tuple(map(int, re.search(ended, err).groups())) == (100 + first, 105)
    assert f"replay {tmp_path}/w --step {6 - first}` names the layer and the images" in err
    assert [record.get("train/skipped_steps") for record in records(tmp_path / "w")][:21] == [first] + [5] * 20
    assert "train/loss" not in records(tmp_path / "w")[1]
    assert all(np.isfinite(value).all() for value in arrays(tmp_path / "w", 105).values())

    # Steps are counted over starts: the same command says it at once.
    code, _, err = run(monkeypatch, capsys, train.main, *arguments, "--config.step.on_nonfinite=skip")
    assert (code, tuple(map(int, re.search(ended, err).groups()))) == (2, (100 + first, 105))
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)  # which goes on, and skips none
    assert (code, "at step 110; the checkpoint of step 105 is kept" in err) == (2, True), err

    # Nor is a run finished that skipped the last hundred of its steps.
    arguments = [tmp_path / "e" if argument == tmp_path / "w" else argument for argument in arguments]
    arguments += [f"--config.epochs={105 / 157 * 2}", "--config.step.on_nonfinite=skip"]
    for _ in range(2):
        code, _, err = run(monkeypatch, capsys, train.main, *arguments)
        assert (code, tuple(map(int, re.search(ended, err).groups()))) == (2, (100 + first, 105))


# The second update overflows: its rate is 3e38, that of the first is 0. Loss and gradient of both steps are finite. The
# first step is saved.
SECOND_OVERFLOWS = ["--config", f"{DIGITS}:lenet", *(text for text in LENET if "_epochs" not in text)]
SECOND_OVERFLOWS += ["--config.epochs=1", "--config.eval_every_epochs=inf", "--config.checkpoint_every_epochs=0.0127"]
SECOND_OVERFLOWS += [f"--config.schedule.{text}" for text in ("name=cosine", "warmup_epochs=0.0127")]
SECOND_OVERFLOWS += [f"--config.optimizer.{text}" for text in ("name=adamw", "learning_rate=3e38", "clip_norm=None")]
SECOND_OVERFLOWS += ["--config.optimizer.decoupled_weight_decay=1e4"]


@pytest.mark.parametrize("cause", ["the end of an interval", "SIGTERM"])
def test_an_update_that_overflows_exactly_at_a_save_is_not_saved(tmp_path, monkeypatch, capsys, cause):
    """The array is named, and the last good checkpoint stays, from which the same command does the same again."""
    arguments = [*SECOND_OVERFLOWS, "--workdir", tmp_path / "w"]
    if cause == "SIGTERM":  # by which step 1 is saved, and then step 2 would be
        arguments += ["--config.checkpoint_every_epochs=inf"]
        advance = progress.RunProgress.advance

        def stop(report: progress.RunProgress, step: int) -> None:
            advance(report, step)
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(progress.RunProgress, "advance", stop)
        assert run(monkeypatch, capsys, train.main, *arguments)[0] == 128 + signal.SIGTERM
        assert list(checkpoint_steps(tmp_path / "w")) == [1]
    for _ in range(2):
        code, _, err = run(monkeypatch, capsys, train.main, *arguments)
        assert code == 2
        assert re.search(
            r"^error: values of raw\['params'\]\['conv1'\]\['kernel'\] and \d+ other arrays are not finite after step "
            r"2; the checkpoint of step 1 is kept\. Lower optimizer\.learning_rate or clip gradients "
            rf"\(optimizer\.clip_norm\), in a new workdir from the start or, if it evaluates well, from there "
            rf"\(--config\.init\.weights={tmp_path}/w\); `xception-flax replay {tmp_path}/w` names the first such "
            r"step, the layer and the images\.$",
            err,
            re.MULTILINE,
        )
        assert list(checkpoint_steps(tmp_path / "w")) == [1]
    assert all(np.isfinite(value).all() for value in arrays(tmp_path / "w", 1).values())


def checkpoint_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *OVERFLOW]
    code, out, err = run(monkeypatch, capsys, train.main, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "error: the loss of the evaluation is nan: the weights are finite, the network's output is not; no "
        "checkpoint was written yet. Lower optimizer.learning_rate or clip gradients (optimizer.clip_norm), in a new "
        f"workdir; `xception-flax replay {tmp_path}` names the first such step, the layer and the images."
    )
    assert [list(r) for r in records(tmp_path) if "eval/loss" in r] == []
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_checkpoint_whose_evaluation_is_not_finite_is_not_recommended(tmp_path, monkeypatch, capsys):
    """It was written when a signal broke the evaluation off."""
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *OVERFLOW]
    again = Watchdog.again

    def strike(watchdog: Watchdog, *batch: object) -> None:
        again(watchdog)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Watchdog, "again", strike)
    assert run(monkeypatch, capsys, train.main, *arguments)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(Watchdog, "again", again)
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 2
    assert (
        "the network's output is not; the checkpoint of step 1, which was not evaluated, has these weights. "
        "Lower optimizer.learning_rate or clip gradients (optimizer.clip_norm), in a new workdir; `xception-flax"
    ) in err.splitlines()[-1]


BRIEF = [*LENET, "--config.epochs=0.1019", "--config.schedule.warmup_epochs=0"]  # 8 steps
BRIEF += ["--config.log_every_steps=2", "--config.checkpoint_every_epochs=0.02545"]  # every two steps


def test_a_disk_that_is_full_in_mid_run_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, capsys):
    """A limit on the size of files stands for it: the run ends at the next record or checkpoint, and can be used."""
    process = start(tmp_path, "--config.epochs=200", "--config.checkpoint_every_epochs=0.1", lenet=True)
    wait_until(lambda: has_checkpoints(tmp_path), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    code, _, err = finish(process)
    assert (code, "Traceback" in err) == (2, False), err
    kept = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
    said = err.splitlines()[-1]
    assert said.startswith("error: ")
    assert (
        "cannot be written: File too large" in said or f"checkpoints kept: {', '.join(map(str, sorted(kept)))}" in said
    )
    # None of them has an evaluation, so none is the best.
    code, out, err = run(monkeypatch, capsys, evaluate.main, "--workdir", tmp_path, "--checkpoint", "latest")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == max(kept)


def test_records_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch, capsys):
    """The size of the file when a save begins is its size when it was last synced."""
    path, synced, seen = tmp_path / "metrics.jsonl", {}, []
    fsync, save = os.fsync, train.checkpoint.save

    def noting_fsync(descriptor):
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def noting_save(manager, state, *rest):
        assert records(tmp_path)[-1]["step"] == int(state.step)
        seen.append((synced.get(path.stat().st_ino), path.stat().st_size))
        save(manager, state, *rest)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(train.checkpoint, "save", noting_save)
    arguments = ["--config", f"{DIGITS}:lenet", "--workdir", tmp_path, *BRIEF]
    code, _, err = run(monkeypatch, capsys, train.main, *arguments)
    assert code == 0, err
    assert len(seen) == 4
    assert [on_disk for on_disk, _ in seen] == [size for _, size in seen]
    assert synced[path.stat().st_ino] == path.stat().st_size


@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "removed"])
def test_a_workdir_that_is_gone_ends_the_run(tmp_path, monkeypatch, capsys, renamed):
    """It ends at the next record, and does not create the workdir again, as Orbax would."""
    workdir = tmp_path / "w"
    monkeypatch.setattr(
        progress.RunProgress,
        "compiled",
        lambda self, step: workdir.rename(tmp_path / "elsewhere") if renamed else shutil.rmtree(workdir),
    )
    code, out, err = run(monkeypatch, capsys, train.main, "--config", f"{DIGITS}:lenet", "--workdir", workdir, *BRIEF)
    assert (code, out) == (2, "")
    assert re.match(f"error: workdir {workdir} was removed, renamed or closed to this run", err.splitlines()[-1]), err
    assert [path.name for path in tmp_path.iterdir()] == (["elsewhere"] if renamed else [])


def test_a_full_disk_is_one_line(whole, tmp_path):
    """A limit on the size of files stands for a full disk: records and checkpoints fail.

    The run of `whole` has compiled the same programs, so they are cached.
    """
    limit = 3600  # bytes: more than config.json has, and more than ten records
    frequent = ["--config.log_every_steps=1", "--config.checkpoint_every_epochs=0.1274"]  # every ten steps
    command = [sys.executable, "-W", "ignore::UserWarning", str(ROOT / "train.py"), "--config", DIGITS]
    process = subprocess.run(
        [*command, "--workdir", str(tmp_path), *SMALL, *frequent],
        env=environment(2),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = [line for line in process.stderr.splitlines() if not line.startswith("step ")]
    assert (process.returncode, len(said)) == (2, 2), process.stderr
    assert re.match(rf"error: (a checkpoint could not be written to )?{tmp_path}/", said[1]), said
    assert (tmp_path / "metrics.jsonl").stat().st_size <= limit
    steps = [r["step"] for r in history.read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 10
