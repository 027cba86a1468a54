"""How sure a number is: intervals of shares, of scores over images, and of the difference of two networks."""

import functools

import numpy as np

CONFIDENCE = 0.95
Z = 1.959964  # standard deviations of a normal distribution that hold 95 %
SEED = 0  # of the resamples
ROUNDING = 1e-12  # a standard error of so small a share of the score is the rounding of equal numbers

# So many images are drawn for the resamples of an evaluation, in all: a bound on time and memory.
MAX_DRAWN = 5_000_000
MIN_RESAMPLES, MAX_RESAMPLES = 100, 1000


@functools.cache
def wilson(successes: int, count: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a share of independent images (Wilson 1927); NaN without images."""
    from scipy import stats  # here, since it takes a second that only this needs

    if not count:
        return float("nan"), float("nan")
    low, high = stats.binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def num_resamples(num_images: int) -> int:
    """Returns how often images are drawn anew: 1,000 times, or fewer (at least 100) above 5,000 images."""
    return int(np.clip(MAX_DRAWN // num_images, MIN_RESAMPLES, MAX_RESAMPLES))


def resample(num_images: int) -> np.ndarray:
    """Returns how often each image counts, float32 `[num_images, 1 + resamples]`.

    Column 0 counts each image once. Each other column is a bootstrap resample (Efron 1979): as many images as there
    are, drawn with replacement, by `SEED`.
    """
    rng = np.random.default_rng(SEED)
    weights = np.ones((num_images, 1 + num_resamples(num_images)), np.float32)
    for column in range(1, weights.shape[1]):
        weights[:, column] = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
    return weights


def around(values: np.ndarray, most: float = 1.0) -> np.ndarray:
    """Returns value, low and high of a score: `[..., 1 + resamples]`, as `resample` orders them -> `[..., 3]`.

    The bounds are 1.96 standard errors away, cut at 0 and `most`; the standard error is the standard deviation over
    the resamples in which the score is defined. Percentiles would not do: images that a resample has twice raise
    average precision, for classes of few images by more than its standard error.

    The bounds are NaN where the score is, and where it is the same in all resamples, as of images that are all right: a
    standard error of 0 would say that the score is certain.
    """
    known = ~np.isnan(values[..., 1:])
    count = known.sum(-1)
    resampled = np.where(known, values[..., 1:], 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = resampled.sum(-1) / count
        squares = np.where(known, (resampled - means[..., None]) ** 2, 0).sum(-1)
        error = np.sqrt(squares / (count - 1))
    value = values[..., 0]
    error = np.where(error > ROUNDING * np.abs(value), error, np.nan)
    low, high = (np.clip(value + sign * Z * error, 0, most) for sign in (-1, 1))
    return np.stack([value, low, high], -1)


def difference(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of the first's accuracy minus the second's, on the same images.

    It is the adjusted Wald interval of Bonett and Price (2012), https://doi.org/10.3102/1076998611411915: one more
    image is counted on either side, so that it holds for few images and for none that differ.

    Args:
      only_first, only_second: images that this one alone has right.
      count: all images.
    """
    first, second, total = only_first + 1, only_second + 1, count + 2
    middle = (first - second) / total
    variance = ((first + second) / total - middle**2) / total
    half = Z * variance**0.5
    return max(-1.0, middle - half), min(1.0, middle + half)
