"""How a random crop draws its rectangle: two different samplings, both known as Inception's.

GoogLeNet's paper (Szegedy et al. 2015, arXiv 1409.4842, section 6) takes patches whose "size is distributed evenly
between 8% and 100% of the image area with aspect ratio constrained to the interval [3/4, 4/3]", and says no more. A box
is `(top, left, height, width)` in pixels.
"""

import math

import numpy as np

Box = tuple[int, int, int, int]

MAX_ASPECT = 1000  # a larger number in a recipe is a mistake, and would leave nothing of an image

MAX_ATTEMPTS = {"torchvision": 10, "tensorflow": 100}  # torchvision's constant, TensorFlow's default


def torchvision_box(
    rng: np.random.Generator, height: int, width: int, *, min_area: float, max_area: float, max_aspect: float
) -> Box:
    """Draws a box as `torchvision.transforms.RandomResizedCrop.get_params` does.

    The area is uniform, and so is the *logarithm* of the aspect ratio (width / height). Sides are rounded. A box that
    does not fit is drawn again. After ten draws that do not fit, it is the largest central box whose aspect ratio is
    within the bounds.

    Args:
      min_area, max_area: shares of the image's area, 0 to 1.
      max_aspect: at least 1; the ratio is in [1 / max_aspect, max_aspect].
    """
    for _ in range(MAX_ATTEMPTS["torchvision"]):
        area = rng.uniform(min_area, max_area) * height * width
        root = math.exp(rng.uniform(-0.5, 0.5) * math.log(max_aspect))  # of the aspect ratio
        w, h = round(math.sqrt(area) * root), round(math.sqrt(area) / root)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width * max_aspect)), min(width, round(height * max_aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def tensorflow_box(
    rng: np.random.Generator, height: int, width: int, *, min_area: float, max_area: float, max_aspect: float
) -> Box:
    """Draws a box as `tf.image.sample_distorted_bounding_box` does, for an image without boxes of objects.

    The aspect ratio (width / height) itself is uniform. Then the *height* is uniform, between the heights of the
    smallest and the largest box of that ratio that fit. So small areas are more likely than with torchvision. After a
    hundred draws that do not fit, it is the whole image. The result equals that of `GenerateRandomCrop` in TensorFlow's
    `sample_distorted_bounding_box_op.cc` to the pixel: sides are rounded in the same way, and a box smaller than the
    image never touches its lower or right edge.

    TensorFlow's recipes often have `min_object_covered=0.1`. With the whole image as the object, this refuses areas
    below a tenth; here it is `min_area=0.1`.

    Args:
      min_area, max_area: shares of the image's area, 0 to 1.
      max_aspect: at least 1; the ratio is in [1 / max_aspect, max_aspect].
    """
    smallest, largest = min_area * height * width, max_area * height * width
    for _ in range(MAX_ATTEMPTS["tensorflow"]):
        aspect = rng.uniform(1 / max_aspect, max_aspect)
        h, most = round(math.sqrt(smallest / aspect)), round(math.sqrt(largest / aspect))
        if round(most * aspect) > width:
            most = int((width + 0.5 - 1e-7) / aspect)
            most -= round(most * aspect) > width
        most = min(most, height)
        h = int(rng.integers(h, most + 1)) if h < most else most
        if h * round(h * aspect) < smallest:  # by rounding
            h += 1
        if h * round(h * aspect) > largest:
            h -= 1
        w = round(h * aspect)
        if 0 < w <= width and 0 < h <= height and smallest <= h * w <= largest:
            top = int(rng.integers(height - h)) if h < height else 0
            left = int(rng.integers(width - w)) if w < width else 0
            return top, left, h, w
    return 0, 0, height, width


#: How a random crop is drawn, by name, for `sampling` of `random_resized_crop`.
SAMPLINGS = {"torchvision": torchvision_box, "tensorflow": tensorflow_box}
