"""The bundled sample: what it must hold, that it is marked synthetic, and that a bag of words does not solve it."""

import hashlib
import json
from collections import Counter

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from src.config import LabelledSettings
from src.deduplication import near_duplicate_groups
from src.finetuning_dataset import collect_labelled
from src.sample_data import BOILERPLATE, sample_articles, sample_sentences, world
from src.sample_lexicon import BAD, GOOD
from src.word_ngrams import comparison_key


@pytest.fixture(scope="module")
def articles():
    return list(sample_articles())


@pytest.fixture(scope="module")
def sentences():
    return sample_sentences()


@pytest.fixture(scope="module")
def dataset(articles):
    return collect_labelled(LabelledSettings(path="sample"), (article["Article"] for article in articles))


def fingerprint(rows):
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def test_every_call_gives_the_same_sample(articles, sentences):
    """A sample that differs between calls makes artifacts stale for no reason."""
    assert fingerprint(sample_articles()) == fingerprint(articles)
    assert fingerprint(sample_sentences()) == fingerprint(sentences)


def test_articles_are_many_and_as_untidy_as_real_ones(articles):
    """Stages 1 would go untested on the sample if it had no header, trailer, mojibake, duplicate, short or long article."""
    texts = [article["Article"] for article in articles]
    lengths = [len(text.split()) for text in texts]
    assert len(articles) >= 2_000
    assert 300_000 <= sum(lengths) <= 500_000
    assert min(lengths) == 0
    assert max(lengths) > 2_000
    marks = {"(Synthetic News) - ": 1_000, ":SYN)": 2_000, "To contact the reporter": 1_000, "(Reporting by ": 1_000, "â€": 50}
    for mark, least in marks.items():
        assert sum(mark in text for text in texts) >= least, mark
    exact = len(texts) - len({comparison_key(text) for text in texts})
    groups = near_duplicate_groups(texts)
    assert exact >= 50
    assert len(texts) - len(set(groups.tolist())) - exact >= 50


def test_everything_is_marked_synthetic(articles):
    """Invented news that could be taken for real has no place in a project about news."""
    assert set(articles[0]) == {"Headline", "Journalists", "Date", "Link", "Article"}
    for article in articles:
        assert "synthetic" in article["Link"]
        assert "(synthetic)" in article["Journalists"]
        assert "(Synthetic)" in article["Headline"]


def test_labelled_sentences_hold_what_stage_2_has_to_find(dataset, sentences):
    """Without planted conflicts, boilerplate and duplicates the notebook would have nothing to show and hide its bugs."""
    assert len(sentences) >= 3_000
    assert {row["label"] for row in sentences} == {0, 1, 2}
    assert len(dataset.boilerplate) == len(BOILERPLATE)
    assert dataset.counts["conflicting labels"] >= 20
    assert dataset.counts["exact duplicates"] >= 50
    assert dataset.leak["with_near_duplicate_in_train"] >= 20
    assert 20 <= dataset.frame["in_pretraining"].sum() <= 0.05 * len(dataset.frame)
    assert min(Counter(dataset.frame["label"]).values()) >= 0.25 * len(dataset.frame)
    for phrase in ("did not have", "beat", "missed", "less than expected", "but also", "despite"):
        assert any(phrase in row["text"] for row in sentences), phrase


def test_a_bag_of_words_does_not_solve_it(dataset):
    """A sample that word counts solve shows nothing about a language model."""
    train, test = dataset.of_split("train"), dataset.of_split("test")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LinearSVC(C=0.5).fit(vectorizer.fit_transform(train["text"]), train["label"])
    assert model.score(vectorizer.transform(test["text"]), test["label"]) < 0.82


def test_articles_tell_what_labelled_sentences_presuppose(articles):
    """The gain from pre-training hangs on it: every event is mentioned often, and in the company of its own kind."""
    words = Counter(word.strip(",.:") for article in articles for word in article["Article"].split())
    for sentiment in (GOOD, BAD):
        assert min(words[event] for event in world().events[sentiment]) >= 30
