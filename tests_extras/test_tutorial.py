"""docs/fine-tuning.md as it stands, from a folder of photos to a network that answers over HTTP."""

import contextlib
import json
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image
from skimage import data as pictures
from sklearn.datasets import load_sample_images

from shell import ROOT
from tests import test_docs
from xception_flax.inference import predictor

PAGE = "docs/fine-tuning.md"


@pytest.fixture
def photos(tmp_path):
    """Crops of four photographs, two a class, 160 x 200: the left half of each, and the right half beside it."""
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    china, flower = load_sample_images().images
    rng = np.random.default_rng(0)
    for label, photo in [("cat", pictures.chelsea()), ("dog", pictures.astronaut()), ("cat", china), ("dog", flower)]:
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(10):
            top, left = (rng.integers(size - side) for size, side in zip(photo.shape, (160, 200), strict=False))
            name = f"{len(list(folder.iterdir())):03}.jpg"
            Image.fromarray(photo[top : top + 160, left : left + 200]).save(folder / name, quality=90)
    return tmp_path


def test_the_page_leads_to_a_server(photos, capsys):
    """What the server says of a photo is what `predict` says."""
    said: dict[str, object] = {}
    with contextlib.chdir(photos):
        (photos / "runs").mkdir()
        for block in test_docs.blocks_of(PAGE):
            if block.text.startswith("python train.py --config configs/digits.py"):
                break  # what follows is no part of the way
            if block.language == "python":
                exec(compile(block.text, PAGE, "exec"), said)
            else:
                runs = block._replace(comment="") if block.comment == "not run: needs the extra onnx" else block
                for words in test_docs.commands(block.text):
                    test_docs.run(runs, words, capsys)
        assert {path.name for path in (photos / "runs" / "mine").glob("*_val*")} >= {"report_val.html"}
        assert len(list((photos / "explained").iterdir())) == 20
        photo = photos / "photos" / "dog" / "007.jpg"
        expected = predictor.load("runs/mine", checkpoint="best")
        server = said["server"]("mine.onnx", 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with urllib.request.urlopen(address, data=photo.read_bytes(), timeout=60) as answer:
                found = json.load(answer)
        finally:
            server.shutdown()
            server.server_close()
        (probabilities,) = expected.predict([photo])
    assert list(found) == list(expected.class_names) == ["cat", "dog"]
    np.testing.assert_allclose(list(found.values()), probabilities, atol=1e-4)
