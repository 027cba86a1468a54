"""Writes huggingface.parquet: a table as the library `datasets` of Hugging Face writes it.

    pip install datasets==5.2.0 pillow && python tests/golden/make_huggingface.py

24 images of 8 x 8 pixels in the column `image`, a struct of bytes and path; `label`, numbers of the classes zebra, cat,
dog; `tags`, lists of numbers of the classes red, blue.
"""

import io
from pathlib import Path

from PIL import Image

import datasets


def png(i: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(content, "PNG")
    return content.getvalue()


data = {
    "image": [{"bytes": png(i), "path": f"{i:02}.png"} for i in range(24)],
    "label": [i % 3 for i in range(24)],
    "tags": [[[], [0], [1], [1, 0]][i % 4] for i in range(24)],
}
features = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["zebra", "cat", "dog"]),
        "tags": datasets.List(datasets.ClassLabel(names=["red", "blue"])),
    }
)
datasets.Dataset.from_dict(data, features=features).to_parquet(
    Path(__file__).with_name("huggingface.parquet"), batch_size=10
)
