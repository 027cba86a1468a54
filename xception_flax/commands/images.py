"""What the commands share that ask a trained network about images: their arguments, and the files they name."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xception_flax.commands import cli
from xception_flax.data.sources import folder
from xception_flax.display import console
from xception_flax.inference import predictor
from xception_flax.inference.predictor import BATCH_SIZE, CPU_BATCH_SIZE, Predictor
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.weights.word import read_class_names

SOURCE = "workdir of a run, file or folder of weights, keras:NETWORK, timm:NAME, hf:OWNER/NAME"
IMAGE_SIZE = "of what the network takes: pixels a side, or height x width such as 224x320"


def add_arguments(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    """Adds the network, the images, and what says how an image becomes what the network takes.

    Without `batch_size`, the default is that of `load`.
    """
    add_network(parser)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="a file, or a folder with files in it")
    parser.add_argument("--workdir", type=cli.directory, help="instead of SOURCE: folder of a run of train.py")
    default = batch_size or f"{BATCH_SIZE}, on CPUs {CPU_BATCH_SIZE}"
    parser.add_argument(
        "--batch-size", type=cli.positive, default=batch_size, metavar="N", help=f"images at a time ({default})"
    )
    add_word(parser)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds which network."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    cli.add_checkpoint(parser)


def add_word(parser: argparse.ArgumentParser) -> None:
    """Adds what the user says of weights from elsewhere; `word` reads it."""
    said = parser.add_argument_group("of weights from elsewhere, where they do not say it themselves")
    said.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes, a line each")
    said.add_argument("--image-size", type=cli.image_size, metavar="N|HxW", help=IMAGE_SIZE)
    said.add_argument("--transforms", metavar="CHAIN", help="as data.eval_transforms of a recipe, such as center_crop")
    said.add_argument("--mean", type=float, nargs="+", metavar="X", help="of 0 to 255; a value a channel, or one")
    said.add_argument("--std", type=float, nargs="+", metavar="X", help="the same")


def word(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what the user says of the network, as keywords of `weights.word.told`."""
    names = None if arguments.class_names is None else read_class_names(arguments.class_names)
    options = ("image_size", "transforms", "mean", "std")
    return {"class_names": names} | {name: getattr(arguments, name) for name in options}


def given(arguments: argparse.Namespace) -> tuple[str, list[Path]]:
    """Returns the network and the files of images that the arguments name.

    Raises:
      UserError: no network or no image is named, or one does not exist.
    """
    source, paths = arguments.source, arguments.images
    if arguments.workdir is not None:
        source, paths = str(arguments.workdir), [Path(source), *paths]
    elif Path(source).suffix.lower() in folder.IMAGE_SUFFIXES and not Path(source).is_dir():
        raise UserError(f"{naming.shown(Path(source))} is an image; expected the network before it: a {SOURCE}.")
    if not paths:
        raise UserError(f"there is no image; give files or folders behind {naming.shown(Path(source))}.")
    return source, list(files(paths))


def load(source: str, arguments: argparse.Namespace, mesh: Mesh | None = None) -> Predictor:
    """Returns the network, on all devices or on `mesh`, and says on standard error what was assumed and left out.

    Raises:
      UserError: there is no such network, or an argument is wrong.
    """
    options = {name: getattr(arguments, name) for name in ("checkpoint", "weights", "batch_size")}
    found = predictor.load(source, mesh=mesh, **word(arguments), **options)
    if jax.process_index() == 0:
        for note in found.notes:
            print(note, file=sys.stderr)
    return found


def outputs(
    found: Predictor, paths: Sequence[Path], name: str, what: str, dark: list[Path] | None = None
) -> Iterator[tuple[Path, np.ndarray | UserError]]:
    """Yields each file with its output `name`, or with the error; the progress is shown as `what`."""
    for start in console.stepping(what, range(0, len(paths), found.batch_size)):
        for path, output in found.stream(paths[start : start + found.batch_size], (name,), dark=dark):
            yield path, output if isinstance(output, UserError) else output[name]


def title(source: str, found: Predictor) -> str:
    """Returns what a table's heading says of the network: 'runs/photos, step 40, ema weights'."""
    what = [naming.shown(Path(source))]
    if "step" in found.origin:
        what += [f"step {found.origin['step']}", f"{found.origin['weights']} weights"]
    return ", ".join(what)


def report(unreadable: Sequence[tuple[Path, UserError]]) -> int:
    """Says which files could not be read, and returns the exit code."""
    for path, error in unreadable:
        cli.complain(f"{naming.shown(path)}: {error}")
    return 2 if unreadable else 0


def files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yields the files, and all images in and below the folders.

    Raises:
      UserError: a file or folder does not exist, or a folder has no image.
    """
    for path in paths:
        if path.is_dir():
            found, others = folder.list_files(path)
            unread = folder.describe_unread(others, len(found))
            if not found:
                raise UserError(
                    f"{path} has no image (of {', '.join(folder.IMAGE_SUFFIXES)}).{unread and f' {unread}'}"
                )
            if unread:
                print(f"{naming.shown(path)}: {unread}", file=sys.stderr)
            yield from found
        elif path.exists():
            yield path
        else:
            raise UserError(f"{path} is not there; expected an image or a folder of images.")
