"""A table of claims whose runs take seconds: a narrow LeNet on the digits, 157 steps."""

from ml_collections import ConfigDict

from xception_flax.reproduction.claims import Claim, Comparison, Setting

ABOUT = "A network that is narrow."

DATA_SETS = {"digits": "digits"}

SETTINGS = {
    "base": Setting("LeNet"),
    "no_momentum": Setting("without momentum", {"optimizer.momentum": 0.0}, "base"),
    "unstable": Setting("at a rate that is far too high", {"optimizer.learning_rate": 1e30}, "base"),
}

CLAIMS = (
    Claim("momentum", "Momentum helps", "nowhere", [Comparison("no_momentum", "base", "worse")]),
    Claim(
        "averaging",
        "Averaged weights are better",
        "nowhere",
        [Comparison("base", "base", "worse", weights="raw")],
        axis={"rates": [("plain", "base"), ("other", "no_momentum")]},
        axis_title="setting",
        note="Nothing is said of it.",
    ),
)


def get_config(name: str) -> ConfigDict:
    data_set, _, setting = name.partition("/")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.epochs = 8.0
    config.log_every_steps = 5
    config.eval_every_epochs = 4.0
    config.checkpoint_every_epochs = 1.0
    config.model = dict(name="lenet", num_classes=10, width=0.1, dropout_rate=0.0)
    config.normalize = dict(mean=(127.5,), std=(127.5,))
    config.loss = dict(name="softmax")
    config.metrics = dict(name="single_label")
    config.optimizer = dict(name="sgd", learning_rate=0.05)
    config.schedule = dict(name="constant")
    config.step = dict(ema_decay=0.9)
    config.data = dict(source=data_set, image_size=16, channels=1, eval_split="validation")
    for key, value in SETTINGS[setting].changes.items():
        group, _, option = key.partition(".")
        config[group][option] = value
    return config
