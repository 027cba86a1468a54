"""The rows of a file, and which of them are of the recipes as they are now."""

from pathlib import Path

import pytest

from tests.reproduction import planted
from xception_flax.reproduction import results as rows
from xception_flax.reproduction.claims import read_table
from xception_flax.reproduction.results import Results, Run
from xception_flax.text.errors import UserError

TINY = Path(__file__).with_name("tiny.py")
RUN = Run("digits", "base", 0.05, 0)


def copy_of(path: Path, old: str = "", new: str = "") -> Results:
    path.write_text(TINY.read_text().replace(old, new))
    return Results(read_table(path), [])


def test_a_changed_recipe_has_another_name_and_its_rows_are_stale(tmp_path):
    before = Results(read_table(TINY), [])
    row = planted.row(before, RUN, 0.5)
    changed = copy_of(tmp_path / "a.py", "width=0.1", "width=0.2")
    changed.add(row)
    assert (changed.get(RUN), changed.stale) == (None, 1)
    before.add(row)
    assert (before.get(RUN), before.stale) == (row, 0)


@pytest.mark.parametrize(
    ("old", "new"), [("seed = 0", "seed = 7"), ("learning_rate=0.05", "learning_rate=0.5"), ("# ", "#")]
)
def test_seed_and_rate_are_of_the_run_and_not_of_the_recipe(tmp_path, old, new):
    names = [
        copy.recipe_name("digits", "base")
        for copy in (Results(read_table(TINY), []), copy_of(tmp_path / "a.py", old, new))
    ]
    assert names[0] == names[1]


def test_each_setting_has_a_name_of_its_own():
    results = Results(read_table(TINY), [])
    assert len({results.recipe_name("digits", setting) for setting in ("base", "no_momentum")}) == 2


def test_rows_are_added_to_the_file_and_read_again(tmp_path):
    results = Results(read_table(TINY), [])
    path = tmp_path / "new" / "results.jsonl"
    written = [planted.row(results, RUN._replace(seed=seed), 0.1 + 0.2) for seed in range(3)]
    assert rows.read(path) == []
    for row in written:
        rows.append(path, row)
    assert rows.read(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]
    path.write_bytes(path.read_bytes()[:-1])  # as some editors end a file
    rows.append(path, written[0])
    assert rows.read(path) == [*written, written[0]]


@pytest.mark.parametrize("key", rows.OF_A_ROW)
def test_a_row_without_one_of_its_keys_is_named(tmp_path, key):
    row = planted.row(Results(read_table(TINY), []), RUN, 0.5)
    del row[key]
    rows.append(tmp_path / "results.jsonl", row)
    with pytest.raises(UserError, match=f"line 1: expected the JSON of a run, .*it lacks {key}"):
        rows.read(tmp_path / "results.jsonl")


@pytest.mark.parametrize("key", rows.OF_A_ROW)
def test_a_value_of_a_wrong_type_is_named(tmp_path, key):
    row = planted.row(Results(read_table(TINY), []), RUN, 0.5)
    rows.append(tmp_path / "results.jsonl", row | {key: True})
    with pytest.raises(UserError, match=f"line 1: expected the JSON of a run, .*of a wrong type: {key}"):
        rows.read(tmp_path / "results.jsonl")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="got bytes that are no text"):
        rows.read(tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    "line", ["{", "3", "{}", '{"data_set": "digits", "setting": "base", "learning_rate": 1, "seed": 0}']
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"results.jsonl, line 1: expected the JSON of a run"):
        rows.read(path)
