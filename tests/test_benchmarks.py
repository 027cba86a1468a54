"""The benchmarks run, and their reports are right; times are never asserted."""

import gzip
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import shell
from benchmarks import (
    cold_start,
    command,
    contenders,
    endurance,
    finetuning,
    growth,
    input_pipeline,
    inputs,
    photos,
    plain_linen,
    pods,
    readers,
    reencoding,
    step,
    worker,
)
from benchmarks.job import Job
from xception_flax import create_model
from xception_flax.models import costs

MAX_DIFFERENCE = 1e-4  # of the spread of the logits over images, as in tests/weights/test_keras.py; measured: 8e-6


def benchmark(arguments: str) -> subprocess.CompletedProcess:
    """Runs `python -m benchmarks.` with the rest of a command line."""
    name, *others = arguments.split()
    return shell.run("-m", f"benchmarks.{name}", *others)


def test_plain_linen_has_the_parameters_of_xception():
    model = plain_linen.Xception()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 71, 71, 3)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 22_855_952  # Keras Applications


def test_the_step_of_train_py_trains(tmp_path):
    """A narrow network's losses before and after an update of the same weights."""
    job = Job(str(tmp_path), "train", batch=8, size=71, threads=1, width=0.05, middle_repeats=1)
    inputs.write(job, ["keras"])
    run = contenders.build_xception_flax(job)
    losses = np.stack([run(), run()])
    assert worker.difference(losses, job.load("expected_keras.npy")) < step.MAX_DIFFERENCE  # measured: 1.3e-4
    assert losses[1] < losses[0]


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(worker.WorkerError, match="-c ended by itself: no step"):
        cold_start.seconds_until(lambda log: False, [sys.executable, "-c", "print('no step')"], tmp_path, threads=1)


def test_a_step_is_measured_and_who_fails_keeps_a_row(tmp_path):
    """Two contenders are installed, and one is not: its environment lacks TensorFlow."""
    file = tmp_path / "step.json"
    names = ["xception_flax", "plain_linen", "keras_tensorflow"]
    result = benchmark(
        "step --mode forward --batch 2 --size 71 --rounds 2 --seconds-per-turn 0.1 "
        f"--only {','.join(names)} --contenders-python {sys.executable} --json {file}"
    )
    assert result.returncode == 1, result.stderr  # for the one that failed
    assert "forward: round 2 of 2, plain linen" in result.stderr

    record = json.loads(file.read_text())
    assert set(record) == {"machine", "options", "forward"}
    forward = record["forward"]
    assert forward["gflop_per_image"] == pytest.approx(2 * 0.553174824)
    rows = {row["name"]: row for row in forward["rows"]}
    assert set(rows) == set(names)
    for name in names[:2]:
        row = rows[name]
        laps = [lap for laps in row["lap_seconds"] for lap in laps]
        assert len(row["lap_seconds"]) == 2
        assert row["seconds"] == np.median(laps)
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["difference"] < MAX_DIFFERENCE
        assert 0 < row["imported_mb"] < row["build_peak_mb"]
        ceiling = max(forward["ceiling_gflop_per_second"].values())
        assert row["of_the_ceiling"] == pytest.approx(forward["gflop_per_image"] * row["images_per_second"] / ceiling)
    assert rows["plain_linen"]["of_the_best_other"] == 1.0
    seconds = [rows[name]["seconds"] for name in names[:2]]
    assert rows["xception_flax"]["of_the_best_other"] == pytest.approx(seconds[1] / seconds[0])
    assert "No module named 'tensorflow'" in rows["keras_tensorflow"]["error"]

    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [row["title"] for row in forward["rows"]]
    assert len({len(line) for line in table[:-1]}) == 1
    assert table[-1].startswith("| Keras on TensorFlow | failed: ModuleNotFoundError")


def test_growth(tmp_path):
    file = tmp_path / "growth.json"
    result = benchmark(
        "growth --size 71 --width 0.05 --middle-repeats 1 --rounds 1 --seconds-per-turn 0.1 "
        f"--axis batch=1,3 --json {file}"
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["batch"]["rows"]
    assert [row["name"] for row in rows] == ["1", "3"]
    assert rows[1]["gflop"] == pytest.approx(3 * rows[0]["gflop"])
    assert rows[0]["relative"] == pytest.approx(3 * rows[0]["seconds"] / rows[1]["seconds"])
    assert "Time grows as FLOP to the power of" in result.stdout


def test_growth_from_network_to_network(tmp_path):
    file = tmp_path / "growth.json"
    size = "--size 75 --batch 1 --rounds 1 --seconds-per-turn 0.1"
    result = benchmark(f"growth {size} --axis network=lenet,inception_v3 --json {file}")
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["network"]["rows"]
    assert [row["name"] for row in rows] == ["lenet", "inception_v3"]
    for row in rows:
        model = create_model(row["name"], num_classes=1000)
        macs = sum(layer.macs for layer in costs.list_layers(model, (75, 75, 3)))
        assert row["gflop"] == pytest.approx(2 * macs / 1e9)
    assert "power" not in result.stdout


def test_the_exponent_of_growth():
    rows = [{"gflop": gflop, "seconds": 0.3 * gflop**1.5} for gflop in (1, 2, 5, 11)]
    assert growth.exponent(rows) == pytest.approx(1.5)


def test_a_worker_sleeps_unless_asked_and_ends(tmp_path):
    with worker.Worker(Path(sys.executable), 1, tmp_path, {}) as process:
        with pytest.raises(worker.WorkerError, match="TypeError: "):
            process.ask("turn", seconds=1.0)  # nothing is built
        pid = process._process.pid
        deadline = time.monotonic() + 60
        while (state := Path(f"/proc/{pid}/stat").read_text().split()[2]) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state == "T"  # stopped
        assert os.sched_getaffinity(pid) == {min(os.sched_getaffinity(0))}
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(worker.WorkerError, match=r"its process ended by SIGKILL \(out of memory\?\)"):
            process.ask("turn", seconds=1.0)
    assert not Path(f"/proc/{pid}").exists()


def test_settings_of_the_shell_do_not_reach_a_worker(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "OMP_NUM_THREADS", "LD_PRELOAD", "TF_ENABLE_ONEDNN_OPTS"):
        monkeypatch.setenv(name, "1")
        assert name not in worker.clean_environment()
    assert "PATH" in worker.clean_environment()


def test_a_table_in_markdown():
    assert command.markdown(("name", "s"), [("a", "10.5"), ("longer", "1")]).splitlines() == [
        "| name   |    s |",
        "| ------ | ---: |",
        "| a      | 10.5 |",
        "| longer |    1 |",
    ]


def test_input_is_measured_and_its_values_are_compared(tmp_path):
    """Two readers are installed and read the same from whole photos; the third is not, and has a row that says so."""
    file = tmp_path / "input_pipeline.json"
    result = benchmark(
        "input_pipeline --images 8 --batch 8 --size 64 --threads 1 --rounds 1 --seconds-per-turn 0.1 "
        f"--only xception_flax,prepared,alone,prepared_alone,tf_data --contenders-python {sys.executable} --json {file}"
    )
    assert result.returncode == 1, result.stderr
    record = json.loads(file.read_text())
    rows = {row["contender"]: row for row in record["rows"]}
    ours = ("xception_flax", "prepared", "alone", "prepared_alone")
    assert set(rows) == {*ours, "tf_data"}
    assert record["images"] == 8 * 8
    assert rows["xception_flax"]["difference"] == 0.0
    for name in ours:
        assert 0 < rows[name]["cpu_seconds"] < 1.1 * rows[name]["seconds"]  # one thread
        assert rows[name]["images_per_second"] == pytest.approx(64 / rows[name]["seconds"])
        assert 0 < rows[name]["imported_mb"] < rows[name]["run_peak_mb"] < rows[name]["imported_mb"] + 400
    assert "No module named 'tensorflow'" in rows["tf_data"]["error"]
    assert "| tf.data, decode_and_crop_jpeg, 1 CPU | failed: ModuleNotFoundError" in result.stdout
    for end in (".", ", of the records."):
        assert f"of one CPU's time is outside of decode, crop, resize and flip{end}" in result.stdout


def test_what_smaller_records_change(capsys):
    """PSNR by its definition. More pixels and a higher quality change less."""
    gray = np.full((8, 8, 3), 100, np.uint8)
    assert reencoding.psnr(gray, gray + 2) == pytest.approx(20 * np.log10(255 / 2))
    assert reencoding.main(["--images", "2"]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if re.match(r"\| +\d", line)]
    rows = {tuple(map(int, setting.split(","))): list(map(float, values)) for setting, *values, _, _ in lines}
    assert set(rows) == {tuple(setting) for setting in reencoding.SETTINGS}
    for side in (300, 350, 400):
        for quality in (90, 95):
            small, large = rows[side, quality], rows[side + 50, quality]
            assert all(less < more for less, more in zip(small, large, strict=True))
            assert 25 < small[2] < 60
        assert all(less < more for less, more in zip(rows[side, 90], rows[side, 95], strict=True))


def test_what_features_differ_by_has_a_median_and_a_maximum():
    """1 - cosine by hand: of the same direction 0, at 60 degrees 0.5, at right angles 1."""
    expected = np.array([[1.0, 0], [2, 0], [3, 0]])
    found = reencoding.differences(np.array([[4.0, 0], [1, np.sqrt(3)], [0, 5]]), expected)
    assert found == pytest.approx({"features": 0.5, "features_most": 1.0})
    row = dict(max_side=400, quality=90, bytes=1e3, whole_psnr=30.0, crop_psnr=30.0)
    result = {"mean_file_bytes": 1e3, "features_of_others": 0.69, "rows": [row | found]}
    assert "|   0.5000 |  1.0000 |" in reencoding.table(result)


def test_a_reader_reads_whole_photos_as_pillow_does(tmp_path):
    """Bilinear scaling without antialiasing, against NumPy's arithmetic on Pillow's pixels."""
    contents = photos.jpegs(4, width=64, height=64)
    input_pipeline._write(tmp_path, contents)
    job = Job(str(tmp_path), "whole", batch=4, size=32, threads=1)
    readers.build_xception_flax(job)()
    images = np.load(tmp_path / "whole_xception_flax.npy")
    whole = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in contents]).astype(float)
    expected = whole.reshape(4, 32, 2, 32, 2, 3).mean((2, 4))  # half the size: between four pixels
    assert np.abs(images - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("input_pipeline --only tfdata", "unknown contender 'tfdata'; did you mean 'tf_data'?"),
        ("input_pipeline --images 8", "--images must be at least the batch of 32, got 8"),
        ("step --only xception_flx", "unknown contender 'xception_flx'; did you mean 'xception_flax'?"),
        ("step --only timm --contenders-python /nowhere", "timm: there is no /nowhere; .* `make contenders`"),
        ("step --only openvino --mode train", "openvino has no mode 'train', only forward"),
        ("step --size 70", "--size must be at least 71 pixels, got 70"),
        ("step --rounds 0", "argument --rounds: must be positive, got 0"),
        ("step --threads 9999", "--threads must be at most .*, the CPUs that this process may use"),
        ("step --json /nowhere/step.json", "--json: there is no folder /nowhere"),
        ("growth --axis size=0.5", "size takes int values, got '0.5'"),
        ("growth --axis network=inception", "unknown network 'inception'; did you mean 'inception_v3'"),
        ("growth --axis network --width 0.5", "--axis network compares networks as they are: leave out --width"),
        ("growth --axis batches=1", "unknown axis 'batches'; did you mean 'batch'?"),
        ("cold_start --contenders-python /nowhere", "keras_tensorflow: there is no /nowhere; .* `make contenders`"),
    ],
)
def test_mistakes(capsys, arguments, message):
    name, *rest = arguments.split()
    with pytest.raises(SystemExit) as stopped:
        {"input_pipeline": input_pipeline, "step": step, "growth": growth, "cold_start": cold_start}[name].main(rest)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


# Pods ----------------------------------------------------------------------------------------------


def test_the_bill_of_a_pod_is_that_of_the_page(tmp_path):
    """The parts of a step add up to the step, to the rounding of the columns: 0.05 GB are 0.06 ms of a v5e."""
    tables = pods.bills((shell.ROOT / "docs" / "pods.md").read_text())
    assert [(title.split(",")[0], len(rows)) for title, rows in tables.items()] == [
        ("Weak scaling", 4),
        ("Strong scaling", 4),
    ]
    last = tables["Strong scaling, a batch of 1,536 images"][-1]
    assert last[:3] == ("v5e:16x16", 6, 8.6)
    assert last.hbm == pytest.approx(1e3 * 4.5 / 819)
    assert all(abs(b.hbm + b.arithmetic + b.collectives - b.step) < 0.2 for rows in tables.values() for b in rows)
    assert benchmark(f"pods --picture {tmp_path / 'p.png'}").returncode == 0
    with Image.open(tmp_path / "p.png") as drawn, Image.open(shell.ROOT / "docs/images/pods.png") as shown:
        assert drawn.size == shown.size


# Fine-tuning ---------------------------------------------------------------------------------------


def test_what_the_docs_say_of_fine_tuning_is_in_the_results(tmp_path):
    result = benchmark(f"finetuning --results results/finetuning.jsonl --picture {tmp_path / 'p.png'}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() in (shell.ROOT / "docs" / "fine-tuning.md").read_text()
    with Image.open(tmp_path / "p.png") as drawn, Image.open(shell.ROOT / "docs/images/finetuning.png") as shown:
        assert drawn.size == shown.size


def test_runs_of_several_kinds_are_not_drawn_together(tmp_path):
    first, *others = (shell.ROOT / "results" / "finetuning.jsonl").read_text().splitlines()
    (tmp_path / "r.jsonl").write_text(
        "\n".join([json.dumps(json.loads(first) | {"weights_sha256": "0" * 64}), *others])
    )
    result = benchmark(f"finetuning --results {tmp_path / 'r.jsonl'}")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.match(r"error: .*r\.jsonl has runs of 'recipe' of several kinds", result.stderr)
    # Before anything is run, where it would have them.
    result = benchmark("finetuning --results results/finetuning.jsonl --weights keras --only recipe --seeds 9")
    assert (result.returncode, result.stdout) == (1, "")
    assert "of several kinds, or would have; give --results another file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--results README.md", "README.md: expected a line of JSON for each run"),
        ("--results docs", "docs: expected a line of JSON for each run"),
        ("--results results/finetuning.jsonl --picture p.xyz", "--picture must be a .png, got p.xyz"),
        ("--results results/finetuning.jsonl --picture no/p.png", "no/p.png cannot be written: No such file"),
    ],
)
def test_mistakes_with_fine_tuning_are_refused(arguments, message):
    result = benchmark(f"finetuning {arguments}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {message}")


def test_settings_of_fine_tuning_are_compared_by_seed():
    """With the recipe, in points; t of two differences at 95 % is 12.706, and equal ones are known to half an image."""
    runs = {"recipe": (0.5, 0.6, 0.7), "classifier": (0.4, 0.4), "full": (0.52, 0.62, 0.72)}
    rows = [
        {"setting": name, "seed": seed, "top1": top1, "images_per_class": 20, "evaluated": 100}
        for name, of in runs.items()
        for seed, top1 in enumerate(of)
    ]
    cells = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in finetuning.table(rows).splitlines()[2:]}
    half = 12.706 * 5  # of the differences -10 and -20, whose standard error is 5
    assert list(cells.values()) == ["", f"-15.0 ({-15 - half:+.1f} to {-15 + half:+.1f})", "+2.0 (+1.5 to +2.5)"]


def test_images_to_fine_tune_on(tmp_path):
    """Each seed draws its own of the training images; those to evaluate on are the first of the test images."""
    labels = np.tile(np.arange(10, dtype=np.uint8), 120)
    for part in ("train", "t10k"):
        images = np.arange(1200, dtype=">u2").view(np.uint8).reshape(1200, 1, 2).repeat(4, 1)
        content = struct.pack(">HBB3I", 0, 8, 3, 1200, 4, 2) + images.tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        content = struct.pack(">HBBI", 0, 8, 1, 1200) + labels.tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    found = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        finetuning.write_images(folder, seed, 7, str(tmp_path))
        found[seed] = {
            split: {p.relative_to(folder) for p in (folder / split).rglob("*.png")} for split in ("train", "val")
        }
        assert {len(list(path.iterdir())) for path in (folder / "train").iterdir()} == {7}
        for path in (folder / "train" / "coat").iterdir():
            number = int(path.stem)
            assert number % 10 == 4
            np.testing.assert_array_equal(np.asarray(Image.open(path))[0], [number >> 8, number & 255])
    assert found[0]["val"] == found[1]["val"]
    assert {int(path.stem) for path in found[0]["val"]} == set(range(1000))
    assert found[0]["train"] != found[1]["train"]


# Recipes -------------------------------------------------------------------------------------------


def test_what_the_docs_say_of_recipes_is_in_the_results():
    result = benchmark("recipes")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() in (shell.ROOT / "docs" / "recipes.md").read_text()


def test_a_recipe_is_run_with_each_seed_once_and_anew_where_it_changes(tmp_path):
    recipe, results = tmp_path / "tiny.py", tmp_path / "results.jsonl"
    content = "from configs import digits\n\n\ndef get_config():\n    config = digits.get_config('lenet')\n"
    recipe.write_text(content + "    config.epochs, config.schedule.warmup_epochs = 0.5, 0.0\n    return config\n")
    command_line = f"recipes {recipe} --results {results} --workdir {tmp_path / 'runs'}"
    result = benchmark(f"{command_line} --seeds 2")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["seed"], row["steps"], row["images"]) for row in rows] == [(0, 10, 360), (1, 10, 360)]
    assert rows[0]["losses"] != rows[1]["losses"]
    mean = (rows[0]["test"] + rows[1]["test"]) / 2
    assert f" {mean:.2%} |" in result.stdout
    assert list((tmp_path / "runs").iterdir()) == []

    again = benchmark(f"{command_line} --seeds 2")
    assert (again.returncode, again.stdout, again.stderr) == (0, result.stdout, "")
    recipe.write_text(content + "    config.epochs, config.schedule.warmup_epochs = 0.6, 0.0\n    return config\n")
    changed = benchmark(f"recipes --results {results}")
    assert (changed.returncode, changed.stdout) == (1, "")
    assert "has no run of a recipe as it is now; name a RECIPE to run it" in changed.stderr


# A long run ----------------------------------------------------------------------------------------


def test_what_the_docs_say_of_a_long_run_is_in_the_results(tmp_path):
    result = benchmark(f"endurance --results results/endurance.json --picture {tmp_path / 'p.png'}")
    assert (result.returncode, result.stderr) == (0, "")
    table, left = result.stdout.strip().split("\n\n")
    assert table in (shell.ROOT / "docs" / "reliability.md").read_text()
    assert left == "left in /dev/shm after the end: 0 files"
    with Image.open(tmp_path / "p.png") as drawn, Image.open(shell.ROOT / "docs/images/endurance.png") as shown:
        assert drawn.size == shown.size


def test_what_a_process_holds_is_counted():
    """A child of this process that holds 64 MB, three more files and a file of shared memory."""
    program = (
        "import mmap, os, sys, time; x = bytearray(os.urandom(64_000_000)); "
        "files = [open('/dev/null') for _ in range(3)]; shared = open('/dev/shm/xception_flax_test', 'w+b'); "
        "os.unlink('/dev/shm/xception_flax_test'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        memory, files, threads, shared = endurance.held(child.pid)
        assert 64 < memory < 100
        assert files == 3 + 3 + 1  # the standard ones, /dev/null, shared memory
        assert threads == 1
        assert len(shared) == 1
        assert child.pid in endurance.descendants(os.getpid())
        child.kill()
