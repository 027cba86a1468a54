"""Reads a trained network, whoever trained it, and writes it for another library."""

from pathlib import Path

from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.runs.restore import Run
from xception_flax.text import naming
from xception_flax.training import sharding
from xception_flax.weights import source, writing

EXAMPLES = """\
  xception-flax convert keras:xception --output xception.safetensors
  xception-flax convert runs/photos --output photos.keras
  xception-flax convert model.pth --output hub_folder/"""


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax convert", __doc__, EXAMPLES, hosts=False)
    cli.add_source(parser)
    parser.add_argument(
        "--output",
        type=cli.directory,
        required=True,
        metavar="FILE|DIR",
        help=f"by its suffix: {writing.describe_forms()}",
    )
    arguments = parser.parse_args(argv)
    writing.check_output(arguments.output)
    cli.start(arguments)
    found = source.open_source(arguments.source, sharding.create_mesh(), arguments.checkpoint, arguments.weights)
    pretrained = source.from_run(found) if isinstance(found, Run) else found
    written = writing.write(pretrained, arguments.output)
    rows = {
        "network": describe(pretrained),
        "classes": f"{len(pretrained.class_names):,} with names" if pretrained.class_names else "without names",
        **({"left out": "; ".join(pretrained.left_out)} if pretrained.left_out else {}),
        "written": ", ".join(naming.shown(path) for path in written),
    }
    console.show_table(naming.shown(Path(arguments.source)), rows)
    return 0
