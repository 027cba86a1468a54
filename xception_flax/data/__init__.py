"""Data sets: sources by name, and `load`, which makes batches of them.

No module in this folder calls JAX: worker processes import them, and must never open an accelerator.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as `_HOMES` has them, for type checkers and editors
    from xception_flax.data.loading import check_class_names, check_options, load
    from xception_flax.data.pipeline import InputError, Split
    from xception_flax.data.sources import SOURCES, source_at
    from xception_flax.data.sources.tfds import reencoding_of
    from xception_flax.data.sources.unread import unread_of

__all__ = [
    "SOURCES",
    "InputError",
    "Split",
    "check_class_names",
    "check_options",
    "load",
    "reencoding_of",
    "source_at",
    "unread_of",
]

_HOMES = {
    "InputError": "pipeline",
    "SOURCES": "sources",
    "Split": "pipeline",
    "reencoding_of": "sources.tfds",
    "source_at": "sources",
    "unread_of": "sources.unread",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: a training step needs `data.batch`, and none of the libraries that read images.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'loading')}"), name)
