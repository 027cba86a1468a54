"""Writes transforms.npz: what each transform makes of one photograph, with the seed 2.

    python tests/golden/make_transforms.py

Look at what changed before committing it:

    python tests/golden/make_transforms.py SHEET.png
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import skimage

from xception_flax.data import transforms

SIZE = 48
CHAINS = (
    "resize",
    "resize(kernel='bicubic')",
    "resize(antialias=True)",
    "resize(kernel='bicubic', antialias=True)",
    "center_crop(fraction=0.5)",
    "resize_center_crop(resize_size=64, antialias=True)",
    "random_resized_crop",
    "random_resized_crop(sampling='tensorflow', min_area=0.3)",
    "resize | random_crop_with_padding(padding=12)",
    "resize | random_affine(max_degrees=20, max_shift=0.1, max_scale=1.3)",
    "resize | flip_left_right",
    "resize | color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.3)",
    "resize | rand_augment",
    "resize | rand_augment(num_ops=3, magnitude=20, kernel='bilinear')",
    "resize | random_erasing(probability=1.0)",
    "resize | random_erasing(probability=1.0, fill='gray')",
)


def photograph() -> np.ndarray:
    """A cat, uint8 `[300, 451, 3]`."""
    return cv2.imread(str(Path(skimage.__file__).parent / "data" / "chelsea.png"), cv2.IMREAD_COLOR_RGB)


def transformed(chain: str) -> np.ndarray:
    image, rng = photograph(), np.random.default_rng(2)
    for transform in transforms.parse_transforms(chain, SIZE):
        image = transform(image, rng)
    return image


def main(arguments: list[str]) -> None:
    images = {chain: transformed(chain) for chain in CHAINS}
    np.savez_compressed(Path(__file__).with_name("transforms.npz"), **images)
    if arguments:
        rows = [np.concatenate(list(images.values())[i : i + 8], 1) for i in range(0, len(images), 8)]
        sheet = np.concatenate(rows)[..., ::-1]
        cv2.imwrite(arguments[0], cv2.resize(sheet, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST))


if __name__ == "__main__":
    main(sys.argv[1:])
