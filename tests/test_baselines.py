"""Baselines: each does what its name says, and the strong one reaches what is known of it."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src import baselines, evaluation
from src.labels import LABEL_IDS, TWITTER_LABEL_MAP, LabelError, label_id


def labelled(texts, labels):
    return pd.DataFrame({"text_id": [f"t{i}" for i in range(len(texts))], "text": texts, "label": labels})


def test_word_list_reads_direction_words_and_draws_are_neutral():
    """A word list that matches parts of words (`up` in `startup`, `fell` in `fellow`) is a straw man, not a baseline."""
    texts = [
        "Profits rose and sales gained",
        "Shares fell after a profit warning on losses",
        "The startup meets on Monday",
        "Up and down",
        "A fellow of Time Warner is named successor",
    ]
    found = baselines.word_list(labelled(texts, [2, 0, 1, 1, 1]))
    assert found["prediction"].tolist() == [LABEL_IDS[name] for name in ("bullish", "bearish", "neutral", "neutral", "neutral")]


def test_majority_predicts_shares_of_training_labels():
    """The floor of every table: the commonest class, at the confidence of its share."""
    found = baselines.majority(labelled(["a"] * 4, [0, 1, 1, 2]), labelled(["b", "c"], [0, 2]))
    assert found["prediction"].tolist() == [1, 1]
    assert found[list(evaluation.PROBABILITY_COLUMNS)].to_numpy().tolist() == [[0.25, 0.5, 0.25]] * 2


def test_svm_sees_pairs_of_words_and_keeps_its_own_labels():
    """Without pairs, `not up` and `up` look alike; with the sigmoid's argmax in place of the SVM's the published figure is another."""
    rng = np.random.default_rng(0)
    subjects = [f"Firm{i}" for i in range(120)]
    endings = {0: "profit is not up", 1: "meeting on day", 2: "profit is up not"}
    labels = rng.permutation(np.repeat([0, 1, 2], 40))
    texts = [f"{subject} {endings[label]}" for subject, label in zip(subjects, labels, strict=True)]
    frame = labelled(texts, labels)
    found = baselines.tfidf_svm(frame.iloc[:90], frame.iloc[90:])
    assert (found["prediction"] == found["label"]).all()
    noise = frame.assign(label=rng.choice(3, 120, p=[0.1, 0.7, 0.2]))  # where sigmoid and SVM disagree
    found = baselines.tfidf_svm(noise.iloc[:90], noise.iloc[90:])
    pipeline = baselines.tfidf_svm_pipeline().fit(noise["text"][:90], noise["label"][:90])
    assert found["prediction"].tolist() == pipeline.predict(noise["text"][90:]).tolist()
    assert (found[list(evaluation.PROBABILITY_COLUMNS)].to_numpy().argmax(1) != found["prediction"]).any()


def test_svm_with_the_word_list_knows_words_that_it_was_not_trained_on():
    """Its word list left out or cut loose from the texts, it would be TF-IDF under another name."""
    verbs = {0: ("fell", "slid", "dropped"), 1: ("met", "moved", "spoke"), 2: ("rose", "gained", "climbed")}
    train = labelled(*zip(*[(f"Firm{i} {verb}", label) for label in verbs for i, verb in enumerate(verbs[label] * 8)], strict=True))
    test = labelled(["Kixsy plunged", "Kixsy talked", "Kixsy surged"], [0, 1, 2])
    found = baselines.tfidf_svm(train, test, with_word_list=True)
    assert found["prediction"].tolist() == [0, 1, 2]
    assert found["model"].unique().tolist() == ["tfidf_word_list_svm"]
    assert baselines.tfidf_svm(train, test)["prediction"].tolist() != [0, 1, 2]


def test_a_class_without_training_text_is_named():
    """scikit-learn would fit two classes and shift every label id after the gap."""
    with pytest.raises(LabelError, match="no neutral text"):
        baselines.tfidf_svm(labelled(["a", "b"], [0, 2]), labelled(["c"], [1]))


def test_reference_figure_on_real_news():
    """Published split of Twitter financial news: accuracy .844, macro-F1 .784 are known for TF-IDF + linear SVM."""
    folder = Path(os.environ.get("NEWS_DATA_DIR", "")) / "twitter_financial_news_sentiment"
    if "NEWS_DATA_DIR" not in os.environ or not folder.exists():
        pytest.skip("set NEWS_DATA_DIR to a folder that holds twitter_financial_news_sentiment/")
    frames = []
    for name in ("train", "validation"):
        frame = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
        frames.append(labelled(frame["text"], [label_id(value, TWITTER_LABEL_MAP) for value in frame["label"]]))
    found = evaluation.evaluate_predictions(baselines.tfidf_svm(*frames), resamples=10)
    assert found["accuracy"] == pytest.approx(0.844, abs=0.005)
    assert found["macro_f1"] == pytest.approx(0.784, abs=0.008)
