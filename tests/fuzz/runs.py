"""What describes a run or is left by one: recipes, overrides, config.json, metrics.jsonl, checkpoints, predictions."""

import argparse
import hashlib
import json
import random
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tests.fuzz import mutation, weights
from tests.fuzz.examples import hostile_column
from tests.fuzz.kinds import Files, Kind, WrongError, write
from tests.reports import predicted
from xception_flax import data, models
from xception_flax.commands import cli
from xception_flax.commands import images as commands
from xception_flax.recipes import reading, trial
from xception_flax.recipes.groups import GROUPS, LOOP
from xception_flax.reports import comparing, predictions
from xception_flax.runs import curves, history
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import read_recipe
from xception_flax.training import length, losses, metrics, mixing, optimizers, sharding, steps
from xception_flax.training.patience import Patience
from xception_flax.weights import word

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "digits.py"

# Recipes and overrides -----------------------------------------------------------------------------

VALUES = [
    "1", "0", "-1", "0.5", "1e-9", "1e39", "nan", "inf", "-inf", "None", "True", "[]", "()", "(1,)", "(1,2,3)", "{}",
    "'x'", '""', "224x320", "0x10", "1e400", "9" * 400, "9" * 5000, "center_crop", "resize;flip", "sgd", "adamw",
    "xception", "lenet", "float16", "bfloat16", "complex64", "object", "S1", "int8", "10:12", "a.b", "__import__('os')",
    "center_crop(fraction=2)", "center_crop(fraction=1e-30)", "random_resized_crop(min_area=nan)",
    "resize(image_size=0)",
    "rand_augment(magnitude=99)", "random_crop_with_padding(padding=999999999)", "color_jitter(", "flip()()", "(" * 500,
    "flip;" * 50, "'conv=0,block=0.1'", "{'a': 1}", "'block.*=0'", "((((((1,),),),),),)", "1_0", "balanced",
]  # fmt: skip


@cache
def _keys() -> tuple[str, ...]:
    found = list(LOOP.keys())
    for name, group in GROUPS.items():
        for choice in group.table or ("",):
            found += [f"{name}.{key}" for key in group.keys(choice)]
        if group.selector:
            found.append(f"{name}.{group.selector}")
    return tuple(dict.fromkeys(found))


@cache
def _own_keys() -> tuple[str, ...]:
    """The keys that the recipe has as it is."""
    config = reading.load(str(RECIPE)).to_dict()
    inside = (f"{name}.{key}" for name in GROUPS for key in config[name])
    return (*(key for key in config if key not in GROUPS), *inside)


def _make_overrides(draw: random.Random) -> Files:
    given = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice(_keys() if draw.random() < 0.4 else _own_keys())
        if draw.random() < 0.1:
            key = draw.choice((mutation.changed_text(draw, key), key.upper(), f"{key}.x", "", ".", "model", "a.b.c"))
        value = draw.choice(VALUES) if draw.random() < 0.7 else draw.choice(mutation.HOSTILE_TEXTS)
        if draw.random() < 0.3:
            value = str(draw.choice(mutation.HOSTILE_NUMBERS[:-6]))
        text = f"--config.{key}={value}"
        given.append(text if draw.random() < 0.95 else mutation.changed_text(draw, text))
    return {"overrides.json": json.dumps(given).encode()}


def read_overrides(folder: Path) -> None:
    """Overrides as every command takes them; and what they set, as far as that takes no seconds."""
    given = json.loads((folder / "overrides.json").read_text())
    _create(reading.load(str(RECIPE), given))


def _create(config: Any) -> None:
    """Makes the parts of a run that need no data and no tracing."""
    data.check_options(**config.data)
    models.create_model(**config.model)
    schedule = optimizers.create_schedule(
        **config.schedule, run=length.create_length(config.epochs, config.batch_size, 10**6)
    )
    optimizers.create_optimizer(**config.optimizer, schedule=schedule)
    losses.create_loss(**config.loss)
    metrics.create_metrics(**config.metrics)
    steps.create_normalizer(**config.normalize)
    mixing.make_mixing(**config.mix)


def read_values(folder: Path) -> None:
    """Overrides, and all of the run that can be put together without its data."""
    given = json.loads((folder / "overrides.json").read_text())
    small = ["--config.model.width=0.05"] if not any("model." in text for text in given) else []
    trial.check_values(reading.load(f"{RECIPE}:lenet" if small else str(RECIPE), [*small, *given]))


def _make_recipe(draw: random.Random) -> Files:
    text = draw.choice((RECIPE, ROOT / "configs" / "cifar10.py")).read_text()
    if draw.random() < 0.7:
        changed = mutation.encoded(mutation.changed_text(draw, text))
    else:
        changed = mutation.changed_bytes(draw, text.encode())
    return {"configs/recipe.py": changed}


def read_recipe_file(folder: Path) -> None:
    """A recipe as every command reads it."""
    _create(reading.load(str(folder / "configs" / "recipe.py")))


# A workdir -----------------------------------------------------------------------------------------


@cache
def _old() -> dict[str, bytes]:
    with tarfile.open(weights.GOLDEN / "workdir_0.1.tar.xz") as files:
        whole = {member.name: files.extractfile(member).read() for member in files if member.isfile()}
    return {name: content for name, content in whole.items() if not name.startswith("checkpoints/79")}


def _make_config(draw: random.Random) -> Files:
    content = _old()["config.json"]
    if draw.random() < 0.75:
        return {"config.json": mutation.json_bytes(draw, json.loads(content))}
    return {"config.json": mutation.changed_bytes(draw, content)}


def read_config(folder: Path) -> None:
    """A config.json as every command on a run reads it."""
    _create(read_recipe(folder))


def _make_metrics(draw: random.Random) -> Files:
    lines = _old()["metrics.jsonl"].splitlines()
    for _ in range(draw.choice((1, 1, 3))):
        place = draw.randrange(len(lines))
        if draw.random() < 0.8:
            record = json.loads(draw.choice(_old()["metrics.jsonl"].splitlines()))
            record |= {} if draw.random() < 0.5 else {"train/bad_images": 1}
            key = draw.choice([*record, "train/bad_images", "eval/loss", "eval/top1", "eval/weights", "step"])
            record[key] = mutation.value(draw)
            lines[place] = json.dumps(record).encode()
        else:
            lines[place] = mutation.changed_bytes(draw, lines[place])
    content = b"\n".join(lines) + b"\n"
    return {"metrics.jsonl": content if draw.random() < 0.8 else mutation.changed_bytes(draw, content)}


def read_metrics(folder: Path) -> None:
    """A history as a run that goes on reads it, and as one that ends."""
    path = folder / "metrics.jsonl"
    before = path.read_bytes()
    records = history.read_metrics(path)
    if not isinstance(history.count_bad_images(path), int):
        raise WrongError("the number of bad images is no integer")
    for metric in ("", "loss"):
        patience = Patience("single_label", metric, 3.0, length.create_length(2, 16, 1257))
        patience.add_history(records, 50)
        assert patience.is_over in (True, False)
    file, _ = history.open_metrics(path, 40)
    file.close()
    left = history.read_metrics(path)
    if left != [record for record in records if record["step"] <= 40]:
        raise WrongError("other records are left than those up to the step")
    if kept := [line for line in path.read_bytes().splitlines(keepends=True) if line.rstrip(b"\n") not in before]:
        raise WrongError(f"a line that was not there: {kept[0][:60]!r}")


def read_curves(folder: Path) -> None:
    """The same, drawn."""
    curves.draw_run(folder)


@cache
def _mesh() -> Any:
    return sharding.create_mesh(devices=jax.devices()[:1])


def _make_checkpoint(draw: random.Random) -> Files:
    files = dict(_old())
    name = draw.choice([name for name in files if name.startswith("checkpoints/")])
    if draw.random() < 0.1:
        del files[name]
    elif name.endswith(("metadata", "METADATA", "_sharding", "metrics")) and draw.random() < 0.5:
        try:
            files[name] = mutation.json_bytes(draw, json.loads(files[name]))
        except ValueError:
            files[name] = mutation.changed_bytes(draw, files[name])
    else:
        files[name] = mutation.changed_bytes(draw, files[name])
    return files


def read_checkpoint(folder: Path) -> None:
    """A run as every command restores it: the weights that were saved, or an error. They have checksums."""
    run = restore(folder, _mesh(), "latest")
    if len(run.class_names) != 10:
        raise WrongError(f"the run has {len(run.class_names)} names of classes; its network has 10")
    if run.step != 40 or _variables(run.variables) != _true_variables():
        raise WrongError("the run has other weights than were saved")
    run.measured()


def _variables(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@cache
def _true_variables() -> str:
    folder = Path(tempfile.mkdtemp())
    try:
        write(_old(), folder)
        return _variables(restore(folder, _mesh(), "latest").variables)
    finally:
        shutil.rmtree(folder)


# What a user says of a network ---------------------------------------------------------------------


def _make_names(draw: random.Random) -> Files:
    text = "cat\ndog\nn\u00e9\n"
    changed = mutation.encoded(mutation.changed_text(draw, text))
    content = changed if draw.random() < 0.6 else mutation.changed_bytes(draw, text.encode("utf-8-sig"))
    said = [*draw.choice([[], ["--mean", "1", "2", "3", "--std", "1"], ["--image-size", draw.choice(VALUES)]])]
    if draw.random() < 0.3:
        said = ["--mean", str(draw.choice(mutation.HOSTILE_NUMBERS[16:20])), "--std", draw.choice(VALUES)]
    if draw.random() < 0.2:
        said += ["--transforms", draw.choice(VALUES)]
    return {"classes.txt": content, "arguments.json": json.dumps(said).encode()}


def read_names(folder: Path) -> None:
    """A file of names, and the other words of a user, as `predict` takes them."""
    parser = cli.parser("predict", "", "", hosts=False)
    commands.add_word(parser)
    given = ["--class-names", str(folder / "classes.txt"), *json.loads((folder / "arguments.json").read_text())]
    arguments: argparse.Namespace = parser.parse_args(given)
    network = word.told(weights.lenet(), **commands.word(arguments))
    if len(set(network.class_names)) != 3:
        raise WrongError(f"names of classes: {network.class_names}")


# Predictions ---------------------------------------------------------------------------------------

ABOUT = {"title": "runs/a, step 3", "fingerprint": "f" * 64, "split": "val", "source": "runs/a"}
NAMES = [f"cat/{i}.jpg" for i in range(9)]


@cache
def _predictions() -> bytes:
    path = Path(tempfile.mkdtemp()) / "predictions_val.parquet"
    predictions.write(predicted.single(np.random.default_rng(0), 9, 3), NAMES, dict(ABOUT), path)
    content = path.read_bytes()
    shutil.rmtree(path.parent)
    return content


def _make_predictions(draw: random.Random) -> Files:
    whole = _predictions()
    if draw.random() < 0.5:
        return {"predictions_val.parquet": mutation.changed_bytes(draw, whole)}
    table = parquet.read_table(pa.BufferReader(whole))
    said = json.loads(table.schema.metadata[predictions.KEY])
    match draw.randrange(3):
        case 0:
            place = table.column_names.index(draw.choice(["index", "file", "true", "correct"]))
            table = table.set_column(place, table.column_names[place], hostile_column(draw, table.num_rows))
        case 1 if draw.random() < 0.3:
            table = table.drop_columns([draw.choice(table.column_names)])
        case _:
            content = b"[" * 3000 if draw.random() < 0.05 else mutation.json_bytes(draw, said)
            table = table.replace_schema_metadata({predictions.KEY: content})
    file = pa.BufferOutputStream()
    parquet.write_table(table, file)
    return {"predictions_val.parquet": file.getvalue().to_pybytes()}


def read_predictions(folder: Path) -> None:
    """Predictions of another network, as `evaluate --compare` takes them."""
    this = predicted.single(np.random.default_rng(0), 9, 3)
    other = comparing.open_other(folder, "val")
    found = comparing.compare(this, NAMES, ABOUT["fingerprint"], other)
    if not found.both + found.neither + found.only_this + found.only_other == len(this.index):
        raise WrongError("the images of a comparison are not all")


KINDS = {
    "overrides": Kind(_make_overrides, read_overrides, share=2),
    "values": Kind(_make_overrides, read_values, share=0.05),
    "recipe": Kind(_make_recipe, read_recipe_file),
    "config": Kind(_make_config, read_config, share=1.5),
    "metrics": Kind(_make_metrics, read_metrics, share=1.5),
    "curves": Kind(_make_metrics, read_curves, share=0.1),
    "checkpoint": Kind(_make_checkpoint, read_checkpoint, share=0.2),
    "names": Kind(_make_names, read_names, share=0.7),
    "predictions": Kind(_make_predictions, read_predictions),
}
