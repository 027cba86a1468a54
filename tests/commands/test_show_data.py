"""The picture shows the images that the training step computes with."""

import itertools
from pathlib import Path

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from xception_flax import data
from xception_flax.commands import show_data
from xception_flax.recipes import reading
from xception_flax.text.errors import UserError
from xception_flax.training import losses, mixing, sharding, steps
from xception_flax.training.metrics import create_metrics
from xception_flax.training.optimizers import create_optimizer
from xception_flax.training.state import make_init

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")
MIXED = ["--config.mix.mixup_alpha=0.4", "--config.mix.cutmix_alpha=1.0", "--config.batch_size=16"]


class Linear(nn.Module):
    """The smallest network whose loss depends on every pixel."""

    num_classes: int = 10
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.num_classes, name="dense")(images.reshape(len(images), -1))


def test_it_shows_what_a_step_sees():
    """With a learning rate of 0 the losses of three steps on eight devices equal those of the batches shown."""
    config = reading.load(DIGITS, [*MIXED, "--config.data.image_size=16"])
    split = data.load(**config.data, batch_size=16, seed=config.seed, train=True)
    shown = list(itertools.islice(show_data.batches(config, split), 3))

    mesh = sharding.create_mesh()
    tx, _ = create_optimizer("sgd", 0.0, schedule=lambda step: jnp.ones(()))
    init, abstract = make_init(Linear(), tx, split.image_shape, mesh, ema=False)
    normalize, loss = steps.create_normalizer(**config.normalize), losses.create_loss("softmax")
    train_step = steps.make_train_step(
        Linear(),
        tx,
        loss,
        create_metrics("single_label"),
        normalize,
        abstract,
        mesh,
        seed=config.seed,
        mix=mixing.make_mixing(**config.mix),
    )
    state = init(jax.random.key(0))
    dense = jax.device_get(state.params["dense"])
    for batch, seen in zip(split.batches(), shown, strict=False):
        state, sums = train_step(state, sharding.global_batch(mesh, batch))
        logits = np.asarray(normalize(seen["images"])).reshape(16, -1) @ dense["kernel"] + dense["bias"]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        own, other = (log_p[np.arange(16), seen[key]] for key in ("labels", "minor_labels"))
        expected = -np.mean(seen["share"] * own + (1 - seen["share"]) * other)
        assert float(sums["loss"].total / sums["loss"].count) == pytest.approx(expected, rel=1e-5)
    assert len({float(b["share"][0]) for b in shown}) == 3


def test_the_command_draws_a_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = ["--config", DIGITS, "--output", str(sheet), "--batches", "2", "--images", "12"]
    assert show_data.main([*arguments, *MIXED]) == 0
    assert capsys.readouterr().out == f"{sheet}: 24 images\n"
    height, width = cv2.imread(str(sheet)).shape[:2]  # three rows of eight
    assert 8 * 150 < width < 8 * 200
    assert 3 * 150 < height < 3 * 260


def test_evaluation_is_shown_without_mixing_and_without_padding(tmp_path, capsys):
    config = reading.load(DIGITS, ["--config.data.eval_split=test", "--config.mix.mixup_alpha=0.4"])
    split = data.load(**config.data, batch_size=100, train=False)
    *_, last = (show_data.first_images(batch, 80) for batch in show_data.batches(config, split))
    assert len(last["images"]) == 60  # of 360
    np.testing.assert_array_equal(last["labels"], split.source.labels[300:])
    assert show_data.captions(last, split.class_names)[0] == str(split.source.labels[300])


def test_captions():
    names = ("tabby", "plug", "go-kart")
    mixed = {
        "labels": np.int32([0, 2]),
        "minor_labels": np.int32([1, 0]),
        "share": np.float32([0.75, 1.0]),
    }
    assert show_data.captions(mixed, names) == ["75 % tabby\n25 % plug", "go-kart"]
    assert show_data.captions({"labels": np.uint8([[1, 0, 1], [0, 0, 0]])}, names) == ["tabby, go-kart", ""]


def test_images_that_would_be_black_are_refused(tmp_path):
    for i in range(40):
        (path := tmp_path / "ab"[i % 2] / f"{i}.png").parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((8, 8), 1000, np.uint16))
    recipe_of = f"{Path(DIGITS).with_name('folder.py')}:{tmp_path}"
    with pytest.raises(
        UserError, match=r"up to 1,000 of 65,535 .*at most 3 of 255\. .*--config\.data\.max_value=1023, or"
    ):
        show_data.main(["--config", recipe_of, "--output", str(tmp_path / "a.png"), "--config.batch_size=8"])


def test_a_wrong_file_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"sheet.pgn is no name of a picture; expected one that ends in \.png"):
        show_data.main(["--config", DIGITS, "--output", str(tmp_path / "sheet.pgn"), "--config.data.eval_split=x"])
    assert not list(tmp_path.iterdir())
