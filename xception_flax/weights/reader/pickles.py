"""Reads the pickles in files of torch, without running anything that they name.

A pickle is a program for a small machine with a stack. Python's own machine imports what the program names, and calls
it. Restricting that needs care at each of its 68 instructions; so this is a machine of its own, which knows the
instructions that torch needs. It has no instruction that imports or calls: a name stays a name, and the few names in
the tables below stand for something that this module builds itself. `pickletools` only splits the bytes.
"""

import pickletools
from typing import IO, Any, NamedTuple

import numpy as np

_STORAGES = {
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.BFloat16Storage": np.dtype("V2"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_DICTS = {"collections.OrderedDict", "collections.defaultdict"}
_SIZE = "torch.Size"
_BUILTINS = "bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple unicode"
_LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning.pytorch.utilities.parsing",
    "lightning_fabric.utilities.data",
)
# What training scripts keep beside the weights: it is passed over, with all that is in it.
_PASSED_OVER = {
    *(f"{module}.{name}" for module in ("__builtin__", "builtins") for name in _BUILTINS.split()),
    *(f"torch.{dtype}" for dtype in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool", "device")),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode"),
    *("argparse.Namespace", "types.SimpleNamespace", "collections.Counter", "datetime.datetime", "datetime.timedelta"),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "_local.PosixPath", "_local.WindowsPath")),
    *(f"{module}.AttributeDict" for module in _LIGHTNING),
}


class _Name(NamedTuple):
    """Of a function or class; nothing is imported."""

    name: str


class _PassedOver:
    """Stands for all that is no number, text, list, dict or tensor."""


_PASSED = _PassedOver()
_MARK = object()


class Storage(NamedTuple):
    """A part of one of the file's blocks of numbers.

    Attributes:
      dtype: of the numbers; bfloat16 is 'V2'.
      key: the name of the block.
      start: where the part begins, in numbers.
      numel: how many there are.
    """

    dtype: np.dtype
    key: str
    start: int
    numel: int

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Tensor(NamedTuple):
    """A view of a storage, with offset and strides in numbers. None of them has been compared with the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """Returns what a pickle describes, and the whole of each block that it mentions, by key.

    Numbers, texts, tuples, lists and dicts are themselves, and tensors are `Tensor`. Dicts have only those keys that
    are numbers, texts or None. The file's position is then behind the pickle.

    Raises:
      ValueError: it is damaged, or describes anything else; the message has the name of that.
    """
    machine = _Machine()
    position = file.tell()
    try:
        for opcode, argument, place in pickletools.genops(file):
            position = place
            machine.step(opcode.name, argument)
        return machine.pop(), machine.blocks
    except _RefusedError as error:
        if b"_parameters" in file.read(2**20):  # each torch.nn.Module has a dict of that name
            raise ValueError(
                f"it is a whole model, and {error} would have to run; with torch, torch.save(torch.load(FILE, "
                "weights_only=False).state_dict(), 'weights.pth') writes its weights alone"
            ) from None
        raise ValueError(
            f"it has not only arrays: {error} is refused; with torch, torch.save(model.state_dict(), 'weights.pth') "
            "writes the weights alone"
        ) from None
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged at byte {position:,} ({error})") from None


class _RefusedError(Exception):
    """Has the name of what is refused."""


class _Machine:
    def __init__(self) -> None:
        self.blocks: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("nothing to take")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark")
        items = self._stack[start + 1 :]
        del self._stack[start:]
        return items

    def step(self, instruction: str, argument: Any) -> None:
        """Does one instruction, by its name in `pickletools`."""
        push = self._stack.append
        match instruction:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(instruction == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":
                push(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "EMPTY_SET":
                push(_PASSED)
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "MARK":
                push(_MARK)
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([self.pop() for _ in range(int(instruction[-1]))])))
            case "FROZENSET":
                self._pop_to_mark()
                push(_PASSED)
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._set_items([self.pop(), self.pop()][::-1])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "GLOBAL":
                push(_known(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                push(_known(f"{_text(module)}.{_text(name)}"))
            case "REDUCE" | "NEWOBJ":
                arguments, name = self.pop(), self.pop()
                push(_built(name, arguments))
            case "BUILD":  # gives attributes to what was built; arrays have none that matter
                self.pop()
                self._top()
            case "BINPERSID":
                whole, part = _storages(self.pop())
                if self.blocks.setdefault(whole.key, whole).num_bytes != whole.num_bytes:
                    raise ValueError(f"the storage {whole.key} has two sizes")
                push(part)
            case _:
                raise ValueError(f"the instruction {instruction}, which torch does not use")

    def _top(self) -> Any:
        item = self.pop()
        self._stack.append(item)
        return item

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._top(), list):
            self._top().extend(items)
        elif self._top() is not _PASSED:
            raise TypeError("no list to append to")

    def _set_items(self, items: list[Any]) -> None:
        if isinstance(self._top(), dict):
            self._top().update(_pairs(items[::2], items[1::2]))
        elif self._top() is not _PASSED:
            raise TypeError("no dict to set items of")


def _known(name: str) -> _Name | _PassedOver:
    if name in _PASSED_OVER:
        return _PASSED
    if name in _STORAGES or name in _TENSORS or name in _PARAMETERS or name in _DICTS or name == _SIZE:
        return _Name(name)
    raise _RefusedError(name if name.isprintable() else repr(name))


def _built(what: Any, arguments: Any) -> Any:
    """Returns what calling a name of our tables with these arguments stands for."""
    if what is _PASSED:
        return _PASSED
    if not isinstance(what, _Name) or not isinstance(arguments, tuple):
        raise TypeError("a call of nothing that has a name")
    if what.name in _TENSORS:
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Storage) or len(_whole_numbers(size)) != len(_whole_numbers(stride)):
            raise TypeError("a tensor of no storage")
        (offset,) = _whole_numbers((offset,))
        return Tensor(storage, offset, size, stride)
    if what.name in _PARAMETERS:
        return arguments[0]
    if what.name == _SIZE:
        return _whole_numbers(tuple(arguments[0]))
    if what.name in _DICTS:  # Python 2 wrote the items as a list of lists
        items = arguments[0] if arguments and isinstance(arguments[0], list) else []
        return _pairs([key for key, _ in items], [value for _, value in items])
    raise TypeError(f"a call of {what.name}")


def _pairs(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    # Other keys are not for weights; the hash of a tuple of tuples may take for ever.
    plain = (str, int, float, type(None))
    return {key: value for key, value in zip(keys, values, strict=True) if isinstance(key, plain)}


def _storages(what: Any) -> tuple[Storage, Storage]:
    """Returns the block that torch means by such a tuple, and the part of it."""
    word, name, key, _, numel, *view = what
    if word != "storage" or not isinstance(name, _Name) or name.name not in _STORAGES:
        raise TypeError("a reference to no storage")
    (numel,) = _whole_numbers((numel,))
    whole = Storage(_STORAGES[name.name], _text(key), 0, numel)
    if not view or view[0] is None:
        return whole, whole
    _, start, numel = view[0]  # of torch before 0.4, which had parts of blocks
    start, numel = _whole_numbers((start, numel))
    if start + numel > whole.numel:
        raise ValueError("a part beyond its storage")
    return whole, whole._replace(start=start, numel=numel)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TypeError("no tuple of whole numbers")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
