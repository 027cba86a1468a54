"""`evaluate` on a finished run: its results, its picture, its mistakes."""

import json
import re

import jax
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import scipy.stats
import sklearn.metrics

from shell import ROOT
from shell import call as run
from workdirs import best_evaluation, evaluations, records
from xception_flax.commands import evaluate
from xception_flax.data.sources import digits
from xception_flax.reports import grid
from xception_flax.text.errors import UserError

KINDS = {"report": "html", "evaluation": "json", "predictions": "parquet", "mistakes": "png"}


def test_evaluation_on_other_channels_is_refused(whole):
    with pytest.raises(UserError, match=r"was trained on images of data\.channels=1, got 3; leave out --config\.data"):
        evaluate.main(["--workdir", str(whole), "--config.data.channels=3"])


def test_evaluate_repeats_the_loops_evaluation(whole, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, evaluate.main, "--workdir", whole)
    assert code == 0
    assert "digits, split 'validation', 180 images" in out
    result = json.loads(out.splitlines()[-1])
    recorded = best_evaluation(whole)
    assert {"top1", "top5", "loss", "count"} <= set(result)
    assert (result["step"], result["weights"], result["count"]) == (recorded["step"], "ema", 180)
    assert result["top1"] == pytest.approx(recorded["eval/top1"], abs=1e-9)
    assert result["loss"] == pytest.approx(recorded["eval/loss"], rel=1e-4)
    assert (whole / "mistakes_validation.png").exists()

    code, out, _ = run(monkeypatch, capsys, evaluate.main, "--workdir", whole, "--checkpoint", "latest")
    result = json.loads(out.splitlines()[-1])
    assert (code, result["step"]) == (0, 157)
    assert result["loss"] == pytest.approx(evaluations(whole)[-1]["eval/loss"], rel=1e-4)


def test_the_picture_says_what_it_is_of(whole, tmp_path, monkeypatch, capsys):
    """An SVG has its texts as comments. One image is labelled as each of the ten digits, so nine are wrong."""
    digit = np.load(ROOT / "xception_flax" / "data" / "digits.npz")["images"][:1]
    files = {"ten": (np.repeat(digit, 10, 0), np.arange(10))}

    def result(name):
        images, labels = files[name]
        names = np.arange(10).astype(str)
        np.savez(tmp_path / "d.npz", **{f"{name}_images": images, f"{name}_labels": labels, "class_names": names})
        source = ["--config.data.source=arrays", f"--config.data.path={tmp_path / 'd.npz'}", "--split", name]
        picture = tmp_path / f"{name}.svg"
        code, out, err = run(monkeypatch, capsys, evaluate.main, "--workdir", whole, "--picture", picture, *source)
        assert code == 0, err
        comments = re.findall(r"<!-- (.*?) -->", picture.read_text(), re.DOTALL)
        return re.search("  wrong +(.*)", out)[1], comments

    wrong, comments = result("ten")
    assert wrong == f"9 images, see {tmp_path / 'ten.svg'}"
    text = "\n".join(comments)
    assert "9 of 10 wrong (10.00 % right)" in text
    assert "arrays, split 'ten'" in text
    assert f"step {best_evaluation(whole)['step']}, ema weights" in text
    wrong_labels = {int(label) for label in re.findall(r"^is (\d)", text, re.MULTILINE)}
    (right,) = set(range(10)) - wrong_labels
    files |= {"none": (digit, np.array([right])), "one": (digit, np.array([min(wrong_labels)]))}
    assert result("none")[0] == "no image"
    assert result("one")[0] == f"1 image, see {tmp_path / 'one.svg'}"


def test_no_picture_loses_the_results(whole, tmp_path, monkeypatch, capsys):
    """A bad path is found before the evaluation, a full disk after its results are printed."""
    for picture, message in [
        (tmp_path / "no" / "m.png", "No such file"),
        (tmp_path / "m.pgn", r"expected one that ends in \.png"),
        (tmp_path / "m", r"expected one that ends in \.png"),
        (whole, r"expected one that ends in \.png"),
    ]:
        both = ["--picture", picture, "--split", "tset"]  # a wrong split is the first error of the evaluation
        code, out, err = run(monkeypatch, capsys, evaluate.main, "--workdir", whole, *both)
        assert (code, out) == (2, "")
        assert re.match(rf"error: {picture} .*{message}", err), err
    code, _, err = run(
        monkeypatch, capsys, evaluate.main, "--workdir", whole, "--picture", tmp_path / "m.png", "--split", "tset"
    )
    assert "unknown split" in err
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "full.png").symlink_to("/dev/full")
    code, out, err = run(monkeypatch, capsys, evaluate.main, "--workdir", whole, "--picture", tmp_path / "full.png")
    assert code == 2
    assert json.loads(out.splitlines()[-1])["count"] == 180
    assert re.match(r"error: .*full\.png cannot be written: No space left on device; name another file\.", err)


def test_a_folder_stands_for_other_data(whole, tmp_path, monkeypatch, capsys):
    """All images of CLASS/*.png, with the recipe's transforms: the same digits, the same result."""
    validation = digits.digits("validation")
    for i, (image, label) in enumerate(zip(validation.images, validation.labels, strict=True)):
        (tmp_path / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(tmp_path / "digits" / str(label) / f"{i:03}.png")
    results = []
    for arguments in ([whole], [whole, tmp_path / "digits"], ["--workdir", whole, tmp_path / "digits"]):
        picture = ["--picture", tmp_path / "m.png"] if len(arguments) > 1 else []
        code, out, err = run(monkeypatch, capsys, evaluate.main, *arguments, *picture, "--no-report")
        assert code == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    assert results[0].pop("loss") == pytest.approx(results[1].pop("loss"), rel=1e-5)
    assert results[0] | {"split": "all"} == results[1]
    assert results[2].items() > results[1].items()
    assert "folder, split 'all', 180 images" in out


def test_the_files_say_what_the_table_says(whole, tmp_path, monkeypatch, capsys):
    """The record against scikit-learn's numbers of the predictions, and both against the line of JSON."""
    out_of = ["--split", "test", "--output", tmp_path / "new" / "r"]
    code, out, err = run(monkeypatch, capsys, evaluate.main, whole, *out_of)
    assert code == 0, err
    line, folder = json.loads(out.splitlines()[-1]), tmp_path / "new" / "r"
    names = {f"{kind}_test.{end}" for kind, end in KINDS.items()}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert re.search(rf"^  \w+ +.*{folder / name}$", out, re.MULTILINE)
    record = json.loads((folder / "evaluation_test.json").read_text())
    rows = pyarrow.parquet.read_table(folder / "predictions_test.parquet").to_pydict()
    test = digits.digits("test")
    assert rows["index"] == list(range(360))
    assert rows["true"] == [str(label) for label in test.labels]
    assert np.mean(rows["correct"]) == line["top1"] == record["scores"]["top1"]["value"]
    assert record["scores"]["top5"]["value"] == line["top5"]
    assert record["loss"] == line["loss"]
    probabilities = np.array(rows["probabilities"])
    assert -np.log(probabilities[np.arange(360), test.labels]).mean() == pytest.approx(line["loss"], rel=1e-5)
    expected = sklearn.metrics.roc_auc_score(test.labels, probabilities, multi_class="ovr")
    assert record["scores"]["macro_roc_auc"]["value"] == pytest.approx(expected)
    matrix = sklearn.metrics.confusion_matrix(rows["true"], rows["predicted"])
    assert record["confusion_matrix"]["counts"] == matrix.tolist()
    of = record["of"]
    best = best_evaluation(whole)["step"]
    assert (of["weights"]["step"], of["weights"]["weights"], of["weights"]["checkpoint"]) == (best, "ema", "best")
    assert (of["data"]["split"], of["data"]["images"], of["device"]) == ("test", 360, jax.devices()[0].device_kind)
    assert of["preprocessing"]["image_size"] == 32
    page = (folder / "report_test.html").read_text()
    assert f"{100 * line['top1']:.2f} %" in page
    assert page.count("data:image/png;base64,") == 4

    # Another network on the same images; the averages of a run and what they average are two.
    raw = [*out_of[:2], "--weights", "raw", "--no-report", "--picture", tmp_path / "m.png"]
    code, out, err = run(monkeypatch, capsys, evaluate.main, whole, *raw, "--compare", folder)
    assert code == 0, err
    other = json.loads(out.splitlines()[-1])
    alone = re.search(r"alone right +(\d+) images? here, (\d+) there; McNemar's exact test: p = ([\d.e-]+)", out)
    here, there = int(alone[1]), int(alone[2])
    assert (here - there) / 360 == pytest.approx(other["top1"] - line["top1"])
    assert float(alone[3]) == pytest.approx(scipy.stats.binomtest(here, here + there).pvalue, rel=0.01)
    assert f"top1 {100 * (here - there) / 360:+.2f} points" in out
    code, out, err = run(
        monkeypatch, capsys, evaluate.main, whole, "--no-report", "--compare", folder / "evaluation_test.json"
    )
    assert (code, out) == (2, "")
    assert re.match(r"error: --compare .*predictions_test.parquet: these are predictions on other images, 360 of", err)


def test_a_grid_is_a_table(whole, tmp_path, monkeypatch, capsys):
    """The given transforms are as in an evaluation; all files stay as they are."""
    monkeypatch.setattr(grid, "FRACTIONS", (0.5,))
    before = sorted(whole.iterdir())
    code, out, err = run(monkeypatch, capsys, evaluate.main, whole, "--grid")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    given = best_evaluation(whole)
    trials = found["grid"]
    assert len(trials) == 9
    assert [t["top1"] for t in trials] == sorted((t["top1"] for t in trials), reverse=True)
    (same,) = [t for t in trials if t["transforms"] == found["given"] == "resize"]
    assert same["top1"] == given["eval/top1"]
    half = [t["top1"] for t in trials if "fraction=0.5" in t["transforms"]]
    assert max(half) < same["top1"]  # half of a digit
    assert re.search(r"^resize +\S+ % +\S+ +given$", out, re.MULTILINE)
    difference = 100 * (half[0] - same["top1"])
    assert re.search(rf"fraction=0\.5, .* {re.escape(f'{difference:+.2f}')} \(95 %: ", out)
    assert "The best of 9 was chosen on these images, so its top1 is too good for them." in err
    assert sorted(whole.iterdir()) == before
    code, out, err = run(monkeypatch, capsys, evaluate.main, whole, "--grid", "--output", tmp_path)
    assert (code, out) == (2, "")
    assert "--output does not go with --grid" in err


def test_evaluate_by_choice(whole, monkeypatch, capsys):
    def result(*arguments):
        code, out, err = run(monkeypatch, capsys, evaluate.main, "--workdir", whole, "--no-report", *arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    test = result("--split", "test")
    other_batch = result("--split", "test", "--batch-size", "400")
    assert (test["count"], other_batch["count"]) == (360, 360)
    assert other_batch["top1"] == pytest.approx(test["top1"], abs=1e-9)
    assert other_batch["loss"] == pytest.approx(test["loss"], rel=1e-5)
    raw = result("--weights", "raw")
    assert raw["weights"] == "raw"
    assert raw["loss"] != test["loss"]
    best = result("--checkpoint", "best")
    assert best["top1"] == pytest.approx(max(r["eval/top1"] for r in records(whole) if "eval/top1" in r))
    assert result("--checkpoint", str(best["step"]))["top1"] == best["top1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "/nowhere"], "there is no /nowhere; expected the workdir of a run"),
        (["--checkpoint", "3"], "no checkpoint '3' in .*; take latest, best or a step of"),
        (["--checkpoint", "9" * 5000], r"no checkpoint '9{59} \.\.\. 9{29}' in .*; take latest, best or a step of"),
        (["--split", "tset"], "unknown split of digits 'tset'; did you mean 'test'"),
        (["--batch-size", "0"], "--batch-size: must be a positive integer, got '0'"),
        (["--picture", "/nowhere/m.png"], "/nowhere/m.png cannot be written: No such file .*name another file"),
        (["--batch-size", "12"], "batch_size=12 does not divide over 8 devices"),
        (["--mean", "1", "--std", "1"], "mean, std: .* is a run, which says this itself; leave it out"),
        (["--config.model.width=1"], "--config.model.width cannot be changed here"),
        (["--bath-size", "8"], "unknown option '--bath-size'; did you mean '--batch-size'"),
    ],
)
def test_mistakes_with_evaluate(whole, monkeypatch, capsys, arguments, message):
    workdir = [] if "--workdir" in arguments else ["--workdir", whole]
    code, out, err = run(monkeypatch, capsys, evaluate.main, *workdir, *arguments)
    assert (code, out) == (2, "")
    assert re.match(f"error: .*{message}", err), err
    assert err.count("\n") <= 2
