"""The extremes of every key of every group, from its annotation: refused in a line that names the key, or harmless."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from xception_flax import checkpoint, cli, data, metrics, mixing, models, optimizers, pretrained, recipe, sharding, steps
from xception_flax.data.transforms import TRANSFORMS, parse_transforms
from xception_flax.program import create_program
from xception_flax.ranges import check_range
from xception_flax.state import abstract_variables

LONG = "x" * 5000
EXTREMES = {
    float: (math.nan, math.inf, -math.inf, -1.0, -0.0, 1e-320, 1e300, True),
    int: (-1, 0, 2**31, 2**63, 10**30, True),
    str: ("", "a\0b", "a\nb", "x" * 300, LONG),
    bool: (0, 1, "yes"),
    types.NoneType: (None,),
    DTypeLike: ("", "int8", "complex64", "float64", "float8_e4m3fn", "a\0b", LONG, None, 3),
}


def extremes(annotation: Any) -> Iterator[Any]:
    """Values of a type, and nearly of it, that nobody means."""
    if annotation in EXTREMES:
        yield from EXTREMES[annotation]
    elif typing.get_origin(annotation) is Sequence:
        (kind,) = typing.get_args(annotation)
        ordinary = {int: 8, float: 1.0}.get(kind, (8, 2))
        yield from ((), "", "text", b"ab", (ordinary,) * 5000, ((ordinary,),), (ordinary, "x"))
        yield from ((ordinary, value) for value in extremes(kind))
    else:
        yield from (value for kind in typing.get_args(annotation) for value in extremes(kind))


MINIMAL = {
    "": {"batch_size": 8, "epochs": 1.0},
    "model": {"name": "lenet", "num_classes": 10},
    "normalize": {"mean": (0.0,), "std": (1.0,)},
    "loss": {"name": "softmax"},
    "metrics": {"name": "single_label"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "schedule": {"name": "constant"},
    "data": {"source": "digits", "image_size": 8, "channels": 1, "num_workers": 0},
}


def resolve(name: str, values: dict[str, Any]):
    groups = {group: keys for group, keys in MINIMAL.items() if group} | ({name: values} if name else {})
    return recipe.resolve(groups | MINIMAL[""] | ({} if name else values))
