"""Reads a trained network, whoever trained it, and writes it for another library, or compares it with its own."""

from pathlib import Path

from xception_flax.commands import cli, images
from xception_flax.display import console
from xception_flax.runs.restore import Run
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.training import sharding
from xception_flax.weights import source, verifying, writing
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.word import told

EXAMPLES = """\
  xception-flax convert keras:xception --output xception.safetensors
  xception-flax convert runs/photos --output photos.keras
  xception-flax convert mine.keras --class-names classes.txt --output hub_folder
  xception-flax convert keras:xception --verify"""


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax convert", __doc__, EXAMPLES, hosts=False)
    parser.add_argument("source", metavar="SOURCE", help="as of predict: a workdir, a file or folder, or a name")
    cli.add_checkpoint(parser)
    parser.add_argument(
        "--output",
        type=cli.directory,
        metavar="FILE|DIR",
        help="; ".join(f"{suffix or 'no suffix'}: {form.meaning}" for suffix, form in writing.FORMATS.items()),
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare with the library it is from, which must be installed"
    )
    images.add_word(parser)
    arguments = parser.parse_args(argv)
    word = images.word(arguments)
    if arguments.output is not None:
        writing.check_output(arguments.output)
    elif not arguments.verify:
        parser.error("expected --output, --verify, or both")
    cli.start(arguments)
    found = source.open_source(arguments.source, sharding.create_mesh(), arguments.checkpoint, arguments.weights)
    found = told(found, **word)
    pretrained = source.from_run(found) if isinstance(found, Run) else found
    if arguments.verify and not _verify(arguments.source, pretrained):
        return 1
    if arguments.output is None:
        return 0
    written = writing.write(pretrained, arguments.output)
    rows = {
        "network": f"{pretrained.model['name']}, {counted(pretrained.model.get('num_classes', 0), 'class')}",
        **({"left out": "; ".join(pretrained.left_out)} if pretrained.left_out else {}),
        "written": naming.shown(written.path),
        **({"note": "; ".join(written.notes)} if written.notes else {}),
    }
    console.show_table(naming.shown(Path(arguments.source)), rows)
    return 0


def _verify(name: str, pretrained: Pretrained) -> bool:
    """Prints how far the network is from its library's, and returns whether they agree."""
    found = verifying.verify(pretrained)
    rows = {stage: f"{value:.1e} of the spread" for stage, value in found.differences.items()}
    first = found.first
    rows["agree"] = f"yes, to {verifying.MAX_DIFFERENCE:.0e}" if first is None else f"not from {first} on"
    if first is not None:
        rows["maybe"] = verifying.reason(pretrained, first)
    console.show_table(f"{naming.shown(Path(name))} and {found.against}", rows)
    return first is None
