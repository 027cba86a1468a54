"""Other ways to bring the images of an evaluation to size: crops, kernels, antialiasing."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xception_flax.data.transforms import parse_transforms
from xception_flax.data.transforms.resampling import KERNELS
from xception_flax.display import console
from xception_flax.inference.subject import Subject
from xception_flax.reports import writing
from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.text.sizes import ImageSize, normal, sides

FRACTIONS = (0.7, 0.8, 0.875, 0.95, 1.0)  # of the shorter side, that the crop keeps

_RESIZING = re.compile(r"(resize_center_crop|center_crop|resize)\s*(?:\((.*)\))?", re.DOTALL)


class Trial(NamedTuple):
    """One way, and how good the network is with it.

    Attributes:
      transforms: the chain.
      score: the metric that chooses.
      loss: in nats.
      correct: whether each image is right, `[N]`; None with several labels.
    """

    transforms: str
    score: float
    loss: float
    correct: np.ndarray | None


def chains(given: str, image_size: ImageSize) -> list[str]:
    """Returns the chains to try: the given one, and it with other fractions, kernels and antialiasing.

    `center_crop` and `resize_center_crop` keep their order of crop and scaling. For `resize`, which takes the whole
    image, there are central crops too.

    Args:
      given: a chain with one of these three transforms in it.
      image_size: of the network.

    Raises:
      UserError: there is none of them, or more than one.
    """
    calls = [call.strip() for call in given.split("|")]
    places = [(i, match) for i, call in enumerate(calls) if (match := _RESIZING.fullmatch(call))]
    if len(places) != 1:
        raise UserError(
            "--grid varies one resize, center_crop or resize_center_crop in the transforms of the evaluation, got "
            f"{written(given)}."
        )
    place, match = places[0]
    size = re.search(r"image_size\s*=\s*(\d+|\([^)]*\)|\[[^]]*\]|[\"'][^\"']*[\"'])", match[2] or "")
    said = f"{size[0]}, " if size else ""
    inner = sides(values.parse("image_size", size[1], ImageSize) if size else image_size)
    found = [given]
    for kernel, antialias in itertools.product(KERNELS, (False, True)):
        how = f"kernel={kernel}, antialias={antialias}"
        crops = [f"center_crop({said}fraction={fraction:g}, {how})" for fraction in FRACTIONS]
        if match[1] == "resize_center_crop":
            outer = [normal([int(side / fraction) for side in inner]) for fraction in FRACTIONS]
            crops = [f"resize_center_crop({said}resize_size={size}, {how})" for size in outer]
        elif match[1] == "resize":
            crops.insert(0, f"resize({said + how})")
        found += [" | ".join([*calls[:place], crop, *calls[place + 1 :]]) for crop in crops]
    return found


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the trials by their score, of equal ones the lower loss, of equal ones the earlier first."""
    return sorted(trials, key=lambda trial: (-trial.score, trial.loss))


def run(subject: Subject, given: str, image_size: ImageSize, metric: str) -> list[Trial]:
    """Evaluates with each of `chains`; the first is the given one. Each process must call it.

    Args:
      subject: what is evaluated; its preprocessing is the given chain.
      given, image_size: as of `chains`.
      metric: the result that chooses.

    Raises:
      UserError: the chain cannot be varied.
    """
    trials = []
    for chain in console.stepping("evaluating", chains(given, image_size)):
        split = subject.split
        if chain != given:  # its pixels are rounded to whole numbers, as where a user writes it in --transforms
            split = dataclasses.replace(split, transforms=parse_transforms(chain, image_size), rounded=True)
        results, said = writing.evaluate(subject._replace(split=split))
        correct = None if said.several_labels else said.correct
        trials.append(Trial(chain, results[metric], results["loss"], correct))
    return trials
