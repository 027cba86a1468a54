"""The curves of a run are drawn from whatever records there are."""

import cv2
import pytest

from xception_flax.runs import curves
from xception_flax.training.metrics import METRICS, single_label


def test_curves_show_what_there_is(tmp_path):
    """More records make more ink. A run without evaluation, or without a finite loss, is drawn too."""
    records = [{"step": s, "train/loss": 1 / s, "train/top1": 1 - 1 / s, "train/learning_rate": 0.1} for s in (1, 2, 3)]
    evaluated = [*records, {"step": 3, "eval/loss": 0.2, "eval/top1": 0.9}]
    multi_label = [{"step": 1, "train/loss": None}, {"step": 1, "eval/loss": 3.0, "eval/map": 0.3}]
    ink = []
    for i, r in enumerate((records, evaluated, multi_label, [])):
        path = tmp_path / f"{i}.png"
        curves.draw_curves(r, "title", path)
        picture = cv2.imread(str(path))
        assert picture.shape[0] > 300
        assert picture.shape[1] > 1200
        ink.append(int((picture < 200).sum()))
    assert ink[1] > ink[0] > ink[3]


@pytest.mark.parametrize("name", [*METRICS, "new"])
def test_curves_show_the_best_metric(tmp_path, monkeypatch, name):
    """A new choice of metrics needs no change here, and may have another's too. An SVG has its texts as comments."""
    shares = (*METRICS["single_label"].shares, "recall")
    new = METRICS["single_label"]._replace(function=single_label, shares=shares, best="recall", title="recall")
    monkeypatch.setitem(METRICS, "new", new)
    entry = METRICS[name]
    evaluated = {f"eval/{share}": 0.5 for share in entry.shares} | {f"eval/{entry.best}": 0.25}
    curves.draw_curves([{"step": 1, **evaluated}], "title", tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text()
    assert f"<!-- {entry.title} (%) -->" in picture
    assert "<!-- 25.00 % -->" in picture


@pytest.mark.parametrize("accuracies", [[0.2722], [0.3, 0.1], [0.1, 0.3], [0.0], [1.0, 1.0]])
def test_short_curves_have_whole_numbers_and_the_last_value_inside(tmp_path, monkeypatch, accuracies):
    """A run with one or two evaluations: the axes' own numbers would be 2.5 steps and a loss of 2.3 x 10^0."""
    figures = []
    monkeypatch.setattr(curves.plt, "close", figures.append)
    records = [{"step": 20 * i, "train/loss": 2.35 - i / 9, "train/top1": 0.5} for i in (1, 2)]
    records += [{"step": 20 * i + 20, "eval/loss": 2.1, "eval/top1": value} for i, value in enumerate(accuracies)]
    curves.draw_curves(records, "long/" * 80, tmp_path / "curves.png")
    (figure,) = figures
    loss, score, _ = figure.axes
    (number,) = score.texts
    assert number.get_text() == f"{100 * accuracies[-1]:.2f} %"
    box, (left, bottom), (right, top) = number.get_window_extent(), score.bbox.min, score.bbox.max
    assert left <= box.x0 < box.x1 <= right
    assert bottom <= box.y0 < box.y1 <= top
    for axes in (loss, score):
        assert all(tick.get_text().isdecimal() for tick in axes.get_xticklabels())
    written = [label for label in loss.get_yticklabels(which="both") if label.get_text()]
    assert written
    assert all(float(label.get_text()) == pytest.approx(label.get_position()[1]) for label in written)
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
    assert title.y1 <= figure.bbox.height
    monkeypatch.undo()
    curves.plt.close(figure)
