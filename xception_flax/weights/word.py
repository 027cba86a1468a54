"""The user's word about a trained network: what its source does not say, or says otherwise."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import flax.linen as nn

from xception_flax import models
from xception_flax.data import transforms as chains
from xception_flax.data.transforms.geometry import MAX_SIDE
from xception_flax.runs.restore import Run
from xception_flax.text import values
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.naming import repeated
from xception_flax.text.sizes import ImageSize, check_size
from xception_flax.training.steps import create_normalizer
from xception_flax.weights.pretrained import IMAGE_SIZE, Pretrained

Network = TypeVar("Network", bound=Pretrained | Run)


def told(
    network: Network,
    *,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    image_size: ImageSize | None = None,
    transforms: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Returns a network with what the user says of it, which counts more than what its source says.

    Args:
      network: from `source.open_source`.
      class_names: of the logits, in their order; or a file of them, as of `read_class_names`.
      image_size, transforms, mean, std: as of `Pretrained`; of a run its recipe says them. What was measured of a
        network was measured with its own, and is left out where they are given.

    Raises:
      UserError: a value is wrong, or it is not the user's to say.
    """
    given = {"image_size": image_size, "transforms": transforms, "mean": mean, "std": std}
    said = [name for name, value in given.items() if value is not None]
    if isinstance(class_names, str | os.PathLike):
        class_names = read_class_names(class_names)
    if isinstance(network, Run):
        if said:
            raise UserError(f"{', '.join(said)}: the recipe of {network.workdir} says this; leave it out.")
        return network if class_names is None else network._replace(class_names=_names(class_names, network.model))
    if class_names is not None:
        names = _names(class_names, models.create_model(**network.model))
        network = network._replace(class_names=names, class_descriptions=())
    if (mean is None) != (std is None):
        raise UserError("mean and std go together; give both or neither.")
    if mean is not None and std is not None:
        create_normalizer(mean, std)
        if max(std) < 1:  # no library divides values of 0 to 255 by less
            raise UserError(
                f"std={','.join(map(str, std))} is for values of 0 to 1, and here they are 0 to 255; give "
                f"mean={','.join(f'{255 * value:g}' for value in mean)} and "
                f"std={','.join(f'{255 * value:g}' for value in std)}."
            )
        if len(mean) not in (1, network.channels):
            raise UserError(
                f"mean has {len(mean)} values, and images have {network.channels} channels; give 1 or each."
            )
        network = network._replace(normalize={"mean": tuple(map(float, mean)), "std": tuple(map(float, std))})
    if image_size is not None:
        image_size = values.check("image_size", image_size, ImageSize)
        check_size("image_size", image_size, MAX_SIDE)
        network = network._replace(image_size=image_size, min_decoded_side=0)
    if transforms is not None:
        chains.parse_transforms(transforms, image_size or network.image_size or IMAGE_SIZE)
        network = network._replace(transforms=transforms, min_decoded_side=0)
    return network._replace(measured={}) if said else network


def read_class_names(file: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the names of classes in a file of text, a line each; empty lines count for nothing.

    Raises:
      UserError: the file is not there, or no text in UTF-8.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()  # editors on Windows begin a text with a mark
        return tuple(line.strip() for line in lines if line.strip())
    except UnicodeDecodeError:
        raise UserError(f"the class names {file} are no text in UTF-8; expected a name in each line.") from None
    except (OSError, ValueError) as error:  # a ValueError: the name has a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the class names {written(os.fspath(file))} cannot be read: {reason}.") from None


def _names(names: Sequence[str], model: nn.Module) -> tuple[str, ...]:
    if len(names) != model.num_classes:
        raise UserError(
            f"got {counted(len(names), 'name')} of classes for {counted(model.num_classes, 'logit')}; give each a "
            "name, in a file (--class-names FILE) a line each."
        )
    if (twice := repeated(names)) is not None:
        raise UserError(f"two classes are named {written(twice)}; give each a name of its own.")
    return tuple(names)
