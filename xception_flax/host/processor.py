"""What the CPU of this machine is called."""

import platform
import re
from pathlib import Path


def name() -> str:
    """Returns the name of the CPU, by Linux; elsewhere, and where Linux has none, its architecture."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.machine()
