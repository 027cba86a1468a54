"""A batch: the arrays that travel from a data set to a step, by name."""

from typing import Generic, NotRequired, TypedDict, TypeVar

_Array = TypeVar("_Array")  # of NumPy on a host, of JAX in a step


class Batch(TypedDict, Generic[_Array]):
    """N examples. Each array has one row per example, so that all arrays are split over devices alike.

    A data set makes `images`, `labels` and, if some images do not count, `mask`. The training step adds the others, by
    the function named at each.

    Attributes:
      images: `[N, H, W, C]` uint8.
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
