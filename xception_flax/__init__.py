"""Xception in JAX and Flax: the networks, their training and evaluation."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as `_HOMES` has them, for type checkers and editors
    from xception_flax.host import allocator
    from xception_flax.inference.predictor import load
    from xception_flax.models import MODELS, create_model, ops
    from xception_flax.models.folding import fold_batch_norm
    from xception_flax.text.errors import UserError

__all__ = ["MODELS", "UserError", "allocator", "create_model", "fold_batch_norm", "load", "ops"]
__version__ = "0.9.0"

_HOMES = {
    "MODELS": "models",
    "UserError": "text.errors",
    "allocator": "host.allocator",
    "create_model": "models",
    "fold_batch_norm": "models.folding",
    "load": "inference.predictor",
    "ops": "models.ops",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: importing JAX takes seconds, and a command must handle Ctrl-C before that.
    if name not in _HOMES:
        # Python adds a suggestion, by `__dir__`, where nobody catches the error.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return module if name in ("allocator", "ops") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
