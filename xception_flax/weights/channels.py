"""Weights for images of another number of channels."""

import numpy as np


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Returns a first convolution's kernel for images of `channels` channels, as timm has it.

    One channel gets the sum over the old ones: a gray image gives what it gave as three equal channels. For more, the
    old ones are repeated in their order, cut off at `channels`, and scaled by old / new, so that equal channels give
    what equal channels gave. (timm, `models/_manipulate.py`, `adapt_input_conv`.)

    Args:
      kernel: `[kh, kw, C, features]`.
      channels: of the images, at least 1.

    Returns:
      `[kh, kw, channels, features]`, of the kernel's type; added up and scaled in float32 or better. The kernel itself
      where it has as many channels.
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32))
    if channels == 1:
        return wide.sum(axis=2, keepdims=True).astype(kernel.dtype)
    repeated = np.tile(wide, (1, 1, -(-channels // old), 1))[:, :, :channels]
    return (repeated * (old / channels)).astype(kernel.dtype)


def add_alpha(kernel: np.ndarray) -> np.ndarray:
    """Returns a first convolution's kernel for RGBA, with which the network computes what it did, whatever alpha is.

    Args:
      kernel: `[kh, kw, C, features]`, of gray (C 1) or RGB (C 3).

    Returns:
      `[kh, kw, 4, features]`, of the kernel's type: for the colours as of `adapt_channels`, for alpha 0.
    """
    return np.pad(adapt_channels(kernel, 3), [(0, 0), (0, 0), (0, 1), (0, 0)])
