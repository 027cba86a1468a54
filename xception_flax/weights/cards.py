"""What stands beside the weights in a folder as the Hugging Face hub has it: `config.json` and the model card."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xception_flax.text import naming
from xception_flax.text.sizes import ImageSize, shown, sides
from xception_flax.training.metrics import SHARES
from xception_flax.weights.description import DESCRIPTION, describe
from xception_flax.weights.pretrained import IMAGE_SIZE, Pretrained, formula

NUM_FEATURES = 2048  # of the pooled features of every network that timm has

# timm's names of what it takes off for fine-tuning, by network: (classifier, first convolution).
_ENDS = {"legacy_xception": ("fc", "conv1"), "inception_v3": ("fc", "Conv2d_1a_3x3.conv")}
_ALIGNED_ENDS = ("head.fc", "stem.0.conv")


def config(pretrained: Pretrained, architecture: str | None) -> dict[str, Any]:
    """Returns `config.json`: as timm reads it, where `architecture` is timm's name, and our description beside.

    Args:
      pretrained: the network.
      architecture: timm's name of the network; None where timm does not have it.
    """
    ours = {DESCRIPTION: describe(pretrained)}
    if architecture is None:
        return ours
    hidden = bool(pretrained.model.get("fc_layers"))
    num_classes = 0 if hidden else pretrained.model["num_classes"]
    size = pretrained.image_size or IMAGE_SIZE
    normalize = pretrained.normalize or {"mean": (127.5,), "std": (127.5,)}
    mean, std = ([v / 255 for v in _per_channel(normalize[k], pretrained.channels)] for k in ("mean", "std"))
    classifier, first_conv = _ENDS.get(architecture, _ALIGNED_ENDS)
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": NUM_FEATURES,
        "global_pool": "avg",
        **_labels(pretrained),
        "model_args": {"in_chans": pretrained.channels} if pretrained.channels != 3 else {},
        "pretrained_cfg": {
            "input_size": [pretrained.channels, *sides(size)],
            **_crop(pretrained.transforms or "resize", size),
            "mean": mean,
            "std": std,
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": first_conv,
            "classifier": classifier,
        },
        **ours,
    }


def _labels(pretrained: Pretrained) -> dict[str, Any]:
    """Returns timm's names of the classes, and their descriptions by name."""
    names, texts = (list(map(naming.shown, of)) for of in (pretrained.class_names, pretrained.class_descriptions))
    described = {"label_descriptions": dict(zip(names, texts, strict=True))} if texts else {}
    return {"label_names": names} | described if names else {}


def _crop(transforms: str, image_size: ImageSize) -> dict[str, Any]:
    """Returns what timm calls the resizing of our chain; the whole image for chains it has no words for."""
    kernel = "bicubic" if "bicubic" in transforms else "bilinear"
    resizing = r"resize_center_crop\(.*?resize_size=%s.*\)"
    if match := re.fullmatch(r"center_crop\(.*?fraction=([0-9.]+).*\)", transforms):
        share, mode = float(match[1]), "center"
    elif isinstance(image_size, int) and (match := re.fullmatch(resizing % "([0-9]+)", transforms)):
        share, mode = image_size / int(match[1]), "center"
    elif match := re.fullmatch(resizing % r"\(([0-9]+), *[0-9]+\)", transforms):
        share, mode = sides(image_size)[0] / int(match[1]), "center"
    else:
        share, mode = 1.0, "squash"
    return {"interpolation": kernel, "crop_pct": share, "crop_mode": mode}


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return [float(v) for v in values] if len(values) == channels else [float(values[0])] * channels


def model_card(pretrained: Pretrained, architecture: str | None, notes: Sequence[str]) -> str:
    """Returns `README.md`: what the network is, how images become what it takes, and how it is loaded."""
    library = "timm" if architecture else "xception_flax"
    name = pretrained.model["name"]
    size = f"{shown(pretrained.image_size)} pixels" if pretrained.image_size else "not recorded"
    normalize = pretrained.normalize
    taken = formula(**normalize) if normalize else "not recorded"
    classes = ", ".join(map(naming.shown, pretrained.class_names)) or "their names are not recorded"
    # Of the file its name alone: the folders are of the machine that wrote this, and nobody's business.
    origin = dict(pretrained.origin)
    origin |= {"file": naming.shown(Path(origin["file"]).name)} if "file" in origin else {}
    rows = {
        "network": name + (f" ({architecture} in timm)" if architecture and architecture != name else ""),
        "logits": f"{pretrained.model['num_classes']}: {classes}",
        "activation": pretrained.activation,
        "image": size,
        "values, of 0 to 255": taken,
        "resizing": f"`{pretrained.transforms}`" if pretrained.transforms else "not recorded",
        "weights from": ", ".join(f"{key} {value}" for key, value in origin.items()) or "not recorded",
        "accuracy": record(pretrained.measured) or "not measured",
    }
    if pretrained.max_value is not None:
        rows["white, of 16 bits"] = str(pretrained.max_value)
    if pretrained.orientation == "apply":
        rows["orientation"] = "turned as EXIF says"
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    remarks = "".join(f"\n- {note}" for note in notes)
    use = ["```python", "import xception_flax", 'network = xception_flax.load("THIS FOLDER")']
    use += ['network.predict(["photo.jpg"])  # probabilities [1, classes]', "```"]
    if architecture:
        strict = ", pretrained_strict=False" if pretrained.model.get("fc_layers") else ""
        use += [
            "",
            "```python",
            "import timm",
            f'timm.create_model("local-dir:THIS FOLDER", pretrained=True{strict})',
            "```",
        ]
    front = {"tags": ["image-classification", library, name], "library_name": library}
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            f"# {name}",
            "",
            "| | |",
            "|---|---|",
            table,
            remarks,
            "",
            "## Use",
            "",
            *use,
            "",
        ]
    )


def _cell(text: str) -> str:
    """Returns text as it stands in a cell of Markdown's tables, in code too."""
    return naming.harmless(text).replace("|", "\\|")


def record(measured: Mapping[str, Any]) -> str:
    """Returns what was measured of a network in words; '' where nothing was.

    Args:
      measured: as of `Pretrained`: metrics by name, and how they were measured.
    """
    shares = [f"{name} {100 * measured[name]:.2f} %" for name in measured if name in SHARES]
    if not shares:
        return ""
    loss = [f"loss {measured['loss']:.4g}"] if "loss" in measured else []
    said = {
        "count": "on {:,} images",
        "source": "of {}",
        "split": "split '{}'",
        "step": "by the run itself at step {:,}",
        "weights": "{} weights",
        "date": "{}",
        "version": "xception_flax {}",
    }
    how = [text.format(measured[key]) for key, text in said.items() if key in measured]
    return naming.harmless(", ".join([*shares, *loss, *how]))
