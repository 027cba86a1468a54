"""What every network here keeps to: checks of its fields and its images, widths, strides traded for dilation."""

import math

import flax.linen as nn
import jax

from xception_flax.layers import ACTIVATIONS
from xception_flax.lookup import lookup

OUTPUT_STRIDES = (8, 16, 32)


def check_fields(model: nn.Module) -> None:
    """Raises ValueError where a field that several networks share is out of its range."""
    fields = vars(model)
    if model.num_classes < 0:
        raise ValueError(f"num_classes must not be negative (0: no classifier), got {model.num_classes}.")
    if not 0 <= model.dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {model.dropout_rate}.")
    if any(not isinstance(features, int) or features < 1 for features in fields.get("fc_layers", ())):
        raise ValueError(f"fc_layers must be positive integers, got {tuple(model.fc_layers)}.")
    if fields.get("mid_activation") is not None:
        lookup(ACTIVATIONS, model.mid_activation, "mid_activation")
    for name in ("width", "width_multiple", "bn_epsilon"):
        if not 0 < fields.get(name, 1) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {fields[name]}.")
    if fields.get("middle_repeats", 0) < 0:
        raise ValueError(f"middle_repeats must not be negative, got {model.middle_repeats}.")
    if not 0 <= fields.get("bn_decay", 0) < 1:
        raise ValueError(f"bn_decay, the share kept, must be in [0, 1), got {model.bn_decay}.")
    if fields.get("output_stride", 32) not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {model.output_stride}.")


def check_images(images: jax.Array, min_size: int, network: str) -> None:
    """Raises ValueError where `images` are not `[N, H, W, C]` or less than `min_size` pixels high or wide."""
    if images.ndim != 4:
        raise ValueError(f"images must be [N, H, W, C], got shape {images.shape}.")
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise ValueError(f"images must be [N, H, W, C]; {images.shape} looks like [N, C, H, W], transpose it.")
    if min(images.shape[1:3]) < min_size:
        height, width = images.shape[1:3]
        raise ValueError(
            f"{network} needs images of at least {min_size} x {min_size} pixels, "
            f"got {height} x {width}; give larger ones (in a recipe: data.image_size)."
        )


def scaled(features: int, width: float, multiple: int = 8) -> int:
    """The nearest multiple of `multiple` to `features * width`, and at least one multiple."""
    return max(multiple, multiple * round(features * width / multiple))


def rate_at(stride: int, output_stride: int) -> int:
    """Dilation of an operation whose input has `stride` in the plain network: 1 where that stride is still had."""
    return max(1, stride // output_stride)
