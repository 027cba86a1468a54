"""How an image becomes what a network takes."""

import functools
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from xception_flax.data import transforms
from xception_flax.data.decoding import BadImageError, is_dark, largest_value
from xception_flax.data.pipeline import prepare_image
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.sizes import ImageSize, normal, shown, sides
from xception_flax.weights.pretrained import IMAGE_SIZE, Pretrained

# What the libraries do with an image where its network does not say. Keras: `image_dataset_from_directory` and
# `preprocess_input`. timm: `resolve_data_config`, by the network's `default_cfgs`, all with mean and std 0.5.
MEAN = STD = (127.5,)
KERAS_TRANSFORMS = "resize"  # the whole image, bilinear, without antialiasing
TIMM_CROPS = {"xception": 0.8975, "inception_v3": 0.875, "xception41p": 0.94, "xception65p": 0.94, "xception65": 0.94}
TIMM_CROP = 0.903  # of the others, and of those that it has from DeepLab (xception65.tf_in1k)

Image = str | Path | bytes | np.ndarray | PIL.Image.Image
#: An `Image`, where all of a sequence are of one kind.
AnImage = TypeVar("AnImage", bound=Image)


class Preprocessing(NamedTuple):
    """How an image becomes what a network takes.

    Attributes:
      image_size: of what the network gets, in pixels, in its normal form: see `text.sizes`.
      channels: 1 for gray, 3 for RGB, 4 for RGBA.
      transforms: the chain that makes an image of this size, as a recipe's `data.eval_transforms`.
      mean, std: of the normalization, on the scale 0 to 255; a value a channel, or one for all.
      rounded: whether pixels are whole numbers after the transforms too. Keras' own resizing keeps the fractions.
      min_decoded_side: see `data.decoding.decode`.
      max_value, orientation: the same.
    """

    image_size: ImageSize
    channels: int
    transforms: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounded: bool = True
    min_decoded_side: int = 0
    max_value: int | None = None
    orientation: str = "ignore"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of what the network gets."""
        return *sides(self.image_size), self.channels

    def prepare(self, image: Image) -> np.ndarray:
        """Returns `[H, W, C]`: uint8, or float32 in 0 to 255 where it is not `rounded`.

        Args:
          image: a path, the content of a file, pixels `[H, W]` or `[H, W, C]` of uint8, or an image of PIL.

        Raises:
          BadImageError: it cannot be read, or a transform does not take it.
          UserError: the transforms make another shape.
        """
        chain = _chain(self.transforms, self.image_size)
        rng = np.random.default_rng(0)  # not used by the transforms of an evaluation
        options = dict(rounded=self.rounded, orientation=self.orientation)
        return prepare_image(
            content(image, self.channels),
            chain,
            self.image_shape,
            self.min_decoded_side,
            rng,
            self.max_value,
            **options,
        )

    def may_be_dark(self, file: bytes | np.ndarray) -> bool:
        """Whether a file of 16 bits has no value in the upper half: white may be less there, and nothing says it."""
        if self.max_value is not None or not isinstance(file, bytes):
            return False
        largest = largest_value(file)
        return largest is not None and is_dark(largest)


_chain = functools.lru_cache(transforms.parse_transforms)


def content(image: Image, channels: int) -> bytes | np.ndarray:
    """Returns the content of a file, or the pixels, that an image is given as.

    Args:
      image: as of `Preprocessing.prepare`.
      channels: that the network takes; with 4, the alpha of an image of PIL is kept.

    Raises:
      BadImageError: the file cannot be read.
      UserError: it is none of the types of `Image`.
    """
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise BadImageError(f"{error.strerror}.") from None
    if isinstance(image, PIL.Image.Image):
        alpha = channels == 4 and image.has_transparency_data
        return np.asarray(
            image.convert("RGBA") if alpha else image if image.mode in ("L", "RGB") else image.convert("RGB")
        )
    if isinstance(image, bytes):
        return image
    if hasattr(image, "__array__"):  # also those of JAX, torch and TensorFlow
        return np.asarray(image)
    raise UserError(f"an image must be a path, bytes, an array or an image of PIL, got {written(image)}.")


def of_recipe(recipe: ConfigDict) -> Preprocessing:
    """Returns what the evaluation of a recipe does."""
    return Preprocessing(
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        transforms=recipe.data.eval_transforms,
        mean=tuple(recipe.normalize.mean),
        std=tuple(recipe.normalize.std),
        min_decoded_side=recipe.data.min_decoded_side,
        max_value=recipe.data.max_value,
        orientation=recipe.data.orientation,
    )


def of_pretrained(pretrained: Pretrained) -> tuple[Preprocessing, tuple[str, ...]]:
    """Returns the preprocessing of a network from elsewhere, and what was assumed of it, in words.

    What the network does not say is what its library does.

    Raises:
      UserError: the transforms are wrong.
    """
    keras, rounded = pretrained.framework == "keras", True
    assumed = []
    image_size, resizing, normalize = pretrained.image_size, pretrained.transforms, pretrained.normalize
    if image_size is None:
        image_size = IMAGE_SIZE
        assumed.append(f"images of {shown(image_size)} pixels")
    if resizing is None:
        resizing, rounded = (KERAS_TRANSFORMS, False) if keras else (_timm_crop(pretrained, image_size), True)
        assumed.append(f"resized as {'Keras' if keras else 'timm'} does, by '{resizing}'")
    if normalize is None:
        normalize = {"mean": MEAN, "std": STD}
        assumed.append("values in [-1, 1]")
    transforms.parse_transforms(resizing, image_size)
    mean, std = (tuple(normalize[name]) for name in ("mean", "std"))
    decoding = (pretrained.min_decoded_side, pretrained.max_value, pretrained.orientation)
    return Preprocessing(image_size, pretrained.channels, resizing, mean, std, rounded, *decoding), tuple(assumed)


def _timm_crop(pretrained: Pretrained, image_size: ImageSize) -> str:
    """The chain of timm's evaluation: scaled to cover `image_size / crop`, rounded down, then the centre."""
    deeplab = pretrained.framework == "deeplab"
    crop = TIMM_CROP if deeplab else TIMM_CROPS.get(pretrained.model["name"], TIMM_CROP)
    resize_size = normal([int(side / crop) for side in sides(image_size)])
    return f"resize_center_crop(resize_size={resize_size}, kernel=bicubic, antialias=True)"
