"""`python -m benchmarks.onnx_export` on a narrow network: whole files, real turns, and a table that adds up."""

import json
import re
import sys
import types

import pytest

import shell
from benchmarks import inputs, onnx_export, worker
from benchmarks.contenders import EXPORTED, build_our_onnx, write_our_onnx
from benchmarks.job import Job
from benchmarks.step import MAX_DIFFERENCE


def test_our_file_computes_the_benchmarks_network(tmp_path):
    job = Job(str(tmp_path), "forward", batch=2, size=71, threads=1, width=0.05, middle_repeats=1)
    inputs.write(job, ["keras"])
    write_our_onnx(job)
    logits = build_our_onnx(job)()
    assert logits.shape == (2, 1000)
    assert worker.difference(logits, job.load(f"expected_{EXPORTED['our_onnx'].reading}.npy")) < MAX_DIFFERENCE


def test_it_runs(tmp_path):
    """Xception of full width at 71 px: the file that torch writes needs `make contenders`."""
    file = tmp_path / "onnx.json"
    result = shell.run(
        *("-m", "benchmarks.onnx_export", "--only", "our_onnx", "--batch", "1", "2", "--size", "71", "--rounds", "2"),
        *("--seconds-per-turn", "0.1", "--threads", "1", "--contenders-python", sys.executable, "--json", file),
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text())
    for batch in ("1", "2"):
        row = record[batch]["our_onnx"]
        assert len(row["lap_seconds"]) == 2
        laps = [lap for laps in row["lap_seconds"] for lap in laps]
        assert min(laps) <= row["seconds"] <= max(laps)
        assert row["difference"] < MAX_DIFFERENCE
        shown = re.search(rf"{batch} x 71 px, 1 threads.*\n.*\n\| xception-flax export +\| +([\d.]+) ", result.stdout)
        assert float(shown[1]) == pytest.approx(1e3 * row["seconds"], abs=0.051)


def test_the_table():
    rows = {
        "ours": dict(title="ours", seconds=0.1, lap_seconds=[[0.09, 0.1], [0.2]], difference=1e-6),
        "broken": dict(title="broken", error="no"),
        "theirs": dict(title="theirs", seconds=0.2, lap_seconds=[[0.2]], difference=2e-6),
    }
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in onnx_export.table(rows, "1").split("\n")]
    assert lines[0] == ["1", "ms, median", "ms, fastest", "of the last", "difference"]
    assert lines[2:] == [["ours", "100.0", "90.0", "0.50", "1e-06"], ["theirs", "200.0", "200.0", "1.00", "2e-06"]]


def test_a_file_that_computes_something_else_has_no_time(monkeypatch, tmp_path):
    """With no difference allowed, nothing is the same."""
    monkeypatch.setattr(onnx_export, "MAX_DIFFERENCE", 0.0)
    options = types.SimpleNamespace(
        size=71, threads=1, rounds=1, seconds_per_turn=0.1, contenders_python=onnx_export.Path(sys.executable)
    )
    row = onnx_export.measure(["our_onnx"], 1, options)["our_onnx"]
    assert row["error"].startswith("computes something else: the difference is ")
    assert "seconds" not in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "our_onx"], "unknown contender 'our_onx'; did you mean 'our_onnx'"),
        (["--contenders-python", "/nowhere/python"], "there is no /nowhere/python; make the contenders' environment"),
        (["--batch", "0"], "--batch"),
        (["--json", "/nowhere/onnx.json"], "--json: there is no folder /nowhere"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        onnx_export.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
