"""A trained network of any origin, as reading its source gives it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from xception_flax.text.sizes import ImageSize


def formula(mean: Sequence[float], std: Sequence[float]) -> str:
    """Returns a normalization in words: '(x - 127.5) / 127.5'; with a value a channel '(x - (0, 1, 2)) / 58.4'."""
    average, deviation = (
        f"{values[0]:g}" if len(set(values)) == 1 else f"({', '.join(f'{value:g}' for value in values)})"
        for values in (mean, std)
    )
    return f"(x - {average}) / {deviation}"


IMAGE_SIZE = 299  # pixels a side that all these networks are published for


class Pretrained(NamedTuple):
    """A network with its weights, and what the source says of its use.

    Attributes:
      framework: that trained it, 'keras', 'timm', 'deeplab' or 'xception_flax': what it does with an image where the
        source does not say is what this library does.
      model: keywords of `models.create_model`; `name` too.
      variables: what `model.apply` takes: 'params' and 'batch_stats', NumPy arrays.
      channels: of the images.
      class_names: of the logits, in their order; () where the source does not say.
      class_descriptions: the same in words, where the names are codes such as 'n01440764'; () where unsaid.
      image_size: of the images it was trained on, in the normal form of `text.sizes`; None where unsaid.
      transforms: how an image becomes one of that size, as `data.eval_transforms`; None where unsaid.
      normalize: `mean` and `std` on the scale 0 to 255, a value a channel or one for all; None where unsaid.
      activation: 'softmax' (one label an image) or 'sigmoid' (several): from logits to probabilities.
      left_out: what else the source has and this network has no place for, in words, a part each.
      origin: what the weights are, as JSON: {'file': path, 'sha256': ...}.
      measured: how good it is and how that was measured, as JSON, as of `runs.restore.Run.measured`; {} where unsaid.
      min_decoded_side, max_value, orientation: as of `data.decoding.decode`, of the images of a run; else its
        defaults.
    """

    framework: str
    model: dict[str, Any]
    variables: dict[str, Any]
    channels: int
    class_names: tuple[str, ...] = ()
    image_size: ImageSize | None = None
    transforms: str | None = None
    normalize: dict[str, tuple[float, ...]] | None = None
    activation: str = "softmax"
    left_out: tuple[str, ...] = ()
    origin: Mapping[str, Any] = MappingProxyType({})
    class_descriptions: tuple[str, ...] = ()
    measured: Mapping[str, Any] = MappingProxyType({})
    min_decoded_side: int = 0
    max_value: int | None = None
    orientation: str = "ignore"
