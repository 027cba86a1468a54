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
    """A new choice of metrics needs no change here. An SVG has its texts as comments."""
    new = METRICS["single_label"]._replace(function=single_label, shares=("recall",), best="recall", title="recall")
    monkeypatch.setitem(METRICS, "new", new)
    entry = METRICS[name]
    curves.draw_curves([{"step": 1, f"eval/{entry.best}": 0.25}], "title", tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text()
    assert f"<!-- {entry.title} (%) -->" in picture
    assert "<!-- 25.00 % -->" in picture
