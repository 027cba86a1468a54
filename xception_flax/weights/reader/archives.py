"""Reads members of zip archives, which may be damaged or made to hurt. Nothing is unpacked to a disk."""

import os
import re
import zipfile

from xception_flax.weights.reader.room import printable


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the members by name.

    Raises:
      ValueError: some are missing, two have one name, one would be outside the archive, or one is compressed in a way
        that can expand without bounds. `zipfile` raises errors of its own where an archive is damaged.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    archive.fp.seek(-22 - len(archive.comment), os.SEEK_END)
    end = archive.fp.read(22)
    # `zipfile` does not compare the number, and no checksum covers the directory.
    if not end.startswith(b"PK\5\6") or int.from_bytes(end[10:12], "little") != len(archive.infolist()):
        raise ValueError("its directory has not as many members as it says")
    for member in archive.infolist():
        name = printable(member.filename)
        if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            raise ValueError(f"{name} would be outside the archive; expected files in it")
        if name in found:
            raise ValueError(f"{name} is in it twice")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} has the compression {member.compress_type}; expected none, or deflate")
        archive.open(member).close()  # compares the name with the one beside the data, which no checksum covers
        found[name] = member
    return found


def data(archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int) -> bytes:
    """Returns all bytes of a member, whose checksum is compared.

    Raises:
      ValueError: there are more than `max_bytes`, or more or less than the archive says.
    """
    if member.file_size > max_bytes:
        raise ValueError(f"{member.filename} has more than {max_bytes:,} bytes; expected less")
    content = archive.read(member)
    if len(content) != member.file_size:
        raise ValueError(f"{member.filename} has {len(content):,} bytes; the archive says {member.file_size:,}")
    return content
