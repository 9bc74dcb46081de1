"""Articles and labelled sentences as the rest of the pipeline reads them, from wherever they lie.

Articles are streamed, labelled sentences are read whole. A limited run takes rows evenly spread over the source rather
than its first ones: news files are sorted by date and labelled ones often by label. For that a csv, json, jsonl or
txt source is read twice, once to count it.
"""

import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src.file_formats import Row, SourceError
from src.labels import label_id, parse_label_map
from src.source_locations import KnownSource, Source, check_columns, open_source

__all__ = ["Article", "SourceError", "count_articles", "describe_source", "read_articles", "read_labelled"]

# Headlines are kept in front of their article: sentences that are classified later are often headlines.
TEXT_COLUMNS = ("Headline+Article", "Article", "article", "text", "Text", "sentence", "Sentence", "content", "body", "headline", "title")
LABEL_COLUMNS = ("label", "Label", "sentiment", "Sentiment", "labels")


def choose_column(name: str, columns: Sequence[str], given: str | None, candidates: Sequence[str], variable: str) -> tuple[str, ...]:
    """Columns to read of a source: the given ones (`A+B` joins two), or the first candidate that it has."""
    if given:
        chosen = tuple(given.split("+")) if given not in columns else (given,)
        check_columns(name, chosen, columns)
        return chosen
    for candidate in candidates:
        if all(part in columns for part in candidate.split("+")):
            return tuple(candidate.split("+"))
    if not columns:
        raise SourceError(f"{name} holds no row: fetch it again or name another source")
    raise SourceError(f"{name} has columns {', '.join(map(repr, columns))}: say which one to read with {variable}=…")


def text_of(where: str, row: int, values: Row, columns: Sequence[str]) -> str:
    """Text of a row; several columns become lines, and all but the last end as sentences do. Nothing (None) is empty text."""
    parts = []
    for column in columns:
        value = values.get(column)
        if value is not None and not isinstance(value, str):
            raise SourceError(
                f"{where}: row {row}, column {column!r} holds {type(value).__name__} {reprlib.repr(value)}, not text: choose another column"
            )
        value = value or ""
        if not value.isascii():  # JSON can hold half of an emoji, which nothing could write again
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts.append(value.strip())
    lead = [part if part[-1] in ".?!:;" else f"{part}." for part in parts[:-1] if part]
    return "\n".join([*lead, *parts[-1:]]).strip()


def spread(rows: Iterator[tuple[str, int, Row]], count: int | None, wanted: int | None) -> Iterator[tuple[int, str, int, Row]]:
    """Number rows from 0 and keep `wanted` of `count`, evenly spaced (all if None)."""
    for index, (where, row, values) in enumerate(rows):
        if wanted is None or (index + 1) * wanted // count > index * wanted // count:
            yield index, where, row, values


def selected_rows(source: Source, columns: Sequence[str], max_documents: int | None) -> Iterator[tuple[int, str, int, Row]]:
    total = source.count() if max_documents is not None else None
    wanted = None if total is None or total <= max_documents else max_documents
    found = False
    for item in spread(source.rows(columns), total, wanted):
        found = True
        yield item
    if not found:
        raise SourceError(f"{source.name} holds no row: fetch it again or name another source")


@dataclass(frozen=True)
class Article:
    """One article: its place in the source, counted from 0, and its raw text (empty where the source has none)."""

    row: int
    text: str


def read_articles(path: str | Path, text_column: str | None = None, max_documents: int | None = None) -> Iterator[Article]:
    """Stream articles.

    Args:
        path: `sample`, `hub` (Bloomberg), a Hub id, or a file or folder of csv, tsv, jsonl, json, parquet or txt. A txt file
            holds one document a line; a folder of txt files one document a file.
        text_column: column to read, `Headline+Article` joins two; None takes the known one.
        max_documents: at most this many, evenly spread over the source; None takes all.

    Raises:
        SourceError: missing, empty or damaged source, wrong column, not UTF-8, Hub unreachable.
    """
    source = open_source(str(path), labelled=False)
    known = [source.known.text_column] if source.known else []
    columns = source.columns()
    texts = choose_column(source.name, columns, text_column, [*known, *TEXT_COLUMNS, *columns[: len(columns) == 1]], "CORPUS_COLUMN")
    for index, where, row, values in selected_rows(source, texts, max_documents):
        yield Article(index, text_of(where, row, values, texts))


def count_articles(path: str | Path) -> int:
    """How many articles a source holds; a csv, json, jsonl or txt source is read through for it."""
    return open_source(str(path), labelled=False).count()


def read_labelled(
    path: str | Path,
    text_column: str | None = None,
    label_column: str | None = None,
    label_map: str | Mapping[str, str] | None = None,
    max_documents: int | None = None,
) -> pd.DataFrame:
    """Read labelled sentences.

    Args:
        path, text_column, max_documents: as for `read_articles`; `hub` is the Yahoo set.
        label_column: None takes the known one.
        label_map: `"0=bearish,1=bullish,2=neutral"` or a mapping; None takes the known one of a Hub dataset, else words
            are read by their meaning and integers are refused.

    Returns:
        Columns `text` (str), `label` (int, index into `LABELS`), `source_row` (int, from 0). Rows without text are left
        out with a warning; their number is `frame.attrs["without_text"]`.

    Raises:
        SourceError: as for `read_articles`; a label that is missing, unknown, or a number without a map.
    """
    source = open_source(str(path), labelled=True)
    known = source.known or KnownSource("text")
    columns = source.columns()
    texts = choose_column(source.name, columns, text_column, [known.text_column, *TEXT_COLUMNS], "TEXT_COLUMN")
    (label,) = choose_column(source.name, columns, label_column, [known.label_column or "label", *LABEL_COLUMNS], "LABEL_COLUMN")
    names = parse_label_map(label_map) if isinstance(label_map, str) else label_map or known.label_map
    kept, blank = [], []
    for index, where, row, values in selected_rows(source, (*texts, label), max_documents):
        if text := text_of(where, row, values, texts):
            kept.append((text, read_label(where, row, label, values.get(label), names), index))
        else:
            blank.append(f"{where}: row {row}")
    if not kept:
        raise SourceError(f"{source.name}: column {'+'.join(texts)!r} holds no text in any row: choose another with TEXT_COLUMN=…")
    if blank:
        warnings.warn(f"{blank[0]} has no text, as {len(blank)} of {len(blank) + len(kept)} rows: left out", stacklevel=2)
    frame = pd.DataFrame(kept, columns=["text", "label", "source_row"])
    frame.attrs["without_text"] = len(blank)
    return frame


def read_label(where: str, row: int, column: str, value: object, label_map: Mapping[str, str] | None) -> int:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise SourceError(f"{where}: row {row} has no label in column {column!r}: fill it in or delete the row")
    try:
        return label_id(value, label_map)
    except ValueError as error:
        raise SourceError(f"{where}: row {row}, column {column!r}: {error}") from None


def describe_source(path: str | Path, *, labelled: bool = False) -> list[dict[str, Any]]:
    """What was read, for a manifest: `path, bytes, sha256, modified_ns` of each file, or `hub_id, split, revision`."""
    return open_source(str(path), labelled=labelled).describe()
