"""Writes torch_files.tar.xz: files of torch.save in each of its formats, for the tests of the reader.

    python3 -m venv /tmp/torchenv && /tmp/torchenv/bin/pip install torch numpy
    /tmp/torchenv/bin/python tests/golden/make_torch.py

Every array has the values of `values` here, in its type, so that the tests need nothing else.
"""

import argparse
import collections
import io
import tarfile
from pathlib import Path

import numpy as np
import torch

DTYPES = ("float16", "bfloat16", "float32", "float64")


def values(*shape: int) -> np.ndarray:
    """Numbers that every type has exactly: -n/8, ..., -1/8, 0, 1/8, ..."""
    n = int(np.prod(shape))
    return ((np.arange(n) - n // 2) / 8).reshape(shape)


def network(dtype: str) -> torch.nn.Module:
    network = torch.nn.Sequential(collections.OrderedDict(conv=torch.nn.Conv2d(3, 2, 2), bn=torch.nn.BatchNorm2d(2)))
    state = {name: torch.from_numpy(values(*array.shape)) for name, array in network.state_dict().items()}
    network.load_state_dict(state | {"bn.num_batches_tracked": torch.tensor(7)})
    return network.to(getattr(torch, dtype))


def views() -> dict[str, torch.Tensor]:
    """Tensors that share a storage, or have it in another order."""
    base = torch.from_numpy(values(4, 6).astype(np.float32))
    return {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": base[0, :1].expand(5),
        "scalar": base[3, 5],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[2]),
        "channels_last": base.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    }


def checkpoint() -> dict[str, object]:
    """As training scripts save one: the weights among other things."""
    model = network("float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "arch": "xception",
        "state_dict": network("float32").state_dict(),
        "state_dict_ema": {f"module.{name}": value for name, value in network("float32").state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.999), names=["a"], seen={1, 2}),
        "metric": np.float64(0.5),
        "history": [0.25, 0.5],
        "dtype": torch.float32,
        "done": True,
        "best": None,
        "counts": collections.defaultdict(int, a=1),
        "size": torch.Size([3, 4]),
    }


def main() -> None:
    files: dict[str, bytes] = {}

    def save(name: str, value: object, **options: object) -> None:
        file = io.BytesIO()
        torch.save(value, file, **options)
        files[name] = file.getvalue()

    for older in (False, True):
        prefix, options = ("older_", {"_use_new_zipfile_serialization": False}) if older else ("", {})
        for dtype in DTYPES:
            save(f"{prefix}{dtype}.pth", network(dtype).state_dict(), **options)
        save(f"{prefix}views.pth", views(), **options)
        save(f"{prefix}checkpoint.pth", checkpoint(), **options)
        save(f"{prefix}protocol4.pth", network("float32").state_dict(), pickle_protocol=4, **options)
        save(f"{prefix}model.pth", network("float32"), **options)
    program = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), program)
    files["program.pt"] = program.getvalue()

    with tarfile.open(Path(__file__).with_name("torch_files.tar.xz"), "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
