"""Gets weights from where they are published: Keras Applications' files, and the Hugging Face hub.

Both are kept where their own libraries keep them, so that nothing is fetched twice: `~/.keras/models` (or
`KERAS_HOME`), and the cache of `huggingface_hub` (`HF_HOME`). The hub's own settings count: `HF_TOKEN`,
`HF_HUB_OFFLINE`, `HF_ENDPOINT`.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xception_flax.display import console
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, lookup, suggest, written

FORMS = ("keras:NETWORK", "timm:NAME", "hf:OWNER/NAME")  # of a source that is elsewhere

KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications"
KERAS_FILES = {  # network: (name, MD5) with the classifier, then without
    "xception": (
        ("xception_weights_tf_dim_ordering_tf_kernels.h5", "0a58e3b7378bc2990ea3b43d5981f1f6"),
        ("xception_weights_tf_dim_ordering_tf_kernels_notop.h5", "b0042744bf5b25fce3cb969f33bebb97"),
    ),
    "inception_v3": (
        ("inception_v3_weights_tf_dim_ordering_tf_kernels.h5", "9a0d58056eeedaa3f26cb7ebd46da564"),
        ("inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5", "bcbd6486424b2319ff4ef7d526e38f63"),
    ),
}

# The tag that timm takes where none is given: the first of its `default_cfgs` of each network (timm 1.0).
TIMM_TAGS = {
    "legacy_xception": "tf_in1k",
    "xception41": "tf_in1k",
    "xception65": "ra3_in1k",
    "xception71": "tf_in1k",
    "xception41p": "ra3_in1k",
    "xception65p": "ra3_in1k",
    "inception_v3": "tv_in1k",
}

TIMM_ALIASES = {"xception": "legacy_xception"}  # names that timm has renamed, and still takes

# What can be meant, for a hint where nothing of a name is found.
NAMES = (*(f"keras:{network}" for network in KERAS_FILES), *(f"timm:{network}" for network in TIMM_TAGS))

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # a pickle only where there is nothing else

TIMEOUT_SECONDS = 30


def is_remote(source: str) -> bool:
    """Whether a source is to be fetched by its name, rather than being a path."""
    return source.partition(":")[0] in ("keras", "timm", "hf") and ":" in source


def is_published(md5: str) -> bool:
    """Whether a file with this MD5 is one that Keras Applications publishes."""
    return any(md5 == published for files in KERAS_FILES.values() for _, published in files)


def fetch(source: str) -> Path:
    """Returns the file, or the folder in the hub's layout, that `source` names, from the cache or the network.

    Args:
      source: 'keras:NETWORK', a key of `KERAS_FILES`; 'timm:NAME' or 'timm:NAME.TAG', of `TIMM_TAGS` or `TIMM_ALIASES`;
        'hf:OWNER/NAME' or 'hf:OWNER/NAME@REVISION'.

    Raises:
      UserError: there is no such source, it cannot be reached, or what came is not what was published.
    """
    library, _, name = source.partition(":")
    if library == "keras":
        return _fetch_keras(name)
    if library == "timm":
        network, _, tag = name.partition(".")
        network = TIMM_ALIASES.get(network, network)
        return _fetch_hub(f"timm/{network}.{tag or lookup(TIMM_TAGS, network, 'network of timm')}")
    return _fetch_hub(name)


# Keras ---------------------------------------------------------------------------------------------


def _fetch_keras(network: str) -> Path:
    files = lookup(KERAS_FILES, network, "network that Keras publishes")
    folder = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models"
    for name, md5 in files:
        if (folder / name).is_file():
            return _checked(folder / name, md5)
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it tells on standard error what the bar shows
    name, md5 = files[0]
    url = f"{KERAS_URL}/{network}/{name}"
    try:
        with contextlib.ExitStack() as stack:
            downloader = pooch.HTTPDownloader(progressbar=_Bar(name, stack), timeout=TIMEOUT_SECONDS)
            pooch.retrieve(url, f"md5:{md5}", fname=name, path=folder, downloader=downloader)
    except Exception as error:  # of requests, urllib3 or pooch, or an OSError
        raise UserError(
            f"{url} cannot be fetched: {_reason(error)}.\n"
            f"Get it where there is a network, and put it here:\n"
            f"  curl --create-dirs -o {folder / name} {url}"
        ) from None
    return folder / name


class _Bar:
    """The progress of a download, as pooch tells it: `total` is set before the first `update`."""

    def __init__(self, name: str, stack: contextlib.ExitStack) -> None:
        self.total = 0
        self._name, self._stack = name, stack
        self._advance: Callable[[int], None] | None = None

    def update(self, num_bytes: int) -> None:
        if self._advance is None:
            self._advance = self._stack.enter_context(console.counting(f"fetching {self._name}", self.total, "bytes"))
        self._advance(num_bytes)

    def reset(self) -> None:
        """Called at the end, before pooch tells the whole size once more."""
        self._advance = lambda num_bytes: None

    def close(self) -> None:
        pass


def _checked(path: Path, md5: str) -> Path:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() == md5:
            return path
    raise UserError(
        f"{path} is not the published file (another MD5 than {md5}): a broken download? Remove it, and it is fetched "
        "again; for a file of your own give its path."
    )


# The hub -------------------------------------------------------------------------------------------


def _fetch_hub(name: str) -> Path:
    repository, _, revision = name.partition("@")
    if len(parts := repository.split("/")) != 2 or not all(parts):
        raise UserError(f"a source on the hub must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {written(name)}.")
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    options: dict[str, Any] = {"revision": revision or None}
    logging.set_verbosity_error()  # it warns of each try; the error below says it once
    try:
        folder = Path(huggingface_hub.hf_hub_download(repository, "config.json", **options)).parent
        for file in HUB_WEIGHTS:
            try:
                huggingface_hub.hf_hub_download(repository, file, **options)
                return folder
            except errors.EntryNotFoundError:
                continue
    except errors.GatedRepoError:
        raise UserError(f"hf:{repository} is open to those alone who asked for it, and HF_TOKEN names none.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"hf:{repository} has no revision {written(revision)}.") from None
    except errors.RepositoryNotFoundError:
        hint = ""
        if repository.startswith("timm/"):
            known = [f"{network}.{tag}" for network, tag in TIMM_TAGS.items()]
            hint = f"; {suggest(repository.removeprefix('timm/'), known)}"
        raise UserError(f"the hub has no model {repository}, or HF_TOKEN may not read it{hint}") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"hf:{repository} is not in the hub's cache on this machine, and the hub cannot be reached.\n"
            f"Where there is a network: hf download {repository} --local-dir FOLDER; then give that FOLDER."
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"hf:{repository} has no config.json; expected a model as timm or this project writes it."
        ) from None
    except Exception as error:  # of the network, or an OSError of the cache
        raise UserError(f"hf:{repository} cannot be fetched: {_reason(error)}.") from None
    raise UserError(f"hf:{repository} has none of {', '.join(HUB_WEIGHTS)}.")


def _reason(error: Exception) -> str:
    return cut(f"{type(error).__name__}: {error}".rstrip("."))
