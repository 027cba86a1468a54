"""Names of classes where the source of a network has none: ImageNet's, in `imagenet_classes.txt`, or numbers.

The file has torchvision's names of the 1,000 classes of ILSVRC 2012, in the order of their synsets, in which Keras,
timm and torchvision have the logits. Its licence stands beside it. Networks of TF-slim and DeepLab have the background
before them, as class 0.
"""

import functools
from pathlib import Path

IMAGENET = 1000  # classes


def of(num_classes: int) -> tuple[str, ...]:
    """Returns a name for each class."""
    if num_classes == IMAGENET + 1:
        return ("background", *_imagenet())
    return _imagenet() if num_classes == IMAGENET else tuple(map(str, range(num_classes)))


def describe(num_classes: int) -> str:
    """Returns what the names are, in words."""
    if num_classes == IMAGENET + 1:
        return "ImageNet's after 'background'"
    return "ImageNet's" if num_classes == IMAGENET else "known by their numbers (--class-names FILE gives them names)"


@functools.cache
def _imagenet() -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "imagenet_classes.txt").read_text("utf-8").splitlines())
