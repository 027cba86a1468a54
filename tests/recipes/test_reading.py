"""Reading, resolving, overriding and comparing recipes."""

import json
import math
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from xception_flax.recipes import checking, groups, reading
from xception_flax.recipes.comparing import alike, recipe_json
from xception_flax.text.errors import UserError

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.py")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def minimal(**changes) -> dict:
    return {
        "batch_size": 8,
        "epochs": 1.0,
        "model": {"name": "xception"},
        "normalize": {"mean": [0.0], "std": [1.0]},
        "loss": {"name": "softmax"},
        "metrics": {"name": "single_label"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "data": {"source": "digits", "image_size": 32},
    } | changes


def test_every_default_is_filled_in():
    config = checking.resolve(minimal())
    assert isinstance(config, ConfigDict)
    assert (config.seed, config.log_every_steps) == (0, 50)
    assert config.model.num_classes == 1000
    assert config.model.bn_epsilon == 1e-3
    assert config.model.dtype == "float32"
    assert config.optimizer.to_dict() == {
        "name": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "decoupled_weight_decay": 0.0,
        "backbone_factor": 1.0,
        "layer_factors": "",
        "clip_norm": None,
    }
    assert config.schedule.name == "constant"
    assert config.mesh.to_dict() == {"data": -1, "fsdp": 1}
    assert config.normalize.mean == (0.0,)
    # What the program supplies is no key of a recipe.
    assert not {"mesh", "seed", "model"} & set(config.step)
    assert not {"train", "batch_size", "process_index", "split"} & set(config.data)


def test_a_resolved_recipe_is_json_and_resolves_to_itself():
    config = reading.load(DIGITS)
    again = checking.resolve(json.loads(recipe_json(config)))
    assert again == config
    assert recipe_json(again) == recipe_json(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimzer": {}}, "unknown recipe key 'optimzer'; did you mean 'optimizer'"),
        ({"ema_decay": 0.9}, r"unknown recipe key 'ema_decay'; did you mean 'step\.ema_decay'\?$"),
        (
            {"model": {"name": "xception", "learning_rate": 0.1}},
            r"key 'model\.learning_rate' with model\.name='xception'; did you mean 'optimizer\.learning_rate'\?$",
        ),
        ({"optimizer_learning_rate": 1.0}, r"'optimizer_learning_rate'; did you mean 'optimizer\.learning_rate'\?$"),
        ({"warmup_epochs": 5}, r"unknown recipe key 'warmup_epochs'; did you mean 'schedule\.warmup_epochs'\?$"),
        ({"batch_sze": 3}, "unknown recipe key 'batch_sze'; did you mean 'batch_size'"),
        ({"epochs": 0.0}, "recipe key 'epochs' must be positive, got 0.0"),
        ({"batch_size": 0}, "recipe key 'batch_size' must be positive, got 0"),
        ({"seed": -1}, r"recipe key 'seed' must be in \[0, 2\*\*32\), got -1"),
        ({"profile": "10-12"}, r"key 'profile' must be FIRST:LAST, got '10-12'; 10:12 traces the steps 10, 11 and 12"),
        ({"profile": "12:10"}, "recipe key 'profile' must be FIRST:LAST, got '12:10'"),
        ({"profile": "0:3"}, "recipe key 'profile' must be FIRST:LAST, got '0:3'"),
        ({"profile": 10}, "recipe key 'profile' must be a text, got 10"),
        ({"batch_size": 8.5}, "recipe key 'batch_size' must be an integer, got 8.5"),
        ({"batch_size": True}, "recipe key 'batch_size' must be an integer, got True"),
        ({"model": 3}, "recipe key 'model' must be a group of keys, got 3"),
        ({"model": {}}, "recipe key 'model.name' is missing; there are: .*xception"),
        ({"model": {"name": "xeption"}}, "unknown model.name 'xeption'; did you mean 'xception'"),
        (
            {"model": {"name": "xception", "widht": 1.0}},
            "unknown recipe key 'model.widht' with model.name='xception'; did you mean 'width'",
        ),
        ({"model": {"name": "xception", "width": "wide"}}, "recipe key 'model.width' must be a number, got 'wide'"),
        (
            {"optimizer": {"name": "sgd"}},
            r"'optimizer.learning_rate' is missing; set it by --config.optimizer.learning_rate=VALUE \(a number\)",
        ),
        (
            {"optimizer": {"name": "rmsprop", "learning_rate": 0.1, "nesterov": True}},
            "unknown recipe key 'optimizer.nesterov' with optimizer.name='rmsprop'; there are: ",
        ),
        (
            {"data": {"source": "digits", "image_size": 32, "path": "x"}},
            "'data.path' with data.source='digits'; there are: ",
        ),
        (
            {"data": {"source": "digits", "image_size": (32, 48, 3)}},
            r"'data.image_size' must be a number, or height x width such as 224x320, got \(32, 48, 3\)",
        ),
        ({"step": {"seed": 1}}, r"unknown recipe key 'step\.seed'; did you mean 'seed'\?$"),
        ({"normalize": {"mean": [0.0]}}, "recipe key 'normalize.std' is missing"),
        ({"normalize": {"mean": 0.0, "std": [1.0]}}, r"'normalize.mean' must be a list of numbers, got 0.0"),
    ],
)
def test_mistakes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        checking.resolve(minimal(**changes))


def test_int_is_a_float_and_none_where_it_may_be():
    config = checking.resolve(minimal(epochs=3, optimizer={"name": "sgd", "learning_rate": 1, "clip_norm": 2}))
    assert (config.epochs, config.optimizer.clip_norm) == (3, 2)


# Overrides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("batch_size=32", ("batch_size",), 32),
        ("epochs=1e-1", ("epochs",), 0.1),
        ("optimizer.learning_rate=0.1", ("optimizer", "learning_rate"), 0.1),
        ("optimizer.clip_norm=none", ("optimizer", "clip_norm"), None),
        ("optimizer.clip_norm=2", ("optimizer", "clip_norm"), 2),
        ("model.residual=false", ("model", "residual"), False),
        ("model.mid_activation=relu", ("model", "mid_activation"), "relu"),
        ("model.mid_activation=None", ("model", "mid_activation"), None),
        ("model.fc_layers=(64, 32)", ("model", "fc_layers"), (64, 32)),
        ("model.fc_layers=[64]", ("model", "fc_layers"), (64,)),
        ("model.dtype=bfloat16", ("model", "dtype"), "bfloat16"),
        ("data.train_split=train+validation", ("data", "train_split"), "train+validation"),
        ("data.train_transforms=resize | flip_left_right", ("data", "train_transforms"), "resize | flip_left_right"),
        ("mesh.fsdp=-1", ("mesh", "fsdp"), -1),
        ("profile=10:12", ("profile",), "10:12"),
        ("profile=", ("profile",), ""),
        ("batch_size=1_000", ("batch_size",), 1000),
        ("batch_size=0x10", ("batch_size",), 16),
        ("data.image_size=48x64", ("data", "image_size"), (48, 64)),
        ("data.image_size=(64, 48)", ("data", "image_size"), (64, 48)),
        ("data.image_size=48x48", ("data", "image_size"), 48),
    ],
)
def test_overrides(override, key, value):
    config = reading.load(DIGITS, ["--config." + override])
    for part in key:
        config = config[part]
    assert config == value
    assert type(config) is type(value)


def test_profiled_steps_are_both_included():
    assert list(groups.profiled_steps("10:12")) == [10, 11, 12]
    assert list(groups.profiled_steps("7:7")) == [7]
    assert not groups.profiled_steps("")


def test_a_number_can_be_a_string_where_a_string_is_asked_for():
    assert reading.load(DIGITS, ["--config.data.eval_split=7"]).data.eval_split == "7"


def test_another_choice_drops_the_keys_of_the_old_one():
    """AdamW's beta1 would be an unknown key to SGD; what both take stays."""
    overrides = ["--config.optimizer.momentum=0.8", "--config.optimizer.name=sgd"]
    config = reading.load(DIGITS, overrides)
    assert config.optimizer.to_dict() == {
        "name": "sgd",
        "learning_rate": 0.003,
        "momentum": 0.8,
        "nesterov": False,
        "decoupled_weight_decay": 0.05,
        "backbone_factor": 1.0,
        "layer_factors": "",
        "clip_norm": None,
    }
    cosine_gone = reading.load(DIGITS, ["--config.schedule.name=constant"])
    assert cosine_gone.schedule.to_dict() == {"name": "constant"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.learning_rat=1", r"unknown recipe key 'optimizer.learning_rat' .*'learning_rate'"),
        ("--config.optimiser.name=sgd", "unknown recipe group 'optimiser' in --config.optimiser.name; did you mean"),
        ("--config.batchsize=1", "unknown recipe key 'batchsize'; did you mean 'batch_size'"),
        ("--config.batch_size=many", "recipe key 'batch_size' must be an integer, got 'many'"),
        ("--config.batch_size=1e3", "recipe key 'batch_size' must be an integer, got 1000.0"),
        ("--config.model.residual=1", "recipe key 'model.residual' must be True or False, got 1"),
        ("--config.model=xception", "--config.model is a group; set one of its keys"),
        ("--config.model.name=resnet", "unknown model.name 'resnet'"),
        ("--config.batch_size", "'--config.batch_size' has no value; write it in one word, --config.batch_size=VALUE"),
        ("--batch_size=3", r"unknown argument '--batch_size=3'; .* set by --config\.batch_size=3\.$"),
        ("--batchsize=3", r"unknown argument '--batchsize=3'; .* set by --config\.KEY=VALUE\.$"),
        ("--config.=3", "unknown argument '--config.=3'"),
        ("--config..=3", r"unknown recipe group '' in --config\.\.; there are: "),
        ("--config.model.=3", r"unknown recipe key 'model\.' with model\.name='xception'; there are: "),
        ("--config.model.width.x=3", r"unknown recipe group 'model\.width' in --config\.model\.width\.x; did you mean"),
        ("--config.batch_size=", "recipe key 'batch_size' must be an integer, got ''"),
        # Values on which Python's own parser fails, in each of its ways.
        (
            "--config.batch_size=" + "(" * 10_000,
            r"recipe key 'batch_size' must be an integer, got '\({59} \.\.\. \({29}'",
        ),
        ("--config.batch_size=" + "-" * 20_000 + "1", "recipe key 'batch_size' must be an integer, got '-{59} "),
        ("--config.batch_size={[]: 1}", r"recipe key 'batch_size' must be an integer, got '{\[\]: 1}'"),
        ("--config.batch_size=" + "9" * 5000, "recipe key 'batch_size' must be an integer, got '9{59} "),
        (
            "--config.batch_size=0x" + "f" * 5000,
            "'batch_size' must be an integer of 64 bits, got a value of type int that",
        ),
        ("--config.batch_size=9223372036854775808", "must be an integer of 64 bits, got 9223372036854775808"),
        ("--config.epochs=1e400", "recipe key 'epochs' must be a finite number, got inf"),
        (
            "--config.epochs=1e-320",
            r"'epochs' must not be nearer to 0 than 1\.2e-38, float32's smallest number, got 1e-320",
        ),
        (
            "--config.epochs=1e300",
            r"recipe key 'epochs' must be at most 3\.4e\+38, float32's largest number, got 1e\+300",
        ),
        ("--config.epochs=nan", "recipe key 'epochs' must be a finite number, got nan"),
        ("--config.normalize.mean=(1.0, 1e400)", r"recipe key 'normalize\.mean' must be a finite number, got inf"),
        ("--config.normalize.mean=(1.0, 'a')", r"'normalize\.mean' must be a list of numbers, got \(1.0, 'a'\)"),
        ("--config.model.fc_layers=(8, True)", r"'model\.fc_layers' must be a list of integers, got \(8, True\)"),
        ("--config.model.fc_layers=", r"'model\.fc_layers' must be a list of integers, got ''"),
        ("--config.model.fc_layers=b'ab'", r"'model\.fc_layers' must be a list of integers, got b'ab'"),
        ("--config.profile=1:" + "9" * 4000, r"recipe key 'profile' must be FIRST:LAST, got '1:9{57} "),
        (
            "--config.init.weights=" + "x" * 5000,
            r"'init\.weights' must be a text of at most 4,096 characters, none of them",
        ),
        ("--config.data.train_split=a\0b", r"none of them NUL, got 'a\\x00b'"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        reading.load(DIGITS, [override])


def test_an_option_that_is_a_key_is_answered_with_how_the_key_is_set():
    for words, meant in [
        (["--epochs", "3"], "--config.epochs=3"),
        (["--learning-rate=0.1"], "--config.optimizer.learning_rate=0.1"),
        (["--epochs", "--config.seed=1"], "--config.epochs=VALUE"),
        (["--bs", "1"], "--config.KEY=VALUE"),
    ]:
        with pytest.raises(UserError) as error:
            reading.load(DIGITS, words)
        expected = f"unknown argument {words[0]!r}; --help lists them, and a recipe's key is set by {meant}."
        assert str(error.value) == expected
    with pytest.raises(UserError, match=r"set by --config\.KEY=VALUE\.$"):  # which may not be changed here
        reading.override(reading.load(DIGITS), ["--epochs=3"], groups=("data", "mesh"))


def test_of_a_key_given_twice_the_last_counts():
    """As on any command line: arguments in a script can be overridden by more arguments."""
    assert reading.load(DIGITS, ["--config.seed=3", "--config.seed=4"]).seed == 4


def test_an_override_of_a_group_that_is_none(tmp_path):
    path = write(tmp_path / "r.py", f"{CONFIG}.model = 3\n    return config\n")
    with pytest.raises(UserError, match="recipe key 'model' must be a group of keys, got 3"):
        reading.load(path, ["--config.model.width=1"])


def test_not_a_number_is_refused_wherever_it_comes_from():
    """In a recipe as in an override."""
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"'optimizer.learning_rate' must be a finite number, got {value}"):
            checking.resolve(minimal(optimizer={"name": "sgd", "learning_rate": value}))


def test_only_some_groups_may_change_afterwards():
    config = reading.load(DIGITS)
    changed = reading.override(config, ["--config.data.num_threads=2"], groups=("data", "mesh"))
    assert changed.data.num_threads == 2
    with pytest.raises(UserError, match=r"--config.model.width cannot be changed here; only keys of: data, mesh"):
        reading.override(config, ["--config.model.width=2"], groups=("data", "mesh"))


def test_one_group_is_resolved_as_in_a_recipe():
    overrides = ["--config.model.width=0.5"]
    group = checking.resolve_group("model", {"name": "xception"}, overrides)
    assert group == reading.override(checking.resolve(minimal()), overrides, groups=("model",)).model
    with pytest.raises(UserError, match=r"recipe key 'model\.name' is missing"):
        checking.resolve_group("model", {})
    with pytest.raises(UserError, match=r"--config\.seed cannot be changed here; only keys of: model"):
        checking.resolve_group("model", {"name": "xception"}, ["--config.seed=1"])


# Files ---------------------------------------------------------------------------------------------


CONFIG = """
from ml_collections import ConfigDict, config_dict
def get_config():
    config = ConfigDict(dict(batch_size=8, epochs=1.0))
    config"""


def test_mistakes_with_recipe_files(tmp_path):
    for text, message in [
        ("def get_config(:\n", r"r\.py, line 1: .*: def get_config\(:"),
        ("x = 1\n", r"r\.py has no function get_config\(\)"),
        ("import nothing_of_this_name\n", r"r\.py, line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 1 / 0\n", r"r\.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {}\n", r"get_config\(\) must return a ConfigDict, got dict"),
        ("def get_config(size):\n    return {}\n", r"r\.py needs an argument: --config .*r\.py:SIZE"),
        (
            "def get_config(a, b='x', *, c):\n    return {}\n",
            r"r\.py: get_config must take one argument or none, got get_config\(a, b='x', \*, c\)\.$",
        ),
        ("def get_config(a='x', *rest):\n    return {}\n", r"get_config\(\) must return a ConfigDict, got dict"),
        ("def get_config():\n    return int('x')\n", r"r\.py, line 2: invalid literal for int\(\)"),
        ("get_config = 3\n", r"r\.py: get_config must be a function that returns a ConfigDict, got 3\.$"),
        ("import sys\nsys.exit(0)\n", r"r\.py, line 2: SystemExit: 0$"),  # must not look like a run that ended well
        ("def get_config():\n    raise SystemExit('x')\n", r"r\.py, line 2: SystemExit: x$"),
        ("x = 1\0\n", r"r\.py: source code string cannot contain null bytes$"),
        ("x = " + "(" * 1000, r"r\.py, line 1: too many nested parentheses: x = \({56} \.\.\. \({30}$"),
        (f"{CONFIG}.x = config\n    return config\n", "recipe key 'batch_size' is missing|unknown recipe key 'x'"),
        (f"{CONFIG}.model = 3\n    return config\n", "recipe key 'model' must be a group of keys, got 3"),
        (
            f"{CONFIG}.model = dict(name=['lenet'])\n    return config\n",
            r"unknown model\.name \['lenet'\]; did you mean",
        ),
        (
            f"{CONFIG}.seed = config_dict.required_placeholder(int)\n    return config\n",
            r"r\.py: RequiredValueError: None value found in required reference$",
        ),
        (
            f"{CONFIG}.profile = x = []\n    for _ in range(50_000): x.append([]); x = x[0]\n    return config\n",
            "'profile' must be a text, got a value of type list that",
        ),
        ("import os\nos.nothing\n", r"r\.py, line 2: AttributeError: module 'os' has no attribute 'nothing'"),
    ]:
        with pytest.raises(UserError, match=message):
            reading.load(write(tmp_path / "r.py", text))
    os.mkfifo(tmp_path / "fifo.py")
    for path in (tmp_path / "fifo.py", "/dev/zero", tmp_path / ("x" * 300), "/x\0/y"):  # none may be opened
        with pytest.raises(UserError, match=r"^no recipe file '/"):
            reading.load(str(path))
    with pytest.raises(UserError, match=r"^no recipe file 'x{59} \.\.\. x{29}'; "):
        reading.load("x" * 5000)
    with pytest.raises(
        UserError, match=r"no recipe file '.*/digts\.py'; did you mean '\S*/configs/digits\.py'\? There"
    ):
        reading.load(str(ROOT / "configs" / "digts.py"))
    with pytest.raises(UserError, match="takes no argument, got"):
        reading.load(str(ROOT / "configs" / "imagenet.py") + ":big")
    with pytest.raises(UserError, match="is no Python file"):
        reading.load(write(tmp_path / "recipe.txt", ""))


def test_a_recipe_that_is_not_there(tmp_path, monkeypatch):
    """It is suggested by its name alone. In another folder the message says which folder was searched."""
    monkeypatch.chdir(ROOT)
    every = r"configs/ablations\.py, .*configs/digits\.py, .*configs/miniature\.py\.$"  # neither train.py nor a test
    for path, message in [
        ("configs/zzzzz.py", rf"^no recipe file 'configs/zzzzz\.py'; there are: {every}"),
        ("configs/", rf"^'configs/' is a folder, not a recipe file; there are: {every}"),
        (".", rf"^'\.' is a folder, not a recipe file; there are: {every}"),
        ("digit", r"^no recipe file 'digit'; did you mean 'digits'\? There are: ablations, .*, miniature\.$"),
    ]:
        with pytest.raises(UserError, match=message):
            reading.load(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"^no recipe file 'configs/digits\.py', seen from {tmp_path}; change to the .* --config digits\.$",
    ):
        reading.load("configs/digits.py")
    with pytest.raises(UserError, match=r"or take this project's own: --config digits:lenet\.$"):
        reading.load("configs/digits.py:lenet")
    with pytest.raises(UserError, match=r"^no recipe file 'digit'; did you mean 'digits'\? There are: ablations, "):
        reading.load("digit")
    with pytest.raises(UserError, match=r"digits\.py', and no recipe beside it; check the path"):
        reading.load(str(tmp_path / "configs" / "digits.py"))


def test_a_recipe_of_this_project_has_a_name(tmp_path, monkeypatch):
    """From any folder, whatever is in it; with an argument as a file has."""
    monkeypatch.chdir(tmp_path)
    for name, file in [("digits", "digits.py"), ("digits:lenet", "digits.py:lenet")]:
        assert reading.load(name).to_dict() == reading.load(str(ROOT / "configs" / file)).to_dict()
    with pytest.raises(UserError, match=r"^recipe finetune_folder needs an argument: --config finetune_folder:FOLDER$"):
        reading.load("finetune_folder")
    with pytest.raises(UserError, match=r"^recipe imagenet takes no argument, got 'imagenet:big'\.$"):
        reading.load("imagenet:big")
    (tmp_path / "digits").touch()
    assert reading.load("digits").model.name == "xception"
    with pytest.raises(UserError, match=r"^'\./digits' is no Python file"):
        reading.load("./digits")


def test_an_argument_reaches_the_recipe(tmp_path):
    assert reading.load(str(ROOT / "configs" / "jft.py") + ":fc").model.fc_layers == (4096, 4096)
    assert reading.load(str(ROOT / "configs" / "jft.py")).model.fc_layers == ()
    # A recipe's UserError about its argument is shown without the line of the recipe.
    with pytest.raises(UserError, match=r"jft\.py: the argument must be 'fc' or nothing, got 'x'"):
        reading.load(str(ROOT / "configs" / "jft.py") + ":x")
    with pytest.raises(UserError, match=r"^data\.data_dir: \S*/no is no directory; expected"):
        reading.load(str(ROOT / "configs" / "folder.py") + f":{tmp_path / 'no'}")


# Two beside each other --------------------------------------------------------------------------------


def test_hosts_may_differ_in_how_they_read_and_in_nothing_else():
    config = reading.load(DIGITS)
    common = alike(config)
    keys = {f"{group}.{key}" for group, keys in config.items() if isinstance(keys, ConfigDict) for key in keys}
    keys |= {key for key, value in config.items() if not isinstance(value, ConfigDict)}
    assert {f"recipe key {key}" for key in keys - {"data.num_threads", "data.num_workers"}} == set(common)
    assert alike(reading.load(DIGITS, ["--config.data.num_threads=3", "--config.data.num_workers=1"])) == common
    for change in ("data.on_bad_image=replace", "log_every_steps=7", "mesh.fsdp=2"):
        key, _, value = change.partition("=")
        other = alike(reading.load(DIGITS, [f"--config.{change}"]))
        assert [(k, str(other[k])) for k in common if other[k] != common[k]] == [(f"recipe key {key}", value)]
