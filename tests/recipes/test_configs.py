"""Every recipe: each group fits the function that takes it; one recipe of each kind takes a step in the real loop."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import train
import workdirs
from xception_flax import MODELS, create_model, data
from xception_flax.commands import evaluate
from xception_flax.data import sources
from xception_flax.recipes import reading
from xception_flax.recipes.comparing import differences
from xception_flax.text.errors import UserError
from xception_flax.training import program, sharding

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = [
    *(
        "cifar10",
        "digits",
        "digits:lenet",
        "fashion_mnist",
        "finetune_folder",
        "folder",
        "imagenet",
        "imagenet_modern",
        "jft",
        "jft:fc",
        "miniature:digits/base",
        "miniature:fashion_mnist/inception_v3_parameters",
        "inception_v3",
        "ablations:towers_4",
    ),
    *(f"imagenet_aligned:xception{variant}" for variant in ("41", "65", "71", "41p", "65p")),
]

# Sixteen images, one step of eight devices, the narrowest network without a middle flow.
TINY = [
    "model.width=0.02",
    "schedule.name=constant",
    "data.image_size=32",
    "batch_size=16",
    "epochs=1",
]
NARROWEST = {
    "inception_v3": ["data.image_size=75"],
    "miniature:fashion_mnist/inception_v3_parameters": ["data.image_size=75"],
    "digits:lenet": [],
    "ablations:towers_4": ["model.middle_repeats=0", "model.width=0.07"],  # four towers need four channels
}


def make_data(recipe_name: str, directory: Path) -> list[str]:
    """Writes sixteen images for training and nine for evaluation; returns the overrides that name them."""
    digits = sources.digits.digits("train")
    gray = recipe_name.startswith(("digits", "fashion_mnist", "miniature"))
    images = digits.images if gray else np.repeat(digits.images[..., None], 3, -1)
    labels = digits.labels
    if recipe_name == "cifar10":
        images = images.repeat(4, 1).repeat(4, 2)  # 32 pixels, as its crop takes them
    if recipe_name.startswith("jft"):
        # Synthetic labels: the true digit, and a second one that follows from it. JFT's are private.
        labels = np.zeros((len(images), 10), np.int64)
        labels[np.arange(len(images)), digits.labels] = 1
        labels[np.arange(len(images)), digits.labels * 7 % 10] = 1
    np.savez(
        directory / "data.npz",
        train_images=images[:16],
        train_labels=labels[:16],
        validation_images=images[16:25],
        validation_labels=labels[16:25],
        class_names=list("0123456789"),
    )
    np.save(directory / "weights.npy", np.arange(10.0))
    weights = [f"metrics.class_weights={directory / 'weights.npy'}"] if recipe_name == "jft" else []
    return [
        *weights,
        "data.source=arrays",
        f"data.path={directory / 'data.npz'}",
        "data.train_split=train",
        "data.eval_split=validation",
        "model.num_classes=10",
    ]


def test_the_list_is_complete():
    assert {name.partition(":")[0] for name in RECIPES} == {path.stem for path in CONFIGS.glob("*.py")}


def test_every_network_is_in_a_recipe():
    """So each is traced below; each trains in test_family.py, test_steps.py or prepare/test_training.py."""
    networks = {reading.load(path_of(name)).model.name for name in RECIPES if "folder" not in name}
    assert networks == set(MODELS)


def path_of(name: str) -> str:
    file, colon, argument = name.partition(":")
    return f"{CONFIGS / file}.py{colon}{argument}"


def load(name: str, directory: Path, *overrides: str):
    """Returns the recipe at its narrowest, on a little data in `directory`."""
    path = path_of(name)
    if "folder" in name:
        (directory / "photos" / "train" / "cat").mkdir(parents=True)
        (directory / "photos" / "train" / "cat" / "1.jpg").touch()
        path += f":{directory / 'photos'}"
    recipe = reading.load(path)  # as it is: every key known, every type right
    assert name in NARROWEST or "middle_repeats" in recipe.model, f"{name!r} needs a row in NARROWEST: add it"
    narrowest = [] if "model.name=lenet" in overrides else NARROWEST.get(name, ["model.middle_repeats=0"])
    texts = [*TINY, *narrowest, *make_data(name, directory), *overrides]
    return reading.load(path, ["--config." + text for text in texts])


# All losses, metrics and mixing, and networks with and without batch statistics. Of the other recipes, imagenet trains
# in prepare/test_training.py and finetune_folder in test_initial.py.
STEPPING = ("digits", "digits:lenet", "imagenet_modern", "jft")
# These are about losses and mixing, and take a step with the network that compiles fastest.
WITH_LENET = ("imagenet_modern", "jft")


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in STEPPING or name in WITH_LENET])
def test_recipe_fits_together(name, tmp_path):
    """Data, network, loss, optimizer and both steps, from shapes: what train.py does before it compiles."""
    config = load(name, tmp_path)
    mesh = sharding.create_mesh(**config.mesh)
    splits = {
        training: data.load(**config.data, batch_size=config.batch_size, seed=config.seed, train=training)
        for training in (True, False)
    }
    made = program.create_program(config, mesh, splits[True].image_shape, splits[True].num_images)
    batches = {training: sharding.abstract_batch(mesh, split.batch_shapes) for training, split in splits.items()}
    state, sums = jax.eval_shape(made.train_step, made.abstract_state, batches[True])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), made.abstract_state
    )
    assert {"loss", "gradient_norm"} <= set(sums)
    sums, logits = jax.eval_shape(made.eval_step, made.abstract_state.variables(made.weights), batches[False])
    assert "loss" in sums
    assert logits.shape == (16, 10)
    assert (made.length.total_steps, made.weights) == (1, "ema")


@pytest.mark.parametrize("name", STEPPING)
def test_recipe_takes_a_step(name, tmp_path, capsys):
    # The transforms of the evaluation are the recipe's, and `evaluate` below takes them from there.
    crop = ["data.eval_transforms=center_crop(fraction=0.4, kernel='bicubic', antialias=True)"]
    lenet = ["model.name=lenet"] if name in WITH_LENET else []
    config = load(name, tmp_path, *(crop if name == "digits" else lenet))
    file = name.partition(":")[0]
    assert train.train(config, tmp_path / "w") == 0

    records = workdirs.records(tmp_path / "w")
    assert [next(iter(record.keys() - {"step"})).partition("/")[0] for record in records] == [
        "train",
        "eval",
        "checkpoint",
    ]
    evaluation = records[1]
    assert evaluation["step"] == 1
    metric = "map" if file == "jft" else "top1"
    assert evaluation["eval/count"] == 9
    assert 0 <= evaluation[f"eval/{metric}"] <= 1
    chance = 10 * np.log(2) if file == "jft" else np.log(10)
    assert records[0]["train/loss"] == pytest.approx(chance, rel=0.7)
    assert evaluation["eval/weights"] == "ema"
    for item in ("config.json", "curves.png", "checkpoints/1/raw", "checkpoints/1/ema"):
        assert (tmp_path / "w" / item).exists(), item

    if name in ("digits", "digits:lenet"):  # with and without batch statistics; the rest is the same
        capsys.readouterr()
        assert evaluate.main(["--workdir", str(tmp_path / "w")]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["loss"] == pytest.approx(evaluation["eval/loss"], rel=1e-5)
        assert (result["top1"], result["count"]) == (evaluation["eval/top1"], 9)


def test_imagenet_is_the_papers():
    """Sections 4.1 and 4.2, and the data of table 1."""
    config = reading.load(str(CONFIGS / "imagenet.py"))
    assert config.model.to_dict() | {"width": 1.0, "middle_repeats": 8} == config.model.to_dict()
    assert (config.model.num_classes, config.model.dropout_rate, config.model.residual) == (1000, 0.5, True)
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.momentum) == ("sgd", 0.045, 0.9)
    assert (config.schedule.decay_rate, config.schedule.every_epochs) == (0.94, 2.0)
    assert config.loss.weight_decay == 1e-5
    assert config.step.ema_decay > 0
    assert (config.data.name, config.data.image_size, config.data.eval_split) == ("imagenet2012", 299, "validation")


def test_jft_is_the_papers():
    config = reading.load(str(CONFIGS / "jft.py"))
    assert (config.model.num_classes, config.model.dropout_rate, config.model.fc_layers) == (17_000, 0.0, ())
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.momentum) == ("rmsprop", 0.001, 0.9)
    assert (config.schedule.decay_rate, config.schedule.every_images) == (0.9, 3_000_000)
    assert (config.loss.name, config.loss.weight_decay) == ("sigmoid", 1e-5)
    assert (config.metrics.name, config.metrics.k) == ("multi_label", 100)


def test_inception_v3_is_trained_as_xception_is():
    """Sections 4.2 and 4.3: the same settings except for the weight decay, and no auxiliary tower."""
    xception, inception = (reading.load(str(CONFIGS / f"{name}.py")) for name in ("imagenet", "inception_v3"))
    assert not inception.model.auxiliary
    assert inception.loss.weight_decay == 4e-5
    same = [line for line in differences(xception, inception) if not line.startswith("model.")]
    assert same == ["loss.weight_decay: 1e-05 -> 4e-05"]
    shared = set(xception.model) & set(inception.model) - {"name"}
    assert {key: inception.model[key] for key in shared} == {key: xception.model[key] for key in shared}


@pytest.mark.parametrize("name", ["xception41", "xception65", "xception71", "xception41p", "xception65p"])
def test_aligned_recipe_has_the_named_network(name):
    config = reading.load(f"{CONFIGS / 'imagenet_aligned.py'}:{name}")
    ours, timms = create_model(**config.model), create_model(name)
    for field in ("entry_flow", "middle_repeats", "preactivation", "bn_epsilon"):
        assert getattr(ours, field) == getattr(timms, field), field


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("no_residual", {"model.residual: True -> False"}),
        ("mid_relu", {"model.mid_activation: None -> 'relu'"}),
        ("mid_elu", {"model.mid_activation: None -> 'elu'"}),
        ("fc", {"model.fc_layers: [] -> [4096, 4096]"}),
        ("wd_4e-5", {"loss.weight_decay: 1e-05 -> 4e-05"}),
        *((f"towers_{k}", {f"model.towers: '(none)' -> {k}"}) for k in (1, 2, 3, 4, 8)),
        ("towers_4_equal", {"model.towers: '(none)' -> 4", "model.width: 1.0 -> 0.5971"}),
    ],
)
def test_an_ablation_is_one_change(name, changes):
    found = differences(reading.load(str(CONFIGS / "imagenet.py")), reading.load(f"{CONFIGS / 'ablations.py'}:{name}"))
    if name.startswith("towers"):  # the network's name and other defaults change too
        changes = changes | {
            "model.name: 'xception' -> 'xception_towers'",
            "model.order: '(none)' -> 'depthwise_first'",
            "model.width_multiple: 8 -> 1",
        }
    assert set(found) == changes


@pytest.mark.parametrize("name", ["ablations.py:towers_0", "ablations.py:residual", "imagenet_aligned.py:xception"])
def test_unknown_arguments_of_recipes_are_refused(name):
    with pytest.raises(UserError, match="the argument must be one of"):
        reading.load(str(CONFIGS / name))


TAGS = ("[paper]", "[Inception V3]", "[Keras]", "[torchvision]", "[WRN]", "[CutMix]", "[ours]")


@pytest.mark.parametrize("name", ["cifar10", "finetune_folder", "imagenet", "imagenet_modern", "jft"])
def test_every_value_is_tagged(name):
    """In recipes that follow a publication each line says where its value is from."""
    lines = (CONFIGS / f"{name}.py").read_text().splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("def get_config")) + 1 :]
    untagged = [
        line.strip() for line in body if ("=" in line or "config." in line) and not any(tag in line for tag in TAGS)
    ]
    structural = (
        "config = ConfigDict()",
        "= dict(",
        'source="tfds"',
        'name="',
        "num_classes=",
        "channels=3",
        "_split=",
    )
    assert [
        line for line in untagged if not any(mark in line for mark in structural) and "to be given" not in line
    ] == []
