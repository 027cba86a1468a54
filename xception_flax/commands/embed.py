"""Writes the pooled features of images, which a trained network has before its classifier."""

import importlib.util
import io
from pathlib import Path

import numpy as np

from xception_flax.commands import cli, images
from xception_flax.display import console
from xception_flax.host.files import check_writable, write_whole
from xception_flax.text import naming
from xception_flax.text.errors import UserError

EXAMPLES = """\
  xception-flax embed keras:xception holiday/ --output holiday.npy
  xception-flax embed runs/photos holiday/ --output holiday.parquet"""


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax embed", __doc__, EXAMPLES, hosts=False)
    images.add_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npy: float32 [images, features], and the files' names beside it in FILE.files.txt; .parquet: both",
    )
    arguments = parser.parse_args(argv)
    source, paths = images.given(arguments)
    if arguments.output.suffix not in WRITERS:
        raise UserError(f"--output {arguments.output} must end in {' or '.join(WRITERS)}.")
    if arguments.output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{arguments.output}: Parquet is written by pyarrow; pip install pyarrow, or write .npy.")
    check_writable(arguments.output)
    cli.start(arguments)
    with cli.out_of_memory(cli.LOWER_BATCH_SIZE):
        predictor = images.load(source, arguments)
        files, rows, unreadable = [], [], []
        for path, features in images.outputs(predictor, paths, "pooled", "embedding"):
            if isinstance(features, UserError):
                unreadable.append((path, features))
            else:
                files.append(naming.decoded(path))
                rows.append(features)
    if rows:
        WRITERS[arguments.output.suffix](arguments.output, files, np.stack(rows))
        shape = f"{len(rows):,} x {rows[0].size:,}"
        console.show_table(
            images.title(source, predictor), {"features": shape, "written": naming.shown(arguments.output)}
        )
    return images.report(unreadable)


def _write_npy(path: Path, files: list[str], features: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, features)
    write_whole(path, [content.getbuffer()])
    write_whole(path.with_suffix(".files.txt"), ["".join(f"{naming.harmless(name)}\n" for name in files).encode()])


def _write_parquet(path: Path, files: list[str], features: np.ndarray) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"file": files, "features": pyarrow.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])}
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    write_whole(path, [content.getbuffer()])


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
