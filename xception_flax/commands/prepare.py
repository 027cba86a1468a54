"""Prepares and checks data sets: ArrayRecord as TFDS writes it, without TensorFlow.

  imagenet   the two tars of ILSVRC2012 as TFDS' `imagenet2012`
  folder     your own images, CLASS/*.jpg or a table of them, as a TFDS data set
  check      reads every image of a data set, a folder or a table

If it was stopped or killed, the same command continues. A data set is in VERSION.incomplete until it is complete.
`--max-side` writes smaller images, which are read faster.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_flax import data
from xception_flax.commands import cli
from xception_flax.data import decoding
from xception_flax.data.loading import MAX_THREADS
from xception_flax.data.sources.splitting import VAL_FRACTION
from xception_flax.data.sources.table import Rows
from xception_flax.data.sources.tfds import REENCODED, Reencoding
from xception_flax.data.sources.unread import unread_of
from xception_flax.data.transforms.geometry import MAX_SIDE
from xception_flax.display import console
from xception_flax.host import files
from xception_flax.prepare import check, encoding, folder, imagenet, records, similar
from xception_flax.recipes import overrides
from xception_flax.recipes.checking import resolve_group
from xception_flax.recipes.signatures import keys_of
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError

GROUPING = "keep images of one video, patient or object in one split by data.group_by (docs/data.md)"

QUALITY = 90  # of JPEGs with --max-side, as FFCV's default

OVERRIDES = "how training divides and reads a folder or a table: group_by, stratify, label_column, ..."
CHECKED = f"{OVERRIDES}; {', '.join(check.DECODED)}"

EXAMPLES = """\
  xception-flax prepare imagenet --tars downloads --data-dir /data/tfds --hashes
  xception-flax prepare imagenet --tars downloads --data-dir /data/tfds --max-side 400
  xception-flax prepare folder photos --data-dir /data/tfds --val-fraction 0.2
  xception-flax prepare folder labels.csv --data-dir /data/tfds --config.data.label_column=breed
  xception-flax prepare check /data/tfds/imagenet2012/5.1.0 --json report.json"""


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax prepare", __doc__, EXAMPLES, hosts=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("imagenet", help="the two tars of ILSVRC2012", allow_abbrev=False)
    command.set_defaults(function=prepare_imagenet)
    command.add_argument("--tars", type=cli.directory, required=True, metavar="DIR", help="folder with the two tars")
    hashes = command.add_mutually_exclusive_group()
    hashes.add_argument("--hashes", action="store_true", help="check their MD5 too, which reads 155 GB")
    hashes.add_argument("--subset", action="store_true", help="accept tars of other sizes: a part of ImageNet")
    _add_output(command)

    command = commands.add_parser("folder", help="images in one folder per class, or in a table", allow_abbrev=False)
    command.set_defaults(function=prepare_folder)
    command.add_argument(
        "source",
        type=cli.directory,
        metavar="SRC",
        help="folder with CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg; or a table, .csv or .parquet",
    )
    command.add_argument(
        "--name", help="of the data set; default: SRC's name in small letters, and size and quality with --max-side"
    )
    cli.add_overrides(command, "data.KEY", OVERRIDES)
    _add_val_fraction(command, "SRC")
    _add_output(command)

    command = commands.add_parser("check", help="reads every image", allow_abbrev=False)
    command.set_defaults(function=check_data_set)
    command.add_argument(
        "dataset",
        type=cli.directory,
        metavar="DATASET",
        help="NAME/VERSION of a prepared data set, a folder or a table",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report with all names to FILE")
    cli.add_overrides(command, "data.KEY", CHECKED)
    _add_val_fraction(command, "DATASET")
    _add_threads(command)
    arguments, arguments.changes = parser.parse_known_args(argv)
    if arguments.changes and arguments.function is prepare_imagenet:
        parser.error(f"unrecognized arguments: {' '.join(arguments.changes)}")
    return arguments.function(arguments)


def _options(path: Path, arguments: argparse.Namespace, others: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the keywords of the source that were given: as training takes them, and --val-fraction.

    Args:
      path: of the data.
      arguments: of the command.
      others: further keys of training's data that have an effect here.

    Raises:
      UserError: a key is unknown or has no effect here, a value is wrong, or the data are given twice.
    """
    given = data.source_at(os.fspath(path))
    said = overrides.split(arguments.changes, ("data",))["data"]
    if twice := given.keys() & said.keys():
        raise UserError(f"the data are given twice, by {path} and by --config.data.{min(twice)}; give one.")
    group = resolve_group("data", {**given, "image_size": 1}, arguments.changes)
    known = (*keys_of(data.SOURCES[given["source"]]), *others)
    if idle := said.keys() - set(known):
        raise UserError(f"data.{min(idle)} has no effect here, only in training; leave out --config.data.{min(idle)}.")
    data.check_options(**group.to_dict())
    options = {key: group[key] for key in known if key in said}
    return options if arguments.val_fraction is None else options | {"val_fraction": arguments.val_fraction}


def _add_val_fraction(command: argparse.ArgumentParser, of: str) -> None:
    command.add_argument(
        "--val-fraction",
        type=_fraction,
        metavar="SHARE",
        help=f"share of {of}/CLASS/*.jpg in split val, chosen by a hash of the file's name as in training on a folder; "
        f"default: {VAL_FRACTION}",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir", type=cli.directory, required=True, metavar="DIR", help="folder of TFDS data sets; may be new"
    )
    command.add_argument(
        "--max-side",
        type=_number_to(MAX_SIDE),
        metavar="PX",
        help="write images with a larger side anew, as JPEGs whose longer side is PX; default: the originals",
    )
    command.add_argument(
        "--quality", type=_number_to(100), metavar="Q", help=f"of these JPEGs, 1 to 100; default: {QUALITY}"
    )
    _add_threads(command)


def _add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--num-threads",
        type=_number_to(MAX_THREADS),
        default=min(16, os.cpu_count() or 1),
        metavar="N",
        help="threads that read; default: %(default)s",
    )


def _number_to(largest: int) -> Callable[[str], int]:
    """Returns a type of arguments: a whole number from 1 to `largest`."""

    def parse(text: str) -> int:
        number = cli.positive(text)
        if number > largest:
            raise argparse.ArgumentTypeError(f"must be at most {largest:,}, got {text}")
        return number

    return parse


def _reencoding(arguments: argparse.Namespace) -> Reencoding | None:
    """Returns what is to be done to the images; None for nothing.

    Raises:
      UserError: --quality is given alone.
    """
    if arguments.max_side is None:
        if arguments.quality is not None:
            raise UserError("--quality is of images that --max-side scales; give both, or leave it out.")
        return None
    return Reencoding(arguments.max_side, arguments.quality or QUALITY)


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return fraction


# Preparing -----------------------------------------------------------------------------------------


def prepare_imagenet(arguments: argparse.Namespace) -> int:
    reencoding = _reencoding(arguments)
    paths = imagenet.find(arguments.tars, subset=arguments.subset)
    if arguments.hashes:
        for split, path in paths.items():
            with console.counting(f"MD5 of {path.name}", path.stat().st_size, "bytes") as advance:
                imagenet.check_hash(path, imagenet.TARS[split].md5, advance)
    info = imagenet.create_info(arguments.data_dir, reencoding)
    with console.counting("listing the tars", sum(path.stat().st_size for path in paths.values()), "bytes") as advance:
        splits = imagenet.list_images(paths, info, advance, subset=arguments.subset)
    return _prepare(info, splits, arguments, f"{arguments.tars}", reencoding)


def prepare_folder(arguments: argparse.Namespace) -> int:
    reencoding = _reencoding(arguments)
    path = arguments.source.expanduser().absolute()
    options = _options(path, arguments)
    splits = folder.open_images(path, options)
    first = next(iter(splits.values()))
    several = isinstance(first, Rows) and first.several
    name = folder.default_name(path)
    name = arguments.name or (name if reencoding is None else encoding.name_of(name, reencoding))
    info = folder.create_info(name, first.class_names, arguments.data_dir, several=several, reencoding=reencoding)
    if unread := unread_of(splits.values()):
        print(f"{naming.shown(path)}: {unread}", file=sys.stderr)
    images = folder.list_images(path, splits, options.get("data_dir"))
    return _prepare(info, images, arguments, str(path), reencoding)


def _prepare(
    info: tfds.core.DatasetInfo,
    splits: Mapping[str, Sequence[records.EncodedImage]],
    arguments: argparse.Namespace,
    origin: str,
    reencoding: Reencoding | None,
) -> int:
    layout = records.create_layout(info, splits, arguments.data_dir, origin, reencoding)
    if records.is_complete(layout):
        print(f"{naming.shown(layout.directory)} is prepared; nothing to do.")
        return 0
    with records.claim(layout) as missing:
        total = sum(shard.num_bytes for shard in layout.shards)
        done = total - sum(shard.num_bytes for shard in missing)
        what = f"writing {info.name}"
        if len(missing) < len(layout.shards):
            what += f", going on from shard {len(layout.shards) - len(missing):,} of {len(layout.shards):,}"
        with console.counting(what, total, "bytes", done=done) as advance:
            written = records.write(layout, missing, arguments.num_threads, advance)
        records.complete(layout, written)
    label = info.features["label"]
    several = isinstance(label, tfds.features.Sequence)
    num_classes = (label.feature if several else label).num_classes
    first = next(iter(splits.values()))
    labels = [image.label for image in first]
    shown = {number for label in labels for number in (label if isinstance(label, tuple) else (label,))}
    empty = num_classes - len(shown)
    classes = f"{num_classes:,}" + (f", {empty:,} without an image" if empty else "")
    rows = {split: counted(len(images), "image") for split, images in splits.items()} | {"classes": classes}
    if reencoding is not None:
        rows["re-encoded"] = f"{reencoding}: {info.dataset_size / 1e6:,.1f} MB of {total / 1e6:,.1f}"
    console.show_table(
        naming.shown(layout.directory),
        rows
        | {
            # Without the version, TFDS would take its own data set of that name, if it has one.
            "train by": f"--config.data.source=tfds --config.data.name={info.name}:{info.version} "
            f"--config.data.data_dir={shlex.quote(str(layout.directory.parent.parent))}",
            "read all by": f"xception-flax prepare check {shlex.quote(str(layout.directory))}",
        },
    )
    return 0


# Checking ------------------------------------------------------------------------------------------


def check_data_set(arguments: argparse.Namespace) -> int:
    path = arguments.dataset.expanduser().absolute()
    options = _options(path, arguments, check.DECODED)
    decoded = {key: options.pop(key) for key in check.DECODED if key in options}
    splits, refused = check.open_splits(path, options)
    of_training = {split: source for split, source in splits.items() if split in ("train", "val")} or splits
    class_names = folder.common_classes(arguments.dataset, of_training)
    reencoding = data.reencoding_of(next(iter(splits.values())))
    if arguments.json is not None:
        files.check_writable(arguments.json)  # before hours of reading, not after
    total = sum(map(len, splits.values()))
    with console.counting(f"reading {arguments.dataset.name}", total, "image") as advance:
        images = check.read_all(splits, arguments.num_threads, advance, decoded)
    report = {split: check.describe(found, splits[split].class_names) for split, found in images.items()}
    repeated, alike = check.repeated(images), check.alike(images)
    if arguments.json is not None:
        unread = sorted({file for source in splits.values() for file in getattr(source, "unread", ())})
        content = {
            "splits": report,
            "repeated": repeated,
            "alike": alike,
            "unread": [file._asdict() for file in unread],
            REENCODED: None if reencoding is None else reencoding._asdict(),
        }
        arguments.json.write_text(naming.to_json(content, indent=1) + "\n")
    _show(report, repeated)
    _show_alike(alike)
    if reencoding is not None:
        print(f"\nre-encoded: {reencoding}")
    if unread := unread_of(splits.values()):
        print(f"\n{unread}")
    other = [split for split, source in splits.items() if source.class_names != class_names]
    if other:  # training does not use these splits, but `evaluate` would refuse them
        print(f"\nother classes than training's: split {', '.join(other)}")
    for mistake in refused:
        print(f"\ntraining refuses it: {naming.harmless(mistake)}")
    return 1 if other or refused or any(described["undecodable"] for described in report.values()) else 0


def _show(report: Mapping[str, dict[str, Any]], repeated: Sequence[Sequence[str]]) -> None:
    for split, described in report.items():
        counts = list(described["classes"].values())
        least, most = min(counts), max(counts)
        rows = {
            "images": f"{described['images']:,}",
            "classes": f"{len(counts):,}, with "
            + (f"{counted(most, 'image')} each" if least == most else f"{least:,} to {counted(most, 'image')}"),
        }
        if 0 in counts:
            rows["without an image"] = counted(counts.count(0), "class")
        rows["undecodable"] = f"{len(described['undecodable']):,}"
        for what in ("bytes", "pixels"):
            low, middle, high = described[what]
            if high:  # else there is no image
                rows[what] = f"{low:,} to {high:,}, median {middle:,}"
        if wide := described["sixteen_bits"]:
            rows["16 bits"] = f"{counted(wide['images'], 'image')}, of values up to {wide['largest']:,}"
        console.show_table(split, rows)
    found = [wide for split in report.values() if (wide := split["sixteen_bits"])]
    largest = max((wide["largest"] for wide in found), default=0)
    if found and decoding.is_dark(largest):
        print(f"\nno value in the upper half of 16 bits: train by --config.data.max_value={decoding.white(largest)}")
    elif dark := sum(wide["dark"] for wide in found):
        number = sum(wide["images"] for wide in found)
        has = "has" if dark == 1 else "have"
        print(
            f"\n{dark:,} of {counted(number, 'image')} of 16 bits {has} no value in the upper half; is white less than "
            f"{decoding.WHITE} there?"
        )

    def is_across(names: Sequence[str]) -> bool:
        return len({name.partition(": ")[0] for name in names}) > 1

    across = sum(map(is_across, repeated))
    are = "is" if len(repeated) == 1 else "are"
    print(f"\n{counted(len(repeated), 'file')} {are} there more than once, {across:,} of them in more than one split")
    for names in sorted(repeated, key=is_across, reverse=True)[:10]:  # those in several splits first
        print(f"  {' = '.join(map(naming.shown, names[:5]))}{' ...' if len(names) > 5 else ''}")
    if across:
        print(f"  {GROUPING}")
    undecodable = [f"{split}: {name}" for split in report for name in report[split]["undecodable"]]
    if undecodable:
        print(f"\n{counted(len(undecodable), 'image')} cannot be read or decoded")
        for name in undecodable[:20]:
            print(f"  {naming.shown(name)}")
        if len(undecodable) > 20:
            print("  ... (all by --json FILE)")


def _show_alike(alike: Sequence[Mapping[str, Any]]) -> None:
    if not alike:
        return
    looks = "looks" if len(alike) == 1 else "look"
    print(
        f"\n{counted(len(alike), 'image')} {looks} nearly the same as one of another split (pHash, up to "
        f"{similar.MAX_DISTANCE} of 64 bits differ)"
    )
    for pair in alike[:10]:
        print(f"  {' ~ '.join(map(naming.shown, pair['images']))} ({pair['distance']})")
    print(f"  {'... (all by --json FILE); ' if len(alike) > 10 else ''}{GROUPING}")
