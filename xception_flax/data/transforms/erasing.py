"""Random erasing (Zhong et al. 2017, arXiv 1708.04896)."""

import math

import numpy as np

from xception_flax.data.transforms.crops import MAX_ASPECT
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.ranges import check_range

Image = np.ndarray


def random_erasing(
    image: Image,
    rng: np.random.Generator,
    *,
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    max_aspect: float = 10 / 3,
    fill: str = "noise",
) -> Image:
    """Covers a random rectangle (Zhong et al. 2017, arXiv 1708.04896), drawn as torchvision and timm do.

    The area and the logarithm of the aspect ratio are uniform. After ten draws that do not fit, nothing is covered.

    Args:
      probability: of covering anything; the paper's and torchvision's 0.5.
      min_area, max_area: shares of the image's area, 0 to 1; the paper has 0.02 and 0.4.
      max_aspect: 1 to 1000; the ratio is in [1 / max_aspect, max_aspect].
      fill: 'noise', uniform 0 to 255 in every pixel and channel (also in alpha), which the paper found best; or
        'gray', 128, which is torchvision's 0 after normalization.
    """
    check_range("probability", probability, 0, 1)
    check_range("max_area", max_area, 0, 1, above=True)
    check_range("min_area", min_area, 0, max_area, above=True)
    check_range("max_aspect", max_aspect, 1, MAX_ASPECT)
    if fill not in ("noise", "gray"):
        raise UserError(f"unknown fill {written(fill)}; {suggest(fill, ('noise', 'gray'))}")
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(min_area, max_area) * height * width
        root = math.exp(rng.uniform(-0.5, 0.5) * math.log(max_aspect))  # of the aspect ratio
        h, w = round(math.sqrt(area) * root), round(math.sqrt(area) / root)
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.copy()  # the array may belong to the source
            covered = image[top : top + h, left : left + w]
            covered[:] = rng.integers(256, size=covered.shape, dtype=np.uint8) if fill == "noise" else 128
            return image
    return image
