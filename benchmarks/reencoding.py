"""Measures what `xception-flax prepare --max-side` changes: bytes, pixels as training sees them, and features.

JPEGs of 500 x 375 pixels (`photos.py`) are compared with what they become, whole and in crops, scaled to 299 pixels.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

import xception_flax
from benchmarks import command, photos
from xception_flax.data import decoding
from xception_flax.data.sources.tfds import Reencoding
from xception_flax.data.transforms.resampling import resample
from xception_flax.prepare.encoding import reencode

EXAMPLES = """\
  python -m benchmarks.reencoding
  python -m benchmarks.reencoding --weights keras:xception"""

SIZE = 299  # pixels a side, of what the network gets
SETTINGS = [Reencoding(side, quality) for side in (300, 350, 400, 450) for quality in (90, 95)]


def main(argv: list[str]) -> int:
    arguments = command.parser("reencoding", __doc__, EXAMPLES)
    arguments.add_argument("--images", type=command.positive(int), default=96, metavar="N", help="photos (96)")
    arguments.add_argument("--weights", metavar="SOURCE", help="of a network whose pooled features are compared too")
    options = arguments.parse_args(argv)
    command.check(arguments, options)
    result = measure(options)
    print(f"\n{table(result)}\n", flush=True)
    command.write_json(options.json, options, result)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns a row for each of `SETTINGS`, and what the features of different photos differ by."""
    progress = command.Progress("reencoding")
    files = photos.jpegs(options.images)
    whole = [decoding.decode(content, 3) for content in files]
    boxes = _boxes(len(files))
    embed = None if options.weights is None else xception_flax.load(options.weights, image_size=SIZE).embed
    expected = None if embed is None else embed(files)
    rows = []
    for setting in SETTINGS:
        progress.show(str(setting))
        small = [reencode(content, setting) for content in files]
        pixels = [decoding.decode(content, 3) for content in small]
        rows.append(
            setting._asdict()
            | {
                "bytes": statistics.mean(map(len, small)),
                "whole_psnr": statistics.mean(map(psnr, map(_whole, whole), map(_whole, pixels))),
                "crop_psnr": statistics.mean(map(psnr, map(_crop, whole, boxes), map(_crop, pixels, boxes))),
            }
            | ({} if embed is None else differences(embed(small), expected))
        )
    progress.end()
    others = None
    if expected is not None:
        apart = _distance(expected[:, None], expected[None])
        others = float(np.median(apart[~np.eye(len(apart), dtype=bool)]))
    return {"mean_file_bytes": statistics.mean(map(len, files)), "features_of_others": others, "rows": rows}


def _boxes(number: int) -> np.ndarray:
    """Returns squares in shares of the sides, `[N, (top, left, side)]`: areas evenly between 8 and 100 %."""
    rng = np.random.default_rng(0)
    side = np.sqrt(rng.uniform(0.08, 1.0, number))
    return np.stack([*(rng.uniform(0, 1, (2, number)) * (1 - side)), side], -1)


def _whole(image: np.ndarray) -> np.ndarray:
    return resample(image, SIZE, SIZE)


def _crop(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Returns the square of the image by an affine map, so that both sizes show the same to a part of a pixel."""
    (top, left, side), (height, width) = box, image.shape[:2]
    scale_x, scale_y = side * width / SIZE, side * height / SIZE
    x, y = left * width + scale_x / 2 - 0.5, top * height + scale_y / 2 - 0.5
    matrix = np.array([[scale_x, 0, x], [0, scale_y, y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 images in dB, at most 100."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return min(100.0, 10 * np.log10(255**2 / max(error, 1e-9)))


def differences(features: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Returns median and maximum over images of what their features `[N, C]` differ by from the originals'."""
    apart = _distance(features, expected)
    return {"features": float(np.median(apart)), "features_most": float(np.max(apart))}


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns 1 - cosine of the features in the last axis."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return 1 - (one * other).sum(-1) / lengths


def table(result: dict[str, Any]) -> str:
    """Returns the result of `measure` as a table in Markdown, with what it is of in lines below."""
    header = ("longer side, quality", "kB", "whole, dB", "crops, dB", "features", "at most")
    rows = [
        (
            f"{row['max_side']}, {row['quality']}",
            f"{row['bytes'] / 1e3:.0f}",
            f"{row['whole_psnr']:.1f}",
            f"{row['crop_psnr']:.1f}",
            *(f"{row[key]:.4f}" if key in row else "-" for key in ("features", "features_most")),
        )
        for row in result["rows"]
    ]
    lines = [f"Files of {result['mean_file_bytes'] / 1e3:.0f} kB, 500 x 375 pixels."]
    if result["features_of_others"] is not None:
        lines.append(f"Features of two different photos differ by {result['features_of_others']:.3f} (1 - cosine).")
    return "\n".join((command.markdown(header, rows), "", " ".join(lines)))


if __name__ == "__main__":
    command.run(main)
