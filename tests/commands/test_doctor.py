"""What a report of a defect needs: true versions and devices, and the loss of a real step."""

import re
from importlib import metadata

import jax
from packaging.requirements import Requirement

import train
from workdirs import records
from xception_flax.commands import doctor


def table(out: str, title: str) -> dict[str, str]:
    """Returns the rows of a table on standard output."""
    lines = out.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines)


def test_it_says_what_is_there_and_takes_the_step_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "RECIPE", "digits:lenet")
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("NVIDIA_API_KEY", "a secret")
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    software = table(out, "software")
    for name in ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"):
        assert software[name] == metadata.version(name)
    assert table(out, "machine")["JAX_TRACEBACK_FILTERING"] == "off"
    assert "a secret" not in out
    assert table(out, "devices")["cpu"] == "8 devices, cpu"
    found = re.match(
        r"64 images on 8 devices: loss (\d\.\d{6}), ", table(out, "a training step of the recipe digits:lenet")["cpu"]
    )

    short = ["epochs=0.05", "schedule.warmup_epochs=0", "log_every_steps=1"]
    recipe = ["--config=digits:lenet", *(f"--config.{text}" for text in short)]
    assert train.main([*recipe, "--workdir", str(tmp_path / "run")]) == 0
    assert f"{records(tmp_path / 'run')[0]['train/loss']:.6f}" == found[1]


def test_a_backend_that_fails_is_a_row_and_the_others_are_tried(monkeypatch):
    """What cannot be a device is one that fails."""
    monkeypatch.setattr(doctor, "RECIPE", "digits:lenet")
    backends = {"broken": [object()], "cpu": jax.local_devices(backend="cpu")}
    monkeypatch.setattr(doctor, "_backends", lambda: backends)
    rows = dict(doctor._steps())
    assert re.fullmatch(r"failed: \w+: \S.*", rows["broken"])
    assert re.match(r"64 images on 8 devices: loss \d", rows["cpu"])


def test_extras_are_there_or_missing():
    """Of those of this environment, and of what JAX's own extras install."""
    extras = doctor._extras()
    assert extras["heif"] == f"pillow-heif {metadata.version('pillow-heif')}"
    assert {"cuda", "tpu", "onnx", "demo", "dev"} <= extras.keys()
    assert extras["tpu"] == "missing: libtpu"
    assert {"jax", "jax-cuda13-plugin"} <= set(doctor._distributions(Requirement("jax[cuda13]")))
    of_dev = doctor._distributions(Requirement("xception-flax[dev]"))  # which has `train`, which has `data`
    assert {"pytest", "grain"} <= set(of_dev)
    assert "xception-flax" not in of_dev


def test_settings_are_those_of_the_user(monkeypatch):
    """`import jax` sets some itself."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "1")
        assert name not in doctor._machine()
        monkeypatch.setenv(name, "0")
        assert doctor._machine()[name] == "0"


def test_without_an_installed_package_it_says_so(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert doctor._extras() == {"(none)": "no-such-distribution is not installed: pip install -e ."}
    assert list(doctor._software())[:2] == ["no-such-distribution", "Python"]
