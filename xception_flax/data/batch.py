"""A batch: the arrays that travel from a data set to a step, by name."""

from typing import Generic, NotRequired, TypedDict, TypeVar

import numpy as np

_Array = TypeVar("_Array")  # of NumPy on a host, of JAX in a step

Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and type of each array, by its name in a batch


class Batch(TypedDict, Generic[_Array]):
    """N examples. Each array has one row per example, so that all arrays are split over devices alike.

    A data set makes `images`, `labels` and, if some images do not count, `mask`. The training step adds the others, by
    the function named at each.

    Attributes:
      images: `[N, H, W, C]` uint8; float32 where resizing does not round (`pipeline.Split.rounded`).
      labels: `[N]` int32, or `[N, num_classes]` uint8, rows of 0 and 1, if an image may have several labels. For two
        mixed images, the label of the one with the larger share.
      mask: `[N]` float32: 0 for padding and for images that cannot be decoded, which loss, gradient and metrics
        leave out; 1 for others. Without it all images count.
      minor_labels: as `labels`, of the image with the smaller share (`mixing.make_mixing`).
      share: `[N]` float32, 1/2 to 1: the larger share (`mixing.make_mixing`).
      weight: `[N]` float32: the batch size divided by the number of images that count, the same in each row. It makes
        the mean over the parts of a masked batch the mean over all images that count (`steps.make_train_step`).
    """

    images: _Array
    labels: _Array
    mask: NotRequired[_Array]
    minor_labels: NotRequired[_Array]
    share: NotRequired[_Array]
    weight: NotRequired[_Array]


def shapes(
    batch_size: int,
    image_shape: tuple[int, int, int],
    label_shape: tuple[int, ...],
    *,
    masked: bool,
    rounded: bool = True,
) -> Shapes:
    """Returns shape and type of each array that a data set makes.

    Args:
      batch_size: number of examples.
      image_shape: `(H, W, C)`.
      label_shape: `()`, or `(num_classes,)` if an image may have several labels.
      masked: whether some images do not count.
      rounded: whether pixels are whole numbers.
    """
    made: Shapes = {
        "images": ((batch_size, *image_shape), np.dtype(np.uint8 if rounded else np.float32)),
        "labels": ((batch_size, *label_shape), label_dtype(label_shape)),
    }
    return made | ({"mask": ((batch_size,), np.dtype(np.float32))} if masked else {})


def label_dtype(label_shape: tuple[int, ...]) -> np.dtype:
    """Returns the type of labels: of a class's number, or of a row of 0 and 1."""
    return np.dtype(np.uint8 if label_shape else np.int32)
