"""Files, folders and classes of any name are printed, stored and trained on, and different names stay different."""

import io
import itertools
import json
import os
import sys

import cv2
import numpy as np
import pytest

import train
from xception_flax.commands import cli, evaluate, predict, prepare, show_data
from xception_flax.data.sources import tfds
from xception_flax.recipes import reading
from xception_flax.runs.workdir import read_recipe
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint

BYTE = os.fsdecode(b"caf\xe9")  # of a Latin-1 file system: no UTF-8
LETTERS = ["\\", "x", "e", "2", "0", "9", "u", "d", "8", "n", "\udce9", "\ud8e0", "\n", " ", "\x85", "\udc85", "\x1b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("café 猫 👩\u200d👧 $x^$ 100% {} [red] 'q'", "café 猫 👩\u200d👧 $x^$ 100% {} [red] 'q'"),
        (r"C:\data\cats", r"C:\data\cats"),
        (BYTE, r"caf\xe9"),
        (r"caf\xe9", r"caf\\xe9"),
        ("line\nbreak\ttab\r", r"line\nbreak\ttab\r"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("abc\u202edef\u2028", r"abc\u202edef\u2028"),
        ("\x85\x9b31m", r"\u0085\u009b31m"),  # a terminal command too, in 8 bits
        ("\ud83d", r"\ud83d"),
        ("cat\u200b\xa0\ufeff", r"cat\u200b\u00a0\ufeff"),
        (" a b  ", r"\x20a b\x20\x20"),
        ("   ", r"\x20\x20\x20"),
    ],
)
def test_shown(name, expected):
    assert naming.shown(name) == expected
    assert naming.harmless(expected) == expected


def test_two_names_stay_two():
    """All 88,740 strings of one to four of the letters of which escapes consist, or which are escaped."""
    names = ["".join(letters) for n in range(1, 5) for letters in itertools.product(LETTERS, repeat=n)]
    assert len(names) == 17 + 17**2 + 17**3 + 17**4 == 88_740
    assert len({naming.shown(name) for name in names}) == len(names)
    stored = naming.stored(names)
    "".join(stored).encode()  # all of it is valid Unicode
    assert naming.restored(stored) == names


def test_json_of_any_name_is_for_every_parser():
    value = {BYTE: [BYTE, r"caf\xe9", "a\nb", "猫", 1.5, None], "path": ("a\\b",)}
    text = naming.to_json(value)
    assert json.loads(text) == {r"caf\xe9": [r"caf\xe9", r"caf\\xe9", "a\nb", "猫", 1.5, None], "path": ["a\\b"]}
    assert naming.from_json(text) == value | {"path": ["a\\b"]}
    line = naming.to_json_line({"name": BYTE, "loss": float("nan"), "rate": float("-inf"), "top1": 0.5})
    assert json.loads(line, parse_constant=pytest.fail) == {"name": r"caf\xe9", "loss": None, "rate": None, "top1": 0.5}


def test_a_name_is_the_same_under_every_locale(monkeypatch):
    """Under ASCII Python reads the two bytes of é as two surrogates."""
    monkeypatch.setattr(naming.os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))
    assert naming.decoded("caf\udcc3\udca9") == "café"
    assert naming.decoded("café") == "café"  # not a name of a file on this machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight images of each of some classes with strange names."""
    folder, rng = tmp_path_factory.mktemp("data") / BYTE, np.random.default_rng(0)
    names = [BYTE, r"caf\xe9", "a\n\x1b[31mb", "-$\\frac{$", "[red]{} 100% :cat:", "   ", "\u202e猫", "x" * 255]
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            image = rng.integers(0, 256, (8, 8, 3), np.uint8)
            (folder / name / f"{number}{i}{name[:200]}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return folder, sorted(names)


def run(monkeypatch, main, *arguments, encoding="ascii") -> tuple[int, str, str]:
    """Runs a command whose output goes to pipes of a strict encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    monkeypatch.undo()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return exit_.value.code, *texts


def test_a_run_on_them_from_its_data_to_its_predictions(folder, tmp_path, monkeypatch, capsys):
    """Trained, resumed, evaluated, drawn and predicted; names from JSON are those on the disk."""
    data_dir, names = folder
    small = ["model.name=lenet", "data.image_size=32", "batch_size=16", "epochs=1", "schedule.warmup_epochs=0"]
    small += [
        "data.train_transforms=resize",
        "data.eval_transforms=resize",
        "step.ema_decay=0.0",
        "optimizer.momentum=0.0",
    ]
    overrides = [f"--config.{text}" for text in small]
    recipe_file = str(train.__file__).replace("train.py", "configs/folder.py")
    config = reading.load(f"{recipe_file}:{data_dir}", overrides)
    workdir = tmp_path / "$x^$ \x1b[31m"
    assert train.train(config, workdir) == 0
    assert train.train(reading.load(f"{recipe_file}:{data_dir}", overrides), workdir) == 0  # finished: the same recipe
    err, out = capsys.readouterr()[::-1]
    assert r"$x^$ \x1b[31m: this run is finished" in out
    assert "\x1b" not in err + out
    assert read_recipe(workdir).data.data_dir == str(data_dir)
    (workdir / "config.json").read_bytes().decode("ascii")
    with checkpoint.open_manager(workdir / "checkpoints", best_metric="top1", read_only=True) as manager:
        assert checkpoint.read_meta(manager, manager.latest_step())["class_names"] == names

    code, out, err = run(monkeypatch, evaluate.main, "--workdir", workdir)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["split"] == "val"
    assert (workdir / "mistakes_val.png").stat().st_size > 1000
    sheet = tmp_path / "sheet.png"
    arguments = ("--config", f"{recipe_file}:{data_dir}", "--output", sheet, *overrides)
    assert run(monkeypatch, show_data.main, *arguments)[:2] == (0, f"{sheet}: 16 images\n")

    code, out, err = run(monkeypatch, predict.main, "--workdir", workdir, data_dir, "--json", "--top", 8)
    lines = [naming.from_json(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 64)
    assert {line["image"] for line in lines} == {str(p) for p in data_dir.glob("*/*.png")}
    assert all(sorted(line["classes"]) == names for line in lines)
    (bad := tmp_path / os.fsdecode(b"b\xe9d\n.png")).write_bytes(b"no image")
    code, out, err = run(monkeypatch, predict.main, "--workdir", workdir, data_dir, bad, data_dir / "   ")
    assert code == 2
    _, title, *rows = out.splitlines()
    assert title.endswith(r"$x^$ \x1b[31m, step 4, raw weights")
    assert len(rows) == 64 + 8
    assert err.startswith(rf"error: {tmp_path}/b\xe9d\n.png: the image cannot be decoded: 8 bytes")


def test_closed_output_is_no_traceback(monkeypatch):
    """With `>&-`, standard output is None in Python."""
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda argv: print("…", flush=True) or len(argv))
    assert exit_.value.code == 0


def test_check_reports_them(folder, tmp_path, monkeypatch):
    data_dir, names = folder
    report = tmp_path / "report.json"
    (bad := data_dir / names[0] / os.fsdecode(b"\xff\x1b[2J\n.png")).write_bytes(b"no image")
    try:
        code, out, err = run(monkeypatch, prepare.main, "check", data_dir, "--json", report)
    finally:
        bad.unlink()
    assert code == 1
    assert r"\xff\x1b[2J\n.png" in out.splitlines()[-1]
    assert "\x1b" not in out + err
    splits = naming.from_json(report.read_text())["splits"].values()
    counts = {name: sum(found["classes"][name] for found in splits) for name in names}
    assert counts == {name: 9 if name == names[0] else 8 for name in names}
    assert [name for found in splits for name in found["undecodable"]] == [f"{bad}"]
    code, _, err = run(monkeypatch, prepare.main, "folder", data_dir, "--name", "x", "--data-dir", tmp_path / "tfds")
    assert code == 2
    assert "TFDS reads no class" in err
    assert not (tmp_path / "tfds").exists()


def test_tfds_takes_only_unicode(tmp_path, monkeypatch):
    """Its readers and writers are in C++, and would raise TypeError for another folder."""
    rng, there = np.random.default_rng(0), tmp_path / os.fsdecode(b"\xe9")
    names = sorted(["$", "a\u202eb", "\x1b[31m", "猫", r"caf\xe9", "-{}"])
    for name, i in itertools.product(names, range(12)):
        (tmp_path / "of" / name).mkdir(parents=True, exist_ok=True)
        image = cv2.imencode(".png", rng.integers(0, 256, (8, 8, 3), np.uint8))[1].tobytes()
        (tmp_path / "of" / name / f"{name}\n{i}.png").write_bytes(image)
    expected = rf"error: {tmp_path}/\xe9/of/1.0.0: TFDS takes no name of a folder that is not UTF-8; take another."
    code, _, err = run(monkeypatch, prepare.main, "folder", tmp_path / "of", "--data-dir", there)
    assert (code, err.splitlines()[-1]) == (2, expected)
    code, out, err = run(monkeypatch, prepare.main, "folder", tmp_path / "of", "--data-dir", tmp_path / "b c")
    assert code == 0, err
    assert f"--config.data.data_dir='{tmp_path}/b c'" in out  # as a shell reads it
    source = tfds.tfds("train+val", data_dir=str(tmp_path / "b c" / "of" / "1.0.0"))
    assert (len(source), source.class_names) == (72, tuple(names))
    os.rename(tmp_path / "b c", there)
    with pytest.raises(UserError, match=r"\\xe9/of/1.0.0: TFDS takes no name of a folder that is not UTF-8; rename"):
        tfds.tfds("train", data_dir=str(there / "of" / "1.0.0"))
