"""The folder of a run: its claim, files in its way, and the recipe that it keeps."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xception_flax.recipes import reading
from xception_flax.recipes.comparing import differences
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import (
    FILES,
    FOLDERS,
    check_claim,
    check_workdir,
    claim,
    read_recipe,
    remember,
)
from xception_flax.text.errors import UserError

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.py")


def test_a_workdir_remembers_and_refuses_another_recipe(tmp_path):
    config = reading.load(DIGITS)
    check_workdir(tmp_path / "w", config)
    assert not (tmp_path / "w").exists()
    with claim(tmp_path / "w", config):
        pass
    assert read_recipe(tmp_path / "w") == config
    before = (tmp_path / "w" / "config.json").read_bytes()

    operational = ["--config.mesh.fsdp=2", "--config.data.num_workers=3", "--config.log_every_steps=7"]
    operational += ["--config.profile=3:4"]
    check_workdir(tmp_path / "w", reading.load(DIGITS, [*operational, "--config.checkpoint.keep_latest=5"]))
    other = reading.load(DIGITS, ["--config.optimizer.learning_rate=0.1", "--config.seed=3"])
    with pytest.raises(UserError, match=r"(?s)another recipe.*optimizer.learning_rate: 0.003 -> 0.1.*seed: 0 -> 3"):
        check_workdir(tmp_path / "w", other)
    assert (tmp_path / "w" / "config.json").read_bytes() == before


def test_how_to_train_on_is_said_where_it_is_possible(tmp_path):
    """It is possible if the run has a checkpoint and the other recipe computes the same with its weights."""
    workdir = tmp_path / "my run"
    claim(workdir, reading.load(DIGITS)).__enter__()
    longer = reading.load(DIGITS, ["--config.epochs=72"])
    changed = (
        f"{workdir} holds a run of another recipe; nothing was changed. Take a new workdir, or the old values:\n"
        "  epochs: 36.0 -> 72"
    )
    advice = (
        f"\nTo train its weights for more epochs, take a new workdir and --config.init.weights='{workdir}': that run "
        "begins with them (the averaged ones, where there are), its optimizer, schedule and steps anew."
    )
    with pytest.raises(UserError, match=f"^{re.escape(changed)}$"):
        check_workdir(workdir, longer)
    (workdir / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{re.escape(changed + advice)}$"):
        check_workdir(workdir, longer)
    for override in ("model.width=0.5", "normalize.mean=(0.0,)"):
        with pytest.raises(UserError, match=r"^((?!To train its weights)[\s\S])*$"):
            check_workdir(workdir, reading.load(DIGITS, ["--config.epochs=72", f"--config.{override}"]))


def test_folders_that_are_no_runs_are_refused(tmp_path, monkeypatch):
    config = reading.load(DIGITS)
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    for path, what in [
        ("/", "the root of all folders"),
        ("//tmp/..", "the root of all folders"),
        (str(tmp_path / "link"), "your home folder"),
        (".", "this program's folder"),
        ("tests/..", "this program's folder"),
    ]:
        with pytest.raises(UserError, match=f"^workdir '{path}' is {what}; take a folder that is for this run alone"):
            check_workdir(Path(path), config)
    assert not any((tmp_path / "home").iterdir())
    check_workdir(tmp_path / "home" / "run", config)
    check_workdir(Path("runs", "that_is_not_there"), config)  # `make demo` may have filled runs
    photos = reading.load(DIGITS, ["--config.data.source=folder", f"--config.data.data_dir={tmp_path}/photos"])
    for within in ("photos", "photos/run", "photos/../photos/a/b"):
        with pytest.raises(UserError, match=r"^workdir .* lies in the folder of the images, .*/photos; take one"):
            check_workdir(tmp_path / within, photos)
    check_workdir(tmp_path / "photos2", photos)
    remember(tmp_path / "home", config)  # a run that was begun there goes on
    check_workdir(tmp_path / "home", config)


def test_a_folder_of_others_is_refused(tmp_path):
    """A folder that a run was killed in, or where only file managers and disks left something, is free to use."""
    config, workdir = reading.load(DIGITS), tmp_path / "w"
    for name in (".lock", ".DS_Store", "config.json.partial"):
        workdir.mkdir(exist_ok=True)
        (workdir / name).touch()
    (workdir / "lost+found").mkdir()
    check_workdir(workdir, config)
    (workdir / "thesis.tex").touch()
    end = "and no config.json: not a run of this program, or a damaged one. Nothing was changed; take another workdir."
    with pytest.raises(UserError, match=f"^{re.escape(f'workdir {workdir} has thesis.tex {end}')}$"):
        check_workdir(workdir, config)
    for name in "abc":
        (workdir / name).mkdir()
    before = sorted(workdir.iterdir())
    with pytest.raises(UserError, match=f"^{re.escape(f'workdir {workdir} has a, b, c and 1 more {end}')}$"):
        check_workdir(workdir, config)
    assert sorted(workdir.iterdir()) == before
    remember(workdir, config)
    check_workdir(workdir, config)


def test_no_run_begins_among_the_files_of_another(tmp_path):
    """The other run removes its old checkpoints, and what is in them. Beside its files, a folder is free to use."""
    config, outer = reading.load(DIGITS), tmp_path / "A"
    (outer / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(outer / "checkpoints")
    (outer / "config.json").write_text("{}")  # of any program

    def check(place: str) -> None:
        check_workdir(tmp_path / place, config)

    def refuse(place: str) -> None:
        with pytest.raises(
            UserError, match=rf"^workdir {tmp_path}/{place} is within the files of another run, {outer};"
        ):
            check(place)

    check("A/checkpoints/new")
    remember(outer, config)
    (outer / "checkpoints" / "39").mkdir()
    refuse("A/checkpoints/new")
    (outer / "checkpoints" / "39").rmdir()
    (outer / ".lock").touch()  # of a run that has no checkpoint yet
    for place in (
        "A/checkpoints",
        "A/checkpoints/39",
        "A/tensorboard",
        "A/profile/x/y",
        "A/b/../checkpoints",
        "link/x",
    ):
        refuse(place)
    check("A/finetuned")
    remember(outer / "checkpoints", config)  # a run that was begun there goes on
    check("A/checkpoints")


def test_a_folder_that_cannot_be_searched_is_a_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    config = reading.load(DIGITS)
    monkeypatch.setattr(Path, "is_file", refuse)  # for root every folder can be searched
    with pytest.raises(UserError, match=rf"^workdir {tmp_path}/w cannot be written: Permission denied\.$"):
        check_workdir(tmp_path / "w", config)


def test_bad_workdirs_are_refused(tmp_path):
    config = reading.load(DIGITS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir .*file is a file; expected a folder, or a name that is free"):
        check_workdir(tmp_path / "file", config)
    with pytest.raises(UserError, match=r"workdir .*file/a/b lies in .*file, which is a file"):
        check_workdir(tmp_path / "file" / "a" / "b", config)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"workdir .*link is a link to nothing; expected a folder, or a name that is"):
        check_workdir(tmp_path / "link", config)
    with pytest.raises(UserError, match=r"workdir .*link/a lies in .*link, which is a link to nothing"):
        check_workdir(tmp_path / "link" / "a", config)
    with pytest.raises(UserError, match="cannot be written"):
        check_workdir(Path("/proc/nothing"), config)
    (tmp_path / "w" / "checkpoints" / "236" / "raw").mkdir(parents=True)
    (tmp_path / "w" / "config.json").touch()
    within = (
        rf"/raw is no workdir of a run: it has no config\.json: this is within one; give {tmp_path}/w and 236 as its"
    )
    with pytest.raises(UserError, match=within):
        read_recipe(tmp_path / "w" / "checkpoints" / "236" / "raw")
    with pytest.raises(UserError, match=r"is no workdir of a run: it has no config\.json\.$"):
        read_recipe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged: Expecting"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged: Expecting value: line 1 column 1 (char 0)."),
        (b"[]", "damaged: expected keys and values in braces, got b'[]'."),
        (b"null", "damaged: expected keys and values in braces, got b'null'."),
        (b"3", "damaged: expected keys and values in braces, got b'3'."),
        (b'"x"', "damaged: expected keys and values in braces, got b'\"x\"'."),
        (b"\x89PNG\r\n\x1a\n\0\0\xff", "damaged: 'utf-8' codec can't decode"),
        (b"\0" * 4096, "damaged: "),
        (b"[" * 100_000, "damaged: it is nested too deep."),
        (b'{"model": ' * 900 + b"1" + b"}" * 900, ": "),
        (b"1" * 9999, "damaged: Exceeds the limit"),
        (b"{}", ": recipe key 'batch_size' is missing; "),
        (b'{"batch_size": 8, "epochs": 1, "colour": 1}', ": unknown recipe key 'colour'; "),
        (b'{"batch_size": 8, "epochs": 1, "model": 3}', ": recipe key 'model' must be a group of keys, got 3."),
    ],
)
def test_an_odd_config_json_is_a_line_for_all_who_read_it(tmp_path, one_device, content, message):
    """For the run's own command, for a command with another recipe, and for whoever restores the run."""
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_recipe(tmp_path)
    assert str(raised.value).startswith(str(path))
    with pytest.raises(UserError, match=re.escape(str(raised.value))):
        check_workdir(tmp_path, reading.load(DIGITS))
    with pytest.raises(UserError, match=re.escape(str(raised.value))):
        restore(tmp_path, one_device, "latest")
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_what_is_in_the_way_of_a_runs_files_is_refused(tmp_path, monkeypatch, name):
    """Before anything is written, in a new workdir and in that of a run that goes on."""
    config = reading.load(DIGITS)
    expected, other = ("folder", "no folder") if name in FOLDERS else ("file", "a folder")
    workdir, path = tmp_path / "w", tmp_path / "w" / name
    path.mkdir(parents=True)
    if expected == "folder":
        path.rmdir()
        path.write_text("")
    with pytest.raises(UserError, match=rf"^{path} is {other}, expected a {expected} or nothing; move it away\.$"):
        check_workdir(workdir, config)
    shutil.rmtree(workdir)

    with claim(workdir, config):
        pass
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "nowhere")
    message = rf"^{path} is a link to nothing, expected a {expected} or nothing; move it away\.$"
    with pytest.raises(UserError, match=message):
        check_workdir(workdir, config)
    assert not (tmp_path / "nowhere").exists()
    path.unlink()

    path.mkdir() if expected == "folder" else path.write_text("")
    monkeypatch.setattr(os, "access", lambda at, mode: Path(at) != path)  # for root every file is accessible
    needed = "read" if name in ("config.json", "metrics.jsonl") else "read and written"  # those two are replaced
    message = rf"^{path} cannot be {needed} by this user; change its permissions or its owner\.$"
    with pytest.raises(UserError, match=message):
        check_workdir(workdir, config)


def test_a_workdir_that_is_gone_is_noticed(tmp_path):
    config, workdir = reading.load(DIGITS), tmp_path / "w"
    gone = (
        rf"^workdir {workdir} was removed, renamed or closed to this run while it was going on \(\.lock: No such file "
        r"or directory\)\. Put it back, or give its new name as --workdir: the same command goes on from its newest "
        r"checkpoint\.$"
    )
    with claim(workdir, config):
        check_claim(workdir)
        workdir.rename(tmp_path / "renamed")
        with pytest.raises(UserError, match=gone):
            check_claim(workdir)
        workdir.mkdir()  # by another run, with another lock
        (workdir / ".lock").write_text("process 1 on elsewhere")
        with pytest.raises(
            UserError, match=rf"^workdir {workdir} now belongs to process 1 on elsewhere, by its \.lock;"
        ):
            check_claim(workdir)
        shutil.rmtree(workdir)
        (tmp_path / "renamed").rename(workdir)
        check_claim(workdir)
        shutil.rmtree(workdir)
        with pytest.raises(UserError, match=gone):
            check_claim(workdir)


def test_a_workdir_is_claimed_by_one_at_a_time(tmp_path, monkeypatch):
    """A killed process leaves no lock, since the lock is the kernel's. Without locks, every process gets the claim."""
    config = reading.load(DIGITS)
    script = f"""
import pathlib, time
from xception_flax.recipes import reading
from xception_flax.runs import workdir
with workdir.claim(pathlib.Path({str(tmp_path)!r}), reading.load({DIGITS!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .* \(it holds .*/\.lock\)"):
            claim(tmp_path, config).__enter__()
        other.kill()
    with claim(tmp_path, config), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        claim(tmp_path, config).__enter__()
    # Another run may have begun and ended between the check and the claim.
    with (
        pytest.raises(UserError, match=r"(?s)another recipe.*seed: 0 -> 3"),
        claim(tmp_path, reading.load(DIGITS, ["--config.seed=3"])),
    ):
        pass

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claim(tmp_path, config), claim(tmp_path, config):
        pass


def test_infinite_epochs_between_two_are_at_the_end_alone(tmp_path):
    """JSON has no infinity. The config.json of an older version has it nevertheless, and is the same recipe."""
    config = reading.load(DIGITS, ["--config.eval_every_epochs=inf", "--config.checkpoint_every_epochs=1e400"])
    largest = 2.0**128 - 2.0**104  # of float32
    assert (config.eval_every_epochs, config.checkpoint_every_epochs) == (largest, largest)
    with claim(tmp_path, config):
        pass
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["eval_every_epochs"] == largest
    (tmp_path / "config.json").write_text(text.replace(str(largest), "Infinity"))
    assert differences(read_recipe(tmp_path), config) == []
    assert [line.partition("-> ")[2] for line in differences(reading.load(DIGITS), config)] == ["inf", "inf"]
    with pytest.raises(UserError, match="'eval_every_epochs' must be a finite number, got nan"):
        reading.load(DIGITS, ["--config.eval_every_epochs=nan"])


def test_a_defect_in_reading_a_recipe_is_no_damaged_file(tmp_path, monkeypatch):
    remember(tmp_path, reading.load(DIGITS))
    monkeypatch.setattr("xception_flax.runs.workdir.resolve", lambda values: int("x"))
    with pytest.raises(ValueError, match=r"^invalid literal for int"):
        read_recipe(tmp_path)
