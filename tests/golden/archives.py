"""Golden files that are kept in archives."""

import tarfile
from pathlib import Path


def unpacked(name: str, folder: Path) -> Path:
    """Unpacks an archive of this folder into `folder`, which is returned."""
    with tarfile.open(Path(__file__).parent / name) as archive:
        archive.extractall(folder, filter="data")
    return folder
