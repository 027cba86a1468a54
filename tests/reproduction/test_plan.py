"""What is run next, given results that are planted."""

from pathlib import Path

import pytest

from tests.reproduction import planted
from xception_flax.reproduction import plan
from xception_flax.reproduction.claims import SEARCH_SEED, read_table
from xception_flax.reproduction.results import Results, Run

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture
def results() -> Results:
    return Results(read_table(TINY), [])


@pytest.fixture
def claims():
    return read_table(TINY).claims


def plant(results: Results, setting: str, rate: float, seed: int, accuracy: float, **options: float) -> None:
    run = Run("digits", setting, rate, seed)
    results.add(planted.row(results, run, accuracy, **options))


def finish_search(results: Results, setting: str = "base") -> None:
    for rate, accuracy in ((0.025, 0.5), (0.05, 0.6), (0.1, 0.5)):
        plant(results, setting, rate, SEARCH_SEED, accuracy)


def test_the_best_rate_inside_the_grid_is_taken(results):
    rate, missing = plan.search(results, "digits", "base")
    assert (rate, [run.learning_rate for run in missing]) == (None, [0.025, 0.05, 0.1])
    assert all(run.is_search for run in missing)
    finish_search(results)
    assert plan.search(results, "digits", "base") == (0.05, [])


def test_of_equal_accuracies_the_lower_loss_is_taken(results):
    for rate, loss in ((0.025, 0.9), (0.05, 1.2), (0.1, 1.0)):
        plant(results, "base", rate, SEARCH_SEED, 0.5, loss=loss)
    for rate in (0.0125, 0.00625):
        plant(results, "base", rate, SEARCH_SEED, 0.4)
    assert plan.search(results, "digits", "base") == (0.025, [])


@pytest.mark.parametrize(
    ("accuracies", "next_rates"), [((0.5, 0.6, 0.7), (0.2, 0.4)), ((0.7, 0.6, 0.5), (0.0125, 0.00625))]
)
def test_the_grid_grows_where_the_best_is_at_its_edge_at_most_twice(results, accuracies, next_rates):
    for rate, accuracy in zip((0.025, 0.05, 0.1), accuracies, strict=True):
        plant(results, "base", rate, SEARCH_SEED, accuracy)
    for number, rate in enumerate(next_rates):
        assert plan.search(results, "digits", "base") == (None, [Run("digits", "base", rate, SEARCH_SEED)])
        plant(results, "base", rate, SEARCH_SEED, 0.8 + number / 10)
    assert plan.search(results, "digits", "base") == (next_rates[-1], [])


def test_a_rate_at_which_it_diverged_is_the_worst(results):
    for rate, accuracy in ((0.025, 0.1), (0.05, 0.2)):
        plant(results, "base", rate, SEARCH_SEED, accuracy)
    run = Run("digits", "base", 0.1, SEARCH_SEED)
    results.add(planted.row(results, run, 0.9) | {"validation": None})
    assert plan.search(results, "digits", "base") == (0.05, [])


def test_claims_with_fewer_missing_runs_come_first(results, claims):
    """The search of the base, which 'averaging' alone needs, before that of the other setting."""
    runs = plan.missing(results, claims, ["digits"], 3)
    assert [(run.setting, run.learning_rate) for run in runs] == [
        *(("base", rate) for rate in (0.025, 0.05, 0.1)),
        *(("no_momentum", rate) for rate in (0.025, 0.05, 0.1)),
    ]


def test_every_claim_has_one_seed_before_any_has_two(results, claims):
    finish_search(results)
    finish_search(results, "no_momentum")
    runs = plan.missing(results, claims, ["digits"], 2)
    assert [(run.setting, run.seed) for run in runs] == [
        ("base", 0),
        ("no_momentum", 0),
        ("base", 1),
        ("no_momentum", 1),
    ]


@pytest.mark.parametrize(("others", "seeds"), [((0.5, 0.5, 0.502), []), ((0.6, 0.5, 0.7), [3, 4])])
def test_more_seeds_only_where_three_do_not_decide(results, claims, others, seeds):
    finish_search(results)
    finish_search(results, "no_momentum")
    for seed, accuracy in enumerate(others):
        plant(results, "base", 0.05, seed, 0.6)
        plant(results, "no_momentum", 0.05, seed, accuracy)
    momentum = claims[:1]
    runs = plan.missing(results, momentum, ["digits"], 3)
    assert sorted({run.seed for run in runs}) == seeds
    assert len(runs) == 2 * len(seeds)


def test_after_four_seeds_the_fifth_is_run_whatever_they_say(results, claims):
    """Looking after every seed would find a difference where there is none more often than after 3 and after 5."""
    finish_search(results)
    finish_search(results, "no_momentum")
    for seed, accuracy in enumerate((0.51, 0.58, 0.545, 0.545)):  # -5.5, of three ±8.7, of four ±4.5
        plant(results, "base", 0.05, seed, 0.6)
        plant(results, "no_momentum", 0.05, seed, accuracy)
    found = plan.verdict(results, "digits", claims[0].comparisons[0])
    assert (len(found.differences), found.high < 0, found.word) == (4, True, "too few seeds")
    runs = plan.missing(results, claims[:1], ["digits"], 3)
    assert [(run.setting, run.seed) for run in runs] == [("no_momentum", 4), ("base", 4)]
    assert plan.missing(results, claims[:1], ["digits"], 4) == runs, "asking for four does not change the rule"
    for setting, accuracy in (("base", 0.6), ("no_momentum", 0.55)):
        plant(results, setting, 0.05, 4, accuracy)
    assert plan.verdict(results, "digits", claims[0].comparisons[0]).word == "agree"


def test_four_seeds_that_were_asked_for_are_enough_where_three_decide(results, claims):
    finish_search(results)
    finish_search(results, "no_momentum")
    for seed, accuracy in enumerate((0.5, 0.5, 0.502, 0.5)):
        plant(results, "base", 0.05, seed, 0.6)
        plant(results, "no_momentum", 0.05, seed, accuracy)
    found = plan.verdict(results, "digits", claims[0].comparisons[0])
    assert (len(found.differences), found.word) == (4, "agree")
    assert plan.missing(results, claims[:1], ["digits"], 4) == []


def test_the_difference_is_paired_by_seed(results, claims):
    finish_search(results)
    finish_search(results, "no_momentum")
    for seed, (base, other) in enumerate([(0.6, 0.59), (0.7, 0.68), (0.8, 0.77)]):
        plant(results, "base", 0.05, seed, base, raw=base - 0.05)
        plant(results, "no_momentum", 0.05, seed, other)
    plant(results, "no_momentum", 0.05, 3, 0.1)  # has no partner
    plant(results, "no_momentum", 0.1, 0, 0.1)  # is at another rate
    found = plan.verdict(results, "digits", claims[0].comparisons[0])
    assert found.differences == pytest.approx((-1, -2, -3))
    raw = plan.verdict(results, "digits", claims[1].comparisons[0])
    assert raw.differences == pytest.approx((-5, -5, -5))
    assert (raw.word, raw.high) == ("agree", pytest.approx(-5 + 50 / planted.IMAGES))


def test_a_run_that_diverged_leaves_it_undecided(results, claims):
    finish_search(results)
    finish_search(results, "no_momentum")
    for seed in range(3):
        plant(results, "base", 0.05, seed, 0.6)
        run = Run("digits", "no_momentum", 0.05, seed)
        results.add(planted.row(results, run, 0.5) | ({"test": None} if seed == 1 else {}))
    assert plan.verdict(results, "digits", claims[0].comparisons[0]).word == "undecided"
