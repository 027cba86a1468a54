"""What a user sees of a run: records and rates."""

import errno
import json
import os
import re
import resource
import signal

import pytest
from tensorboardX import RecordWriter
from tensorboardX.proto import event_pb2

from xception_flax.display import console
from xception_flax.runs import curves, history, progress
from xception_flax.text.errors import UserError


def run(workdir, start_step=0, enabled=True):
    return progress.RunProgress(
        workdir, start_step=start_step, total_steps=100, batch_size=10, num_images=50, enabled=enabled
    )


def events(workdir) -> list[tuple[int, str, float]]:
    """Reads TensorBoard's files: records of length (8 bytes), checksum (4), event, checksum (4)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 8], "little")
            event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            position += 16 + length
    return found


def test_records(tmp_path, capsys):
    with run(tmp_path) as report:
        report.compiled(1)
        report.train(1, {"loss": 2.0})  # a record of the compiling step alone has no rate
        report.train(10, {"loss": 0.5, "top1": 0.25, "learning_rate": 0.1})
        report.evaluation(20, {"top1": 0.9, "loss": float("nan"), "other": float("inf"), "count": 7}, "ema")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].pop("train/first_step_seconds") > 0
    assert lines[1].pop("train/images_per_second") > 0
    assert lines[1].pop("train/step_seconds") > 0
    assert lines[1].pop("train/input_wait_seconds") == 0
    assert lines == [
        {"step": 1, "train/loss": 2.0},
        {"step": 10, "train/loss": 0.5, "train/top1": 0.25, "train/learning_rate": 0.1},
        {"step": 20, "eval/top1": 0.9, "eval/loss": None, "eval/other": None, "eval/count": 7, "eval/weights": "ema"},
    ]
    shown = capsys.readouterr().err
    assert "step 10/100  loss 0.5000" in shown
    assert "epoch   4.0  evaluation (ema): top1 90.00 %" in shown
    recorded = events(tmp_path)
    assert (10, "train/loss", 0.5) in recorded
    assert (20, "eval/top1", pytest.approx(0.9)) in recorded


def test_columns_are_aligned_and_never_cut(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10")
    console.show_columns("title", {"name": ["[b]a[/b]", "b"], "number": ["1", "123,456,789,000"]})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "title",
        "name               number",
        "[b]a[/b]                1",
        "b         123,456,789,000",
    ]


def test_what_others_called_a_thing_is_shown_as_it_stands(tmp_path, monkeypatch, capsys):
    """Rich reads `[red]` as a colour, `[/x]` as an error, `:cat:` as an emoji; a terminal obeys what follows ESC."""
    name = "[red][/x] :cat: {task} 100%"
    monkeypatch.setenv("COLUMNS", "40")
    console.show_table(name, {"猫": "a\x1b[31m", "name": "b\nc"})
    assert capsys.readouterr().out == f"\n{name}\n  猫    a\\x1b[31m\n  name  b\\nc\n"  # 猫 takes up two columns
    console.show_columns(name, {"name": [name + "\n"]})
    assert capsys.readouterr().out.split() == [*name.split(), "name", *f"{name}\\n".split()]
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with console.waiting(name + "\x1b]0;"):
            pass
        with console.counting(name + "\r", 10, "image") as advance:
            advance(10)
        with run(tmp_path) as report:
            report.say(name + "\x07")
        err = capsys.readouterr().err
        assert rf"{name}\x1b]0;: 0 s" in err
        assert rf"{name}\r: 10 images in 0:00" in err
        assert rf"{name}\x07" in err
        assert "\x1b]0;" not in err


def test_a_bar_on_the_terminal_takes_nothing_from_a_file(monkeypatch, capsys):
    """Standard error is a terminal and standard output a file, as in `predict --json > FILE`."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    for step in console.stepping("predicting", range(3)):
        print(step)
    out, err = capsys.readouterr()
    assert out == "0\n1\n2\n"
    assert "predicting" in err


def test_a_resumed_run_continues_the_records_of_its_checkpoint(tmp_path):
    """Records after step 20 are removed, since those steps are done again; so is a line that a kill cut off."""
    with run(tmp_path) as report:
        for step in (10, 20, 30):
            report.train(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')
    with run(tmp_path, start_step=20) as report:
        report.train(30, {"loss": 0.0})
    records = history.read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["train/loss"]) for r in records] == [(10, 10), (20, 20), (30, 0)]


STRANGE = [
    b"a note of mine\n",
    b'{"step": 12, "train/lo\n',  # cut off, then something was written after it
    b'{"step": 13, "train/loss": 1.0}{"step": 14}\n',
    b"\xff\xfe\n",
    b"\0\0\0\0\n",
    b"\n",
    b"[]\n",
    b"null\n",
    b"[" * 100_000 + b"\n",
    b'{"train/loss": 1.0}\n',
    *(b'{"step": %s}\n' % step for step in (b'"3"', b"3.0", b"true", b"null", b"-1", b"[3]", b"1" * 400, b"1" * 9999)),
    *(b'{"step": 3, "train/loss": %s}\n' % value for value in (b'"x"', b"[1]", b"{}", b"true", b"NaN", b"1e999")),
]
RECORDS = [b'{"step": 1, "train/loss": 3.0}\r\n', b'{"step": 20, "eval/loss": null, "eval/weights": "ema"}\n']


@pytest.mark.parametrize("tail", [b"", b'{"step": 40, "train/lo', b"\0\0\0", b'{"step": 40, "train/loss": 1.0}'])
def test_what_is_no_record_stays_as_it_is(tmp_path, capsys, tail):
    """Only later records and a last line that was cut off are removed. Other lines may be the user's."""
    path, later = tmp_path / "metrics.jsonl", b'{"step": 30, "train/loss": 2.0}\n'
    path.write_bytes(RECORDS[0] + later + b"".join(STRANGE) + RECORDS[1] + later + tail)
    with run(tmp_path, start_step=20) as report:
        report.train(21, {"loss": 0.5})
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:-1]) == RECORDS[0] + b"".join(STRANGE) + RECORDS[1]
    said = f"{path} has {len(STRANGE)} lines that are not records, the first is line 3; left as they are."
    assert capsys.readouterr().err.splitlines()[0] == said
    records = history.read_metrics(path)
    assert records[:-1] == [json.loads(line) for line in RECORDS]
    assert (records[-1]["step"], records[-1]["train/loss"]) == (21, 0.5)
    curves.draw_curves(records, "title", tmp_path / "curves.png")


def test_a_record_without_the_end_of_its_line_is_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 7, "train/loss": 1.0}')
    with run(tmp_path, start_step=7) as report:
        report.train(8, {"loss": 2.0})
    assert [r["step"] for r in history.read_metrics(tmp_path / "metrics.jsonl")] == [7, 8]


@pytest.fixture
def file_size():
    """Sets the kernel's limit of a file's size. As on a full disk, the first part of a file is written, and no more."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_line_and_what_was_written_stays(tmp_path, file_size):
    """Also when the file is closed at the end, which writes once more."""
    path = tmp_path / "metrics.jsonl"

    def train_until_it_is_full():
        with run(tmp_path) as report:
            report.train(10, {"loss": 1.0})
            file_size(path.stat().st_size + 9)
            report.train(20, {"loss": 1.0})

    with pytest.raises(UserError, match=f"^{re.escape(str(path))} cannot be written: File too large\\.$"):
        train_until_it_is_full()
    *_, whole, cut_off = path.read_bytes().splitlines(keepends=True)
    assert whole.endswith(b"\n")
    assert len(cut_off) == 9
    assert [r["step"] for r in history.read_metrics(path)] == [10]
    # To begin again takes room too; the file stays as it is.
    before = path.read_bytes()
    file_size(9)
    with pytest.raises(UserError, match=r"cannot be written: File too large\.$"):
        run(tmp_path, start_step=10)
    assert path.read_bytes() == before
    assert not (tmp_path / "metrics.jsonl.partial").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("name", ["tensorboard/events.out.tfevents", "metrics.jsonl"])
def test_what_the_disk_refuses_is_a_line(tmp_path, monkeypatch, number, name):
    """For events, and for records that a checkpoint waits for. Such an error does not hide another exception."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    def write(other_error=None):
        with run(tmp_path) as report:
            if name == "metrics.jsonl":
                monkeypatch.setattr(progress.os, "fsync", refuse)
            else:
                monkeypatch.setattr(RecordWriter, "write", refuse)
            if other_error:
                raise other_error
            report.sync()
            report.train(10, {"loss": 1.0})

    room = "; make room, then give the same command" if number in (errno.ENOSPC, errno.EDQUOT) else ""
    message = rf"^{re.escape(str(tmp_path / name))}\S* cannot be written: {os.strerror(number)}{room}\.$"
    with pytest.raises(UserError, match=message):
        write()
    monkeypatch.undo()
    with pytest.raises(KeyError, match="another"):
        write(KeyError("another"))


def test_the_time_left_does_not_jump_between_evaluations(tmp_path, monkeypatch, capsys):
    """By a fake clock: 0.1 s a step, 10 s an evaluation of every 20 steps; on a terminal and as lines."""
    for terminal in (False, True):
        clock, told = [0.0], []
        monkeypatch.setattr(progress.time, "monotonic", lambda clock=clock: clock[0])
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        (tmp_path / str(terminal)).mkdir()
        with run(tmp_path / str(terminal)) as report:
            for step in range(1, 81):
                clock[0] += 0.1
                report.advance(step)
                if step == 1:
                    report.compiled(step)
                if step % 5 == 0:
                    report.train(step, {"loss": 1.0})
                    told.append(report._bar.tasks[0].fields["state"].partition("%  ")[2])
                if step % 20 == 0:
                    with report.pause("evaluation"):
                        clock[0] += 10
                    report.evaluation(step, {"loss": 1.0, "count": 1}, "raw")
        # After step 1, 19 steps and then 20 have one evaluation each.
        seconds = [(0.1 + 10 * (n := (step - 1) // 20) / max(20 * n - 1, 1)) * (100 - step) for step in range(5, 81, 5)]
        assert told == [f"{console.duration(left)} left" for left in seconds]
        if not terminal:
            assert [line.partition("%  ")[2] for line in capsys.readouterr().err.splitlines() if "step" in line] == told


def test_other_hosts_write_nothing(tmp_path, capsys):
    with run(tmp_path, enabled=False) as report:
        report.compiled(1)
        with report.input_wait(), report.pause("checkpoint"):
            pass
        report.train(10, {"loss": 0.5})
        report.evaluation(10, {"loss": 0.5, "count": 1}, "raw")
        report.checkpoint(10)
        report.say("nothing")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_all_of_the_time_is_recorded_once(tmp_path, monkeypatch, capsys):
    """By a fake clock: the rate leaves out compilation and pauses, and the parts add up to the whole time."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.RunProgress(
        tmp_path,
        start_step=0,
        total_steps=100,
        batch_size=10,
        num_images=50,
        enabled=True,
        peak_images_per_second=250.0,
    ) as report:
        with report.input_wait():
            clock[0] += 7  # the pipeline starts
        clock[0] += 53  # compilation: a minute in all
        report.compiled(1)
        for _ in range(10):  # 10 steps of 10 images in a second
            with report.input_wait():
                clock[0] += 0.025
            clock[0] += 0.075
        report.train(11, {"loss": 0.0})
        with report.pause("evaluation"):
            clock[0] += 8
        report.evaluation(11, {"loss": 0.0, "count": 1}, "raw")
        with report.pause("checkpoint"):
            clock[0] += 2
        report.checkpoint(11)
        with report.pause("profile"):
            clock[0] += 30
        clock[0] += 1
        report.train(21, {"loss": 0.0})
    records = history.read_metrics(tmp_path / "metrics.jsonl")
    times = [{k: v for k, v in r.items() if k.endswith(("second", "seconds", "mfu"))} for r in records]
    steps = {"train/images_per_second": 100, "train/step_seconds": 0.1, "train/mfu": 0.4}
    assert times == [
        pytest.approx(steps | {"train/first_step_seconds": 60, "train/input_wait_seconds": 0.025}),
        pytest.approx({"eval/seconds": 8}),
        pytest.approx({"checkpoint/blocking_seconds": 2}),
        pytest.approx(steps | {"train/input_wait_seconds": 0}),
    ]
    assert clock[0] - 100 == pytest.approx(60 + 10 * 0.1 + 8 + 2 + 30 + 10 * 0.1)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "step 11/100  loss 0.0000  100 images/s  MFU 40 %  input 25 %  0:09 left"
    # 79 steps at 0.1 s, and 10 s for evaluation and checkpoint every 10 steps; profiling does not come again.
    assert shown[-1] == "step 21/100  loss 0.0000  100 images/s  MFU 40 %  input 0 %  1:27 left"
    assert (11, "train/step_seconds", pytest.approx(0.1)) in events(tmp_path)
    assert (11, "checkpoint/blocking_seconds", 2.0) in events(tmp_path)
