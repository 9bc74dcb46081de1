"""Stage 2 from labelled rows to splits: what is dropped, what is kept apart, what is reported, and what it refuses."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from src.config import LabelledSettings
from src.finetuning_dataset import COLUMNS, FinetuningDatasetError, collect_labelled, loose_key, write_finetuning_dataset
from src.sources import SourceError

NAMES = ("negative", "neutral", "positive")


def story(label, number):
    subject = ("losses", "name", "profits")[label]
    return f"Company {number} said its {subject} grew to {number * 7} million in quarter {number % 4} of year {number}"


def labelled_file(folder, rows, name="labelled.csv"):
    path = folder / name
    pd.DataFrame(rows, columns=["sentence", "label"]).to_csv(path, index=False)
    return str(path)


def stories(count=40, start=0):
    return [(story(number % 3, number), NAMES[number % 3]) for number in range(start, start + count)]


def collect(path, corpus=(), **settings):
    return collect_labelled(LabelledSettings(path=path, **settings), corpus)


def test_conflicts_boilerplate_and_duplicates_are_dropped_and_listed(tmp_path):
    """Kept conflicts cap accuracy, kept boilerplate and duplicates inflate it; uncounted, nobody notices."""
    conflict = [("Shares of Acme rose on heavy volume today", name) for name in ("positive", "positive", "negative")]
    boilerplate = [("Read the full story on our site.", "neutral")] * 6
    repeats = [(story(0, 0).upper() + " !", NAMES[0]), (story(1, 1), NAMES[1])]
    blank = [("https://t.co/x", "neutral"), ("  ", "neutral")]
    with pytest.warns(UserWarning, match="has no text"):
        texts = collect(labelled_file(tmp_path, [*stories(), *conflict, *boilerplate, *repeats, *blank]), boilerplate_count=5)
    assert {key: texts.counts[key] for key in ("rows read", "without text", "conflicting labels", "boilerplate", "exact duplicates")} == {
        "rows read": 53, "without text": 2, "conflicting labels": 3, "boilerplate": 6, "exact duplicates": 2,
    }  # fmt: skip
    assert texts.conflicts.to_dict("records") == [{"text": conflict[0][0], "rows": 3, "labels": "bearish, bullish"}]
    assert texts.boilerplate.to_dict("records") == [{"text": boilerplate[0][0], "rows": 6, "labels": "neutral"}]
    assert len(texts.frame) == 40
    assert texts.frame["text_id"].is_unique


def test_near_duplicates_stay_in_one_split(tmp_path):
    """The point of groups: the copy of a training sentence with one word more is no test of anything."""
    originals = stories(60)
    copies = [(f"{text} again", name) for text, name in originals[:30]]
    texts = collect(labelled_file(tmp_path, [*originals, *copies]))
    groups = texts.frame.groupby("group")["split"]
    assert len(groups) == 60
    assert groups.nunique().max() == 1
    assert texts.leak["with_near_duplicate_in_train"] > 3  # and a random split would have divided them
    assert {split: texts.counts[split] for split in ("train", "validation", "test")} == pytest.approx(
        {"train": 63, "validation": 13.5, "test": 13.5}, abs=3.5
    )


def test_a_sentence_with_one_word_changed_is_a_near_duplicate(tmp_path):
    """Breaks when sentences are compared by runs of words so long that one changed word leaves hardly any."""
    pair = [
        ("In the third quarter, net sales increased by 12% to EUR 159.5 million, or by 6% at comparable rates", "positive"),
        ("In the third quarter, net sales grew by 12% to EUR 159.5 million, or by 6% at comparable rates", "positive"),
    ]
    other = ("In the third quarter, operating profit fell by 4% to EUR 12.1 million, or by 7% at comparable rates", "negative")
    frame = collect(labelled_file(tmp_path, [*stories(), *pair, other])).frame
    first, second, third = (frame[frame["raw"] == text]["group"].item() for text, _ in (*pair, other))
    assert first == second != third
    assert frame["group"].nunique() == 42


def test_a_published_split_without_a_class_is_refused_before_anything_is_trained(tmp_path):
    """Its macro-F1 would be a mean over a class that is not there; found out at the scores, two hours of training are lost."""
    published = labelled_file(tmp_path, [row for row in stories(12, start=100) if row[1] != "neutral"], "published.csv")
    with pytest.raises(FinetuningDatasetError, match="the published split: no row is neutral"):
        collect(labelled_file(tmp_path, stories()), validation_path=published)


def test_the_published_split_is_the_test_split_and_the_training_side_gives_way(tmp_path):
    """A published test set that is changed cannot be compared with anybody's; one that training has seen proves nothing."""
    published = [
        *stories(12, start=100),
        (story(0, 100), NAMES[0]),
        ("Read the full story.", "neutral"),
        ("Read the full story.", "positive"),
    ]
    in_both = [(f"{text} https://t.co/{label}", label) for text, label in published[1:3]]
    near = [(f"{published[4][0]} again", published[4][1])]
    path, validation = labelled_file(tmp_path, [*stories(60), *in_both, *near]), labelled_file(tmp_path, published, "published.csv")
    texts = collect(path, validation_path=validation, boilerplate_count=2)
    test = texts.of_split("test")
    assert test["text"].tolist() == [text for text, _ in published]
    assert test["text_id"].is_unique
    assert texts.in_both == 2
    assert texts.counts["also in the published split"] == 2
    assert texts.counts["near duplicate of the published split"] == 1
    assert not set(test["group"]) & set(texts.frame[texts.frame["split"] != "test"]["group"])
    assert texts.counts["train"] / texts.counts["validation"] == pytest.approx(70 / 15, rel=0.15)


@pytest.mark.parametrize(
    ("left", "right", "same"), [("fell 17%to 5", "fell 17% to 5", True), ("a 17%", "a 17", False), ("利潤 5%", "成本 5%", False)]
)
def test_loose_keys_stay_safe(left, right, same):
    """The published split is compared loosely; too loosely, and all texts of another script would be one."""
    assert (loose_key(left) == loose_key(right)) is same


def test_texts_of_the_pretraining_corpus_are_flagged(tmp_path):
    """A model that has read the test sentences in pre-training is not tested on unseen text: the reader must see how many."""
    rows = stories()
    texts = collect(labelled_file(tmp_path, rows), corpus=[f"Today. {rows[3][0]}. And more.", "nothing"])
    assert texts.frame[texts.frame["in_pretraining"]]["text"].tolist() == [rows[3][0]]


def test_what_is_written_is_what_the_next_stages_read(tmp_path):
    """Column names, types and the report are the contract with three other notebooks."""
    settings = LabelledSettings(path=labelled_file(tmp_path, stories()))
    texts = collect_labelled(settings, [])
    report = write_finetuning_dataset(texts, settings, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    frames = {split: pd.read_parquet(tmp_path / f"{split}.parquet") for split in ("train", "validation", "test")}
    for split, frame in frames.items():
        assert list(frame.columns) == COLUMNS
        assert frame["in_pretraining"].dtype == bool
        assert report["classes"][split] == {"bearish": (frame["label"] == 0).sum(), "neutral": (frame["label"] == 1).sum()} | {
            "bullish": (frame["label"] == 2).sum()
        }
    rows = pd.concat(frames.values()).set_index("source_row").sort_index()
    assert rows["text"].tolist() == [text for text, _ in stories()]
    again = collect_labelled(settings, []).frame
    assert again[["text_id", "split"]].equals(texts.frame[["text_id", "split"]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row for row in stories() if row[1] != "neutral"], "no row is neutral (only bearish, bullish): add rows of that class"),
        (stories(7), "2 different neutral texts are too few, 3 are needed: add rows"),
        ([(text, name) for text, _ in stories(5) for name in NAMES], "no row is left (0 without text, 15 conflicting labels"),
        ([("Same text here.", name) for name in NAMES for _ in range(9)], "no row is left (0 without text, 27 conflicting labels"),
        ([(f"{name} {name}", name) for name in NAMES for _ in range(30)], "90 boilerplate): correct the texts and labels, or raise"),
        ([("https://t.co/x", name) for name in NAMES], "no row is left (3 without text)"),
    ],
)  # fmt: skip
def test_too_little_is_refused_in_one_line(tmp_path, rows, message):
    """Without it a class vanishes silently, or an empty split fails three notebooks later."""
    path = labelled_file(tmp_path, rows)
    with pytest.raises(FinetuningDatasetError) as error:
        collect(path)
    assert message in str(error.value)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_labels_are_refused(tmp_path):
    """A guessed label poisons training; the message has to name the row."""
    with pytest.raises(SourceError, match="row 2, column 'label'"):
        collect(labelled_file(tmp_path, [("Sales rose", "positive"), ("Sales fell", "sad")]))


NEWS = Path(os.environ.get("NEWS_DATA_DIR", "missing"))
real_data = pytest.mark.skipif(not NEWS.is_dir(), reason="NEWS_DATA_DIR does not name a folder with the real data sets")


@real_data
def test_phrasebank_splits():
    """Templates that hold on toy text can fail on real sentences with stray quotes and repeated lines."""
    texts = collect(str(NEWS / "financial_phrasebank" / "sentences_50agree.csv"))
    assert texts.counts["rows read"] == 4_846
    assert texts.counts["train"] == pytest.approx(0.7 * len(texts.frame), abs=20)
    assert texts.frame.groupby("group")["split"].nunique().max() == 1


@real_data
def test_the_published_twitter_split():
    """47 texts stand in both files once URLs are gone; they must leave the training side, and the count be told."""
    folder = NEWS / "twitter_financial_news_sentiment"
    texts = collect(str(folder / "train.csv"), validation_path=str(folder / "validation.csv"), label_map="0=bearish,1=bullish,2=neutral")
    assert texts.in_both == 47
    assert texts.counts["test"] == 2_388
    assert texts.frame.groupby("group")["split"].nunique().max() == 1
