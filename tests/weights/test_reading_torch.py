"""Files that torch wrote (golden/make_torch.py), and such as it would not."""

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from golden.archives import unpacked
from xception_flax.text.errors import UserError
from xception_flax.weights import reading
from xception_flax.weights.reader import pickles, torch
from xception_flax.weights.reader.room import Contents, Room

NETWORK = {  # without the counter
    "conv.weight": (2, 3, 2, 2),
    **dict.fromkeys(("conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), (2,)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return unpacked("torch_files.tar.xz", tmp_path_factory.mktemp("torch"))


def values(*shape: int) -> np.ndarray:
    """As golden/make_torch.py has them."""
    n = int(np.prod(shape))
    return ((np.arange(n) - n // 2) / 8).reshape(shape)


def read_here(path: Path, max_bytes: int = 10**6) -> Contents:
    assert reading.recognize(path) == "torch"
    return torch.read(path, Room(max_bytes))


def assert_network(contents: Contents, dtype: type, prefix: str = "") -> None:
    found = {name: array for name, (array,) in contents.entries if name.startswith(prefix)}
    assert list(found) == [f"{prefix}{name}" for name in NETWORK]
    for name, shape in NETWORK.items():
        np.testing.assert_array_equal(found[f"{prefix}{name}"], values(*shape).astype(dtype), strict=True)


# What is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", ["", "older_"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_type(files, older, dtype):
    contents = read_here(files / f"{older}{dtype}.pth")
    assert_network(contents, np.float64 if dtype == "float64" else np.float32)
    assert contents.config == {}


@pytest.mark.parametrize("older", ["", "older_"])
def test_another_protocol(files, older):
    assert_network(read_here(files / f"{older}protocol4.pth"), np.float32)


@pytest.mark.parametrize("older", ["", "older_"])
def test_views_of_a_storage(files, older):
    found = {name: array for name, (array,) in read_here(files / f"{older}views.pth").entries}
    base = values(4, 6).astype(np.float32)
    expected = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": np.broadcast_to(base[0, :1], 5),
        "scalar": base[3, 5],
        "empty": base[:0],
        "parameter": base[2],
        "channels_last": base.reshape(1, 2, 3, 4),
    }
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("older", ["", "older_"])
def test_a_checkpoint_of_a_training_script(files, older):
    """The optimizer, the arguments and whatever else there is are passed over; numbers and texts are kept."""
    contents = reading.read(files / f"{older}checkpoint.pth", "torch")
    assert_network(contents, np.float32, "state_dict.")
    assert_network(contents, np.float32, "state_dict_ema.module.")
    assert len(contents.entries) == 2 * len(NETWORK)
    assert contents.config == {"epoch": 3, "arch": "xception", "done": True, "counts.a": 1}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_machine_of_the_other_byte_order(files, tmp_path, dtype):
    """As torch writes it there, by its source: the numbers swapped, and a member that says so."""
    size = {"float64": 8, "float32": 4}.get(dtype, 2)

    def swapped(name: str, content: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        return np.frombuffer(content, f"u{size}").byteswap().tobytes() if "/data/" in name else content

    path = rewritten(files / f"{dtype}.pth", tmp_path / "a.pth", swapped, without_counter=True)
    assert_network(read_here(path), np.float64 if dtype == "float64" else np.float32)


def rewritten(path: Path, to: Path, change: Callable[[str, bytes], bytes | None], without_counter=False) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if without_counter and "/data/" in member.filename and content == (7).to_bytes(8, "little"):
                changed = content
            else:
                changed = change(member.filename, content)
            if changed is not None:
                new.writestr(member.filename, changed)
    return to


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "model.pth": "it is a whole model, and torch.nn.modules.container.Sequential would have to run; with torch, "
        "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth') writes its weights alone",
        "older_model.pth": "it is a whole model, and torch.nn.modules.container.Sequential would have to run; with "
        "torch, torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth') writes its weights alone",
        "program.pt": "it is TorchScript, a program; with torch, torch.save(torch.jit.load(FILE).state_dict(), "
        "'weights.pth') writes its weights alone",
    }.items(),
)
def test_whole_models_are_named(files, name, message):
    path = files / name
    said = f"{path} cannot be read as a file of torch.save: {message}."
    assert len(message) <= 300
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        reading.read(path, reading.recognize(path))


class Calls:
    """In a pickle: a call of any function."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def archive(path: Path, value: object, protocol: int = 2, storages: dict[str, bytes] | None = None) -> Path:
    """An archive as torch writes it, of any object or pickle."""
    content = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("open('SEEN', 'w')",), r"(__builtin__|builtins)\.eval"),
        (getattr, (str, "join"), r"(__builtin__|builtins)\.getattr"),
        (print, (), r"(__builtin__|builtins)\.print"),
        (re.compile, ("a",), r"re\.compile"),
        (np.ones(3).__reduce__()[0], (np.ndarray, (0,), b"b"), r"numpy\._core\.multiarray\._reconstruct"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_nothing_is_called(tmp_path, monkeypatch, function, arguments, name, protocol):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "a.pth", {"a": Calls(function, *arguments)}, protocol)
    with pytest.raises(ValueError, match=rf"^it has not only arrays: {name} is refused; with torch, torch\.save\("):
        read_here(path)
    assert not (tmp_path / "SEEN").exists()


def storage(numel: object = 4, key: object = "0", kind: str = "FloatStorage") -> bytes:
    """Instructions that push a storage, as a reference."""
    parts = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + push(key) + text("cpu") + push(numel)
    return parts + b"tQ"


def push(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(source: bytes, offset: object, size: object, stride: object) -> bytes:
    """A pickle of {'a': tensor}."""
    arguments = b"(" + source + b"".join(map(push, (offset, size, stride, False, {}))) + b"t"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


DAMAGED = r"its pickle is damaged at byte \d+ "


@pytest.mark.parametrize(
    ("pickled", "message"),
    {
        "beyond": (tensor(storage(), 0, (5,), (1,)), r"a reaches beyond its 4 numbers"),
        "offset": (tensor(storage(), 4, (1,), (1,)), r"a reaches beyond its 4 numbers"),
        "stride": (tensor(storage(), 0, (2, 2), (3, 1)), r"a reaches beyond its 4 numbers"),
        "far": (tensor(storage(), 2**62, (2,), (2**62,)), r"a reaches beyond its 4 numbers"),
        "expanded": (
            tensor(storage(), 0, (2**20, 2**20), (0, 0)),
            r"with a, of shape .* take more than 1,000,000 bytes",
        ),
        "negative": (tensor(storage(), 0, (2,), (-1,)), DAMAGED + r"\(no tuple of whole numbers\)"),
        "fraction": (tensor(storage(), 0, (2.0,), (1,)), DAMAGED + r"\(no tuple of whole numbers\)"),
        "list": (tensor(storage(), 0, [2], (1,)), DAMAGED + r"\(no tuple of whole numbers\)"),
        "ranks": (tensor(storage(), 0, (2,), (1, 1)), DAMAGED + r"\(a tensor of no storage\)"),
        "no storage": (tensor(push("0"), 0, (2,), (1,)), DAMAGED + r"\(a tensor of no storage\)"),
        "missing": (tensor(storage(key="1"), 0, (2,), (1,)), r"archive/data/1 is not there, or has not 16 bytes"),
        "outside": (tensor(storage(key="../data.pkl"), 0, (2,), (1,)), r"archive/data/\.\./data\.pkl is not there, or"),
        "size": (tensor(storage(5), 0, (2,), (1,)), r"archive/data/0 is not there, or has not 20 bytes"),
        "large": (
            tensor(storage(2**40), 0, (2,), (1,)),
            r"with the storage of a, of shape .* take more than 1,000,000",
        ),
        "whole numbers": (tensor(storage(2, kind="LongStorage"), 0, (2,), (1,)), r"a has the type int64; expected"),
        "complex": (
            tensor(storage(2, kind="ComplexFloatStorage"), 0, (2,), (1,)),
            r"it has not only arrays: torch\.Com",
        ),
        "key": (tensor(storage(key=0), 0, (2,), (1,)), DAMAGED + r"\(no text\)"),
        "a list": (b"\x80\x02].", r"it is a list; expected a dict of arrays by their names"),
        "nothing": (b"\x80\x02.", DAMAGED),
        "empty": (b"", DAMAGED),
        "no end": (b"\x80\x02}", DAMAGED + r"\(pickle exhausted before seeing STOP\)"),
        "no mark": (b"\x80\x02u.", DAMAGED),
        "marks": (b"\x80\x02(((R.", DAMAGED + r"\(nothing to take\)"),
        "text protocol": (b"(dp0\n.", DAMAGED + r"\(the instruction DICT, which torch does not use\)"),
        "extension": (b"\x80\x02\x82\x01.", DAMAGED + r"\(the instruction EXT1, which torch does not use\)"),
        "memo": (b"\x80\x02h\x01.", DAMAGED),
        "call of a text": (b"\x80\x02" + text("eval") + b")R.", DAMAGED + r"\(a call of nothing that has a name\)"),
        "a name of another file": (b"\x80\x02cos\nsystem\n.", r"it has not only arrays: os\.system is refused"),
        "a name for the terminal": (b"\x80\x02ca\n\x1b[2J\n.", r"it has not only arrays: 'a\.\\x1b\[2J' is refused"),
        "a key for the terminal": (
            b"\x80\x02}" + text("\x1b[2J") + b"K\x01s.",
            r"a name in it is '\\x1b\[2J'; expected",
        ),
        "twice": (push({"a": {"b": 1}, "a.b": 2}).join((b"\x80\x02", b".")), r"a\.b is in it twice"),
        "a long text": (b"\x80\x02X\xff\xff\xff\xff.", DAMAGED),
        "memo of any size": (b"\x80\x02}r\xff\xff\xff\x7f.", None),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pickles_that_torch_would_not_write(tmp_path, pickled, message):
    content, reason = message
    path = archive(tmp_path / "a.pth", content, storages={"0": bytes(16)})
    if reason is None:
        assert read_here(path) == ([], {})
    else:
        with pytest.raises(ValueError, match=f"^{reason}"):
            read_here(path)


def nested(kind: str) -> bytes:
    """Pickles that are small, and what they stand for is not."""
    if kind == "tuples":  # each of two of the one before: 2**100 leaves
        return b"\x80\x02}" + text("a") + b")" + b"q\x00h\x00\x86" * 100 + b"s."
    if kind == "keys":  # the same as the key of a dict, which would be hashed
        return b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"K\x01s."
    if kind == "dicts":
        level = b"}"
        for i in range(10):  # each has ten times the one before
            level = (
                level + bytes((0x71, i)) + b"}" + b"".join(text(f"{j}") + bytes((0x68, i)) + b"s" for j in range(10))
            )
        return b"\x80\x02" + level + b"."
    if kind == "a dict in itself":
        return b"\x80\x02}q\x00" + text("a") + b"h\x00s."
    if kind == "deep":
        return b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"\x85."
    return b"\x80\x02}" + text("a" * 10**4) + b"K\x01s."  # names


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "tuples": None,
        "keys": None,
        "dicts": "it has more than 65,536 names; expected less",
        "a dict in itself": "it has more than 16 dicts in dicts",
        "deep": "it is a tuple; expected a dict of arrays by their names",
        "names": "it has a name of more than 1,000 letters; expected less",
    }.items(),
)
def test_pickles_that_explode(tmp_path, kind, message):
    path = archive(tmp_path / "a.pth", nested(kind))
    if message is None:
        assert read_here(path) == ([], {})
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            read_here(path)


def test_archives_that_are_not_as_torch_writes_them(files, tmp_path):
    path = rewritten(files / "float32.pth", tmp_path / "a.pth", lambda n, c: b"middle" if "byteorder" in n else c)
    with pytest.raises(ValueError, match=r"^its byteorder is 'middle'; expected 'little' or 'big'$"):
        read_here(path)
    path = rewritten(files / "float32.pth", tmp_path / "a.pth", lambda n, c: None if "data.pkl" in n else c)
    with pytest.raises(ValueError, match=r"^it has 0 members named data\.pkl; expected one, as torch\.save writes it$"):
        read_here(path)


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "cut off": (lambda content: content[:-1], r"it has [\d,]+ bytes; expected [\d,]+, by the storages in it"),
        "longer": (lambda content: content + b"a", r"it has [\d,]+ bytes; expected [\d,]+, by the storages in it"),
        "half": (lambda content: content[: len(content) // 2], DAMAGED),
        "size": (
            lambda content: content.replace((24).to_bytes(8, "little"), (23).to_bytes(8, "little")),
            r"the storage \d+ has not the size that the tensors in it need",
        ),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_older_files_that_are_not_whole(files, tmp_path, change, message):
    changed, reason = message
    content = (files / "older_float32.pth").read_bytes()
    assert changed(content) != content
    (tmp_path / "a.pth").write_bytes(changed(content))
    with pytest.raises(ValueError, match=f"^{reason}"):
        read_here(tmp_path / "a.pth")


def test_parts_of_blocks():
    """As torch before 0.4 wrote a storage that is a part of another: the block, and where the part lies in it."""
    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("5") + text("cpu") + push(10)
    for start, numel, good in [(4, 3, True), (8, 3, False)]:
        view = push(("6", start, numel))
        file = io.BytesIO(b"\x80\x02" + reference + view + b"tQ.")
        if good:
            found, blocks = pickles.load(file)
            assert found == pickles.Storage(np.dtype("<f4"), "5", start, numel)
            assert blocks["5"].numel == 10
        else:
            with pytest.raises(ValueError, match=r"\(a part beyond its storage\)$"):
                pickles.load(file)
