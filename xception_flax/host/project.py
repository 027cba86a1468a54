"""Where `train.py` and the recipes are: in the clone, or in the installed package, which has a copy of both."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]

# The build puts them into the folder `project` of the package; see hatch_build.py.
PROJECT = shipped if (shipped := PACKAGE / "project").is_dir() else PACKAGE.parent

TRAIN = PROJECT / "train.py"
RECIPES = PROJECT / "configs"
