"""Xception in JAX and Flax: the network, its training and evaluation."""

from xception_flax.models import MODELS, create_model

__all__ = ["MODELS", "create_model"]
__version__ = "0.1.0"
