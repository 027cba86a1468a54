"""The cache of compiled programs: where it is, when there is none, how it stays small."""

import os
from pathlib import Path

import jax
import pytest

import shell
from xception_flax.host import compilation_cache


@pytest.fixture
def settings(monkeypatch):
    """Begins with JAX's defaults, and restores the settings after the test."""
    names = [
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_there_is_one_by_default(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = compilation_cache.enable()
    assert folder == tmp_path / "caches" / "xception_flax" / "jax"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert compilation_cache.enable() == folder

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.enable() == tmp_path / ".cache" / "xception_flax" / "jax"


def test_what_jax_was_told_has_precedence(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert compilation_cache.enable() == Path("/elsewhere")
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", "")
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert list(tmp_path.iterdir()) == []


def test_several_processes_have_what_they_can_share(settings, tmp_path, monkeypatch):
    """Nothing on CPUs. Elsewhere the folder given to JAX, but not the user's own, which may differ between hosts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "/shared")
    assert compilation_cache.enable() == Path("/shared")
    assert jax.config.jax_enable_compilation_cache
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert compilation_cache.enable() is None
    assert not jax.config.jax_enable_compilation_cache
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_there_is_none(settings, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation_cache.enable() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert compilation_cache.enable() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache.os, "access", lambda path, mode: False)
    assert compilation_cache.enable() is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "MIN_FREE_BYTES", 2**80)
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


PROGRAM = """
import jax
from xception_flax.host import compilation_cache
compilation_cache.enable()
@jax.jit
def doubled(x):
    return 2 * x
print(doubled(jax.numpy.arange(3.0)))
"""


def test_an_entry_that_was_cut_off_is_written_anew(tmp_path):
    """As by a kill in the middle of its write; JAX alone warns of it at every start, and keeps it."""

    def run() -> str:
        result = shell.run("-c", PROGRAM, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
        assert (result.returncode, result.stdout) == (0, "[0. 2. 4.]\n")
        return result.stderr

    assert run() == ""
    (entry,) = tmp_path.glob("jit_doubled-*-cache")
    whole = entry.read_bytes()
    for part in (whole[: len(whole) // 2], b""):
        entry.write_bytes(part)
        assert run() == ""
        assert len(entry.read_bytes()) > len(whole) / 2
    others = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-cache")}
    assert run() == ""
    assert others == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-cache")}


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    """Of 10 entries of 100 bytes, the 5 that were read or written last may stay."""
    for i in range(10):
        path = tmp_path / f"jit_{i}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + i if i else 5000, 1000 + i))  # the first was read last of all
    (tmp_path / "other").write_bytes(bytes(1000))
    compilation_cache.prune(tmp_path, 599)
    assert {path.name for path in tmp_path.iterdir()} == {"other", *(f"jit_{i}-cache" for i in (0, 6, 7, 8, 9))}
    compilation_cache.prune(tmp_path, 500)
    assert len(list(tmp_path.iterdir())) == 6
