"""What a signature and its docstring say of a recipe's keys: which there are, their types, defaults and meanings.

In the signature of a function that a recipe feeds, the recipe's keys stand between `/` and `*`. The program gives what
stands before `/`, by position, and what stands after `*`, by name.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn

from xception_flax import models


class Key(NamedTuple):
    """A key of a recipe.

    Attributes:
      annotation: its type.
      default: its value where the recipe gives none; `inspect.Parameter.empty` where it must give one.
      meaning: the first sentence of the docstring about it, without the full stop.
    """

    annotation: Any
    default: Any
    meaning: str

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


@functools.cache
def keys_of(function: Callable[..., Any]) -> Mapping[str, Key]:
    """Returns the keys of a recipe that feed `function`, a class or a `partial` of one, in their order."""
    whole = getattr(function, "func", function)  # in a partial's own signature, what follows a keyword it sets is moved
    kinds, meanings = inspect.signature(whole).parameters, meanings_of(whole)
    is_network = isinstance(whole, type) and issubclass(whole, nn.Module)
    no_keys = models.NO_FIELDS if is_network else ()
    return MappingProxyType(
        {
            name: Key(parameter.annotation, parameter.default, meanings.get(name, ""))
            for name, parameter in inspect.signature(function).parameters.items()
            if kinds[name].kind is parameter.POSITIONAL_OR_KEYWORD and name not in no_keys
        }
    )


def meanings_of(function: Callable[..., Any]) -> dict[str, str]:
    """Returns what a docstring says of each argument or attribute, its first sentence; of a class, with its bases'."""
    meanings = {}
    for place in reversed(inspect.getmro(function)) if isinstance(function, type) else (function,):
        docstring = inspect.cleandoc(place.__doc__ or "")
        for section in re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", docstring, re.MULTILINE):
            for entry in re.split(r"^  (?=[\w*])", section, flags=re.MULTILINE)[1:]:
                name, _, text = entry.partition(":")
                meanings[name] = _first_sentence(text)
    return meanings


def _first_sentence(text: str) -> str:
    text = " ".join(text.split())
    # A full stop within a sentence, as in 'et al. 2017' or 'data/x.py', has no capital or quote behind it.
    return re.split(r"\.(?: (?=[A-Z'\"(])|$)", text, maxsplit=1)[0]
