"""The results of all runs: a JSON line each, found again by what was run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from xception_flax.host import files
from xception_flax.recipes import reading
from xception_flax.reproduction.claims import SEARCH_SEED, Table
from xception_flax.text.errors import UserError

# What no result is named by: runs differ in their seeds, and machines in where data are.
OF_A_RUN = ("seed", "data.data_dir")

# What a row has, and its types in JSON. A run that diverged has no validation and no test, one of a search no test, one
# that was interrupted no seconds.
OF_A_ROW: Mapping[str, tuple[type, ...]] = {
    "data_set": (str,),
    "setting": (str,),
    "learning_rate": (float, int),
    "seed": (int,),
    "recipe": (str,),
    "steps": (int,),
    "validation": (dict, NoneType),
    "test": (dict, NoneType),
    "parameters": (int,),
    "multiply_adds": (int,),
    "losses": (list,),
    "accuracies": (list,),
    "seconds": (float, int, NoneType),
    "step_seconds": (float, int, NoneType),
    "versions": (dict,),
    "machine": (dict,),
}


class Run(NamedTuple):
    """What is run once: a setting of a table on a data set, at a learning rate, with a seed."""

    data_set: str
    setting: str
    learning_rate: float
    seed: int

    @property
    def is_search(self) -> bool:
        """Whether it is one of the search of a learning rate, which never sees the test split."""
        return self.seed == SEARCH_SEED


class Results:
    """The rows of a file that are of the recipes of a table as they are now, by their runs.

    Attributes:
      rows: of the current recipes, by run.
      stale: number of rows of other recipes, which count for nothing.
    """

    def __init__(self, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows: dict[Run, Mapping[str, Any]] = {}
        self.stale = 0
        self._table = table
        self._recipes: dict[tuple[str, str], Any] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a row in; of two of the same run the last counts."""
        run = Run(row["data_set"], row["setting"], row["learning_rate"], row["seed"])
        known = run.data_set in self._table.data_sets and run.setting in self._table.settings
        if known and row["recipe"] == self.recipe_name(run.data_set, run.setting):
            self.rows[run] = row
        else:
            self.stale += 1

    def get(self, run: Run) -> Mapping[str, Any] | None:
        """Returns the row of a run; None if it has not been run."""
        return self.rows.get(run)

    def recipe_name(self, data_set: str, setting: str) -> str:
        """Returns the `digest` of the recipe of a setting as it is now, without what a run sets itself."""
        flat = self._flat(data_set, setting)
        return digest({key: value for key, value in flat.items() if key != "optimizer.learning_rate"})

    def learning_rate(self, data_set: str, setting: str) -> float:
        """Returns the learning rate that a setting's recipe is written with."""
        return self._flat(data_set, setting)["optimizer.learning_rate"]

    def _flat(self, data_set: str, setting: str) -> dict[str, Any]:
        if (data_set, setting) not in self._recipes:
            self._recipes[data_set, setting] = flat(reading.as_written(self._table.recipe(data_set, setting)))
        return self._recipes[data_set, setting]


def digest(recipe: Mapping[str, Any]) -> str:
    """Returns a short name of a recipe as written, which changes with any of its values but `OF_A_RUN`.

    It is a SHA-256 of what is written: a new key with a default changes nothing.
    """
    content = {key: value for key, value in flat(recipe).items() if key not in OF_A_RUN}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a recipe by full keys, such as 'model.width', as JSON has them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; none where there is no file.

    Raises:
      UserError: it cannot be read, or a line is no row.
    """
    if not path.exists():
        return []
    with files.file_errors(path, "read"):
        content = path.read_bytes()
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected lines of JSON, got bytes that are no text; name another file.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if lacking := [key for key in OF_A_ROW if key not in row]:
                raise ValueError(f"it lacks {', '.join(lacking)}")
            if wrong := [key for key, types in OF_A_ROW.items() if type(row[key]) not in types]:
                raise ValueError(f"of a wrong type: {', '.join(wrong)}")
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: expected the JSON of a run, got {line[:60]!r} ({error}); remove the line, and "
                "the run is run again."
            ) from None
        rows.append(row)
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, so that the file has either all of it or nothing.

    Raises:
      UserError: the file cannot be written.
    """
    with files.file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
    end = b"" if before[-1:] in (b"", b"\n") else b"\n"  # an editor may have taken the last one away
    files.write_whole(path, [before, end, json.dumps(row).encode() + b"\n"])
