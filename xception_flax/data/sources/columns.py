"""The columns of a table in a file: CSV, TSV, Parquet, JSON lines. Nothing is guessed but what divides the fields."""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xception_flax.data.sources.source import check_memory
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut
from xception_flax.text.values import MAX_TEXT

if TYPE_CHECKING:
    import pyarrow as pa

CSV, PARQUET, JSON = (".csv", ".tsv", ".txt"), (".parquet", ".pq"), (".jsonl", ".ndjson", ".json")
SUFFIXES = CSV + PARQUET + JSON

DIVIDERS = ("\t", ";", ",")  # the first of these that the line of names has; Excel writes ';' in half of the world

BLOCK = 2**20  # bytes of a CSV that are read at a time: the longest row


@dataclasses.dataclass(frozen=True)
class TableFile:
    """An open table.

    Attributes:
      path: of the file.
      schema: names and types of its columns. Those of CSV are texts, so that '007' stays what it is.
      first_row: the number of the first row with values, as an editor or a spreadsheet counts them.
      content: the bytes of a text without a mark at its beginning; None for Parquet.
      divider: between two fields of a CSV; '' for other formats.
    """

    path: str
    schema: "pa.Schema"
    first_row: int
    content: bytes | None = None
    divider: str = ""

    def read(self, columns: Sequence[str]) -> "dict[str, pa.ChunkedArray]":
        """Returns columns by their names; 'NAME.FIELD' is a field of structs, in Parquet.

        Raises:
          UserError: the file is damaged, or no table.
        """
        import pyarrow as pa  # here and below, since it takes a third of a second that other sources do not need
        from pyarrow import csv as arrow_csv
        from pyarrow import json as arrow_json
        from pyarrow import parquet

        try:
            if self.content is None:
                check_memory(self.path, self.num_bytes(columns))
                with parquet.ParquetFile(self.path) as file:
                    read = file.read(list(columns))
            elif self.divider:
                read = arrow_csv.read_csv(
                    pa.BufferReader(self.content),
                    arrow_csv.ReadOptions(
                        column_names=self.schema.names, skip_rows_after_names=self.first_row - 1, block_size=BLOCK
                    ),
                    arrow_csv.ParseOptions(delimiter=self.divider, newlines_in_values=True),
                    arrow_csv.ConvertOptions(
                        column_types=self.schema, strings_can_be_null=False, include_columns=list(columns)
                    ),
                )
            else:
                options = arrow_json.ParseOptions(explicit_schema=self.schema)
                read = arrow_json.read_json(pa.BufferReader(self.content), parse_options=options)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, error) from None
        return {name: self._column(read, name) for name in columns}

    def _column(self, read: "pa.Table", name: str) -> "pa.ChunkedArray":
        import pyarrow as pa
        import pyarrow.compute as pc

        if name in self.schema.names:
            return read.column(name)
        whole, _, field = name.partition(".")
        column = read.column(whole)
        kind = column.type.field(field).type
        return pa.chunked_array([pc.struct_field(chunk, field) for chunk in column.chunks], kind)

    def num_bytes(self, columns: Sequence[str]) -> int:
        """Returns the size of columns of a Parquet file in memory, by its own account."""
        from pyarrow import parquet

        with parquet.ParquetFile(self.path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        wanted = tuple(columns)
        return sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in wanted)
        )

    def groups(self, column: str) -> "Iterator[pa.ChunkedArray]":
        """Yields the values of a column of a Parquet file, as many at a time as were written together."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                for number in range(file.num_row_groups):
                    yield self._column(file.read_row_group(number, columns=[column]), column)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, error) from None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Returns the names of classes that Hugging Face's `datasets` wrote for a column of their numbers, if any."""
        try:
            written = json.loads((self.schema.metadata or {})[b"huggingface"])
            feature = written["info"]["features"][column]
            while isinstance(feature, dict) and "feature" in feature:  # of a list
                feature = feature["feature"]
            if isinstance(feature, list):  # as older versions write a list
                (feature,) = feature
            return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
        except (KeyError, TypeError, ValueError, RecursionError):
            return None


def open_table(path: str) -> TableFile:
    """Returns the table in a file, by the suffix of its name: .csv, .tsv, .txt, .parquet, .pq, .jsonl, .ndjson, .json.

    Raises:
      UserError: there is no such file, it is of another kind, or it is not what its name says.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):  # unlike Path.is_file, it is False for a path that is too long
        raise UserError(f"data.path: {path} is no file; expected a table: .csv, .tsv, .parquet or .jsonl.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        hint = " A spreadsheet is exported as 'CSV UTF-8'." if suffix in (".xlsx", ".xls", ".ods", ".numbers") else ""
        raise UserError(f"data.path: {path} is no table; expected .csv, .tsv, .parquet or .jsonl.{hint}")
    return (_open_csv if suffix in CSV else _open_json if suffix in JSON else _open_parquet)(path)


def _open_parquet(path: str) -> TableFile:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeError) as error:  # the last: of a name that is no text
        raise _unreadable(path, error) from None
    _check_names(path, names)
    return TableFile(path, schema, first_row=1)


def _open_csv(path: str) -> TableFile:
    import pyarrow as pa

    content = _read_text(path).lstrip(b"\r\n")
    content += b"\n" if content and not content.endswith(b"\n") else b""  # Arrow wants an end of the line of names
    text = content[:BLOCK].decode("utf-8", "ignore")
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    outside = re.sub(r'"[^"]*"?', "", first_line)
    divider = next((mark for mark in DIVIDERS if mark in outside), ",")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=divider)
        names = next((row for row in reader if row), [])
    except csv.Error as error:
        raise UserError(f"{path}: its first line, with the names of the columns, cannot be read ({error}).") from None
    names = [name.strip() or f"column {i}" for i, name in enumerate(names, start=1)]  # Excel and pandas leave some out
    if not names:
        raise UserError(f"{path} is empty; expected the names of the columns in its first line, then a row an image.")
    _check_names(path, names)
    schema = pa.schema([(name, pa.string()) for name in names])
    return TableFile(path, schema, first_row=2, content=content, divider=divider)


def _open_json(path: str) -> TableFile:
    import pyarrow as pa
    from pyarrow import json as arrow_json

    content = _read_text(path)
    if content.lstrip()[:1] != b"{":
        raise UserError(f"{path} is no JSON lines; expected an object in each line: {{"
                        '"image": "a.jpg", "label": "cat"}.')  # fmt: skip
    try:
        schema = arrow_json.read_json(pa.BufferReader(content)).schema
    except pa.ArrowException as error:
        raise _unreadable(path, error) from None
    # pyarrow takes texts like '2020-01-01' for points in time.
    kinds = [pa.string() if pa.types.is_timestamp(field.type) else field.type for field in schema]
    return TableFile(path, pa.schema(list(zip(schema.names, kinds, strict=True))), first_row=1, content=content)


def _read_text(path: str) -> bytes:
    """Returns the content of a text in UTF-8, without the mark that Windows puts in front."""
    try:
        check_memory(path, 2 * os.path.getsize(path))
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is text in UTF-16; save it as UTF-8 (in Excel: 'CSV UTF-8').")
    if content[:4] == b"PK\3\4":
        raise UserError(f"{path} is an archive or a spreadsheet, not a text; export it as CSV in UTF-8.")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        raise UserError(f"{path} is no text: it has a byte 0; expected a table in UTF-8.")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is no text in UTF-8: byte 0x{content[error.start]:02x} in line {line:,}. Save it as UTF-8; if it "
            f"is of Windows or Latin-1: iconv -f WINDOWS-1252 -t UTF-8."
        ) from None
    return content


def _check_names(path: str, names: Sequence[str]) -> None:
    if twice := naming.repeated(names):
        raise UserError(f"{path} has two columns called {cut(naming.shown(twice))}; each needs its own name.")
    if long := [name for name in names if len(name) > MAX_TEXT]:
        raise UserError(f"{path} has a column whose name has {len(long[0]):,} characters; is its first line the names?")


def _unreadable(path: str, error: Exception) -> UserError:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    if "straddling object" in text:
        text = f"a row has more than {BLOCK:,} bytes, as if a quote were not closed"
    return UserError(f"{path} cannot be read as a table: {cut(text)}.")
