"""The table of docs/pods.md: the ImageNet recipe on slices of 8 to 256 chips, each compiled by precompile.

    python benchmarks/pods.py            both tables as Markdown, about 20 minutes on two CPU cores
    python benchmarks/pods.py --tpu v6e  the same slices of another TPU

Weak scaling keeps the images a chip, strong scaling the batch. Needs libtpu, and no TPU.
"""

import argparse
import json
import subprocess
import sys

SLICES = ("2x4", "4x8", "8x8", "16x16")  # 8, 32, 64, 256 chips
IMAGES_A_CHIP = 128
BATCH_SIZE = 1536  # the recipe's

COLUMNS = (
    "slice",
    "images a chip",
    "batch",
    "memory a chip",
    "HBM a step",
    "collectives",
    "step",
    "images/s a chip",
    "h",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"


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
    cells += [
        f"{r['memory_bytes'] / 2**30:.1f} of {r['usable_bytes'] / 2**30:.2f} GiB",
        f"{r['hbm_bytes'] / 1e9:.1f} GB",
        f"{count}, {size / 1e6:.1f} MB, {1e3 * r['collective_seconds']:.1f} ms",
        f"{1e3 * r['step_seconds']:.1f} ms",
        f"{r['images_per_second_per_chip']:,.0f}",
        f"{r['hours']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", default="v5e", choices=("v5e", "v6e"), help="generation (v5e)")
    tpu = parser.parse_args().tpu
    for title, batch in (
        (f"Weak scaling, {IMAGES_A_CHIP} images a chip", lambda chips: IMAGES_A_CHIP * chips),
        (f"Strong scaling, a batch of {BATCH_SIZE:,}", lambda chips: BATCH_SIZE),
    ):
        print(f"\n{title}:\n\n{HEADER}", flush=True)
        for shape in SLICES:
            rows, columns = map(int, shape.split("x"))
            print(row(f"{tpu}:{shape}", batch(rows * columns)), flush=True)


if __name__ == "__main__":
    main()
