"""Files of every format, each changed at random: what is read of them, and how their readers end.

`MUTATIONS=1000 pytest tests/weights/test_mutations.py` tries more of them.
"""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.weights import test_reading_tensorflow as tables
from xception_flax.weights.reader import tensorflow

GOLDEN = Path(__file__).parents[1] / "golden"
MUTATIONS = int(os.environ.get("MUTATIONS", "60"))
CHECKED = {"keras", "npz", "npz, compressed", "tensorflow", "torch"}  # they have checksums

# Forks a reader for each file, as starting so many processes would take minutes, and does with its answer what
# `reading.read` does. So it must have no threads, and no JAX.
PROGRAM = """
import hashlib, importlib, json, os, resource, sys, time
from xception_flax.weights import reading
from xception_flax.weights.reader import __main__ as reader

form, cpu_seconds, *paths = sys.argv[1:]
importlib.import_module(f"xception_flax.weights.reader.{form}")
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
for path in paths:
    begun, (source, target) = time.monotonic(), os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        os.dup2(target, 1)
        os.close(target)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        reader.main(form, path, str(10**7), "30", cpu_seconds)
        os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        try:
            contents, error = reading._received(pipe), ""
        except ValueError as raised:
            contents, error = None, str(raised)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if contents is None:
        answer = {"error": error or reading._end(code)}
    else:
        digest = hashlib.sha256(json.dumps(contents.config).encode())
        for name, arrays in contents.entries:
            digest.update(repr((name, [(a.dtype.str, a.shape) for a in arrays])).encode())
            digest.update(b"".join(a.tobytes() for a in arrays))
        answer = {"digest": digest.hexdigest()}
    print(json.dumps(answer | {"seconds": time.monotonic() - begun, "mb": usage.ru_maxrss / 1024}), flush=True)
"""


def original(kind: str) -> tuple[str, bytes]:
    """Its format, and a small file that the library itself wrote."""
    arrays = {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "conv.bias": np.ones(2, np.float32)}
    file = io.BytesIO()
    match kind:
        case "npz":
            np.savez(file, **arrays)
            return kind, file.getvalue()
        case "npz, compressed":
            np.savez_compressed(file, **arrays)
            return "npz", file.getvalue()
        case "safetensors":
            return kind, safetensors.numpy.save(arrays, {"format": "np"})
        case "torch, older" | "torch":
            name, member, form = "torch_files", "float32.pth" if kind == "torch" else "older_float32.pth", "torch"
        case "keras":
            name, member, form = "keras_files", "float32.keras", "keras"
        case "hdf5, whole model":
            name, member, form = "keras_files", "float32.h5", "hdf5"
        case "tensorflow" | "tensorflow, signed":
            name, member, form = "deeplab", "xception_41/model.ckpt.index", "tensorflow"
        case _:
            name, member, form = "keras_files", "float32.weights.h5", "hdf5"
    return form, golden(name, member)


def golden(name: str, member: str) -> bytes:
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        return archive.extractfile(member).read()


def numbers(kind: str) -> bytes | None:
    """The second file of a format that has its numbers in one of their own."""
    return golden("deeplab", "xception_41/model.ckpt.data-00000-of-00001") if "tensorflow" in kind else None


def mutated(content: bytes, seed: int) -> bytes:
    """Bits flipped, the end cut off, bytes put in, or a part over another."""
    draw, changed = random.Random(seed), bytearray(content)
    place = draw.randrange(len(changed))
    match seed % 4:
        case 0:
            for _ in range(draw.choice((1, 1, 2, 8))):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        case 1:
            del changed[place:]
        case 2:
            changed[place:place] = draw.randbytes(draw.choice((1, 4, 64)))
        case 3:
            length = draw.choice((1, 8, 256))
            source = draw.randrange(len(changed))
            part = changed[source : source + length]
            changed[place : place + len(part)] = part
    return bytes(changed)


def mutated_table(content: bytes, seed: int) -> bytes:
    """An index of TensorFlow with a change in one of its messages, or anywhere in their block, and a right checksum."""
    entries = list(tensorflow._entries(content))
    if seed // 4 % 3:
        place = random.Random(seed).randrange(len(entries))
        entries[place] = entries[place][0], mutated(entries[place][1], seed)
        return tables.table(*entries)
    changed = tables.signed(mutated(tables.block(*entries)[:-5], seed))
    return tables.with_handles(changed, b"\0" + tables.varint(len(changed) - 5))


@pytest.mark.parametrize(
    "kind",
    [
        "hdf5",
        "hdf5, whole model",
        "keras",
        "npz",
        "npz, compressed",
        "safetensors",
        "tensorflow",
        "tensorflow, signed",
        "torch",
        "torch, older",
    ],
)
def test_a_changed_file_ends_in_a_sentence(tmp_path, kind):
    """Or is read, and then with the same numbers where the format has checksums. Time and memory have their bounds."""
    form, content = original(kind)
    beside = numbers(kind)
    paths, same = [tmp_path / "original"], [True]
    paths[0].write_bytes(content)
    if beside is not None:
        (tmp_path / "original.data-00000-of-00001").write_bytes(beside)
    for seed in range(MUTATIONS):
        paths.append(tmp_path / f"{seed}")
        # Where an index has checksums that fit, its numbers stay: they have checksums of their own.
        in_numbers = beside is not None and kind != "tensorflow, signed" and seed // 4 % 2 == 1
        change = mutated_table if kind == "tensorflow, signed" else mutated
        changed = content if in_numbers else change(content, seed)
        paths[-1].write_bytes(changed)
        same.append(changed == content)
        if beside is not None:
            changed = mutated(beside, seed) if in_numbers else beside
            (tmp_path / f"{seed}.data-00000-of-00001").write_bytes(changed)
            same[-1] &= changed == beside
    command = [sys.executable, "-c", PROGRAM, form, "5", *map(str, paths)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=GOLDEN.parents[1], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    first, *answers = map(json.loads, done.stdout.splitlines())
    assert len(answers) == MUTATIONS

    counts = Counter()
    for path, unchanged, answer in zip(paths[1:], same[1:], answers, strict=True):
        if "error" in answer:
            error = answer["error"]
            assert error.isprintable(), path
            assert error.strip(), path
            assert not unchanged, path
            assert kind != "tensorflow, signed" or "its index has another checksum" not in error, path
            counts["crashed" if "crashed" in error else "late" if "was not done" in error else "refused"] += 1
        elif answer["digest"] == first["digest"]:
            counts["read, the same"] += 1
        else:
            assert kind not in CHECKED, path
            counts["read, other numbers"] += 1
    slowest, largest = (max(answer[key] for answer in answers) for key in ("seconds", "mb"))
    print(f"{kind}: {dict(counts)}, at most {slowest:.2f} s and {largest:.0f} MB (the original {first['mb']:.0f})")
    assert slowest < 30
    assert largest < first["mb"] + 1000
