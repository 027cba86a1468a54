"""A trained network of any origin on a split with labels: which class is which, and what is measured."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xception_flax import data
from xception_flax.data.sources.source import Renumbered
from xception_flax.inference.predictor import Predictor
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut
from xception_flax.text.naming import composed, repeated, shown
from xception_flax.training import losses, metrics, steps

ADVICE = "Take other weights, or say how images are scaled (--mean, --std)."  # where the loss is not finite

MAX_LISTED = 10  # classes, in a message


class Classes(NamedTuple):
    """Which classes of the data are which of a network.

    Attributes:
      names: of the logits that are scored. A network of one logit for a sigmoid has two classes: no and yes.
      numbers: the logit of each class of the data.
      words: how they were matched.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    words: str


class Evaluation(NamedTuple):
    """What `training.evaluation.evaluate` takes, for one network and one split.

    Attributes:
      eval_step: from `steps.make_eval_step`.
      split: with the network's classes and its preprocessing.
      classes: see there.
      several_labels: whether an image may have several.
      activation: from scored logits to probabilities.
    """

    eval_step: Callable[..., Any]
    split: data.Split
    classes: Classes
    several_labels: bool
    activation: Callable[[jax.Array], jax.Array]


def prepare(predictor: Predictor, split: data.Split) -> Evaluation:
    """Returns the evaluation of a network on a split, which was loaded with the size and transforms of the network.

    The loss is the cross-entropy of the network's activation: over the classes for 'softmax'; for 'sigmoid' the sum of
    each class's own, where the label of an image is the only one that is true.

    Raises:
      UserError: the network has no classifier, other classes than the data, or one class an image where it has several.
    """
    if not predictor.class_names:
        raise UserError("this network has no classifier; its features can be had (embed), or classes be trained.")
    several = len(split.batch_shapes["labels"][0]) == 2
    single_logit = len(predictor.class_names) == 1 and predictor.activation == "sigmoid"
    if several and (predictor.activation != "sigmoid" or single_logit):
        raise UserError("images of this data have several labels; the network chooses one class an image.")
    classes = match(
        predictor.class_names, split.class_names, names_assumed=predictor.names_assumed, single_logit=single_logit
    )
    if several and len(classes.numbers) < len(classes.names):
        raise UserError(
            f"images of this data have several labels, and not all classes of the network: {classes.words}."
        )
    loss = losses.create_loss("softmax" if single_logit else predictor.activation)
    plain, count = loss.plain, len(classes.names)
    if predictor.activation == "sigmoid" and not single_logit and not several:
        loss = loss._replace(plain=lambda logits, labels: plain(logits, jax.nn.one_hot(labels, count)))
    preprocessing = predictor.preprocessing
    eval_step = steps.make_eval_step(
        predictor.model,
        loss,
        metrics.create_metrics("multi_label" if several else "single_label"),
        steps.create_normalizer(preprocessing.mean, preprocessing.std),
        predictor.mesh,
        head=_no_and_yes if single_logit else lambda logits: logits,
        compiler_options=predictor.compiler_options,
    )
    source = Renumbered(split.source, classes.numbers, classes.names)
    return Evaluation(
        eval_step,
        dataclasses.replace(split, source=source, rounded=preprocessing.rounded),
        classes,
        several,
        jax.nn.softmax if single_logit else predictor.activate,
    )


def _no_and_yes(logits: jax.Array) -> jax.Array:
    """The logits of two classes whose softmax is the sigmoid of one: `[N, 1]` -> `[N, 2]`."""
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def match(network: Sequence[str], there: Sequence[str], *, names_assumed: bool, single_logit: bool = False) -> Classes:
    """Returns which class of the data is which of the network: by their names where it has some, else by their order.

    Names are compared in Unicode's composed form. The data may lack classes of the network, whose names then say which.

    Args:
      network: names of its logits.
      there: names of the classes of the data.
      names_assumed: whether the first are ImageNet's or numbers, for want of others. ImageNet's are believed where the
        data has no others.
      single_logit: whether it has one logit, for a sigmoid: it then says whether an image is of its class, or, without
        a name, of the second of two, as Keras has it.

    Raises:
      UserError: they differ; the message lists the first ten.
    """
    network, there = tuple(map(composed, network)), tuple(map(composed, there))
    if single_logit:
        return _match_one(network[0], there, names_assumed=names_assumed)
    numbers = {name: i for i, name in enumerate(network)}
    extra = [name for name in there if name not in numbers]
    some_known = len(extra) < len(there)
    if names_assumed and some_known and network[0] == "0" and len(network) > 10:
        raise UserError(
            f"the data's classes are numbers ({_listed(there, 3)}), sorted as text, and nobody says whether so are the "
            "network's logits; name them, in their order, by --class-names FILE."
        )
    # Names that nobody gave are ImageNet's or numbers. If some of the data's are among them, all are meant so.
    if not names_assumed or some_known:
        if (twice := repeated(network)) is not None:
            raise UserError(f"two classes of the network are named {shown(twice)}; name all by --class-names FILE.")
        present = set(there)
        missing = [name for name in network if name not in present]
        if extra:
            room = MAX_LISTED - len(extra)
            lacks = f", and none of {_listed(missing, room)}" if missing and room > 0 else ""
            raise UserError(
                f"the data has classes that the network has not: {_listed(extra)}{lacks}. Rename them, or name the "
                "network's classes, in the order of its logits, by --class-names FILE."
            )
        words = f"by their names{', which are assumed' if names_assumed else ''}"
        words += f"; no images of {len(missing)} of the network's {len(network)}: {_listed(missing)}" if missing else ""
        return Classes(network, tuple(numbers[name] for name in there), words)
    first = len(network) - len(there)  # logit of the first class: 1 behind a background
    if first and (first, network[0]) != (1, "background"):
        classes = f"{counted(len(there), 'class')} ({_listed(there)})"
        raise UserError(
            f"the data has {classes}, and the network {len(network):,}, without names. Name the "
            "network's, in the order of its logits, by --class-names FILE."
        )
    words = f"by their order{', after background' if first else ''}, as the network has no names of them"
    return Classes((*network[:first], *there), tuple(range(first, len(network))), words)


def _match_one(name: str, there: tuple[str, ...], *, names_assumed: bool) -> Classes:
    if len(there) != 2:
        raise UserError(
            f"the network has one logit, for one of two classes; the data has {len(there):,}: {_listed(there)}."
        )
    if names_assumed:
        return Classes(there, (0, 1), f"one logit, without a name: taken to be for the second, {shown(there[1])}")
    if name not in there:
        raise UserError(f"the network's one class is {shown(name)}; the data has {_listed(there)}.")
    yes = there.index(name)
    return Classes((there[1 - yes], name), (1 - yes, yes), "by their names, one of which the network has")


def _listed(names: Sequence[str], most: int = MAX_LISTED) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(cut(shown(name)) for name in names[:most]) + more
