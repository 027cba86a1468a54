"""The tables of docs/pods.md: the ImageNet recipe on TPU slices and on GPUs, each compiled by precompile.

    python benchmarks/pods.py            both tables of TPUs as Markdown, about 20 minutes on two CPU cores
    python benchmarks/pods.py --tpu v6e  the same slices of another TPU
    python benchmarks/pods.py --gpus     the table of GPUs, seven compilations of a minute or more

Weak scaling keeps the images a chip, strong scaling the batch. Needs libtpu and no TPU, or XLA for CUDA and no GPU.
"""

import argparse
import json
import subprocess
import sys

from xception_flax.planning import machines

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", default="v5e", choices=("v5e", "v6e"), help="generation (v5e)")
    parser.add_argument("--gpus", action="store_true", help="the table of GPUs instead")
    arguments = parser.parse_args()
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
