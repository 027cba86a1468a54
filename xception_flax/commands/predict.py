"""Predicts the classes of images: the most likely ones and their probabilities."""

import csv
import sys

import numpy as np
from rich.cells import cell_len

from xception_flax.commands import cli, images
from xception_flax.data.decoding import WHITE
from xception_flax.display import console
from xception_flax.text import naming
from xception_flax.text.errors import UserError

EXAMPLES = """\
  xception-flax predict runs/photos cat.jpg dog.png
  xception-flax predict runs/photos holiday/ --json > holiday.jsonl
  xception-flax predict keras:xception cat.jpg
  xception-flax predict fine_tuned.keras holiday/ --csv --class-names classes.txt > holiday.csv"""

MAX_WIDTH = 60  # of the column of files, in terminal cells; a longer name moves its own row only


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax predict", __doc__, EXAMPLES, hosts=False)
    images.add_arguments(parser)
    parser.add_argument("--top", type=cli.positive, default=5, metavar="N", help="classes to show for each image (5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON for each image, not the table")
    form.add_argument("--csv", action="store_true", help="print CSV: a row for each class shown of each image")
    arguments = parser.parse_args(argv)
    source, paths = images.given(arguments)
    cli.start(arguments)
    with cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        predictor = images.load(source, arguments)
        width = min(max(cell_len(naming.shown(path)) for path in paths), MAX_WIDTH)
        names = predictor.class_names  # in the table codes are in words
        words = dict(zip(names, predictor.class_descriptions or names, strict=True))
        rows = csv.writer(sys.stdout, lineterminator="\r\n")  # RFC 4180
        readable, unreadable, dark = 0, [], []
        # Each result is printed at once, so that an error with a later image does not lose it.
        for path, scores in images.outputs(predictor, paths, "probabilities", "predicting", dark):
            if isinstance(scores, UserError):
                unreadable.append((path, scores))
                continue
            order = np.argsort(-scores, kind="stable")[: arguments.top]
            best = {predictor.class_names[i]: float(scores[i]) for i in order}
            if arguments.json:
                print(naming.to_json_line({"image": naming.decoded(path), "classes": best}), flush=True)
            elif arguments.csv:
                if not readable:
                    rows.writerow(["image", "rank", "class", "probability"])
                for rank, (name, p) in enumerate(best.items(), start=1):
                    rows.writerow([naming.decoded(path), rank, name, f"{p:.6g}"])
                sys.stdout.flush()
            else:
                if not readable:
                    console.show_title(images.title(source, predictor))
                row = "  ".join(f"{naming.shown(words[name])} {console.percent(p)}" for name, p in best.items())
                console.show_row(naming.shown(path), row, width)
            readable += 1
    if dark:
        print(
            f"{len(dark):,} of {len(paths):,} files, the first {naming.shown(dark[0])}, are of 16 bits and have no "
            f"value in the upper half; if white is less than {WHITE} there, the run needs data.max_value.",
            file=sys.stderr,
        )
    return images.report(unreadable)
