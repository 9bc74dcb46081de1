"""Stage 1: every article is accounted for, nothing stands on both sides of the split, and memory does not follow the corpus."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from src import pretraining_dataset, profiles
from src.artifacts import open_artifact, write_artifact
from src.config import CorpusSettings
from src.pretraining_dataset import ArrayFile, PretrainingDatasetError, collect_documents, write_pretraining_dataset
from src.tokenizer import (
    TokenizedDocuments,
    TokenizerError,
    check_same_ids,
    encode_texts,
    load_tokenizer,
    make_tokenizer,
    tokenizer_sources,
    train_tokenizer,
)

LETTERS = np.random.default_rng(9).choice(list("aeioubcdfglmnprst"), (2_000, 7))
WORDS = ["".join(letters[: 3 + i % 5]) for i, letters in enumerate(LETTERS)]


def article(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words)) + "."


def write_corpus(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """120 different articles, 10 copies in other case and spacing, 10 near copies, 3 short ones, 2 without text."""
    rng = np.random.default_rng(0)
    texts = [article(rng, 150) for _ in range(120)]
    copies = [f"OSLO (Reuters) - {text.upper()}  (Reporting by Ann Writer)" for text in texts[:10]]
    near = [f"{text} Updated {i} times." for i, text in enumerate(texts[10:20])]
    path = write_corpus(tmp_path / "corpus.jsonl", texts + copies + near + ["too short"] * 3 + ["", " "])
    return CorpusSettings(path=path, vocab_size=300, validation_fraction=0.1, min_words=20)


def build(settings, folder):
    folder.mkdir()
    documents = collect_documents(settings)
    tokenizer = make_tokenizer(documents.sample("train", settings.tokenizer_documents), folder, settings)
    return documents, tokenizer, write_pretraining_dataset(documents, folder, folder)


def test_every_article_is_accounted_for(corpus, tmp_path):
    """Breaks when an article is lost, counted twice, or a duplicate slips into the dataset."""
    documents, _, report = build(corpus, tmp_path / "out")
    expected = {"articles read": 145, "without text": 2, "too short": 3, "exact duplicates": 10, "near duplicates": 10}
    assert documents.counts == {**expected, "train": 108, "validation": 12}
    assert sorted(documents.rows[copy] - documents.rows[first] for first, copy in documents.duplicates()) == [120] * 10
    assert report["words"] == 120 * 150
    assert sum(report["words_histogram"]["documents"]) == 120
    assert report["rules"]["drop_credit"]["texts"] == 10
    assert report["unknown_rate"] == 0


def test_token_ids_offsets_and_texts_tell_the_same(corpus, tmp_path):
    """Breaks when rows of documents.parquet and documents of the token arrays fall out of step, or a split shares a text."""
    documents, tokenizer, report = build(corpus, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "documents.parquet").to_pandas()
    assert not set(rows.text[rows.split == "train"]) & set(rows.text[rows.split == "validation"])
    assert rows.document_id.is_monotonic_increasing
    for split in ("train", "validation"):
        stored = TokenizedDocuments.load(tmp_path / "out", split)
        assert rows.document_id[rows.split == split].tolist() == [documents.rows[number] for number in documents.of_split(split)]
        texts = rows.text[rows.split == split].tolist()
        assert [ids.tolist() for ids in map(stored.__getitem__, range(len(stored)))] == encode_texts(tokenizer, texts)
        assert (stored.tokens.dtype, stored.offsets.dtype) == (np.uint16, np.int64)
        assert report["tokens"][split] == len(stored.tokens) == stored.offsets[-1]


def test_the_same_settings_give_the_same_bytes_and_another_seed_another_split(corpus, tmp_path):
    """Breaks when a run cannot be repeated, or the seed has no effect."""
    documents, _, _ = build(corpus, tmp_path / "a")
    build(corpus, tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    other = collect_documents(replace(corpus, seed=1))
    assert set(other.of_split("validation")) != set(documents.of_split("validation"))


def test_memory_does_not_follow_the_corpus(tmp_path, monkeypatch):
    """Breaks when texts, tokens or cleaned copies are kept in memory: four times the corpus must not need four times the memory."""
    monkeypatch.setattr(pretraining_dataset, "BATCH_BYTES", 100_000)
    rng = np.random.default_rng(0)
    peaks, sizes = [], []
    for number in (40, 160):
        path = write_corpus(tmp_path / f"{number}.jsonl", [article(rng, 4_000) for _ in range(number)])
        settings = CorpusSettings(path=path, vocab_size=300, tokenizer_documents=20)
        tracemalloc.start()
        build(settings, tmp_path / str(number))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(Path(path).stat().st_size)
    assert peaks[1] - peaks[0] < 0.25 * (sizes[1] - sizes[0])


def test_a_corpus_too_small_stops_with_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """Breaks when a handful of texts gives an empty dataset, or a failed run leaves half an artifact."""
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path / "artifacts"))
    with pytest.raises(
        PretrainingDatasetError, match=r"1 of 2 articles of .* are left .*, 2 are needed: read more, or lower corpus.min_words \(20\)"
    ):
        collect_documents(CorpusSettings(path=write_corpus(tmp_path / "a.jsonl", [article(np.random.default_rng(0), 30), "short"])))
    rng = np.random.default_rng(1)
    path = write_corpus(tmp_path / "b.jsonl", [article(rng, 40) for _ in range(5)])
    settings = profiles.settings_for("sample", {"corpus.path": path})
    documents = collect_documents(settings.corpus)
    with pytest.raises(TokenizerError, match="too small for a vocabulary"), write_artifact(settings, "tokenizer") as folder:
        train_tokenizer(documents.sample("train", 10), folder, settings.corpus.vocab_size)
    assert not list((tmp_path / "artifacts" / "sample").iterdir())


def test_artifacts_record_what_they_were_made_from(corpus, tmp_path, monkeypatch):
    """Breaks when the dataset does not know its tokenizer, so that a new tokenizer would be paired with old ids."""
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path / "artifacts"))
    settings = profiles.settings_for("sample", {"corpus.path": corpus.path, "corpus.vocab_size": 300})
    documents = collect_documents(settings.corpus)
    with write_artifact(settings, "tokenizer") as folder:
        train_tokenizer(documents.sample("train", 100), folder, 300)
    tokenizer = open_artifact(settings, "tokenizer")
    with write_artifact(settings, "pretraining_dataset", inputs=[tokenizer], counts=documents.counts) as folder:
        write_pretraining_dataset(documents, tokenizer.path, folder)
    dataset = open_artifact(settings, "pretraining_dataset")
    assert dataset.manifest["inputs"] == {"tokenizer": tokenizer.digest}
    assert dataset.manifest["counts"]["articles read"] == 145


def test_a_tokenizer_that_is_named_is_taken_as_it_is(corpus, tmp_path):
    """Pre-training that goes on from a checkpoint needs the ids of that checkpoint: trained again, a tokenizer orders them otherwise."""
    for name in ("named", "copy"):
        (tmp_path / name).mkdir()
    train_tokenizer([article(np.random.default_rng(5), 400) for _ in range(20)], tmp_path / "named", 400)
    settings, texts = replace(corpus, tokenizer=str(tmp_path / "named")), list(collect_documents(corpus).sample("train", 20))
    copied = make_tokenizer(texts, tmp_path / "copy", settings)
    assert encode_texts(copied, texts) == encode_texts(load_tokenizer(tmp_path / "named"), texts)
    assert check_same_ids(tmp_path / "copy", texts) == 20
    (source,) = tokenizer_sources(settings)
    assert source["path"] == str(tmp_path / "named/spiece.model")
    with pytest.raises(TokenizerError, match=r"nowhere/spiece\.model is missing: let corpus.tokenizer name a folder"):
        tokenizer_sources(replace(corpus, tokenizer="nowhere"))


def test_an_array_file_grows_and_opens_as_npy(tmp_path):
    """Breaks when the header does not hold the final length, or moves the data when it is rewritten."""
    file = ArrayFile(tmp_path / "a.npy", np.uint16)
    for start in range(0, 3000, 500):
        file.append(range(start, start + 500))
    file.close()
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False, mmap_mode="r"), np.arange(3000, dtype=np.uint16))
    ArrayFile(tmp_path / "b.npy", np.uint16).close()
    assert len(np.load(tmp_path / "b.npy", allow_pickle=False)) == 0
