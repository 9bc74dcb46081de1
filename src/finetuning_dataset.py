"""Stage 2: labelled sentences to clean, deduplicated, grouped and stratified splits without leakage.

What is dropped is counted and kept for showing: conflicting labels, boilerplate, exact duplicates. Near duplicates stay, as
groups that no split divides. A published validation split becomes the test split as it is, and the training side gives way.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from src.cleaning import RuleCounts, clean, rules_of
from src.config import LabelledSettings
from src.deduplication import near_duplicate_groups
from src.labels import LABELS
from src.overlap import find_overlap
from src.progress import progress_bar
from src.sources import read_labelled
from src.splits import SPLITS, SplitError, check_classes, grouped_stratified_split
from src.word_ngrams import comparison_key, digest

COLUMNS = ["text_id", "text", "label", "group", "in_pretraining", "source_row"]
LISTED = 50  # examples of dropped texts that the report keeps


class FinetuningDatasetError(ValueError):
    """Labelled rows that cannot become three splits; says what to change."""


@dataclass
class LabelledTexts:
    """The labelled set on its way: `frame` holds what is kept, the rest tells what was dropped.

    `frame` has the columns raw, text, key, label, source_row and published (row of a published test split), later group,
    split, in_pretraining and text_id. `boilerplate` and `conflicts` have text, rows and labels.
    """

    frame: pd.DataFrame
    counts: dict[str, int] = field(default_factory=dict)
    rules: RuleCounts = field(default_factory=RuleCounts)
    boilerplate: pd.DataFrame = field(default_factory=pd.DataFrame)
    conflicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    leak: dict[str, int] = field(default_factory=dict)
    in_both: int = 0  # different texts that stood in the main file and in the published split

    def drop(self, step: str, dropped: np.ndarray | pd.Series) -> None:
        """Count the rows of a boolean mask under `step` and drop them."""
        self.counts[step] = int(np.sum(dropped))
        self.frame = self.frame[~np.asarray(dropped)].reset_index(drop=True)

    def of_split(self, split: str) -> pd.DataFrame:
        return self.frame[self.frame["split"] == split]

    def near_duplicates(self) -> list[tuple[pd.Series, pd.Series]]:
        """The first two rows of every group of several texts."""
        repeated = self.frame[self.frame.duplicated("group", keep=False)]
        return [(rows.iloc[0], rows.iloc[1]) for _, rows in repeated.groupby("group")]


def read_cleaned(settings: LabelledSettings) -> LabelledTexts:
    """Read the main file, and the published validation split if there is one, and clean them."""
    columns = {"text_column": settings.text_column, "label_column": settings.label_column, "label_map": settings.label_map}
    frames = [read_labelled(settings.path, max_documents=settings.max_documents, **columns)]
    if settings.validation_path is not None:
        frames.append(read_labelled(settings.validation_path, **columns))
    rows = pd.concat(frames, ignore_index=True).rename(columns={"text": "raw"})
    texts = LabelledTexts(rows.assign(published=np.arange(len(rows)) >= len(frames[0])))
    rules = rules_of(settings.cleaning, "sentence")
    texts.frame["text"] = [clean(raw, rules, texts.rules) for raw in texts.frame["raw"]]
    texts.frame["key"] = [comparison_key(text) for text in texts.frame["text"]]
    blank = sum(frame.attrs["without_text"] for frame in frames)  # left out by the reader
    texts.counts["rows read"] = len(texts.frame) + blank
    texts.drop("without text", texts.frame["text"] == "")
    texts.counts["without text"] += blank
    return texts


def pretraining_texts(folder: Path) -> Iterator[str]:
    """Stream the documents of a pretraining_dataset artifact, a few megabytes at a time."""
    parquet = pq.ParquetFile(folder / "documents.parquet")
    with progress_bar(total=parquet.metadata.num_rows, desc="look for overlap", unit=" documents") as bar:
        for batch in parquet.iter_batches(batch_size=1_024, columns=["text"]):
            yield from batch.column(0).to_pylist()
            bar.update(len(batch))


def dropped_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """The different texts among some rows, the most frequent first: text, rows, labels (as words)."""
    if frame.empty:
        return pd.DataFrame({"text": [], "rows": [], "labels": []})
    names = frame["label"].map(dict(enumerate(LABELS)))
    by_key = frame.assign(name=names).groupby("key", sort=False)
    listed = by_key.agg(text=("text", "first"), rows=("text", "size"), labels=("name", lambda labels: ", ".join(sorted(set(labels)))))
    return listed.sort_values("rows", ascending=False, kind="stable").reset_index(drop=True)


def loose_key(key: str) -> str:
    """ASCII letters and digits alone, so that "17%to touch" is "17% to touch"; the key itself where that leaves under three words."""
    parts = re.findall(r"[a-z0-9]+", key)
    return " ".join(parts) if len(parts) >= 3 else key


def check_published_classes(test: pd.DataFrame) -> None:
    """Every class needs a text in a published split: scores are means over classes.

    Raises:
        SplitError: names the class that is missing.
    """
    check_classes(test["label"].to_numpy(), np.arange(len(test)), 1, "the published split")


def drop_published(texts: LabelledTexts) -> None:
    """Drop from the training side what stands in the published split, compared as loosely as is safe."""
    loose, published = texts.frame["key"].map(loose_key), texts.frame["published"]
    both = set(loose[published]) & set(loose[~published])
    texts.in_both = len(both)
    texts.drop("also in the published split", ~published & loose.isin(both))


def drop_conflicts_and_repeats(texts: LabelledTexts, boilerplate_count: int) -> None:
    """Drop, among the rows that are not of a published split: texts with several labels, boilerplate, exact duplicates."""
    own = ~texts.frame["published"]
    labels = texts.frame[own].groupby("key")["label"].nunique().reindex(texts.frame["key"], fill_value=1).to_numpy()
    texts.conflicts = dropped_texts(texts.frame[own & (labels > 1)])
    texts.drop("conflicting labels", own & (labels > 1))

    own = ~texts.frame["published"]
    seen = texts.frame[own]["key"].value_counts().reindex(texts.frame["key"], fill_value=0).to_numpy()
    texts.boilerplate = dropped_texts(texts.frame[own & (seen >= boilerplate_count)])
    texts.drop("boilerplate", own & (seen >= boilerplate_count))


def groups_of(texts: Iterable[str], settings: LabelledSettings) -> np.ndarray:
    """Group of every text, int64 (texts,): what the settings call near duplicates share one."""
    return near_duplicate_groups(texts, settings.near_duplicate_threshold, settings.near_duplicate_ngram)


def leak_of_random_split(texts: LabelledTexts, groups: np.ndarray, settings: LabelledSettings) -> dict[str, int]:
    """How many test texts would have a near duplicate in train if rows were split at random: what grouping prevents."""
    order = np.random.default_rng(settings.seed).permutation(len(groups))
    train, _, test = np.split(order, np.round(np.cumsum(settings.split_fractions[:2]) * len(groups)).astype(int))
    return {"test": len(test), "with_near_duplicate_in_train": int(np.isin(groups[test], groups[train]).sum())}


def group_and_split(texts: LabelledTexts, settings: LabelledSettings) -> None:
    """Add the columns group and split; exact duplicates and what would stand on both sides of a published split go.

    Raises:
        SplitError: a class is missing or too rare.
    """
    groups = groups_of(texts.frame["text"], settings)
    texts.leak = leak_of_random_split(texts, groups, settings)
    texts.frame["group"] = groups
    published = texts.frame["published"]
    texts.drop("exact duplicates", texts.frame.duplicated(["published", "key"]) & ~published)
    if settings.validation_path is not None:
        test = texts.frame[texts.frame["published"]]
        texts.drop("near duplicate of the published split", ~texts.frame["published"] & texts.frame["group"].isin(test["group"]))
    own = (~texts.frame["published"]).to_numpy()
    fractions = np.asarray(settings.split_fractions if own.all() else settings.split_fractions[:2])
    parts = np.full(len(texts.frame), SPLITS.index("test"))
    frame = texts.frame[own]
    parts[own] = grouped_stratified_split(frame["label"], frame["group"], fractions / fractions.sum(), settings.seed)
    texts.frame["split"] = np.asarray(SPLITS)[parts]


def text_ids(keys: Iterable[str]) -> list[str]:
    """A stable name of each normalised text: 16 hexadecimal digits, `-2`, `-3` … for its repetitions."""
    names = pd.Series([digest(key.encode("utf-8", "surrogatepass")).hex() for key in keys], dtype=object)
    again = names.groupby(names).cumcount()
    return [name if not count else f"{name}-{count + 1}" for name, count in zip(names, again, strict=True)]


def require_rows(texts: LabelledTexts, settings: LabelledSettings) -> None:
    """Raises FinetuningDatasetError when the main file has no row left, saying where they went."""
    if texts.frame["published"].all():
        lost = ", ".join(f"{count} {step}" for step, count in list(texts.counts.items())[1:])
        cure = f"correct the texts and labels, or raise labelled.boilerplate_count ({settings.boilerplate_count})"
        raise FinetuningDatasetError(f"{settings.path}: no row is left ({lost}): {cure}")


def collect_labelled(settings: LabelledSettings, corpus: Iterable[str]) -> LabelledTexts:
    """Everything of stage 2 but the writing.

    Args:
        settings: the section `labelled`.
        corpus: texts of the pre-training documents, streamed once.

    Raises:
        SourceError: a file cannot be read as labelled sentences.
        FinetuningDatasetError: too little is left, or a class is missing.
    """
    texts = read_cleaned(settings)
    require_rows(texts, settings)
    try:
        check_classes(texts.frame["label"].to_numpy(), np.arange(len(texts.frame)), 1, "labels")
        if settings.validation_path is not None:
            check_published_classes(texts.frame[texts.frame["published"]])
            drop_published(texts)
        drop_conflicts_and_repeats(texts, settings.boilerplate_count)
        require_rows(texts, settings)
        group_and_split(texts, settings)
    except SplitError as error:
        raise FinetuningDatasetError(f"{settings.path}: {error}") from None
    texts.frame["text_id"] = text_ids(texts.frame["key"])
    texts.frame["in_pretraining"] = find_overlap(texts.frame["text"].tolist(), corpus, settings.overlap_ngram)
    texts.counts |= {split: len(texts.of_split(split)) for split in SPLITS}
    return texts


def write_finetuning_dataset(texts: LabelledTexts, settings: LabelledSettings, folder: Path) -> dict[str, Any]:
    """Write `train.parquet`, `validation.parquet`, `test.parquet` and `report.json`; returns the report."""
    for split in SPLITS:
        texts.of_split(split)[COLUMNS].reset_index(drop=True).to_parquet(folder / f"{split}.parquet", index=False)
    report = report_of(texts, settings)
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    return report


def report_of(texts: LabelledTexts, settings: LabelledSettings) -> dict[str, Any]:
    frame = texts.frame
    train_groups = frame["group"][frame["split"] == "train"]
    by_split: Mapping[str, pd.DataFrame] = {split: texts.of_split(split) for split in SPLITS}
    return {
        "counts": texts.counts,
        "rules": texts.rules.report(),
        "classes": {
            split: {name: int((rows["label"] == index).sum()) for index, name in enumerate(LABELS)} for split, rows in by_split.items()
        },
        "in_pretraining": {split: int(rows["in_pretraining"].sum()) for split, rows in by_split.items()},
        "groups": int(frame["group"].nunique()),
        "groups_of_several_texts": int((frame["group"].value_counts() > 1).sum()),
        "random_split_leak": texts.leak,
        "test_texts_with_near_duplicate_in_train": int(by_split["test"]["group"].isin(train_groups).sum()),
        "boilerplate": texts.boilerplate.head(LISTED).to_dict("records"),
        "conflicts": texts.conflicts.head(LISTED).to_dict("records"),
        "split_seed": settings.seed,
        "split_fractions": list(settings.split_fractions),
        "published_test_split": settings.validation_path is not None,
        "texts_also_in_published_split": texts.in_both,
    }
