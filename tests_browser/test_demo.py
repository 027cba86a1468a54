"""The page of `demo` in Chromium: `make test-browser`."""

import os
import shutil
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sklearn
from playwright.sync_api import expect, sync_playwright

import shell
import xception_flax
from tests.weights.test_writing import random_network
from xception_flax.display import console
from xception_flax.weights import writing

PHOTO = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"
NAMES = ("<b>bold</b>", "$$x$$", "חתול", "n" * 300)


def test_a_photo_gets_the_classes_of_predict_and_a_picture(tmp_path):
    path = tmp_path / "w.npz"
    writing.write(random_network(name="xception", num_classes=4, width=0.02)._replace(class_names=NAMES), path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = shell.start("-m", "xception_flax", "demo", path, "--no-browser", "--port", port)

    def is_open() -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    try:
        shell.wait_until(is_open, process)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page, hosts = browser.new_page(), set()
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.goto(f"http://127.0.0.1:{port}")
            page.set_input_files("input[type=file]", PHOTO)
            expect(page.locator(".picture img")).to_have_count(2, timeout=60_000)
            shown = dict(
                zip(
                    page.locator(".answer bdi").all_inner_texts(),
                    page.locator(".answer .row span").all_inner_texts(),
                    strict=True,
                )
            )
            predictor = xception_flax.load(path)
            [expected] = predictor.predict([PHOTO])
            assert set(shown) == set(NAMES)
            for name, share in zip(NAMES, expected, strict=True):
                assert float(shown[name].split()[0]) == pytest.approx(100 * share, abs=0.011), console.percent(share)
            (tmp_path / "broken.png").write_bytes(b"no image")
            page.get_by_label("Clear").first.click()
            page.set_input_files("input[type=file]", tmp_path / "broken.png")
            expect(page.get_by_role("alert")).to_contain_text("cannot be decoded")
            assert hosts <= {f"127.0.0.1:{port}", ""}
            browser.close()
    finally:
        os.kill(process.pid, signal.SIGINT)
        code, out, err = shell.finish(process)
    assert code == 0
    assert f"http://127.0.0.1:{port}" in out
    assert "Traceback" not in err
