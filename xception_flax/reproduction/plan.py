"""Which runs are missing, in the order in which they are worth the most."""

import dataclasses
from collections.abc import Iterator, Sequence

from xception_flax.reproduction.claims import (
    EXTENSIONS,
    FACTORS,
    MIN_SEEDS,
    MORE_SEEDS,
    SEARCH_SEED,
    TOO_FEW,
    Claim,
    Comparison,
    Verdict,
    decide,
)
from xception_flax.reproduction.results import Results, Run


def search(results: Results, data_set: str, setting: str) -> tuple[float | None, list[Run]]:
    """Returns the learning rate of a setting, None while the search goes on, and the runs that it needs next.

    The best is that of the highest validation accuracy, the lower loss where two are equal. While it is at the edge of
    the grid, and at most `EXTENSIONS` times, the grid grows there by a step, of the ratio of its last two.
    """
    written = results.learning_rate(data_set, setting)
    factors = list(FACTORS)
    for extension in range(EXTENSIONS + 1):
        runs = [Run(data_set, setting, float(f"{factor * written:.6g}"), SEARCH_SEED) for factor in factors]
        missing = [run for run in runs if results.get(run) is None]
        if missing:
            return None, missing
        best = max(runs, key=lambda run: _quality(results, run))
        if extension == EXTENSIONS or best not in (runs[0], runs[-1]):
            break
        if best == runs[0]:
            factors.insert(0, factors[0] * factors[0] / factors[1])
        else:
            factors.append(factors[-1] * factors[-1] / factors[-2])
    return best.learning_rate, []


def _quality(results: Results, run: Run) -> tuple[float, float]:
    validation = results.get(run)["validation"]
    return (-1.0, 0.0) if validation is None else (validation["top1"], -validation["loss"])  # None: it diverged


def runs_of(
    results: Results, data_set: str, comparison: Comparison, seeds: Sequence[int]
) -> tuple[list[tuple[Run, Run]], list[Run]]:
    """Returns the runs that a comparison is of, a pair for each seed, setting first, and those that are missing.

    While a learning rate is searched, only the search is missing, and there are no pairs.
    """
    base_rate, missing = search(results, data_set, comparison.base)
    rate, more = (base_rate, []) if comparison.same_rate else search(results, data_set, comparison.setting)
    if missing or more:
        return [], [*missing, *(run for run in more if run not in missing)]
    pairs = [
        (Run(data_set, comparison.setting, rate, seed), Run(data_set, comparison.base, base_rate, seed))
        for seed in seeds
    ]
    return pairs, [run for run in dict.fromkeys(run for pair in pairs for run in pair) if results.get(run) is None]


def verdict(results: Results, data_set: str, comparison: Comparison, first: int | None = None) -> Verdict:
    """Returns what the results say of a comparison, by the seeds that both settings have.

    If a run of them diverged, so that it has no accuracy, it is 'undecided'. Between `MIN_SEEDS`, where those ask for
    more, and `MORE_SEEDS` there are too few seeds: a look after each one would find a difference where there is none
    more often.

    Args:
      first: only seeds below this; None for all.
    """
    seeds = sorted({run.seed for run in results.rows if run.data_set == data_set and not run.is_search})
    pairs, _ = runs_of(results, data_set, comparison, [seed for seed in seeds if first is None or seed < first])
    rows = [(results.get(run), results.get(base)) for run, base in pairs]
    rows = [(row, base) for row, base in rows if row is not None and base is not None]
    if any(row["test"] is None or base["test"] is None for row, base in rows):
        return Verdict("undecided", ())
    differences = [
        round(100 * (row["test"][comparison.weights]["top1"] - base["test"]["ema"]["top1"]), 9) for row, base in rows
    ]
    resolution = 50 / rows[0][0]["test"]["images"] if rows else 0.0
    found = decide(differences, comparison.expected, resolution)
    if MIN_SEEDS < len(differences) < MORE_SEEDS and verdict(results, data_set, comparison, MIN_SEEDS).needs_more:
        return dataclasses.replace(found, word=TOO_FEW)
    return found


def missing(results: Results, claims: Sequence[Claim], data_sets: Sequence[str], seeds: int) -> list[Run]:
    """Returns the runs that are missing and can be named now, in their order; what they give may ask for more.

    On each data set, every claim first gets one seed, then `seeds`, then `MORE_SEEDS` where those do not decide. Of the
    claims at one stage that which lacks the fewest runs comes first, so that a short budget completes one.
    """
    found: dict[Run, None] = {}
    for stage in dict.fromkeys((1, seeds, max(seeds, MORE_SEEDS))):
        for data_set in data_sets:
            of_claims = [list(dict.fromkeys(_of_claim(results, data_set, claim, stage, seeds))) for claim in claims]
            for runs in sorted(of_claims, key=len):
                found |= dict.fromkeys(runs)
    return list(found)


def _of_claim(results: Results, data_set: str, claim: Claim, stage: int, seeds: int) -> Iterator[Run]:
    for comparison in claim.comparisons:
        if stage <= seeds or verdict(results, data_set, comparison, MIN_SEEDS).needs_more:
            yield from runs_of(results, data_set, comparison, range(stage))[1]
