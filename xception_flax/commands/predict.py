"""Predicts the classes of images: the most likely ones and their probabilities."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from rich.cells import cell_len

from xception_flax.commands import cli
from xception_flax.data import transforms
from xception_flax.data.decoding import WHITE, BadImageError, is_dark, largest_value
from xception_flax.data.pipeline import prepare_image
from xception_flax.data.sources import folder
from xception_flax.display import console
from xception_flax.runs.restore import Run, restore
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training import sharding, steps

EXAMPLES = """\
  xception-flax predict --workdir runs/photos cat.jpg dog.png
  xception-flax predict --workdir runs/photos holiday/ --json > holiday.jsonl"""

MAX_WIDTH = 60  # of the column of files, in terminal cells; a longer name moves its own row only


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax predict", __doc__, EXAMPLES, hosts=False)
    cli.add_run(parser, checkpoint="best")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a file, or a folder with files in it")
    parser.add_argument("--top", type=cli.positive, default=5, metavar="N", help="classes to show for each image (5)")
    parser.add_argument("--batch-size", type=cli.positive, default=32, metavar="N", help="images at a time (32)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image, not the table")
    arguments = parser.parse_args(argv)
    paths = list(_files(arguments.images))
    cli.start(arguments)
    with cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        mesh = sharding.create_mesh()
        run = restore(arguments.workdir, mesh, arguments.checkpoint, arguments.weights)
        width = min(max(cell_len(naming.shown(path)) for path in paths), MAX_WIDTH)
        readable, unreadable, dark = 0, 0, []
        # Each result is printed at once, so that an error with a later image does not lose it.
        for path, scores in predict(run, paths, mesh, arguments.batch_size, dark):
            if isinstance(scores, UserError):
                cli.complain(f"{naming.shown(path)}: {scores}")
                unreadable += 1
                continue
            best = {run.class_names[i]: float(scores[i]) for i in np.argsort(-scores, kind="stable")[: arguments.top]}
            if arguments.json:
                print(naming.to_json_line({"image": naming.decoded(path), "classes": best}), flush=True)
                continue
            if not readable:
                console.show_title(f"{naming.shown(arguments.workdir)}, step {run.step}, {run.weights} weights")
            row = "  ".join(f"{naming.shown(name)} {console.percent(p)}" for name, p in best.items())
            console.show_row(naming.shown(path), row, width)
            readable += 1
    if dark:
        print(
            f"{len(dark):,} of {len(paths):,} files, the first {naming.shown(dark[0])}, are of 16 bits and have no "
            f"value in the upper half; if white is less than {WHITE} there, the run needs data.max_value.",
            file=sys.stderr,
        )
    return 2 if unreadable else 0


def predict(
    run: Run,
    paths: Sequence[Path],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    dark: list[Path] | None = None,
) -> Iterator[tuple[Path, np.ndarray | UserError]]:
    """Yields each file with the probabilities of the classes `[num_classes]`, or with the error.

    Images are prepared as in the recipe's evaluation. With one label per image the probabilities sum to 1;
    with several labels each class has a probability of its own.

    Args:
      run: the run whose network predicts.
      paths: image files.
      mesh: the mesh of the run's variables.
      batch_size: images at a time; rounded up to a multiple of the number of devices.
      dark: a list to which files of 16 bits without a value in the upper half are added, unless the recipe
        sets `data.max_value`.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size
    config, image_shape = run.recipe, run.image_shape
    chain = transforms.parse_transforms(config.data.eval_transforms, config.data.image_size)
    normalize = steps.create_normalizer(**config.normalize)
    to_probabilities = jax.nn.sigmoid if config.loss.name == "sigmoid" else jax.nn.softmax

    def prepare(path: Path) -> tuple[np.ndarray | UserError, bool]:
        """Returns the image or the error, and whether the image may be nearly black by mistake."""
        try:
            rng = np.random.default_rng(0)  # not used by the transforms of an evaluation
            content, read = path.read_bytes(), config.data
            image = prepare_image(content, chain, image_shape, read.min_decoded_side, rng, read.max_value)
            largest = largest_value(content) if read.max_value is None else None
            return image, largest is not None and is_dark(largest)
        except OSError as error:
            return UserError(f"{error.strerror}."), False
        except BadImageError as error:
            return error, False

    @jax.jit
    def forward(variables: dict, images: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # each device computes its own images
            return to_probabilities(run.model.apply(variables, normalize(images), train=False))

    with ThreadPoolExecutor() as threads:
        for start in console.stepping("predicting", range(0, len(paths), batch_size)):
            prepared, may_be_dark = zip(*threads.map(prepare, paths[start : start + batch_size]), strict=True)
            if dark is not None:
                dark.extend(itertools.compress(paths[start:], may_be_dark))
            images = np.zeros((batch_size, *image_shape), np.uint8)  # always as many, for one program
            for i, image in enumerate(prepared):
                if not isinstance(image, UserError):
                    images[i] = image
            scores = np.asarray(forward(run.variables, sharding.global_batch(mesh, {"images": images})["images"]))
            for path, image, row in zip(paths[start:], prepared, scores, strict=False):
                if not isinstance(image, UserError):
                    image = row if np.isfinite(row).all() else UserError("the network's output for it is not finite.")
                yield path, image


def _files(paths: Sequence[Path]) -> Iterator[Path]:
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
