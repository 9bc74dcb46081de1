"""What a model must beat: the majority class, a finance word list, TF-IDF with a linear support vector machine.

All three return the predictions frame of `src.evaluation`, on the same rows as the fine-tuned models. They take seconds,
know nothing of word order beyond pairs, and the last is a strong opponent on short news: a T5 that does not beat it was not
worth training. The fourth control, the same T5 from random initialisation, is a run of `src.finetuning`.
"""

import re

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.svm import LinearSVC

from src.evaluation import predictions_frame
from src.labels import LABEL_IDS, LABELS

BULLISH_STEMS = (
    "advanc accelerat award beat beats best better boom boost breakthrough bullish buyback climb doubl exceed expan gain grew"
    " grow growth higher highest improv increas jump lift milestone outperform overweight positive profit rallie rally rebound"
    " record recover rise rises rising robust rose soar solid strength strong success surge surging surpass topped tops up upbeat"
    " upgrad upside win wins won"
)
BEARISH_STEMS = (
    "bankrupt bearish closure concern crash cut cuts declin decreas deficit delay deteriorat dip dipped disappoint down downgrad"
    " downturn drop fail fall fear fell fraud halt hurt investigation lawsuit layoff lose loses losing loss lost low missed misses"
    " negativ plummet plung probe recall recession risk sank shrank shrink sink slash slid slide slow slump struggl suspend tumbl"
    " underperform underweight warn weak worse worst"
)


def stem_pattern(stems: str) -> re.Pattern[str]:
    """Matches words that start with a stem; stems of two or three letters stand for themselves and -s, -er, -est."""
    endings = (stem + (r"(?:s|er|est)?\b" if len(stem) < 4 else r"\w*") for stem in stems.split())
    return re.compile(r"\b(?:" + "|".join(endings) + ")", re.IGNORECASE)


class BaselineError(ValueError):
    """Training rows that no classifier can be fitted on."""


def class_shares(train: pd.DataFrame) -> np.ndarray:
    """Share of each label in the training rows, float64 (3,).

    Raises:
        BaselineError: a class has no training row.
    """
    counts = np.bincount(train["label"], minlength=len(LABELS))
    if (counts == 0).any():
        raise BaselineError(f"the training rows hold no {LABELS[int(counts.argmin())]} text: every class needs at least one")
    return counts / counts.sum()


def majority(train: pd.DataFrame, test: pd.DataFrame, fold: int = 0) -> pd.DataFrame:
    """Always the most frequent training label; its probabilities are the shares of the labels."""
    return predictions_frame(test, np.tile(class_shares(train), (len(test), 1)), "majority", fold=fold)


def word_list(test: pd.DataFrame, fold: int = 0) -> pd.DataFrame:
    """Counts bullish and bearish words; a draw is neutral. Needs no training.

    The probabilities are those of counts with one added to each class and two to neutral, so a draw falls to neutral.
    """
    bullish, bearish = stem_pattern(BULLISH_STEMS), stem_pattern(BEARISH_STEMS)
    counts = np.ones((len(test), len(LABELS)))
    for row, text in enumerate(test["text"]):
        balance = len(bullish.findall(text)) - len(bearish.findall(text))
        counts[row, LABEL_IDS["bullish"]] += max(balance, 0) * 2
        counts[row, LABEL_IDS["bearish"]] += max(-balance, 0) * 2
        counts[row, LABEL_IDS["neutral"]] += 1
    return predictions_frame(test, counts / counts.sum(1, keepdims=True), "word_list", fold=fold)


def tfidf_svm_pipeline(seed: int = 0) -> Pipeline:
    """TF-IDF of word pairs and of characters inside words (2 to 5), one linear SVM per class against the rest."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[%$+-]")
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    return make_pipeline(make_union(words, characters), LinearSVC(C=1.0, class_weight="balanced", random_state=seed))


def tfidf_svm(train: pd.DataFrame, test: pd.DataFrame, fold: int = 0, seed: int = 0) -> pd.DataFrame:
    """TF-IDF + linear SVM fitted on `train`; the label is the SVM's own, the probabilities are Platt's.

    The sigmoid is fitted on five held-out parts of the training rows (fewer where a class is rare) and may call another
    label most probable than the SVM does: the SVM's label counts.
    """
    class_shares(train)
    parts = int(min(5, np.bincount(train["label"]).min()))
    pipeline = tfidf_svm_pipeline(seed).fit(train["text"], train["label"])
    labels = pipeline.predict(test["text"])
    if parts < 2:  # one row of a class cannot be held out: certainty is all that can be said
        return predictions_frame(test, np.eye(len(LABELS))[labels], "tfidf_svm", fold=fold)
    calibrated = CalibratedClassifierCV(tfidf_svm_pipeline(seed), cv=parts, ensemble=False).fit(train["text"], train["label"])
    return predictions_frame(test, calibrated.predict_proba(test["text"]), "tfidf_svm", predictions=labels, fold=fold)
