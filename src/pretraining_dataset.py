"""Stage 1: articles to cleaned, deduplicated, split and tokenized documents.

Everything is streamed and nothing that is kept grows by more than a few hundred bytes a document: cleaned text waits in
a temporary file on disk while duplicates are found and the tokenizer is trained on a bounded sample of it.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.cleaning import RuleCounts, clean, rules_of
from src.config import CorpusSettings
from src.deduplication import near_duplicate_groups
from src.progress import progress_bar
from src.sources import count_articles, read_articles
from src.tokenizer import UNK_ID, TokenizedDocuments, encode_in_bulk, load_sentencepiece

SPLITS = ("train", "validation")
BATCH_BYTES = 2_000_000  # text that is encoded and written at once
HISTOGRAM_EDGES = np.concatenate([[0], np.geomspace(8, 65_536, 27).astype(int)])  # words or tokens of a document
SCHEMA = pa.schema([("document_id", pa.int64()), ("split", pa.string()), ("text", pa.string())])


class PretrainingDatasetError(ValueError):
    """A corpus that leaves too little to train on."""


class TextSpool:
    """Texts in a temporary file, appended in order and read back by number; gone when the object is."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="documents-")  # noqa: SIM115 (it lives as long as the object)
        self.ends = array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def append(self, text: str) -> None:
        self.file.seek(self.ends[-1])
        self.ends.append(self.ends[-1] + self.file.write(text.encode("utf-8")))

    def __getitem__(self, index: int) -> str:
        self.file.seek(self.ends[index])
        return self.file.read(self.ends[index + 1] - self.ends[index]).decode("utf-8")


@dataclass
class Documents:
    """Cleaned documents, on disk, and what became of every article.

    `groups[i]` is the first document of the near-duplicate group of document i; `splits[i]` is 0 train, 1 validation, -1 left
    out as a duplicate. `rows[i]` is its row in the source.
    """

    texts: TextSpool = field(default_factory=TextSpool)
    rows: array = field(default_factory=lambda: array("q"))
    words: array = field(default_factory=lambda: array("q"))
    counts: dict[str, int] = field(default_factory=dict)
    rules: RuleCounts = field(default_factory=RuleCounts)
    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    splits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))

    def of_split(self, split: str) -> np.ndarray:
        """Numbers of the documents of a split, int64, in source order."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def duplicates(self) -> list[tuple[int, int]]:
        """`(first of the group, its near duplicate)` for every document left out."""
        return [(int(self.groups[i]), int(i)) for i in np.flatnonzero(self.splits < 0)]

    def sample(self, split: str, count: int) -> Iterator[str]:
        """At most `count` texts of a split, evenly spaced."""
        numbers = self.of_split(split)
        for index in np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int):
            yield self.texts[numbers[index]]


def cleaned_documents(settings: CorpusSettings, documents: Documents) -> Iterator[str]:
    """Read and clean articles; yield, and keep in `documents`, those long enough and not seen before."""
    rules = rules_of(settings.cleaning, "article")
    counts = documents.counts = dict.fromkeys(("articles read", "without text", "too short", "exact duplicates"), 0)
    seen: set[bytes] = set()
    total = settings.max_documents or count_articles(settings.path)  # under a limit, read_articles counts it
    articles = read_articles(settings.path, settings.text_column, settings.max_documents)
    for article in progress_bar(articles, total=total, desc="clean and compare", unit=" articles"):
        counts["articles read"] += 1
        text = clean(article.text, rules, documents.rules)
        words = len(text.split())
        if words < settings.min_words:
            counts["too short" if words else "without text"] += 1
            continue
        key = hashlib.blake2b(text.lower().encode(), digest_size=12).digest()
        if key in seen:
            counts["exact duplicates"] += 1
            continue
        seen.add(key)
        documents.texts.append(text)
        documents.rows.append(article.row)
        documents.words.append(words)
        yield text


def collect_documents(settings: CorpusSettings) -> Documents:
    """Clean, deduplicate and split a corpus.

    The split is by document. Of each near-duplicate group one document is kept, so none has a twin on the other side; a short first report
    and its longer update, which share less than the threshold asks, may stand on two.

    Raises:
        SourceError: the corpus cannot be read.
        PretrainingDatasetError: fewer than two documents are left.
    """
    documents = Documents()
    documents.groups = near_duplicate_groups(cleaned_documents(settings, documents), settings.near_duplicate_threshold)
    first = documents.groups == np.arange(len(documents.groups))
    kept = np.flatnonzero(first)
    if len(kept) < 2:
        raise PretrainingDatasetError(
            f"{len(kept)} of {documents.counts['articles read']} articles of {settings.path} are left after cleaning and deduplication, "
            f"2 are needed: read more, or lower corpus.min_words ({settings.min_words})"
        )
    documents.splits = np.where(first, 0, -1).astype(np.int8)
    validation = max(1, round(settings.validation_fraction * len(kept)))
    documents.splits[np.random.default_rng(settings.seed).permutation(kept)[:validation]] = 1
    documents.counts |= {"near duplicates": len(first) - len(kept), "train": len(kept) - validation, "validation": validation}
    return documents


def batches_of(documents: Documents, numbers: np.ndarray) -> Iterator[list[int]]:
    """Consecutive documents of about `BATCH_BYTES` together, at least one."""
    sizes = np.diff(np.frombuffer(documents.texts.ends, np.int64))[numbers]
    batch = np.cumsum(sizes) // BATCH_BYTES
    with progress_bar(total=len(numbers), desc="tokenize", unit=" documents") as bar:
        for part in np.split(numbers, np.flatnonzero(np.diff(batch)) + 1):
            yield part.tolist()
            bar.update(len(part))


class ArrayFile:
    """A one-dimensional `.npy` file that grows while it is written; numpy leaves room in the header for the length."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.file, self.dtype, self.length = path.open("wb"), np.dtype(dtype), 0
        self.write_header()

    def write_header(self) -> None:
        self.file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: Iterable[int] | np.ndarray) -> None:
        values = np.asarray(values, self.dtype)
        self.file.write(values.tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.write_header()
        self.file.close()


def write_pretraining_dataset(documents: Documents, tokenizer_folder: Path, folder: Path) -> dict[str, Any]:
    """Write token ids, offsets, texts and the report of an artifact folder.

    `documents.parquet` holds the kept documents in source order; the i-th of a split is document i of its token arrays.

    Returns:
        The report: counts at each step, what each cleaning rule removed, lengths, tokens per word, rate of unknown tokens.
    """
    processor = load_sentencepiece(tokenizer_folder)
    if processor.get_piece_size() > 2**16:
        raise PretrainingDatasetError(f"{processor.get_piece_size()} pieces do not fit uint16: set corpus.vocab_size to at most 65536")
    tokens = {split: ArrayFile(folder / f"{split}_tokens.npy", np.uint16) for split in SPLITS}
    ends = {split: array("q", [0]) for split in SPLITS}
    unknown = 0
    kept = np.flatnonzero(documents.splits >= 0)
    with pq.ParquetWriter(folder / "documents.parquet", SCHEMA, compression="zstd") as parquet:
        for numbers in batches_of(documents, kept):
            texts = [documents.texts[number] for number in numbers]
            splits = [SPLITS[documents.splits[number]] for number in numbers]
            for split, ids in zip(splits, encode_in_bulk(processor, texts), strict=True):
                tokens[split].append(ids)
                ends[split].append(ends[split][-1] + len(ids))
                unknown += ids.count(UNK_ID)
            parquet.write_batch(pa.record_batch([[documents.rows[number] for number in numbers], splits, texts], schema=SCHEMA))
    for split in SPLITS:
        tokens[split].close()
        np.save(folder / f"{split}_offsets.npy", np.frombuffer(ends[split], np.int64))
    report = report_of(documents, folder, unknown)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def report_of(documents: Documents, folder: Path, unknown: int) -> dict[str, Any]:
    lengths = {split: TokenizedDocuments.load(folder, split).lengths for split in SPLITS}
    words = np.asarray(documents.words)[documents.splits >= 0]
    tokens = int(sum(length.sum() for length in lengths.values()))
    return {
        "counts": documents.counts,
        "rules": documents.rules.report(),
        "words": int(words.sum()),
        "tokens": {split: int(length.sum()) for split, length in lengths.items()},
        "tokens_per_word": tokens / int(words.sum()),
        "unknown_rate": unknown / tokens,
        "words_histogram": histogram(words),
        "tokens_histogram": histogram(np.concatenate(list(lengths.values()))),
    }


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Documents in each class of length; `edges` are the classes' bounds."""
    counts, edges = np.histogram(np.minimum(lengths, HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)
    return {"edges": edges.tolist(), "documents": counts.tolist()}
