"""What the networks share: checks of fields and images, widths, dilation in place of strides, blocks."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from xception_flax.models.layers import ACTIVATIONS, ModuleDef
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, written
from xception_flax.text.ranges import check_range

OUTPUT_STRIDES = (8, 16, 32)

# Far beyond any network, and still traced in seconds: a recipe that asks for more has a zero too many.
MAX_LAYERS = 1000  # that one field can ask for
MAX_CHANNELS = 2**24  # of one layer, classes too


def check_fields(model: nn.Module) -> None:
    """Raises UserError if a field that several networks share is out of its range."""
    fields = vars(model)
    check_range("model.num_classes (0: no classifier)", model.num_classes, 0, MAX_CHANNELS)
    check_range("model.dropout_rate", model.dropout_rate, 0, 1, below=True)
    check_widths("model.fc_layers", fields.get("fc_layers", ()))
    if fields.get("mid_activation") is not None:
        lookup(ACTIVATIONS, model.mid_activation, "model.mid_activation")
    for name in ("width", "bn_epsilon"):
        check_range(f"model.{name}", fields.get(name, 1.0), 0, above=True)
    check_range("model.width_multiple", fields.get("width_multiple", 1), 1, MAX_CHANNELS)
    check_range("model.middle_repeats", fields.get("middle_repeats", 0), 0, MAX_LAYERS)
    check_range("model.bn_decay, the share kept,", fields.get("bn_decay", 0.0), 0, 1, below=True)
    if fields.get("output_stride", 32) not in OUTPUT_STRIDES:
        raise UserError(f"model.output_stride must be one of {OUTPUT_STRIDES}, got {written(model.output_stride)}.")


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Raises UserError unless `widths` are numbers of channels, at most `MAX_LAYERS` of them."""
    if any(not isinstance(width, int) or width < 1 for width in widths):
        raise UserError(f"{name} must be positive integers, got {written(tuple(widths))}.")
    check_range(f"number of {name}", len(widths), 0, MAX_LAYERS)
    for width in widths:
        check_range(name, width, 1, MAX_CHANNELS)


def check_images(images: jax.Array, min_size: int, network: str) -> None:
    """Raises UserError if `images` are not `[N, H, W, C]`, or less than `min_size` pixels high or wide."""
    if images.ndim != 4:
        raise UserError(f"images must be [N, H, W, C], got shape {images.shape}.")
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise UserError(f"images must be [N, H, W, C]; {images.shape} looks like [N, C, H, W], transpose it.")
    if any(size < min_size for size in images.shape[1:3]):  # each by itself: sizes may be symbols
        height, width = images.shape[1:3]
        raise UserError(
            f"{network} needs images of at least {min_size} x {min_size} pixels, "
            f"got {height} x {width}; give larger ones (in a recipe: data.image_size)."
        )


def scaled(features: int, width: float, multiple: int = 8) -> int:
    """Returns the multiple of `multiple` that is nearest to `features * width`, and at least `multiple`.

    Raises:
      UserError: it is more than `MAX_CHANNELS`.
    """
    channels = max(multiple, multiple * round(features * width / multiple))
    if channels > MAX_CHANNELS:
        raise UserError(
            f"model.width={width} makes a layer of {channels:.3g} channels; at most {MAX_CHANNELS:,} are possible."
        )
    return channels


def rate_at(stride: int, output_stride: int) -> int:
    """Returns the dilation of an operation whose input has this `stride` in the network without dilation."""
    return max(1, stride // output_stride)


def batch_norm(model: nn.Module, *, train: bool, **fields: bool) -> ModuleDef:
    """Returns `nn.BatchNorm` with the settings of `model`; `fields` are further ones."""
    return partial(
        nn.BatchNorm,
        use_running_average=not train or model.bn_frozen,
        momentum=model.bn_decay,
        epsilon=model.bn_epsilon,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        **fields,
    )


def mark_stage(model: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Returns `x`, the features that flow on where a stage ends, so that `inference.explaining` can reach them.

    If the caller collects 'intermediates', they are among them. If the variables have a collection 'perturbations' with
    this name, it is added, and its gradient is that of the features.
    """
    model.sow("intermediates", name, x)
    return x + model.get_variable("perturbations", name) if model.has_variable("perturbations", name) else x


def add_block(model: nn.Module, block: ModuleDef, *args: object, remat: bool = True, **fields: object) -> nn.Module:
    """Returns a block of `model`, rematerialised if `model.remat` and `remat`; to be called inside its compact method.

    Its layers become layers of the model itself, so that parameters are called 'block2_sepconv1', as
    in Keras' weights, not 'block2/sepconv1'.
    """
    module = (nn.remat(block) if remat and model.remat else block)(*args, **fields)
    nn.share_scope(model, module)
    return module
