"""Writes a trained network as a program for another runtime, and runs that to compare: uint8 images in, classes out."""

import itertools
import sys
from pathlib import Path

from xception_flax.commands import cli, images
from xception_flax.data.sources import folder
from xception_flax.display import console
from xception_flax.export import quantizing, verifying, writing
from xception_flax.export.options import PLATFORMS, Options
from xception_flax.export.program import OUTPUTS, create_program
from xception_flax.export.quantizing import Quantized
from xception_flax.export.verifying import MAX_DIFFERENCE, NotVerifiedError
from xception_flax.host import signals
from xception_flax.host.libraries import check_extra
from xception_flax.inference import predictor
from xception_flax.runs.restore import Run
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest
from xception_flax.training import sharding
from xception_flax.weights import source
from xception_flax.weights.word import told

EXAMPLES = """\
  xception-flax export runs/photos --format stablehlo --output photos.stablehlo
  xception-flax export keras:xception --format onnx --output xception.onnx"""


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax export", __doc__, EXAMPLES, hosts=False)
    images.add_network(parser)
    meanings = (f"{name} ({form.meaning}, {form.suffix or 'a folder'})" for name, form in writing.FORMATS.items())
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(meanings))
    parser.add_argument("--output", type=cli.directory, required=True, metavar="FILE", help="and FILE.json beside it")
    parser.add_argument(
        "--outputs", default=OUTPUTS[0], metavar="WHAT", help=f"{OUTPUTS[0]} (default), {' or '.join(OUTPUTS[1:])}"
    )
    parser.add_argument(
        "--any-size", action="store_true", help="images of other sizes too: a multiple of 32 pixels more or less"
    )
    parser.add_argument("--platforms", metavar="NAME,...", help=f"of stablehlo: some of {','.join(PLATFORMS)} (all)")
    parser.add_argument("--no-verify", action="store_true", help="do not run the file to compare it with the network")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="compare with photos from there, not those of scikit-learn"
    )
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="FOLDER",
        help="of onnx: in int8, calibrated on half of the images there; what that costs is measured on the other half",
    )
    images.add_word(parser)
    arguments = parser.parse_args(argv)
    word, verify = images.word(arguments), not arguments.no_verify
    platforms = _platforms(arguments.platforms, arguments.format, verify)
    options = Options(arguments.any_size, platforms, arguments.int8)
    writing.check(arguments.format, arguments.output, options, verify=verify)
    if arguments.int8 is not None:
        if arguments.outputs == "features":
            raise UserError("--int8 is measured by classes; give --outputs probabilities or logits.")
        _check_folder("--int8", arguments.int8)
        quantizing.images_of(arguments.int8)
    if arguments.images is not None and not verify:
        raise UserError("--images is for the comparison, which --no-verify leaves out; give one of them.")
    photos = _photos(arguments.images, arguments.format) if verify else None
    cli.start(arguments)
    mesh = sharding.create_mesh()
    found = told(source.open_source(arguments.source, mesh, arguments.checkpoint, arguments.weights), **word)
    pretrained = source.from_run(found) if isinstance(found, Run) else found
    network = predictor.from_pretrained(pretrained, mesh)
    for note in network.notes:
        print(note, file=sys.stderr)
    program = create_program(network, arguments.outputs)
    try:
        with signals.unwinding(), console.waiting(f"writing {arguments.output.name}"):
            made = writing.write(program, network, pretrained, arguments.format, arguments.output, options, photos)
    except NotVerifiedError as error:
        cli.complain(f"{arguments.output} was not written: {error}.")
        return 1
    rows = {
        "images": f"uint8 [{', '.join(map(str, writing.input_shape(program, options)))}], 0 to 255",
        arguments.outputs: f"float32 [batch, {program.size:,}]",
        "verified": "no" if made.verified is None else _figure(made.verified, "in float32, " if options.int8 else ""),
        **({} if made.quantized is None else _quantized(made.quantized)),
        "written": f"{naming.shown(arguments.output)}, {_bytes(arguments.output) / 1e6:,.1f} MB",
    }
    console.show_table(images.title(arguments.source, network), rows)
    return 0


def _figure(verified: verifying.Verified, what: str) -> str:
    return (
        f"{what}by its own runtime on {verified.images} photos: differs by {verified.difference:.1e} of the spread "
        f"(at most {MAX_DIFFERENCE:.0e})"
    )


def _quantized(found: Quantized) -> dict[str, str]:
    """The rows of a file in int8."""
    others = f"{found.measured:,} others" if found.held_out else "the same, as there are few"
    rows = {
        "int8": f"calibrated on {counted(found.calibrated, 'image')}, measured on {others}",
        "same top-1": f"{found.agreeing:,} of {found.measured:,} as in float32",
        "probability": f"changes by {found.mean:.1e} on average, by {found.largest:.1e} at most",
    }
    if found.labelled:
        float32, int8 = (console.percent(right / found.labelled) for right in found.right)
        rows["top-1 accuracy"] = f"{int8}, {float32} in float32, of the {found.labelled:,} in folders of its classes"
    return rows


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _platforms(names: str | None, form: str, verify: bool) -> tuple[str, ...]:
    """Returns the platforms of `--platforms`."""
    if names is None:
        return PLATFORMS
    if form != "stablehlo":
        raise UserError(f"--platforms is of stablehlo; {form} runs where its runtime does.")
    platforms = tuple(dict.fromkeys(names.split(",")))
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"unknown platform {name!r}; {suggest(name, PLATFORMS)}")
    if verify and "cpu" not in platforms:
        raise UserError("the file is run on a CPU to compare it; give --platforms cpu too, or --no-verify.")
    return platforms


def _check_folder(option: str, path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{option} {naming.shown(path)} is no folder.")


def _photos(path: Path | None, form: str) -> list:
    """Returns the photos to compare with: those of a folder, at most `MAX_IMAGES`."""
    if path is None:
        check_extra(form, ("sklearn",), "--verify without --images")
        return verifying.photos()
    _check_folder("--images", path)
    found, _ = folder.list_files(path)
    if not found:
        raise UserError(f"--images {path} has no image (of {', '.join(folder.IMAGE_SUFFIXES)}).")
    return list(itertools.islice(found, verifying.MAX_IMAGES))
