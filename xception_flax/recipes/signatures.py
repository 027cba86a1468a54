"""The keys of a recipe with type, default and meaning, from the signatures and docstrings of the functions it feeds.

In such a signature the keys are the parameters between `/` and `*`. The program passes those before `/` by position and
those after `*` by name.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn

from xception_flax import models
from xception_flax.text import values


class Key(NamedTuple):
    """A key of a recipe.

    Attributes:
      annotation: its type.
      default: its value if the recipe gives none; `inspect.Parameter.empty` if the recipe must give one.
      meaning: the first sentence of the docstring about it, without the full stop.
    """

    annotation: Any
    default: Any
    meaning: str

    @property
    def is_required(self) -> bool:
        """Whether a recipe must give it, since it has no default."""
        return self.default is inspect.Parameter.empty


@functools.cache
def keys_of(function: Callable[..., Any]) -> Mapping[str, Key]:
    """Returns the keys that a function, a class or a `partial` takes from a recipe, in order.

    Raises:
      UserError: a key has no type, or one of which no value can be written.
    """
    # A partial that sets a keyword makes all parameters after it keyword-only, so kinds are those of the function.
    whole = getattr(function, "func", function)
    kinds, meanings = inspect.signature(whole).parameters, meanings_of(whole)
    is_network = isinstance(whole, type) and issubclass(whole, nn.Module)
    no_keys = models.NO_FIELDS if is_network else ()
    keys = {
        name: Key(parameter.annotation, parameter.default, meanings.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if kinds[name].kind is parameter.POSITIONAL_OR_KEYWORD and name not in no_keys
    }
    for name, key in keys.items():
        values.check_parameter(whole, name, key.annotation)
    return MappingProxyType(keys)


def meanings_of(function: Callable[..., Any]) -> dict[str, str]:
    """Returns the first sentence of a docstring on each argument or attribute; for a class, also those of its bases."""
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
    # A full stop inside a sentence, as in 'et al. 2017' or 'data/x.py', is not followed by a capital or a quote.
    return re.split(r"\.(?: (?=[A-Z'\"(])|$)", text, maxsplit=1)[0]
