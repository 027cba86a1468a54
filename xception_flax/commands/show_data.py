"""Draws what a network would be trained on: the images of a recipe's first batches, with their classes.

They are augmented and mixed as in the steps of `train.py`; only the normalization is left out.
"""

import contextlib
import itertools
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.commands import cli
from xception_flax.data.batch import Batch
from xception_flax.display import console
from xception_flax.host import files
from xception_flax.recipes import reading
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.training import mixing

EXAMPLES = """\
  xception-flax show-data --config digits --output digits.png
  xception-flax show-data --config folder:photos --output eval.png --split eval
  xception-flax show-data --config digits --output mixed.png --config.mix.mixup_alpha=0.4"""


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax show-data", __doc__, EXAMPLES, hosts=False)
    cli.add_recipe(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the picture: .png, .jpg, .pdf, ...")
    parser.add_argument("--batches", type=cli.positive, default=1, metavar="N", help="number of batches (1)")
    parser.add_argument("--images", type=cli.positive, default=32, metavar="N", help="at most, of each batch (32)")
    parser.add_argument(
        "--split", choices=("train", "eval"), default="train", help="as in training (default), or as in evaluation"
    )
    arguments, overrides = parser.parse_known_args(argv)
    config = reading.load(arguments.config, overrides)
    from xception_flax.display import pictures  # Matplotlib, of an extra: the help does without it

    pictures.check_suffix(arguments.output)
    files.check_writable(arguments.output)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, perhaps with this recipe
    train = arguments.split == "train"
    split = data.load(**config.data, batch_size=config.batch_size, seed=config.seed, train=train)
    if dark := split.check_max_value():
        print(dark, file=sys.stderr)
    number = arguments.batches if train else min(arguments.batches, split.num_batches)
    shown = []
    with (
        contextlib.closing(batches(config, split)) as loaded,
        console.counting("reading", number, "batch") as advance,
    ):
        for batch in itertools.islice(loaded, number):
            shown.append(first_images(batch, arguments.images))
            advance(1)
    pictures.draw_images(
        np.concatenate([b["images"] for b in shown]),
        [caption for b in shown for caption in captions(b, split.class_names)],
        f"{naming.shown(arguments.config)}, {'training' if train else 'evaluation'}: the first images of "
        f"{counted(len(shown), 'batch')} of {config.batch_size}\n"
        + (config.data.train_transforms if train else config.data.eval_transforms),
        arguments.output,
    )
    print(f"{naming.shown(arguments.output)}: {counted(sum(len(b['images']) for b in shown), 'image')}")
    return 0


def batches(config: ConfigDict, split: data.Split) -> Generator[Batch[np.ndarray]]:
    """Yields batches as the loss sees them: in training they are mixed by `mixing.make_mixing`."""
    mix = mixing.make_mixing(**config.mix) if split.train else None
    mix = mix and jax.jit(mix)
    with contextlib.closing(split.batches()) as loaded:
        for step, batch in enumerate(loaded):
            yield batch if mix is None else jax.device_get(mix(mixing.mixing_key(config.seed, step), batch))


def first_images(batch: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Returns the first `number` images of a batch, without padding."""
    real = np.flatnonzero(batch["mask"]) if "mask" in batch else np.arange(len(batch["images"]))
    return {key: value[real[:number]] for key, value in batch.items()}


def captions(batch: dict[str, np.ndarray], class_names: Sequence[str]) -> list[str]:
    """Returns the class of each image; for a mixed image, two lines with the classes and their shares."""
    class_names = [naming.shown(name) for name in class_names]

    def classes(label: np.ndarray) -> str:
        return ", ".join(class_names[i] for i in np.flatnonzero(label)) if label.ndim else class_names[label]

    labels = [classes(label) for label in batch["labels"]]
    if "share" not in batch:
        return labels
    minor = [classes(label) for label in batch["minor_labels"]]
    return [
        a if share == 1 or a == b else f"{100 * share:.0f} % {a}\n{100 * (1 - share):.0f} % {b}"
        for a, b, share in zip(labels, minor, batch["share"], strict=True)
    ]
