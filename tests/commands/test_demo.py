"""What the page of `demo` shows of an image, without a browser; names are text, and mistakes are a line."""

import socket

import cv2
import numpy as np
import pytest

import shell
import xception_flax
from golden.seeded import structured_images
from tests.weights.test_writing import random_network
from xception_flax.commands import demo
from xception_flax.display import console, heat
from xception_flax.inference.explaining import Explainer
from xception_flax.text.errors import UserError
from xception_flax.weights import writing

NAMES = ("<b>bold</b>", "$$x$$", "חתול", "n" * 300, "plain", "a\u202eb", "last")


@pytest.fixture(scope="module")
def explainer(tmp_path_factory) -> Explainer:
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    writing.write(
        random_network(name="xception", num_classes=7, width=0.02, middle_repeats=0)._replace(class_names=NAMES), path
    )
    return demo.create_explainer(xception_flax.load(path, batch_size=1))


@pytest.fixture
def photo(tmp_path) -> str:
    [image] = structured_images(1, 80, 100)
    cv2.imwrite(str(tmp_path / "photo.png"), np.uint8((image + 1) * 127.5))
    return str(tmp_path / "photo.png")


def test_it_says_what_the_network_says(explainer, photo):
    [expected] = explainer.predictor.predict([photo])
    order = np.argsort(-expected)
    answer = demo.ask(explainer, photo)
    words = demo.class_words(explainer.predictor)
    assert [name for name, _ in answer.classes] == [words[i] for i in order[:5]]
    np.testing.assert_allclose([share for _, share in answer.classes], expected[order[:5]], rtol=1e-4)
    last = int(order[-1])  # is shown too, if it is to be explained
    asked = demo.ask(explainer, photo, last, "stage3")
    assert (asked.classes[-1][0], asked.explained, len(asked.classes)) == (words[last], words[last], 6)
    [(_, found)] = Explainer(explainer.predictor, stages=["stage3"]).stream([photo], last)
    expected = heat.warm(found.pixels, found.maps["stage3"])
    assert np.abs(asked.picture.astype(int) - expected.astype(int)).max() <= 1  # another program rounds differently


def test_names_are_text(explainer, photo):
    words = demo.class_words(explainer.predictor)
    assert words[5] == r"a\u202eb"
    page = demo.table([(name, 0.5) for name in words])
    assert "<bdi>&lt;b&gt;bold&lt;/b&gt;</bdi>" in page
    assert "<b>" not in page
    assert f"<bdi>{'n' * 300}</bdi><span>{console.percent(0.5)}</span>" in page
    caption = demo.respond(explainer, photo, 0, "stage5")[-1]
    assert "evidence for <bdi>&lt;b&gt;bold&lt;/b&gt;</bdi>" in caption


def test_an_unreadable_image_is_a_message(explainer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be decoded"):
        demo.ask(explainer, tmp_path / "broken.png")
    shown, *pictures, caption = demo.respond(explainer, str(tmp_path / "broken.png"), -1, "stage5")
    assert 'role="alert">the image cannot be decoded' in shown
    assert (pictures, caption) == ([None, None], "")
    assert demo.problem("<i>") == '<div class="problem" role="alert">&lt;i&gt;</div>'


def test_mistakes_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "check_extra", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in [
            (["--port", port], f"no page can be opened at 127.0.0.1, port {port}: Address already in use"),
            (["--port", 70_000], "--port must be at most 65,535, got 70000."),
            (["--port", 0], "must be a positive integer"),
        ]:
            code, out, err = shell.call(monkeypatch, capsys, demo.main, "nowhere", *arguments)
            assert (code, out) == (2, "")
            assert message in err


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = shell.call(monkeypatch, capsys, demo.main, "nowhere")
    assert (code, out) == (2, "")
    assert err == "error: the page needs gradio and matplotlib: pip install 'xception_flax[demo]'\n"
