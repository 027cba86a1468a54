"""Writes boxes.npz: how torchvision's and TensorFlow's own random crops are distributed.

    python3 -m venv /tmp/boxes && /tmp/boxes/bin/pip install torch torchvision tensorflow-cpu
    /tmp/boxes/bin/python tests/golden/make_boxes.py

For two shapes of an image, the distribution functions of six figures of 40,000 boxes.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

SHAPES = ((375, 500), (40, 33))  # as ImageNet's mostly are; and so small that rounding shows
DRAWS = 40_000
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def torchvision_boxes(height: int, width: int) -> np.ndarray:
    import torch  # here: torch and TensorFlow bring an LLVM each, and do not live in one process
    import torchvision

    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    return np.array([draw(image, AREA, ASPECT) for _ in range(DRAWS)])


def tensorflow_boxes(height: int, width: int) -> np.ndarray:
    import tensorflow as tf

    def draw(index: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.constant([height, width, 3]),
            bounding_boxes=tf.zeros([1, 0, 4]),
            seed=tf.stack([index, 0]),
            min_object_covered=0.0,
            aspect_ratio_range=ASPECT,
            area_range=AREA,
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], size[:2]], 0)

    return tf.map_fn(draw, tf.range(DRAWS)).numpy()


def figures(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """`[N, 4]` of top, left, height, width; with the area and aspect that follow."""
    top, left, height, width = boxes.T
    return {
        "top": top, "left": left, "height": height, "width": width, "area": height * width, "aspect": width / height
    }  # fmt: skip


def main() -> None:
    golden = {"versions": np.array([f"{name} {version(name)}" for name in ("torchvision", "tensorflow-cpu")])}
    for name, draw in (("torchvision", torchvision_boxes), ("tensorflow", tensorflow_boxes)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for height, width in SHAPES:
                for figure, values in figures(process.submit(draw, height, width).result()).items():
                    points = np.unique(np.quantile(values, np.linspace(0, 1, 101), method="lower"))
                    key = f"{name}/{height}x{width}/{figure}"
                    golden[f"{key}/points"] = points
                    golden[f"{key}/share"] = np.searchsorted(np.sort(values), points, side="right") / DRAWS
                    print(f"{key}: {points[0]:.4g} to {points[-1]:.4g}")
    np.savez_compressed(Path(__file__).with_name("boxes.npz"), **golden)


if __name__ == "__main__":
    main()
