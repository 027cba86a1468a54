"""Xception in JAX and Flax: the network, its training and evaluation."""

__all__ = ["MODELS", "create_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported when asked for: JAX takes seconds, and a command handles Ctrl-C before it imports that.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from xception_flax import models

    return getattr(models, name)
