"""What timm's config.json, as the Hugging Face hub has it beside the weights, says of a network and its use."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xception_flax.data.transforms import parse_transforms
from xception_flax.data.transforms.geometry import MAX_SIDE
from xception_flax.data.transforms.resampling import KERNELS
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.naming import repeated
from xception_flax.text.sizes import ImageSize, normal

# timm's, where its configuration does not say otherwise.
CROP_PCT = 0.875
INTERPOLATION = "bicubic"

# Arguments of timm's networks that the arrays say too, or that change nothing of what these compute.
_SAID = {"in_chans", "num_classes", "aux_logits", "global_pool", "pretrained"}
# And those that are fields here.
_FIELDS = {"drop_rate": "dropout_rate", "output_stride": "output_stride", "norm_eps": "bn_epsilon"}


class Use(NamedTuple):
    """What a configuration says; the attributes are those of `Pretrained`, but for two.

    Attributes:
      fields: keywords of `models.create_model`.
      pooling: of the features before the classifier: 'avg' is ours.
    """

    fields: Mapping[str, Any]
    pooling: str
    class_names: tuple[str, ...]
    class_descriptions: tuple[str, ...]
    image_size: ImageSize | None
    transforms: str | None
    normalize: dict[str, tuple[float, ...]] | None
    left_out: tuple[str, ...]


def read(config: Mapping[str, Any], channels: int, num_classes: int) -> Use:
    """Reads timm's configuration; one without its keys, such as `{'epoch': 3}`, says nothing.

    Args:
      config: of the file: `{'architecture': ..., 'model_args': {...}, 'pretrained_cfg': {...}}`, or the older form
        without those two groups.
      channels: of the images.
      num_classes: of the network.

    Raises:
      UserError: timm builds another network with these arguments.
    """
    left_out: list[str] = []
    use = config.get("pretrained_cfg", config if "architecture" in config else {})
    use = use if isinstance(use, Mapping) else {}
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"model_args of its config.json must be names and values, got {written(arguments)}.")
    for name in arguments.keys() - _SAID - _FIELDS.keys():
        raise UserError(
            f"timm builds the network of its config.json with {name}={written(arguments[name])}, which none here has."
        )
    fields = {_FIELDS[name]: value for name, value in arguments.items() if name in _FIELDS}
    for name, value in fields.items():
        if type(value) not in (int, float):
            raise UserError(f"{name} in model_args of its config.json must be a number, got {written(value)}.")
    image_size, transforms = _preprocessing(use, left_out)
    class_names = _class_names(config, use, num_classes, left_out)
    return Use(
        fields=fields,
        pooling=str(arguments.get("global_pool") or config.get("global_pool") or "avg"),
        class_names=class_names,
        class_descriptions=_class_descriptions(config, use, class_names, left_out),
        image_size=image_size,
        transforms=transforms,
        normalize=_normalize(use, channels, left_out),
        left_out=tuple(left_out),
    )


def _preprocessing(use: Mapping[str, Any], left_out: list[str]) -> tuple[ImageSize | None, str | None]:
    """Returns `image_size` and `transforms`; timm's `transforms_imagenet_eval` has the same steps."""
    size = use.get("input_size")
    if size is None:
        return None, None
    sides = size[1:] if isinstance(size, Sequence) and len(size) == 3 else ()
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        left_out.append(f"its images, whose input_size is {written(size)}; expected [C, H, W]")
        return None, None
    image_size = normal(sides)
    crop_pct, mode = use.get("crop_pct") or CROP_PCT, use.get("crop_mode") or "center"
    kernel = use.get("interpolation") or INTERPOLATION
    options = f'kernel="{kernel}", antialias=True'
    try:
        if kernel not in KERNELS or use.get("crop_border_pixels"):
            raise UserError("no transform here has this kernel, or cuts off a border")
        resize_size = normal([math.floor(side / crop_pct) for side in sides])
        crop = f"resize_center_crop(resize_size={resize_size}, {options})"
        squash = f"resize(image_size={resize_size}, {options})"
        transforms = {"center": crop, "squash": squash if resize_size == image_size else f"{squash} | {crop}"}[mode]
        parse_transforms(transforms, image_size)
    except (KeyError, TypeError, ArithmeticError, ValueError):
        keys = ("crop_pct", "crop_mode", "crop_border_pixels", "interpolation")
        said = ", ".join(f"{key} {written(use[key])}" for key in keys if use.get(key) is not None)
        left_out.append(f"how its images are scaled and cropped ({said}), which no transform here does")
        return image_size, None
    return image_size, transforms


def _normalize(use: Mapping[str, Any], channels: int, left_out: list[str]) -> dict[str, tuple[float, ...]] | None:
    """Returns `mean` and `std` on the scale 0 to 255."""
    if use.get("mean") is None and use.get("std") is None:
        return None
    found = {}
    for name in ("mean", "std"):
        values = use.get(name)
        values = values if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
        numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v) and (v > 0 or name == "mean")]
        if len(numbers) != len(values) or (len(numbers) != channels and len(set(numbers)) != 1):
            left_out.append(f"its normalization, whose {name} is {written(use.get(name))}; expected a number a channel")
            return None
        numbers = numbers if len(numbers) == channels else numbers[:1]
        found[name] = tuple(round(255 * value, 9) for value in numbers)  # 123.675, not 123.67499999999999
    return found


def _class_names(
    config: Mapping[str, Any], use: Mapping[str, Any], num_classes: int, left_out: list[str]
) -> tuple[str, ...]:
    names = config.get("label_names") or use.get("label_names") or use.get("labels")
    if not names:
        return ()
    if isinstance(names, Mapping):  # index: name
        names = [names.get(str(i)) for i in range(len(names))]
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        left_out.append(f"its label_names, {written(names)}; expected a name a class")
        return ()
    if len(names) != num_classes:
        left_out.append(f"its {len(names)} label_names, for {num_classes} classes")
        return ()
    if (twice := repeated(names)) is not None:
        left_out.append(f"its label_names, two of which are {written(twice)}")
        return ()
    return tuple(names)


def _class_descriptions(
    config: Mapping[str, Any], use: Mapping[str, Any], class_names: Sequence[str], left_out: list[str]
) -> tuple[str, ...]:
    """Returns the classes in words: timm writes them by name, transformers in the order of the names."""
    found = config.get("label_descriptions") or use.get("label_descriptions")
    if not found or not class_names:
        return ()
    texts = [found.get(name) for name in class_names] if isinstance(found, Mapping) else found
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or len(texts) != len(class_names) or not all(isinstance(text, str) for text in texts):
        left_out.append(f"its label_descriptions, {written(found)}; expected a text for each of its label_names")
        return ()
    return tuple(map(str, texts))
