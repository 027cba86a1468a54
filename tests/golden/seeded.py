"""Images and weights that any side of a comparison makes by itself, from names and NumPy alone."""

import zlib
from collections.abc import Sequence

import numpy as np


def stream(name: str) -> np.random.RandomState:
    """A random stream of its own for each name; RandomState's are frozen for good, default_rng's are not."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def structured_images(n: int, height: int, width: int) -> np.ndarray:
    """`[n, height, width, 3]` in [-1, 1]: gratings, discs, gradients and noise, each its own."""
    rng = stream("images")
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    images = []
    for i in range(n):
        angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(2, 25), rng.uniform(0, 2 * np.pi, 3)
        t = (x * np.cos(angle) + y * np.sin(angle))[..., None]
        grating = np.sin(2 * np.pi * frequency * t + phase)
        disc = (np.hypot(x - rng.uniform(), y - rng.uniform()) < rng.uniform(0.1, 0.4))[..., None]
        noise = rng.uniform(-1, 1, (height, width, 3))
        gradient = 2 * t - 1 + rng.uniform(-1, 1, 3)
        images.append([grating, disc * grating - 0.5, gradient, noise][i % 4] * 0.8 + 0.1 * noise)
    return np.clip(images, -1, 1).astype(np.float32)


def draw(name: str, kind: str, shape: Sequence[int], fan_in: int = 1) -> np.ndarray:
    """Random values for the array `name`, of a kind that keeps the signal alive on its way.

    `kind` is 'kernel', 'scale' or 'bias', or 'mean' or 'var': how far to move a statistic that was
    calibrated on the images, see `disturbed`.
    """
    rng = stream(name)
    if kind == "scale":
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    deviation = {"kernel": fan_in**-0.5, "bias": 0.2, "mean": 0.02, "var": 0.1}[kind]
    return (deviation * rng.standard_normal(shape)).astype(np.float32)


def disturbed(name: str, kind: str, value: np.ndarray) -> np.ndarray:
    """A calibrated 'mean' or 'var' moved a little, so that evaluation differs from training."""
    noise = draw(name, kind, value.shape)
    return value * np.exp(noise) if kind == "var" else value + noise


def sample(stage: np.ndarray) -> np.ndarray:
    """About 4 x 4 pixels of 16 channels of `[N, H, W, C]`."""
    return stage[:, :: -(-stage.shape[1] // 4), :: -(-stage.shape[2] // 4), :: -(-stage.shape[3] // 16)]
