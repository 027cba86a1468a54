"""Xception in JAX and Flax: the network, its training and evaluation."""

import importlib

_HOMES = {"MODELS": "models", "create_model": "models", "fold_batch_norm": "folding"}
_MODULES = ("allocator", "ops")

__all__ = [*_HOMES, *_MODULES]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported when asked for: JAX takes seconds, and a command handles Ctrl-C before it imports that.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
