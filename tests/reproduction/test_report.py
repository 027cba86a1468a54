"""The page at each stage, from results that are planted."""

from pathlib import Path

from tests.reproduction import planted
from xception_flax.host.project import RECIPES
from xception_flax.reproduction import report
from xception_flax.reproduction.claims import SEARCH_SEED, read_table
from xception_flax.reproduction.results import Results, Run

TINY = Path(__file__).with_name("tiny.py")


def planted_results(seeds: int) -> Results:
    results = Results(read_table(TINY), [])
    for setting, accuracy in (("base", 0.6), ("no_momentum", 0.5)):
        for rate in (0.025, 0.05, 0.1):
            run = Run("digits", setting, rate, SEARCH_SEED)
            results.add(planted.row(results, run, 0.5 + (rate == 0.05) / 10))
        for seed in range(seeds):
            results.add(planted.row(results, Run("digits", setting, 0.05, seed), accuracy + seed / 500))
    return results


def row_of(page: str, beginning: str) -> list[str]:
    return next(line for line in page.splitlines() if line.startswith(f"| {beginning}")).strip("| ").split(" | ")


def test_without_results_it_says_so(tmp_path):
    table = read_table(TINY)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "miniature_curves.png").write_bytes(b"of an older page")
    assert report.write(Results(table, []), table, tmp_path) == [tmp_path / "miniature.md"]
    page = (tmp_path / "miniature.md").read_text()
    assert row_of(page, "Momentum helps") == ["Momentum helps (nowhere)", "not run"]
    assert "Nothing was run yet." in page
    assert "![" not in page
    assert not list((tmp_path / "images").iterdir())


def test_one_seed_is_too_small_to_decide(tmp_path):
    table = read_table(TINY)
    report.write(planted_results(1), table, tmp_path)
    page = (tmp_path / "miniature.md").read_text()
    assert row_of(page, "Momentum helps")[1] == "too few seeds"
    assert row_of(page, "momentum")[4:] == ["-10.00", "1", "too few seeds"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "miniature_averaging.png",
        "miniature_curves.png",
        "miniature_differences.png",
    ]


def test_three_seeds_decide_and_the_costs_and_rates_are_beside(tmp_path):
    table = read_table(TINY)
    report.write(planted_results(3), table, tmp_path)
    page = (tmp_path / "miniature.md").read_text()
    assert row_of(page, "Momentum helps")[1] == "agree"
    # Equal differences: half an image of the 1,000 on either side.
    assert row_of(page, "momentum")[3:] == ["worse", "-10.00 (-10.05 to -9.95)", "3", "agree"]
    assert row_of(page, "LeNet, digits | 1,000")[1:] == ["1,000", "2.00", "0.100", "10", "60.20", "3"]
    assert row_of(page, "LeNet, digits | 0.025")[1:] == ["0.025: 50.00, 0.05: 60.00, 0.1: 50.00", "0.05"]
    assert "- 12 runs: digits, 2 CPUs (none), jax 1" in page
    assert "\nA network that is narrow.\n" in page
    assert "- **averaging.** Nothing is said of it." in page
    # -10 three times, and 10 to 10.4: both by far.
    kept = (
        "the 2 comparisons of a claimed difference together, these exclude 0: without momentum, digits; LeNet, digits."
    )
    assert kept in " ".join(page.split())


def test_the_same_results_give_the_same_bytes(tmp_path):
    table = read_table(TINY)
    for place in ("a", "b"):
        report.write(planted_results(3), table, tmp_path / place)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_page_of_ones_own_has_nothing_of_this_project():
    """The notes of the project's table are about the project's results; those of one's own table are one's own."""
    mine = Path("mine", report.RESULTS)  # as of a package that is installed: the default, in another folder
    table = read_table(RECIPES / "miniature.py")
    project, of_mine = (report.render(Results(table, []), table, [], *source) for source in ([], [mine]))
    assert "Written after a look at the results" in project
    assert "Written after a look at the results" not in of_mine
    page = report.render(planted_results(3), read_table(TINY), [], mine)
    assert f"`{TINY}` has the" in page
    assert f"`{mine}` a line for each run" in page
    assert "- **averaging.** Nothing is said of it." in page
    assert not [text for text in (page, of_mine) if "](" in text]  # a link


def test_runs_that_diverged_are_counted():
    results = planted_results(3)
    run = Run("digits", "no_momentum", 0.05, 2)
    results.add(planted.row(results, run, 0.5) | {"test": None})
    page = report.render(results, read_table(TINY), [])
    assert row_of(page, "without momentum, digits | 1,000")[-2:] == ["50.10", "2 (and 1 diverged)"]
    assert row_of(page, "momentum")[4:] == ["", "0", "undecided"]


def test_rows_of_other_recipes_are_said():
    results = planted_results(1)
    row = planted.row(results, Run("digits", "base", 0.05, 1), 0.9)
    results.add(row | {"recipe": "of last week"})
    page = report.render(results, read_table(TINY), [])
    assert "1 line of the results are of other recipes, and count for nothing." in page
