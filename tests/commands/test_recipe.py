"""`recipe`: every key with its value, type, default and meaning, as a table and as JSON."""

import json
import shlex
from pathlib import Path

import pytest

from xception_flax.commands import recipe
from xception_flax.recipes import reading
from xception_flax.recipes.groups import GROUPS, LOOP
from xception_flax.runs.workdir import remember
from xception_flax.text.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = str(CONFIGS / "digits.py")


def run(capsys, *arguments: str) -> str:
    assert recipe.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_key_is_shown_with_value_type_default_and_meaning(capsys):
    lines = run(capsys, DIGITS, "--config.eval_every_epochs=inf", "--config.model.fc_layers=(64,)").splitlines()
    assert lines[0] == f"{DIGITS}: * is not the default; --config.KEY=VALUE sets a value"
    for shown in (
        ("* batch_size=64                               integer, required", "of all hosts"),
        ("* eval_every_epochs=inf                       number or inf, default 1.0", "the end is always evaluated"),
        ("  seed=0                                      integer, default 0", "of initial weights, data order"),
        ("  profile=                                    text, default ''", "steps to trace into"),
        ("* model.fc_layers='(64,)'                     list of integers, default ()", "widths of hidden layers"),
        ("* optimizer.learning_rate=0.003               number, required", "where the schedule's factor is 1"),
        ("  optimizer.clip_norm=None                    number or None, default None", "gradients longer than this"),
        ("* schedule.name=cosine                        text, default constant", "a key of `SCHEDULES`: constant, exp"),
        ("  model.dtype=float32                         data type, default float32", "of the computation"),
    ):
        line, meaning = shown
        assert meaning in lines[lines.index(line) + 1]
    assert [line for line in lines if line and not line.startswith((" ", "*"))][1:] == [
        *("outside of groups", "model: xception", "init", "normalize", "loss: softmax", "metrics: single_label"),
        *("optimizer: adamw", "schedule: cosine", "mix", "step", "data: digits", "mesh", "checkpoint"),
    ]


def test_lines_fit_a_terminal_but_for_long_values(capsys):
    _, *lines = run(capsys, str(CONFIGS / "imagenet_modern.py")).splitlines()  # the first has the file's path
    long = [line for line in lines if len(line) > 100]
    assert len(long) == 1
    assert long[0].startswith("* data.train_transforms=")


@pytest.mark.parametrize("name", ["digits", "digits:lenet", "imagenet_modern", "imagenet_aligned:xception71", "jft"])
def test_what_is_shown_can_be_given_on_a_command_line(capsys, name):
    """All values, given as overrides of another recipe, make this recipe, with the data's folder and every type."""
    file, colon, argument = name.partition(":")
    path = f"{CONFIGS / file}.py{colon}{argument}"
    lines = run(capsys, path).splitlines()
    shown = [shlex.split(line[2:])[0] for line in lines if line[:2] in ("* ", "  ") and line[2:3].strip()]
    config = reading.load(path)
    assert len(shown) == len(config) - len(GROUPS) + sum(len(config[group]) for group in GROUPS)
    assert reading.load(DIGITS, [f"--config.{assignment}" for assignment in shown]) == config


def test_json_has_what_the_table_has(capsys):
    (line,) = run(capsys, DIGITS, "--json", "--config.model.width=0.5").splitlines()
    record, config = json.loads(line), reading.load(DIGITS)
    assert record["model.width"] == {
        "value": 0.5,
        "type": "number",
        "default": 1.0,
        "meaning": "multiplies every number of channels but the classifier's",
    }
    assert "default" not in record["batch_size"]
    assert record["model.fc_layers"]["value"] == []
    expected = {f"{group}.{key}" for group in GROUPS for key in config[group]} | LOOP.keys().keys()
    assert record.keys() == expected


def test_a_workdir_shows_the_recipe_of_its_run(tmp_path, capsys):
    """The same lines below the first, though defaults were filled in and JSON has no tuples."""
    overrides = ["--config.model.fc_layers=(64,)", "--config.eval_every_epochs=inf"]
    remember(tmp_path, reading.load(DIGITS, overrides))
    _, *expected = run(capsys, DIGITS, *overrides, "--config.seed=3").splitlines()
    first, *lines = run(capsys, str(tmp_path), "--config.seed=3").splitlines()
    assert lines == expected
    assert first.startswith(f"{tmp_path}: * is not the default;")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json is damaged: "):
        recipe.main([str(tmp_path)])


def test_a_wrong_recipe_is_an_error_as_for_training():
    with pytest.raises(UserError, match=r"unknown recipe key 'model\.widht' with model\.name='xception'; did"):
        recipe.main([DIGITS, "--config.model.widht=1"])
    with pytest.raises(UserError, match=r"unknown argument 'x'; --help lists them, and a recipe's key is set by --"):
        recipe.main([DIGITS, "--config.KEY=VALUE", "x"])  # as the help has it


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=-1", "model.width must be positive, got -1"),
        ("model.dtype=float17", "model.dtype must be one of .*, got 'float17'"),
        ("loss.name=softma", "unknown loss.name 'softma'; did you mean 'softmax'"),
        ("mix.mixup_alpha=-1", "mix.mixup_alpha must be 0 or positive, got -1"),
        ("step.ema_decay=1", "step.ema_decay, the share kept, must be in"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be 0 or positive, got -1"),
        ("data.image_size=16", "at least 32 x 32 pixels, got 16 x 16"),
        ("data.train_transforms='resize | flipp'", "data.train_transforms: unknown transform 'flipp'"),
        ("data.eval_transforms='center_crop(fraction=2)'", "data.eval_transforms: transform 'center_crop"),
    ],
)
def test_values_are_checked_as_for_training(override, message):
    with pytest.raises(UserError, match=message):
        recipe.main([DIGITS, f"--config.{override}"])
