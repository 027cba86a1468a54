"""Draws why a network says what it says: where in each image its evidence is, and which images look alike to it."""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xception_flax.commands import cli, images
from xception_flax.display import console, heat
from xception_flax.host.files import check_kind, check_writable, file_errors
from xception_flax.host.libraries import check_extra
from xception_flax.inference.explaining import PREDICTED, Explainer, Explanation
from xception_flax.inference.neighbours import Gallery, Neighbour
from xception_flax.inference.predictor import Predictor
from xception_flax.text import naming
from xception_flax.text.errors import UserError

EXAMPLES = """\
  xception-flax explain runs/photos fork.jpg knife.jpg
  xception-flax explain runs/photos fork.jpg --class knife --stage stage4 --stage stage5 --output why.png
  xception-flax explain keras:xception holiday/ --steps 0 --output explained
  xception-flax explain runs/photos fork.jpg --neighbours photos/train"""

BATCH_SIZE = 8  # a gradient needs ten times the memory of a prediction
MAX_NAME_BYTES = 255  # of a file, on most systems
STEPS = 30
MAX_ROWS = 30  # images in one picture
NEAREST = 5

LEGEND = "Grad-CAM: bright for the class."
LEGEND_OF_PIXELS = " Integrated gradients: red for it, blue against it."


class Row(NamedTuple):
    """What is drawn of one image: pictures, and a caption for each."""

    pictures: list[np.ndarray]
    captions: list[str]


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    check_extra("plot", ("matplotlib",), "explain")
    from xception_flax.display import pictures

    source, paths = images.given(arguments)
    gallery = _gallery(arguments.neighbours)
    in_one = _check_output(arguments.output, len(paths))
    cli.start(arguments)
    rows, unreadable, count = [], [], 0
    with cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        predictor = images.load(source, arguments)
        options = dict(stages=arguments.stage, steps=arguments.steps, baseline=arguments.baseline)
        explainer = Explainer(predictor, **options, output_stride=arguments.output_stride)
        number = PREDICTED if arguments.name is None else explainer.number_of(arguments.name)
        near = _neighbours(predictor, paths, gallery, arguments.nearest, unreadable)
        title = images.title(source, predictor)
        legend = f"{title}\n{LEGEND}{LEGEND_OF_PIXELS if arguments.steps else ''}"
        with console.counting("explaining", len(paths), "image") as advance:
            for path, found in explainer.stream(paths, number):
                advance(1)
                if isinstance(found, UserError):
                    unreadable.append((path, found))
                    continue
                neighbours = near.get(path, [])
                _tell(predictor, path, found, neighbours, arguments.json, title if not count else "")
                row = _row(predictor, path, found, neighbours, arguments.neighbours)
                if in_one:
                    rows.append(row)
                else:
                    file = arguments.output / _file_name(count, path.stem)
                    pictures.draw_images(row.pictures, row.captions, legend, file, columns=len(row.pictures))
                count += 1
    if rows:
        each = max(len(row.pictures) for row in rows)
        for row in rows:  # an image of the gallery has itself as no neighbour, so it may have one fewer
            blank = [np.full_like(row.pictures[0], 255)] * (each - len(row.pictures))
            row.pictures.extend(blank)
            row.captions.extend("" for _ in blank)
        drawn, captions = (list(itertools.chain.from_iterable(lists)) for lists in zip(*rows, strict=True))
        side_by_side = min(max(1, pictures.COLUMNS // each), len(rows))
        pictures.draw_images(drawn, captions, legend, arguments.output, columns=each * side_by_side)
    if count and not arguments.json:
        print(f"\n  see {naming.shown(arguments.output)}", flush=True)
    return images.report(unreadable)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser("xception-flax explain", __doc__, EXAMPLES, hosts=False)
    images.add_arguments(parser, BATCH_SIZE)
    parser.add_argument(
        "--output",
        type=cli.directory,
        default=Path("explained.png"),
        metavar="PICTURE",
        help=f"a row for each image, up to {MAX_ROWS}; or a folder: a picture for each image (explained.png)",
    )
    parser.add_argument("--class", dest="name", metavar="NAME", help="to explain; default: what the network says")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="STAGE", help="of Grad-CAM, such as stage4; may be repeated"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"of integrated gradients ({STEPS}); 0 leaves them out"
    )
    parser.add_argument("--baseline", type=float, default=0.0, metavar="GRAY", help="they start from, 0 to 255 (0)")
    parser.add_argument("--output-stride", type=int, metavar="N", help="16 or 8: finer maps, by dilated convolutions")
    parser.add_argument("--neighbours", type=cli.directory, metavar="FOLDER", help="of images to find similar ones in")
    parser.add_argument(
        "--nearest", type=cli.positive, default=NEAREST, metavar="N", help=f"neighbours of each image ({NEAREST})"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image, not the table")
    return parser.parse_args(argv)


def _gallery(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--neighbours {folder} is no folder; expected one with images.")
    return list(images.files([folder]))


def _check_output(output: Path, count: int) -> bool:
    """Returns whether all images go into one picture; makes the folder if they do not.

    Raises:
      UserError: they are too many for one, or nothing can be written there.
    """
    if not output.suffix or output.is_dir():
        check_kind(output, folder=True)
        with file_errors(output, "written"):
            output.mkdir(parents=True, exist_ok=True)
        return False
    from xception_flax.display import pictures

    pictures.check_suffix(output)
    if count > MAX_ROWS:
        raise UserError(
            f"{count:,} images do not fit into one picture, {MAX_ROWS} do; for a picture of each give a folder: "
            f"--output {output.with_suffix('')}"
        )
    check_writable(output)
    return True


def _neighbours(
    predictor: Predictor,
    paths: Sequence[Path],
    gallery: Sequence[Path],
    count: int,
    unreadable: list[tuple[Path, UserError]],
) -> dict[Path, list[Neighbour]]:
    """Returns the nearest images in the gallery to each image, `count` or as many as there are besides itself.

    Those that cannot be read are added to `unreadable`.
    """
    if not gallery:
        return {}
    there, features = [], []
    for path, values in images.outputs(predictor, gallery, "pooled", "embedding"):
        if isinstance(values, UserError):
            unreadable.append((path, values))
        else:
            there.append(path)
            features.append(values)
    if not there:
        return {}
    index = Gallery(there, np.stack(features))
    found = images.outputs(predictor, paths, "pooled", "comparing")
    return {path: index.nearest(path, values, count) for path, values in found if not isinstance(values, UserError)}


def _row(
    predictor: Predictor, path: Path, found: Explanation, neighbours: Sequence[Neighbour], folder: Path | None
) -> Row:
    names = predictor.class_descriptions or predictor.class_names
    best = int(found.probabilities.argmax())
    explained = naming.shown(names[found.number])
    row = Row([_shown(found.pixels)], [f"{naming.shown(path.name)}\n{_said(names[best], found.probabilities[best])}"])
    for stage, values in found.maps.items():
        row.pictures.append(heat.warm(found.pixels, values))
        row.captions.append(f"Grad-CAM, {stage}\n{explained}")
    if found.attributions is not None:
        row.pictures.append(heat.for_and_against(found.pixels, found.attributions.sum(-1)))
        row.captions.append(f"integrated gradients\n{explained}")
    for neighbour in neighbours:
        row.pictures.append(_shown(predictor.preprocessing.prepare(neighbour.path)))
        name = neighbour.path.relative_to(folder) if folder else neighbour.path
        row.captions.append(f"{naming.shown(name)}\nsimilarity {neighbour.similarity:.3f}")
    return row


def _file_name(number: int, stem: str) -> str:
    """Returns the name of an image's picture, the stem cut after a whole character where the name would be too long."""
    while len(os.fsencode(name := f"{number:04}_{stem}.png")) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return name


def _shown(pixels: np.ndarray) -> np.ndarray:
    return np.round(pixels[..., :3].clip(0, 255)).astype(np.uint8)  # as the network sees it: without regard to alpha


def _said(name: str, probability: float) -> str:
    return f"{naming.shown(name)} {console.percent(float(probability))}"


def _tell(
    predictor: Predictor,
    path: Path,
    found: Explanation,
    neighbours: Sequence[Neighbour],
    as_json: bool,
    title: str,
) -> None:
    """Prints what is said of an image, at once, so that an error with a later one does not lose it."""
    names, best = predictor.class_names, int(found.probabilities.argmax())
    total = None if found.attributions is None else float(found.attributions.sum(dtype=np.float64))
    if as_json:
        said = {
            "image": naming.decoded(path),
            "predicted": names[best],
            "class": names[found.number],
            "probability": float(found.probabilities[found.number]),
            "attributions": total,
            "logit_difference": found.difference,
            "neighbours": [{"image": naming.decoded(n.path), "similarity": n.similarity} for n in neighbours],
        }
        print(naming.to_json_line(said), flush=True)
        return
    if title:
        console.show_title(title)
    words = predictor.class_descriptions or names
    said = [_said(words[best], found.probabilities[best])]
    if found.number != best:
        said.append(f"explained: {_said(words[found.number], found.probabilities[found.number])}")
    if total is not None:
        said.append(f"attributions add up to {total:.2f} of the logit's change of {found.difference:.2f}")
    console.show_row(naming.shown(path), ", ".join(said), 0)
