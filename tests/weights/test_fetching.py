"""Fetching: from a server of HTTP on this machine, in the place of Keras' and the hub's."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

from xception_flax.text.errors import UserError
from xception_flax.weights import fetching

CONTENT = bytes(range(256)) * 4000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by their paths, and keeps the paths that were asked for.

    Attributes:
      files: path: (status, content).
      asked: the paths of all requests.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, tuple[int, bytes]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, content = self.server.files.get(self.path, (404, b"there is no such thing"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/known/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# Keras ---------------------------------------------------------------------------------------------


@pytest.fixture
def published(server, monkeypatch, tmp_path) -> Path:
    """Where Keras keeps its files, with nothing in it yet; the table has two small files of the server."""
    names = [(name, hashlib.md5(CONTENT).hexdigest()) for name in ("full.h5", "notop.h5")]
    monkeypatch.setitem(fetching.KERAS_FILES, "xception", tuple(names))
    monkeypatch.setattr(fetching, "KERAS_URL", server.url)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    server.files["/xception/full.h5"] = (200, CONTENT)
    return tmp_path / "models"


def test_the_table_is_that_of_keras():
    """Keras Applications' own addresses, names and MD5s."""
    source = Path(keras.applications.xception.__spec__.origin).parents[2] / "src" / "applications"
    for network, files in fetching.KERAS_FILES.items():
        text = (source / f"{network}.py").read_text().replace('"\n    "', "").replace('"\n        "', "")
        for name, md5 in files:
            assert f'"{fetching.KERAS_URL}/{network}/{name}"' in text
            assert f'file_hash="{md5}"' in text


def test_a_published_file_is_fetched_once(server, published, capsys):
    for _ in range(2):
        path = fetching.fetch("keras:xception")
        assert path == published / "full.h5"
        assert path.read_bytes() == CONTENT
    assert server.asked == ["/xception/full.h5"]
    assert capsys.readouterr().err == "fetching full.h5: 0.00 GB in 0:00\n"


def test_the_file_without_classifier_is_taken_where_it_is_the_one_there(server, published):
    published.mkdir()
    (published / "notop.h5").write_bytes(CONTENT)
    assert fetching.fetch("keras:xception") == published / "notop.h5"
    assert server.asked == []


def test_a_file_that_is_not_the_published_one_is_refused(server, published):
    """A download of other bytes is not kept; a file that is there already is not touched."""
    server.files["/xception/full.h5"] = (200, CONTENT[:-1])
    with pytest.raises(UserError, match=r"full\.h5 cannot be fetched: ValueError: MD5 hash"):
        fetching.fetch("keras:xception")
    assert [path.name for path in published.iterdir()] == []
    (published / "full.h5").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"full\.h5 is not the published file \(another MD5 than "):
        fetching.fetch("keras:xception")
    assert (published / "full.h5").read_bytes() == b"mine"


@pytest.mark.parametrize("status", [404, 503, None])
def test_without_the_file_or_a_network_the_message_says_where_to_put_it(server, published, monkeypatch, status):
    server.files["/xception/full.h5"] = (status, b"")
    if status is None:
        monkeypatch.setattr(fetching, "KERAS_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError) as error:
        fetching.fetch("keras:xception")
    first, second, third = str(error.value).splitlines()
    assert first.startswith(f"{fetching.KERAS_URL}/xception/full.h5 cannot be fetched: ")
    assert second == "Get it where there is a network, and put it here:"
    assert third == f"  curl --create-dirs -o {published}/full.h5 {fetching.KERAS_URL}/xception/full.h5"


def test_a_name_that_nobody_publishes():
    with pytest.raises(UserError, match=r"unknown network that Keras publishes 'xceptoin'; did you mean 'xception'"):
        fetching.fetch("keras:xceptoin")
    with pytest.raises(UserError, match=r"unknown network of timm 'xception66'; did you mean 'xception65' or"):
        fetching.fetch("timm:xception66")
    for name in ("", "xception", "a/b/c", "/b"):
        with pytest.raises(UserError, match=r"must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got '"):
            fetching.fetch(f"hf:{name}")
    assert not fetching.is_remote("C:/xception.h5")
    assert fetching.is_remote("hf:a/b")


# The hub -------------------------------------------------------------------------------------------


def fetch_elsewhere(source: str, cache: Path, **environment: str) -> str:
    """Returns what `fetch` returns, or its error, in a new process: the hub's settings are read at its import."""
    program = (
        "from xception_flax.weights.fetching import fetch\n"
        "from xception_flax.text.errors import UserError\n"
        f"try: print(fetch({source!r}))\n"
        "except UserError as error: print('error:', error)\n"
    )
    settings = {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_model_of_the_hub_is_fetched_and_found_again_without_it(server, tmp_path):
    for file, content in {"config.json": b"{}", "model.safetensors": CONTENT}.items():
        server.files[f"/timm/legacy_xception.tf_in1k/resolve/main/{file}"] = (200, content)
    folder = Path(fetch_elsewhere("timm:xception", tmp_path, HF_ENDPOINT=server.url))  # its former name
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert json.loads((folder / "config.json").read_text()) == {}
    assert folder.is_relative_to(tmp_path)
    assert folder == Path(fetch_elsewhere("timm:legacy_xception", tmp_path, HF_HUB_OFFLINE="1"))


def test_a_pickle_is_fetched_only_where_there_is_nothing_else(server, tmp_path):
    server.files["/me/known/resolve/main/config.json"] = (200, b"{}")
    message = fetch_elsewhere("hf:me/known", tmp_path, HF_ENDPOINT=server.url)
    assert message == "error: hf:me/known has none of model.safetensors, pytorch_model.bin."
    server.files["/me/known/resolve/main/pytorch_model.bin"] = (200, CONTENT)
    folder = Path(fetch_elsewhere("hf:me/known", tmp_path, HF_ENDPOINT=server.url))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_mistakes_on_the_hub_are_a_line(server, tmp_path):
    message = fetch_elsewhere("timm:xception65.ra3", tmp_path, HF_ENDPOINT=server.url)
    assert message.startswith(
        "error: the hub has no model timm/xception65.ra3, or HF_TOKEN may not read it; did you me"
    )
    offline = fetch_elsewhere("hf:me/none", tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith(
        "error: hf:me/none is not in the hub's cache on this machine, and the hub cannot be reach"
    )
