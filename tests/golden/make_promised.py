"""Writes promised.json, what docs/stability.md promises to keep: it adds what is new. Run it for a new version.

python tests/golden/make_promised.py
"""

import json
from pathlib import Path

import xception_flax
from xception_flax.__main__ import VERBS, command
from xception_flax.commands import completion
from xception_flax.host.project import RECIPES
from xception_flax.recipes import groups

FILE = Path(__file__).with_name("promised.json")


def found() -> dict[str, list[str]]:
    """Returns what there is now, by kind."""
    options = {verb: completion.options_of(command(verb)) for verb in VERBS}
    return {
        "keys of recipes": [key for name in groups.PARTS for key in completion.keys_of(name)],
        "recipes": [path.stem for path in RECIPES.glob("*.py")],
        "verbs and options": [f"{verb} {option}" for verb, names in options.items() for option in names or [""]],
        "exports": list(xception_flax.__all__),
    }


if __name__ == "__main__":
    promised = json.loads(FILE.read_text()) if FILE.exists() else {}
    content = {kind: sorted({*names, *promised.get(kind, [])}) for kind, names in found().items()}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
