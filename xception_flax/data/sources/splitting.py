"""Which images are held out as split 'val': by a hash of their names or groups, or by classes too.

Images of one group, such as the frames of one video, are of one split. Nothing here depends on the order of the images,
on the machine or on a random state.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, written
from xception_flax.text.naming import canonical
from xception_flax.text.ranges import check_range

VAL_FRACTION = 0.1

SPLITS = ("train", "val")
ALL = "all"  # the split that every image belongs to

# Groups among which the set that comes nearest to a share is searched exactly. Those before them are taken in the order
# of their hashes, so that the time does not grow with the square of their number.
SEARCHED = 200


class Rule(NamedTuple):
    """How images are held out.

    Attributes:
      val_fraction: share of 'val'.
      group_by: what images have in common that must not be in both splits: None for the name of each file, or as of
        `keys_of`.
      stratify: whether each class has that share, instead of all images together.
    """

    val_fraction: float = VAL_FRACTION
    group_by: str | None = None
    stratify: bool = False

    @property
    def key(self) -> str:
        """What an image is held out by, for messages."""
        return "name" if self.group_by is None else "group"


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of N images, of which each may have none or several.

    Attributes:
      images, classes: `[M]` integers: image `images[i]` is of class `classes[i]`.
      class_names: by number.
    """

    images: np.ndarray
    classes: np.ndarray
    class_names: Sequence[str]


def keys_of(paths: Iterable[str], group_by: str | None) -> list[str]:
    """Returns for each image the text whose hash decides its split, in Unicode's composed form.

    Args:
      paths: of the images, below the folder of a class or of the data; parts are divided by '/'.
      group_by: None for the name of each file; 'folder:N' for the name of the folder that is N levels above the file,
        so 'folder:1' is the folder that it lies in; or a regular expression with one group, which is searched in the
        name of each file: `(.*)_frame` makes 'clip7' of 'clip7_frame003.jpg'.

    Raises:
      UserError: `group_by` is neither of these, or an image has no such folder or no such name.
    """
    paths = [canonical(path) for path in paths]
    if group_by is None:
        return [path.rpartition("/")[2] for path in paths]
    find = _finder(group_by)
    keys = [find(path) for path in paths]
    if None in keys:
        first = naming.shown(paths[keys.index(None)])
        raise UserError(
            f"data.group_by={group_by}: {counted(keys.count(None), 'image')} of {len(keys):,} "
            f"{'has' if keys.count(None) == 1 else 'have'} no such group, as {first}."
        )
    return [key for key in keys if key is not None]


def _finder(group_by: str) -> Callable[[str], str | None]:
    """Returns a function from the path of an image to its group; None where it has none."""
    if match := re.fullmatch(r"folder:([1-9][0-9]?)", group_by):
        level = int(match[1])
        return lambda path: path.split("/")[-1 - level] if path.count("/") >= level else None
    try:
        pattern = re.compile(naming.composed(group_by))
        if pattern.groups == 1:

            def group(path: str) -> str | None:
                match = pattern.search(path.rpartition("/")[2])
                return match[1] if match else None

            return group
        wrong = f"{written(group_by)}, which has {counted(pattern.groups, 'group')}"
    except (re.error, RecursionError, OverflowError) as error:
        wrong = f"{written(group_by)} ({error})"
    raise UserError(
        "data.group_by must be folder:N, a regular expression of the file's name with one group in parentheses, or of "
        f"a table the name of a column, got {wrong}."
    )


def hash_of(key: str) -> float:
    """Returns a pseudo-random number in [0, 1) that depends only on the text, on every system."""
    return int.from_bytes(hashlib.sha256(canonical(key).encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def held_out(keys: Sequence[str], labels: Labels, rule: Rule) -> np.ndarray:
    """Returns `[N]` bool: whether each image is of 'val'.

    By default those are the images whose key has a hash below the fraction, so that an image keeps its split when
    others come or go. With `rule.stratify`, each class has as near to its share in 'val' as whole groups allow, and at
    least one image in either split where it has two groups; an image that comes may move another.

    Args:
      keys: from `keys_of`.
      labels: of the images, which `stratify` needs.
      rule: how.
    """
    names, groups = np.unique(np.array(keys, object), return_inverse=True)
    hashes = np.array([hash_of(name) for name in names])
    if not rule.stratify:
        return (hashes < rule.val_fraction)[groups]
    return _stratified(hashes, groups, labels, rule.val_fraction)[groups]


def _stratified(hashes: np.ndarray, groups: np.ndarray, labels: Labels, fraction: float) -> np.ndarray:
    """Returns for each group whether it is of 'val'. The rarest classes choose first among their groups."""
    order = np.argsort(hashes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    num_classes = len(labels.class_names)
    # Images of each class in each of its groups: the groups of a class in the order of their hashes.
    pairs, sizes = np.unique(labels.classes * len(hashes) + rank[groups[labels.images]], return_counts=True)
    of_class, of_group = np.divmod(pairs, len(hashes))
    ends = np.searchsorted(of_class, np.arange(num_classes + 1))
    totals = np.bincount(labels.classes, minlength=num_classes)
    chosen = np.full(len(hashes), -1)  # by rank: 1 for 'val', 0 for 'train', -1 while it is open
    for number in sorted(range(num_classes), key=lambda c: (totals[c], c)):
        part = slice(ends[number], ends[number + 1])
        mine, size = of_group[part], sizes[part]
        if not len(mine):
            continue
        taken, is_open = int(size[chosen[mine] == 1].sum()), chosen[mine] == -1
        target = max(round(fraction * int(totals[number])), 1) - taken
        # A class that has two groups is in both splits: not all that is left may go to one of them.
        among, among_sizes = mine[is_open], size[is_open]
        picked = nearest(among_sizes.tolist(), target, some=not taken, not_all=not (chosen[mine] == 0).any())
        chosen[among] = 0
        chosen[among[picked]] = 1
    without_class = chosen == -1
    chosen[without_class] = hashes[order][without_class] < fraction
    return (chosen == 1)[rank]


def nearest(sizes: Sequence[int], target: int, *, some: bool, not_all: bool) -> list[int]:
    """Returns the indices of those sizes whose sum is nearest to `target`, from below if two are as near.

    The last `SEARCHED` that fit are searched exactly, by all sums that they have; those before are taken.

    Args:
      sizes: positive, in the order in which they are preferred.
      target: the sum.
      some: take at least one, if there are two.
      not_all: leave at least one.
    """
    if not sizes:
        return []
    first, total = 0, 0
    while len(sizes) - first > SEARCHED and total + sum(sizes[first : first + SEARCHED // 2]) <= target:
        total += sizes[first]
        first += 1
    rest = sizes[first : first + SEARCHED]
    wanted, most = max(target - total, 0), sum(rest)
    # Bit n of sums[i] is set if some of the first i have the sum n.
    sums = [1]
    for size in rest:
        sums.append(sums[-1] | sums[-1] << size)
    whole = most if not_all and first + len(rest) == len(sizes) else -1
    least = 1 if some and not total and (len(sizes) > 1 or not not_all) else 0
    near = (n for distance in range(max(wanted, most) + 1) for n in (wanted - distance, wanted + distance))
    left = next((n for n in near if least <= n <= most and n != whole and sums[-1] >> n & 1), 0)
    picked = []
    for index in range(len(rest), 0, -1):
        if not sums[index - 1] >> left & 1:  # there is no such sum without this one
            picked.append(first + index - 1)
            left -= rest[index - 1]
    return [*range(first), *reversed(picked)]


def mistake(
    keys: Sequence[str],
    labels: Labels,
    rule: Rule,
    split: str,
    whole: str,
    place: Callable[[str], str],
    remedy: str,
) -> str:
    """Returns what is wrong with a split that `held_out` makes, and what to do; '' if nothing is.

    Args:
      keys, labels, rule: as of `held_out`.
      split: 'train' or 'val'.
      whole: what the data are called.
      place: returns what a class is called.
      remedy: what to do instead of holding out.
    """
    is_val = held_out(keys, labels, rule)
    if rule.stratify:
        return _mistake_of_classes(is_val, labels, rule, split, place, remedy)
    none = _classes_without(is_val, labels, "train")
    if split == "train" and len(none):
        number = int((labels.classes == none[0]).sum())
        all_of_it = (
            f"by its {rule.key} the only image is" if number == 1 else f"by their {rule.key}s all {number:,} images are"
        )
        wrong = f"{place(labels.class_names[none[0]])}: {all_of_it} of split 'val'"
    elif split == "val" and not is_val.any():
        wrong = f"{whole}: no image is of split 'val' by the hash of its {rule.key}"
    else:
        return ""
    fits = _fractions(keys, labels)
    advice = f"take {min(fits, key=lambda f: abs(f - rule.val_fraction)):g}" if fits else "no fraction does; add images"
    return f"{wrong} (data.val_fraction={rule.val_fraction:g}); {advice}, or {remedy}."


def _classes_without(is_val: np.ndarray, labels: Labels, split: str) -> np.ndarray:
    """Returns the numbers of the classes that have images, but none in a split."""
    of_split = is_val if split == "val" else ~is_val
    return np.setdiff1d(labels.classes, labels.classes[of_split[labels.images]])


def _mistake_of_classes(
    is_val: np.ndarray, labels: Labels, rule: Rule, split: str, place: Callable[[str], str], remedy: str
) -> str:
    if not len(none := _classes_without(is_val, labels, split)):
        return ""
    number = int((labels.classes == none[0]).sum())
    of_one = "" if rule.group_by is None or number == 1 else ", of one group or of groups with other classes"
    return (
        f"{place(labels.class_names[none[0]])}: no image is of split {split!r}, with {counted(number, 'image')} in all"
        f"{of_one}; data.stratify needs two {'images' if rule.group_by is None else 'groups'} of a class. Add some, "
        f"leave out data.stratify, or {remedy}."
    )


def _fractions(keys: Sequence[str], labels: Labels) -> list[float]:
    """Returns the fractions, by thousandths, that give 'val' some images and leave 'train' some of each class."""
    hashes = np.array([hash_of(key) for key in keys])
    largest = np.zeros(len(labels.class_names))
    np.maximum.at(largest, labels.classes, hashes[labels.images])
    limit = min(largest[np.unique(labels.classes)], default=0.0)
    return [n / 1000 for n in range(1, 1000) if hashes.min() < n / 1000 <= limit]


def check_rule(rule: Rule) -> None:
    """Raises UserError if a value is out of its range."""
    check_range("data.val_fraction", rule.val_fraction, 0, 1, above=True, below=True)
    if rule.group_by is not None and not rule.group_by:
        raise UserError(
            f"data.group_by must be folder:N, a regular expression or a column, got {cut(rule.group_by)!r}."
        )
