"""The places text may come from: a dataset of the Hub, a local file or folder, the bundled sample. One interface, `Source`."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from src.file_formats import READERS, Row, SourceError, column_names, count_rows, decoded_lines, read_rows
from src.hub_datasets import hub_revision, hub_rows, load_hub_dataset
from src.labels import TWITTER_LABEL_MAP, YAHOO_LABEL_MAP
from src.sample_data import sample_articles, sample_sentences
from src.verified_folders import describe_file

NOT_READ = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".xls", ".xlsx", ".arrow", ".feather")  # data, in formats that are not for us


@dataclass(frozen=True)
class KnownSource:
    """Columns and label map of a dataset."""

    text_column: str
    label_column: str | None = None
    label_map: Mapping[str, str] | None = None


HUB_ARTICLES, HUB_LABELLED = "genloop/bloomberg_financial_news_120k", "ugursa/Yahoo-Finance-News-Sentences"
KNOWN_SOURCES = {
    HUB_ARTICLES: KnownSource("Headline+Article"),
    HUB_LABELLED: KnownSource("text", "label", YAHOO_LABEL_MAP),
    "zeroshot/twitter-financial-news-sentiment": KnownSource("text", "label", TWITTER_LABEL_MAP),
}
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>\w+))?")


class Source(Protocol):
    """Rows with columns, from anywhere."""

    name: str
    known: KnownSource | None

    def columns(self) -> list[str]: ...
    def count(self) -> int: ...
    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, int, Row]]:
        """`(where, row counted from 1 in it, values)`."""
        ...

    def describe(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class FileSource:
    """A file, or the data files of a folder in name order; text files count only where there is no table."""

    name: str
    files: tuple[Path, ...]
    one_document_a_file: bool = False
    known: KnownSource | None = None

    @classmethod
    def open(cls, path: Path) -> "FileSource":
        if path.is_file() and path.suffix.lower() not in READERS:
            raise SourceError(f"{path}: format {path.suffix or 'without a suffix'} is not known: use {', '.join(READERS)}")
        files = [path] if path.is_file() else [f for f in sorted(path.rglob("*")) if f.is_file() and not is_hidden(f.relative_to(path))]
        skipped = [f.name for f in files if f.suffix.lower() in NOT_READ]
        files = [f for f in files if f.suffix.lower() in READERS]
        if not files:
            raise SourceError(f"{path} is a folder without data: put {', '.join(READERS)} files into it or name another folder")
        tables = [f for f in files if f.suffix.lower() != ".txt"]
        if skipped:
            warnings.warn(f"{path}: {skipped[0]} is not read, as {len(skipped)} file(s): unpack it, or save it as csv", stacklevel=3)
        for file in tables or files:
            if file.stat().st_size == 0:
                raise SourceError(f"{file} is empty: fetch it again or remove it")
        return cls(str(path), tuple(tables or files), one_document_a_file=path.is_dir() and not tables)

    def columns(self) -> list[str]:
        return ["text"] if self.one_document_a_file else column_names(self.files[0])

    def count(self) -> int:
        return len(self.files) if self.one_document_a_file else sum(map(count_rows, self.files))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, int, Row]]:
        for file in self.files:
            if self.one_document_a_file:
                yield str(file), 1, {"text": "".join(decoded_lines(file))}
                continue
            check_columns(str(file), columns, column_names(file))
            for row, values in enumerate(read_rows(file, columns), 1):
                yield str(file), row, values

    def describe(self) -> list[dict[str, Any]]:
        return [describe_file(file) for file in self.files]


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset on the Hub."""

    name: str
    split: str | None
    known: KnownSource | None

    def columns(self) -> list[str]:
        return load_hub_dataset(self.name, self.split).column_names

    def count(self) -> int:
        return len(load_hub_dataset(self.name, self.split))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, int, Row]]:
        for row, values in enumerate(hub_rows(load_hub_dataset(self.name, self.split), columns), 1):
            yield self.name, row, values

    def describe(self) -> list[dict[str, Any]]:
        return [{"hub_id": self.name, "split": self.split, "revision": hub_revision(self.name)}]


@dataclass(frozen=True)
class SampleSource:
    """The bundled synthetic articles, or labelled sentences."""

    labelled: bool
    name: str = "sample"

    @property
    def known(self) -> KnownSource:
        return KNOWN_SOURCES[HUB_LABELLED if self.labelled else HUB_ARTICLES]

    def columns(self) -> list[str]:
        return list(next(iter(sample_sentences() if self.labelled else sample_articles())))

    def count(self) -> int:
        return sum(1 for _ in self.rows(()))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, int, Row]]:
        for row, values in enumerate(sample_sentences() if self.labelled else sample_articles(), 1):
            yield "sample", row, values

    def describe(self) -> list[dict[str, Any]]:
        return [{"path": "sample"}]


def open_source(path: str, *, labelled: bool) -> Source:
    """`sample`, `hub`, a Hub id (`owner/name` or `owner/name:split`), or a local path; local files win over the Hub."""
    if path == "sample":
        return SampleSource(labelled)
    local = Path(path).expanduser()
    if path != "hub" and local.exists():
        return FileSource.open(local)
    match = HUB_ID.fullmatch((HUB_LABELLED if labelled else HUB_ARTICLES) if path == "hub" else path)
    if match is None or local.suffix.lower() in READERS:
        raise SourceError(f"{path} does not exist: correct the path, or use sample, hub or a Hub id such as {HUB_ARTICLES}")
    return HubSource(match["id"], match["split"], KNOWN_SOURCES.get(match["id"]))


def is_hidden(path: Path) -> bool:
    """Whether it or a folder of it starts with a dot: Jupyter keeps old copies in `.ipynb_checkpoints`."""
    return any(part.startswith(".") for part in path.parts)


def check_columns(where: str, wanted: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in columns]:
        raise SourceError(f"{where} has no column {missing[0]!r}: choose from {', '.join(map(repr, columns)) or 'none, it holds no row'}")
