"""Mixup and CutMix: values against NumPy, distributions, and the same on any number of devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax.data.batch import Batch
from xception_flax.text.errors import UserError
from xception_flax.training import mixing, sharding

COLLECTIVES = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def batch(size: int = 16) -> dict[str, np.ndarray]:
    """Random images, each with its index as its label."""
    images = np.random.default_rng(0).integers(0, 256, (size, 20, 24, 3), dtype=np.uint8)
    return {"images": images, "labels": np.arange(size, dtype=np.int32)}


def own_share(labels: np.ndarray, mixed: dict) -> np.ndarray:
    """The share that each image keeps of itself, from 0 to 1."""
    return np.where(mixed["labels"] == labels, mixed["share"], 1 - mixed["share"])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_values(kind):
    """Neighbours are partners, images are rounded, and CutMix's share is exactly the part of the image it leaves."""
    mix = jax.jit(mixing.make_mixing(**{f"{kind}_alpha": 1.0}))
    for step in range(6):
        check_values(kind, jax.device_get(mix(mixing.mixing_key(0, step), batch())))


def check_values(kind: str, mixed: dict) -> None:
    before, partner = batch(), np.arange(16) ^ 1
    share = own_share(before["labels"], mixed)
    assert len(set(share)) == 1
    assert (mixed["share"] >= 0.5).all()
    np.testing.assert_array_equal(
        np.sort([mixed["labels"], mixed["minor_labels"]], 0), np.sort([range(16), partner], 0)
    )
    own, other = before["images"].astype(np.float64), before["images"][partner].astype(np.float64)
    if kind == "mixup":
        expected = share[0] * own + (1 - share[0]) * other
        assert np.abs(mixed["images"] - expected).max() <= 0.5 + 1e-3
    else:
        taken = (mixed["images"] != before["images"]).any((0, 3))
        rows, columns = np.flatnonzero(taken.any(1)), np.flatnonzero(taken.any(0))
        box = np.zeros_like(taken)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(taken, box)
        np.testing.assert_array_equal(mixed["images"], np.where(box[..., None], other, own))
        assert share[0] == pytest.approx(1 - box.mean(), abs=1e-6)
    assert mixed["images"].dtype == np.uint8


def shares(keys: int = 4000, **options) -> tuple[np.ndarray, np.ndarray]:
    """For many batches: the share that the first image keeps of itself, and whether it was mixed by CutMix."""
    before = {
        "images": np.stack([np.full((40, 40, 1), 100, np.uint8), np.full((40, 40, 1), 200, np.uint8)]),
        "labels": np.arange(2, dtype=np.int32),
    }
    mix = mixing.make_mixing(**options)
    mixed = jax.device_get(jax.jit(jax.vmap(mix, (0, None)))(jax.random.split(jax.random.key(0), keys), before))
    first = mixed["images"][:, 0, :, :, 0].astype(int)
    share = np.where(mixed["labels"][:, 0] == 0, mixed["share"][:, 0], 1 - mixed["share"][:, 0])
    np.testing.assert_allclose(share, (200 - first.mean((1, 2))) / 100, atol=0.006)  # pixels agree with labels
    return share, np.isin(first, (100, 200)).all((1, 2)) & (share > 0) & (share < 1)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_share_of_mixup_is_beta(alpha):
    """Kolmogorov-Smirnov test against NumPy; for 4,000 and 400,000 draws the level of 0.1 % is at 0.031."""
    ours, _ = shares(mixup_alpha=alpha)
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 400_000))
    ranks = np.searchsorted(theirs, np.sort(ours)) / len(theirs)
    assert np.abs(ranks - (np.arange(len(ours)) + 0.5) / len(ours)).max() < 0.031


def test_share_of_cutmix_is_what_the_border_leaves_of_beta():
    """Against timm's `rand_bbox`, written in NumPy: 40 pixels a side, alpha 1."""
    ours, _ = shares(cutmix_alpha=1.0)
    rng = np.random.default_rng(0)
    side = (40 * np.sqrt(1 - rng.beta(1, 1, 400_000))).astype(int)
    low = rng.integers(0, 40, (2, 400_000)) - side // 2
    covered = np.prod(np.clip(low + side, 0, 40) - np.clip(low, 0, 40), 0)
    theirs = np.sort(1 - covered / 1600)
    points = np.unique(theirs)
    difference = np.searchsorted(theirs, points, "right") / len(theirs) - (ours[:, None] <= points + 1e-5).mean(0)
    assert np.abs(difference).max() < 0.031
    assert 0.5 < ours.mean() < 0.75  # not 0.5, since a third of the rectangle is outside


def test_how_often():
    """Of 4,000 batches 70 % are mixed, and 30 % of these by CutMix; both within 5 standard deviations."""
    share, cut = shares(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.7, switch_probability=0.3)
    assert np.mean(share < 1) == pytest.approx(0.7, abs=0.04)
    assert cut.sum() / (share < 1).sum() == pytest.approx(0.3, abs=0.04)


def test_the_key_is_of_seed_and_step():
    keys = {jax.random.key_data(mixing.mixing_key(seed, step)).tobytes() for seed in range(3) for step in range(3)}
    assert len(keys) == 9
    dropout = jax.random.fold_in(jax.random.key(0), 0)
    parts = [dropout, *jax.random.split(dropout, 64)]
    assert not keys & {jax.random.key_data(key).tobytes() for key in parts}


@pytest.mark.parametrize(("size", "axes"), [(16, {"data": 2, "fsdp": 4}), (8, {"data": 8})], ids=str)
def test_any_number_of_devices_mixes_alike(one_device, size, axes):
    """Bit for bit. Nothing is sent between devices if each has an even number of images, and only then."""
    mix = mixing.make_mixing(mixup_alpha=0.2, cutmix_alpha=1.0)
    results = []
    for mesh in (one_device, sharding.create_mesh(**({"data": 1} | axes))):
        sharded = sharding.batch_sharding(mesh)
        placed = sharding.global_batch(mesh, batch(size))
        keys = [jax.device_put(mixing.mixing_key(0, step), sharding.replicated(mesh)) for step in range(4)]
        compiled = jax.jit(mix, out_shardings=sharded).lower(keys[0], placed).compile()
        results.append(jax.device_get([compiled(key, placed) for key in keys]))
        sent = COLLECTIVES.search(compiled.as_text())
        assert (sent is None) == (mesh.size == 1 or size // mesh.size % 2 == 0)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_soft_labels():
    mixed = {"labels": np.int32([2, 0]), "minor_labels": np.int32([1, 0]), "share": np.float32([0.75, 0.6])}
    np.testing.assert_allclose(mixing.soft_labels(mixed, 3), [[0, 0.25, 0.75], [1, 0, 0]])
    several = {"labels": np.uint8([[1, 1, 0]]), "minor_labels": np.uint8([[0, 1, 0]]), "share": np.float32([0.75])}
    np.testing.assert_allclose(mixing.soft_labels(several, 3), [[0.75, 1, 0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": -0.1}, "mix.mixup_alpha must be 0 or positive, got -0.1"),
        ({"cutmix_alpha": float("nan")}, "mix.cutmix_alpha must be 0 or positive, and finite, got nan"),
        ({"probability": 1.5}, r"mix.probability must be in \[0, 1\], got 1.5"),
        ({"switch_probability": -1.0}, r"mix.switch_probability must be in \[0, 1\], got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        mixing.make_mixing(**options)


def test_an_odd_batch_is_refused():
    mix = mixing.make_mixing(mixup_alpha=1.0)
    with pytest.raises(UserError, match="mix needs an even number of images, got a batch of 3"):
        mix(jax.random.key(0), jax.tree.map(jnp.asarray, batch(3)))
    assert mixing.make_mixing() is None


def test_who_is_mixed_with_a_bad_image_does_not_count():
    masked = batch() | {"mask": np.where(np.arange(16) == 5, 0, 1).astype(np.float32)}
    mixed = mixing.make_mixing(mixup_alpha=1.0)(mixing.mixing_key(0, 0), masked)
    assert np.flatnonzero(np.asarray(mixed["mask"]) == 0).tolist() == [4, 5]
    assert {*mixed, "weight"} == set(Batch.__annotations__)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_bad_image_never_counts(kind):
    """With a small alpha a share is often so near 0 that only the partner's image is left."""
    bad = {"images": np.full((4, 2, 2, 1), 200, np.uint8), "mask": np.array([1, 0, 1, 1], np.float32)}
    bad["images"][1] = 0  # images that cannot be decoded are replaced by black ones
    mix = jax.jit(mixing.make_mixing(**{f"{kind}_alpha": 0.1}))
    swapped = 0
    for step in range(400):
        mixed = jax.device_get(mix(mixing.mixing_key(0, step), bad | {"labels": np.arange(4, dtype=np.int32)}))
        black = (mixed["images"] == 0).any((1, 2, 3))
        assert not (mixed["mask"] * black).any(), step
        assert mixed["mask"][2:].all()
        if mixed["share"][0] == 1:
            assert mixed["mask"][:2].tolist() == (~black[:2]).tolist()
            swapped += black[0]
    assert swapped >= 5
