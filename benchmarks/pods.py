"""The tables of docs/pods.md: the ImageNet recipe on TPU slices and on GPUs, each compiled by precompile.

    python benchmarks/pods.py            both tables of TPUs as Markdown, about 20 minutes on two CPU cores
    python benchmarks/pods.py --tpu v6e  the same slices of another TPU
    python benchmarks/pods.py --gpus     the table of GPUs, seven compilations of a minute or more
    python benchmarks/pods.py --picture docs/images/pods.png    draws the tables of docs/pods.md, compiles nothing

Weak scaling keeps the images a chip, strong scaling the batch. Needs libtpu and no TPU, or XLA for CUDA and no GPU.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from xception_flax.planning import machines

PAGE = Path(__file__).parent.parent / "docs" / "pods.md"

GPUS = ("h100", "h100:8", "h100:2x8", "h200", "b200", "a100", "l4")
SLICES = ("2x4", "4x8", "8x8", "16x16")  # 8, 32, 64, 256 chips
IMAGES_A_CHIP = 128
BATCH_SIZE = 1536  # the recipe's


def header(machine: str, chip: str) -> str:
    columns = [machine, f"images a {chip}", "batch", f"memory a {chip}", "HBM a step", "collectives", "step"]
    columns += [f"images/s a {chip}", "h"]
    return f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|"


def row(topology: str, batch_size: int) -> str:
    command = [sys.executable, "-m", "xception_flax", "precompile", "--config", "configs/imagenet.py"]
    command += ["--topology", topology, f"--config.batch_size={batch_size}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: it does not fit
        sys.exit(done.returncode)
    r = json.loads(done.stdout.splitlines()[-1])
    cells = [topology, f"{batch_size / r['chips']:g}", f"{batch_size:,}"]
    if not r["fits"]:
        return "| " + " | ".join([*cells, f"needs {r['memory_bytes'] / 2**30:.1f} GiB: does not fit", *[""] * 5]) + " |"
    count, size = (sum(kind[what] for kind in r["collectives"].values()) for what in ("count", "bytes"))
    sent = f"{count}, {size / 1e6:.1f} MB, {1e3 * r['collective_seconds']:.1f} ms" if count else ""
    cells += [
        f"{r['memory_bytes'] / 2**30:.1f} of {r['usable_bytes'] / 2**30:.2f} GiB",
        f"{r['hbm_bytes'] / 1e9:.1f} GB",
        sent,
        f"{1e3 * r['step_seconds']:.1f} ms",
        f"{r['images_per_second_per_chip']:,.0f}",
        f"{r['hours']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


class Bill(NamedTuple):
    """A row of a table of slices; all times in ms, a step of a chip."""

    slice: str
    images: int
    step: float
    hbm: float
    collectives: float

    @property
    def arithmetic(self) -> float:
        """What is left of a step: layers whose arithmetic takes longer than their bytes. The columns are rounded."""
        return max(0.0, self.step - self.hbm - self.collectives)


def bills(page: str) -> dict[str, list[Bill]]:
    """Returns the rows of each table of slices in a page, by the line above the table."""
    row = r"^\| (\w+:\w+) \| (\d+) \| [\d,]+ \| [^|]+ \| ([\d.]+) GB \| [^|]*, ([\d.]+) ms \| ([\d.]+) ms \|.*\n"
    tables = re.finditer(rf"^(.+):\n\n\| slice \|.*\n\|[-|]+\|\n((?:{row})+)", page, re.MULTILINE)
    return {table[1]: [_bill(*found) for found in re.findall(row, table[2], re.MULTILINE)] for table in tables}


def _bill(name: str, images: str, gigabytes: str, collectives: str, step: str) -> Bill:
    hbm = 1e12 * float(gigabytes) / machines.parse_machine(name).chip.hbm_bytes_per_second
    return Bill(name, int(images), float(step), hbm, float(collectives))


def draw(tables: dict[str, list[Bill]], path: Path) -> None:
    """Draws what an image takes of a chip's time, by what bounds it: a stacked bar for each slice."""
    figure, both = plt.subplots(len(tables), 1, figsize=(8, 4.4), sharex=True, layout="constrained")
    parts = {"hbm": ("bytes of HBM", "#2f5d8a"), "arithmetic": ("arithmetic beyond it", "#c9a227")}
    parts |= {"collectives": ("collectives", "#c8553d")}
    for axes, (title, rows) in zip(both, tables.items(), strict=True):
        for place, bill in enumerate(rows):
            left = 0.0
            for part, (label, color) in parts.items():
                width = getattr(bill, part) / bill.images
                axes.barh(place, width, 0.62, left, color=color, label=None if place else label)
                left += width
            axes.annotate(f" {bill.step:g} ms a step", (left, place), va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [f"{bill.slice}, {bill.images} images a chip" for bill in rows])
        axes.set_title(title, fontsize=10, loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e3e5e8")
        axes.set_axisbelow(True)
    axes.set(xlabel="ms of a chip for an image (estimate)", xlim=(0, 1.7))
    both[0].legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", default="v5e", choices=("v5e", "v6e"), help="generation (v5e)")
    parser.add_argument("--gpus", action="store_true", help="the table of GPUs instead")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the tables of docs/pods.md instead")
    arguments = parser.parse_args()
    if arguments.picture:
        draw(bills(PAGE.read_text()), arguments.picture)
        return
    if arguments.gpus:
        print(f"{IMAGES_A_CHIP} images a GPU:\n\n{header('GPUs', 'GPU')}", flush=True)
        for topology in GPUS:
            print(row(topology, IMAGES_A_CHIP * machines.parse_machine(topology).num_chips), flush=True)
        return
    tpu = arguments.tpu
    for title, batch in (
        (f"Weak scaling, {IMAGES_A_CHIP} images a chip", lambda chips: IMAGES_A_CHIP * chips),
        (f"Strong scaling, a batch of {BATCH_SIZE:,}", lambda chips: BATCH_SIZE),
    ):
        print(f"\n{title}:\n\n{header('slice', 'chip')}", flush=True)
        for shape in SLICES:
            topology = f"{tpu}:{shape}"
            print(row(topology, batch(machines.parse_machine(topology).num_chips)), flush=True)


if __name__ == "__main__":
    main()
