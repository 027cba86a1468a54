"""What the allocator does with freed memory, counted by the kernel in a separate process."""

import subprocess
import sys

from xception_flax.host import allocator

PROGRAM = """
import resource, sys
from xception_flax.host import allocator

if "keep" in sys.argv:
    print(allocator.keep_freed_memory())

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        bytearray(64 << 20)  # 16,384 pages, cleared
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
print(faults(4))
"""

HOLE = """
from pathlib import Path
from xception_flax.host import allocator

def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

allocator.keep_freed_memory()
hole, above = bytearray(64 << 20), bytearray(1 << 20)
del hole
before = resident_pages()
print(allocator.release_free_memory(), before - resident_pages())
"""


def test_memory_is_what_is_free_within_the_limit_of_a_container(monkeypatch, tmp_path):
    for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max"):
        (tmp_path / path[1:]).parent.mkdir(parents=True)
    monkeypatch.setattr(allocator, "Path", lambda path: tmp_path / path[1:])
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4096 kB\n")
    assert allocator.free_memory_bytes() == 4096 * 1024
    for limit, expected in (("max\n", 4096 * 1024), ("1000000\n", 1_000_000)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
        assert allocator.free_memory_bytes() == expected


def test_free_memory_below_what_lives_on_is_released():
    """A freed array of 16,384 pages with another above it."""
    result = subprocess.run([sys.executable, "-c", HOLE], check=True, capture_output=True, text=True)
    took_effect, released = result.stdout.split()
    assert took_effect == "True"
    assert int(released) > 16_000


def test_freed_memory_is_kept():
    """Four arrays of 16,384 pages, one after the other: by default each maps its pages anew, or else none does."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True
        ).stdout.split()

    (by_default,) = run()
    took_effect, kept = run("keep")
    assert took_effect == "True"
    assert int(kept) < 1000 < int(by_default)
