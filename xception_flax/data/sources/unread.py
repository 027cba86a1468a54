"""What the sources in use leave out of their folders and tables."""

from collections.abc import Iterable

from xception_flax.data.sources.folder import MAX_KINDS, Files, describe_unread
from xception_flax.data.sources.source import Source
from xception_flax.data.sources.table import Rows
from xception_flax.text import naming


def unread_of(read: Iterable[Source], *, whole: bool = True) -> str:
    """Returns `describe_unread` of the folders and tables that these sources read; '' for sources of other kinds.

    Args:
      read: the splits in use.
      whole: whether `read` is all that is used of the data. Then the text also has the number of all files or rows, and
        the splits that are not used.
    """
    read = list(read)
    files = [source for source in read if isinstance(source, Files)]
    rows = [source for source in read if isinstance(source, Rows)]
    num_files = len({path for source in files for path in source.paths})
    num_rows = sum({source.split_name: len(source) for source in rows}.values())
    said = []
    for sources, number, noun in ((files, num_files, "file"), (rows, num_rows, "row")):
        unread = [entry for source in sources for entry in source.unread]
        said.append(describe_unread(unread, number if whole else None, noun))
        used = {source.split for source in sources}
        others = list(dict.fromkeys(name for source in sources for name in source.splits if name not in used))
        if whole and others:
            more = f" and {len(others) - MAX_KINDS:,} more" if len(others) > MAX_KINDS else ""
            said.append(
                f"Other splits there, which are not used: {', '.join(map(naming.shown, others[:MAX_KINDS]))}{more}."
            )
    return " ".join(filter(None, said))
