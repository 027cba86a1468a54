"""Twenty kills of real runs, as `python -m tests.chaos` makes hundreds: each run ends as one that nobody killed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.chaos import kills, phases, run, several
from tests.chaos.run import Failure, Setting

ONE, EIGHT = Setting("lenet", 1), Setting("lenet", 8)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> dict[Setting, kills.Untouched]:
    folder = tmp_path_factory.mktemp("untouched")
    return {each: kills.Untouched(*run.untouched(each, folder / str(each))) for each in (ONE, EIGHT)}


@pytest.mark.parametrize(("seed", "setting"), [(1, ONE), (2, EIGHT)], ids=str)
def test_a_run_that_is_killed_ten_times_ends_as_an_untouched_one(tmp_path, untouched, seed, setting):
    outcomes = list(kills.trial(seed, setting, untouched[setting], tmp_path / "trial"))
    assert sum(outcome.phase != "finished" for outcome in outcomes) == 10
    assert {outcome.phase for outcome in outcomes} <= {*phases.PHASES, "finished"}
    # Which phase a kill meets depends on the load of the machine, but not what it waits for.
    assert sorted(outcome.aim for outcome in outcomes[:10]) == sorted([*kills.AIMS, kills.LAST_AIM])
    assert {outcome.signal for outcome in outcomes} > {"SIGKILL"}
    assert not (tmp_path / "trial").exists()


def test_a_host_that_dies_ends_the_other_which_goes_on_later(tmp_path):
    """The first of two processes, which split the state and so each write a part of a checkpoint, is killed."""
    setting, untouched = Setting("lenet", 2), tmp_path / "untouched"
    seconds = several.train(setting, tmp_path, untouched, processes=2)
    fault = several.Fault("kill", victim=0, step=16, after=0.5)
    outcome = several.trial(
        0,
        fault,
        setting,
        untouched,
        seconds,
        tmp_path / "trial",
        processes=2,
        silent_seconds=20,
        stop_seconds=0,
    )
    assert outcome.codes == [-signal.SIGKILL, 75]
    assert outcome.said.startswith("error: process 0 has gone: killed, or its machine is down;")


def test_a_second_signal_ends_a_run_with_the_code_of_the_first():
    """Or by itself, where the run has stopped and waits for nothing but its end: a shell reports the same code."""
    kill = kills.Kill(signal.SIGUSR1, again=0.5, aim="step", after=0.5, count=1, workers=0, each_record=False)
    said = "stopped at step 15, checkpoint written"
    kills.check_end(kill, 128 + signal.SIGUSR1, 1.0, "", "step", [8], [8])
    kills.check_end(kill, -signal.SIGUSR1, 1.0, said, "step", [8], [8, 15])
    with pytest.raises(Failure, match=r"^it ended with code -10, expected one of \[138\]$"):
        kills.check_end(kill, -signal.SIGUSR1, 1.0, "", "step", [8], [8])


def test_what_is_not_the_same_is_named(tmp_path, untouched):
    """The comparison can fail: another array, another evaluation, and a folder that a save has left behind."""
    expected, other = untouched[ONE].workdir, tmp_path / "other"
    # LeNet has the kernels of three convolutions, kernels and biases of two dense layers, all in `raw`, in `ema` and as
    # two moments of AdamW; the optimizer has three counters.
    assert run.check_same(expected, expected) == (3 + 2 * 2) * 4 + 3

    shutil.copytree(expected, other)
    history = other / "metrics.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    changed = [row | {"eval/loss": 1.0} if row["step"] == 16 and "eval/loss" in row else row for row in rows]
    history.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(Failure, match=r"^evaluations 16: \{.*'eval/loss': 1\.0.*\}, expected \{"):
        run.check_same(expected, other)
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))

    left = other / "checkpoints" / "48.orbax-checkpoint-tmp"
    left.mkdir()
    with pytest.raises(Failure, match=r"^beside the checkpoints are \['48\.orbax-checkpoint-tmp'\]$"):
        run.check_same(expected, other)
    left.rmdir()
    assert run.check_same(expected, other) > 0

    shutil.rmtree(other / "checkpoints" / "47")
    (other / "checkpoints" / "40").rename(other / "checkpoints" / "47")
    with pytest.raises(Failure, match=r"^raw\['params'\].* differs in \d+ of \d+ values, by up to \d\.\d+"):
        run.check_same(expected, other)


def test_asking_for_the_phase_ends_no_process(tmp_path):
    """From when there is someone to answer to the end, as Python takes its handlers away."""
    answered = 0
    for number in range(10):
        answers = tmp_path / str(number)
        environment = os.environ | {"PYTHONPATH": str(run.ROOT / "tests/chaos/startup"), "CHAOS_STACK": str(answers)}
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.05)"], env=environment)
        while process.poll() is None:
            if answers.exists():
                process.send_signal(signal.SIGUSR2)
        assert process.returncode == 0
        answered += "most recent call first" in answers.read_text()
    assert answered > 0


@pytest.mark.parametrize(
    ("frames", "phase"),
    [
        (["importlib._bootstrap>:1176 _find_and_load", "train.py:20 <module>"], "imports"),
        (["xception_flax/training/evaluation.py:1 evaluate", "train.py:{loop} train", "train.py:9 main"], "evaluation"),
        (["concurrent/futures/_base.py:451 result", "train.py:{loop} train", "train.py:9 main"], "compilation"),
        (["xception_flax/training/checkpoint.py:1 save", "train.py:{loop} train", "train.py:9 main"], "save"),
        (["train.py:{loop} train", "train.py:9 main"], "step"),
        (["train.py:100 train", "train.py:9 main"], "preparation"),
        (["threading.py:1590 _shutdown"], "end"),
    ],
)
def test_the_phase_is_read_from_a_stack(frames, phase):
    loop = phases.lines("for step in range(first_step")[0] + 2
    text = "Stack (most recent call first):\n"
    for frame in frames:
        place, name = frame.format(loop=loop).split(" ")
        file, line = place.rsplit(":", 1)
        text += f'  File "/{file}", line {line} in {name}\n'
    assert phases.of_stack(text) == phase
