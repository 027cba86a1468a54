"""Adds `train.py` and the recipes to the wheel, as the folder `project` of the package (`xception_flax.host.project`).

An editable installation has both in its clone, and gets no copies.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Project(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] |= {
                "train.py": "xception_flax/project/train.py",
                "configs": "xception_flax/project/configs",
            }
