"""Xception in JAX and Flax: the networks, their training and evaluation."""

import importlib

__all__ = ["MODELS", "UserError", "allocator", "create_model", "fold_batch_norm", "ops"]
__version__ = "0.1.0"

_HOMES = {
    "MODELS": "models",
    "UserError": "text.errors",
    "allocator": "host",
    "create_model": "models",
    "fold_batch_norm": "models.folding",
    "ops": "models",
}


def __getattr__(name: str) -> object:
    # Imported when asked for: JAX takes seconds, and a command handles Ctrl-C before it imports that.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    if name in ("allocator", "ops"):
        return importlib.import_module(f"{home.__name__}.{name}")
    return getattr(home, name)
