"""Rows of csv, tsv, jsonl, json, parquet and txt files, streamed, with errors that name the file, the row and the cure.

Files are read line by line (parquet in batches of rows), so memory does not grow with them; only a `.json` file that
holds one big array is read whole. Nothing is guessed: `NA` and `null` in a csv are text like any other, and bytes that
are not UTF-8 stop the reader instead of becoming question marks.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
BATCH_ROWS = 512
LONGEST_FIELD = 2**31 - 1  # characters of a csv field; Python's own limit is 131,072


class SourceError(ValueError):
    """Text that cannot be read: one line that names the place and the cure."""


def decoded_lines(path: Path) -> Iterator[str]:
    """Lines with their endings, decoded strictly as UTF-8, without a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise SourceError(f"{path} is UTF-16: save it as UTF-8, e.g. iconv -f UTF-16 -t UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}: line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1}): "
                    "save the file as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8"
                ) from None


def csv_reader(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(LONGEST_FIELD)
    return csv.reader(decoded_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)


def csv_header(path: Path, reader: Any) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise SourceError(f"{path}: the header is not valid csv ({error}): close its quotes, end lines as Unix or Windows does") from None
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise SourceError(f"{path} has two columns {twice[0]!r}: rename one")
    if len(header) == 1 and (other := re.search(r"[;|\t]", header[0])):
        raise SourceError(f"{path} is separated by {other[0]!r}: save it with commas, or with tabs as .tsv")
    return header


def csv_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    reader = csv_reader(path)
    row = 0
    header = csv_header(path, reader)
    try:
        for values in reader:
            if not values:
                continue  # a blank line
            row += 1
            if len(values) != len(header):
                raise SourceError(
                    f"{path}: row {row} (line {reader.line_num}) has {len(values)} fields, the header {len(header)}: "
                    "put texts with commas in quotes"
                )
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise SourceError(f"{path}: row {row + 1} (line {reader.line_num}) is not valid csv ({error}): close its quotes") from None


def json_row(value: Any, path: Path, row: int) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise SourceError(f'{path}: row {row} is a JSON {type(value).__name__}: write an object such as {{"text": …}} in its place')
    return value


def jsonl_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    row = 0
    for line in decoded_lines(path):
        if not line.strip():
            continue
        row += 1
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(
                f"{path}: row {row} is not valid JSON ({error}): the file may be cut off; fetch it again or delete the row"
            ) from None
        yield json_row(value, path, row)


def json_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a JSON array, of an object with one array in it, or of JSON lines under the name `.json`."""
    opening = list(islice((line for line in decoded_lines(path) if line.strip()), 2))
    try:
        # A single line, or one that starts an array, may be all of a big file: it is parsed only below.
        is_lines = len(opening) == 2 and opening[0].lstrip().startswith("{") and isinstance(json.loads(opening[0]), dict)
    except json.JSONDecodeError:
        is_lines = False
    if is_lines:
        yield from jsonl_rows(path)
        return
    try:
        content = json.loads("".join(decoded_lines(path)))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not valid JSON ({error}): the file may be cut off; fetch it again") from None
    if isinstance(content, dict):
        if len(content) > 1 and all(isinstance(value, dict) for value in content.values()):
            raise SourceError(f'{path} holds columns, not rows: write it with to_json(orient="records")')
        arrays = [value for value in content.values() if isinstance(value, list) and (len(content) == 1 or only_objects(value))]
        content = arrays[0] if len(arrays) == 1 else [content]
    for row, value in enumerate(content if isinstance(content, list) else [content], 1):
        yield json_row(value, path, row)


def only_objects(values: list) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]}): fetch it again") from None


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    row = 0
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns) if columns else None):
                yield from batch.to_pylist()
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path}: damaged after row {row} ({str(error).splitlines()[0]}): fetch it again") from None


def txt_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """One document a line; blank lines only separate."""
    for line in decoded_lines(path):
        if line.strip():
            yield {"text": line.strip()}


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
    ".txt": txt_rows,
}


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of one file as dicts, in order.

    Args:
        path: a file with a suffix in `READERS`.
        columns: the only ones needed; a format that stores columns reads no others.

    Raises:
        SourceError: not UTF-8, cut off, or of another format than its suffix says.
    """
    return READERS[path.suffix.lower()](path, columns)


def column_names(path: Path) -> list[str]:
    """Columns of one file: the header, the schema, or the keys of the first row; empty if there is no row."""
    if path.suffix.lower() == ".parquet":
        with open_parquet(path) as file:
            return file.schema_arrow.names
    if path.suffix.lower() in (".csv", ".tsv"):
        return csv_header(path, csv_reader(path))
    return list(next(iter(read_rows(path)), {}))


def count_rows(path: Path) -> int:
    """Number of rows; reads the file unless the format records it."""
    if path.suffix.lower() == ".parquet":
        with open_parquet(path) as file:
            return file.metadata.num_rows
    return sum(1 for _ in read_rows(path))
