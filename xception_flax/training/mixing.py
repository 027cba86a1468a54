"""Mixup and CutMix inside the compiled step: each image of a batch is mixed with another one.

As in timm's `Mixup` with its default mode 'batch', one share and one choice between mixup and CutMix hold for the whole
batch, and the share of CutMix is corrected to the pixels that its box really covers. Images 2 i and 2 i + 1 are mixed
with each other. In a shuffled batch this is as random as any pairing. It does not depend on the number of devices or
hosts, and sends nothing between devices if each has an even number of images. (timm pairs with the reversed batch, so
that every device would send all its images to another.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from xception_flax.data.batch import Batch
from xception_flax.text.errors import UserError
from xception_flax.text.ranges import check_range

Mix = Callable[[jax.Array, Batch[jax.Array]], Batch[jax.Array]]

_PURPOSE = 0x6D6978  # makes the key differ from those of dropout


def make_mixing(
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> Mix | None:
    """Returns `mix(key, batch) -> batch`, or None if both alphas are 0.

    `mix` takes an even number of images. It returns them rounded to uint8, as timm's `FastCollateMixup` does: this is
    within half a level of the exact value, and takes a quarter of the memory. If `mask` is 0 for one image of a mixed
    pair, it becomes 0 for both. `mix` adds `minor_labels` and `share`; see `data.batch.Batch`.

    Args:
      mixup_alpha: the share of an image is drawn from Beta(alpha, alpha) (Zhang et al. 2017, arXiv 1710.09412,
        section 2: 0.1 to 0.4 on ImageNet); 0 for no mixup.
      cutmix_alpha: the same for the share that an image keeps around a rectangle of the other (Yun et al. 2019, arXiv
        1905.04899, section 3.1: 1); 0 for no CutMix. The rectangle has the image's aspect ratio. Its centre is
        anywhere in the image, so the border may cut some of it off.
      probability: of mixing a batch at all; timm's `prob`.
      switch_probability: of CutMix instead of mixup, if both are on; timm's `switch_prob`.

    Raises:
      UserError: a value out of its range.
    """
    check_range("mix.mixup_alpha", mixup_alpha, 0)
    check_range("mix.cutmix_alpha", cutmix_alpha, 0)
    check_range("mix.probability", probability, 0, 1)
    check_range("mix.switch_probability", switch_probability, 0, 1)
    if not mixup_alpha and not cutmix_alpha:
        return None

    def mix(key: jax.Array, batch: Batch[jax.Array]) -> Batch[jax.Array]:
        images, labels = batch["images"], batch["labels"]
        if images.shape[0] % 2:
            raise UserError(f"mix needs an even number of images, got a batch of {images.shape[0]}.")
        any_key, _, share_key, box_key = jax.random.split(key, 4)
        cut = is_cutmix(key, mixup_alpha, cutmix_alpha, switch_probability=switch_probability)
        alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
        share = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)
        share = jnp.where(jax.random.bernoulli(any_key, probability), share, 1.0)
        box = _box(box_key, share, *images.shape[1:3])
        # The share that an image keeps of each pixel: the same everywhere, or 0 in the box and 1 around it.
        kept = jnp.where(cut, 1.0 - box, share)[None, :, :, None]
        share = jnp.where(cut, 1.0 - jnp.mean(box), share)

        own, other = images.astype(jnp.float32), _swap(images).astype(jnp.float32)
        mixed = jnp.round(kept * own + (1 - kept) * other).astype(images.dtype)

        def by_share(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Returns the values of the image with the larger share, and those of the image with the smaller one."""
            others = _swap(values)
            return jnp.where(share < 0.5, others, values), jnp.where(share < 0.5, values, others)

        major, minor = by_share(labels)
        shares = jnp.full(images.shape[0], jnp.maximum(share, 1 - share), jnp.float32)
        mixed_batch = batch | {"images": mixed, "labels": major, "minor_labels": minor, "share": shares}
        if "mask" in batch:  # an image mixed with one that does not count does not count either
            first, second = by_share(batch["mask"])
            mixed_batch["mask"] = first * jnp.where(shares < 1, second, 1)
        return mixed_batch

    return mix


def is_cutmix(
    key: jax.Array,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> jax.Array:
    """Whether it is by CutMix, not by mixup, that a batch with this key is mixed; arguments as of `make_mixing`."""
    if not mixup_alpha or not cutmix_alpha:
        switch_probability = float(cutmix_alpha > 0)
    return jax.random.bernoulli(jax.random.split(key, 4)[1], switch_probability)


def mixing_key(seed: int, step: jax.Array | int) -> jax.Array:
    """Returns the key of step `step`, counted from 0. Seed and step alone decide how a batch is mixed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _PURPOSE)


def soft_labels(batch: Batch[jax.Array], num_classes: int) -> jax.Array:
    """Returns the targets `[N, num_classes]` float32 of a mixed batch: the share of each class."""

    def one_hot(labels: jax.Array) -> jax.Array:
        return jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels.astype(jnp.float32)

    share = batch["share"][:, None]
    return share * one_hot(batch["labels"]) + (1 - share) * one_hot(batch["minor_labels"])


def _swap(x: jax.Array) -> jax.Array:
    """Swaps elements 2 i and 2 i + 1 of the first axis."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Returns `[height, width]`: 1 in a rectangle of area 1 - share around a random pixel, cut off at the border."""
    y_key, x_key = jax.random.split(key)

    def inside(key: jax.Array, size: int) -> jax.Array:
        side = (size * jnp.sqrt(1 - share)).astype(jnp.int32)
        first = jax.random.randint(key, (), 0, size) - side // 2
        at = jnp.arange(size)
        return (at >= first) & (at < first + side)

    return (inside(y_key, height)[:, None] & inside(x_key, width)[None]).astype(jnp.float32)
