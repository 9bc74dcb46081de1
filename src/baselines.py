"""What a model must beat: the majority class, a finance word list, TF-IDF with a linear support vector machine.

All return the predictions frame of `src.evaluation`, on the same rows as the fine-tuned models. They take seconds,
know nothing of word order beyond pairs, and TF-IDF is a strong opponent on short news: a T5 that does not beat it was not
worth training. With the word list's counts beside its own it knows something that no training row told it, as a pre-trained
model does. The other control, the same T5 from random initialisation, is a run of `src.finetuning`.
"""

import functools
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import LinearSVC

from src.evaluation import predictions_frame
from src.labels import LABEL_IDS, LABELS, require_all_labels
from src.word_list import polar_word_counts


class BaselineError(ValueError):
    """Training rows that no classifier can be fitted on."""


def class_shares(train: pd.DataFrame) -> np.ndarray:
    """Share of each label in the training rows, float64 (3,).

    Raises:
        LabelError: a class has no training row.
    """
    require_all_labels(train["label"])
    counts = np.bincount(train["label"])
    return counts / counts.sum()


def majority(train: pd.DataFrame, test: pd.DataFrame, fold: int = 0) -> pd.DataFrame:
    """Always the most frequent training label; its probabilities are the shares of the labels."""
    return predictions_frame(test, np.tile(class_shares(train), (len(test), 1)), "majority", fold=fold)


def word_list(test: pd.DataFrame, fold: int = 0) -> pd.DataFrame:
    """Counts bullish and bearish words; a draw is neutral. Needs no training.

    The probabilities are those of counts with one added to each class and two to neutral, so a draw falls to neutral.
    """
    balance = polar_word_counts(test["text"]) @ (1, -1)  # (rows,)
    counts = np.ones((len(test), len(LABELS)))
    counts[:, LABEL_IDS["bullish"]] += np.maximum(balance, 0) * 2
    counts[:, LABEL_IDS["bearish"]] += np.maximum(-balance, 0) * 2
    counts[:, LABEL_IDS["neutral"]] += 1
    return predictions_frame(test, counts / counts.sum(1, keepdims=True), "word_list", fold=fold)


def word_list_features(texts: Iterable[str]) -> np.ndarray:
    """Of the size of a text's TF-IDF: both counts up to two, which of them leads, and whether there is none; float64 (texts, 5)."""
    counts = polar_word_counts(texts)
    bullish, bearish = counts.T
    return np.column_stack([np.minimum(counts, 2) / 2, bullish > bearish, bearish > bullish, counts.sum(1) == 0])


def tfidf_svm_pipeline(seed: int = 0, with_word_list: bool = False) -> Pipeline:
    """TF-IDF of word pairs and of characters inside words (2 to 5), one linear SVM per class against the rest."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[%$+-]")
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    features = [words, characters] + ([FunctionTransformer(word_list_features)] if with_word_list else [])
    return make_pipeline(make_union(*features), LinearSVC(C=1.0, class_weight="balanced", random_state=seed))


def tfidf_svm(train: pd.DataFrame, test: pd.DataFrame, fold: int = 0, seed: int = 0, with_word_list: bool = False) -> pd.DataFrame:
    """TF-IDF + linear SVM fitted on `train`; the label is the SVM's own, the probabilities are Platt's.

    The sigmoid is fitted on five held-out parts of the training rows (fewer where a class is rare) and may call another
    label most probable than the SVM does: the SVM's label counts.
    """
    class_shares(train)
    name = "tfidf_word_list_svm" if with_word_list else "tfidf_svm"
    parts = int(min(5, np.bincount(train["label"]).min()))
    try:
        pipeline = tfidf_svm_pipeline(seed, with_word_list).fit(train["text"], train["label"])
    except ValueError as error:  # no run of characters stands in two texts
        raise BaselineError(f"TF-IDF has nothing to count in {len(train)} training texts ({error}): give more labelled rows") from None
    labels = pipeline.predict(test["text"])
    if parts < 2:  # one row of a class cannot be held out: certainty is all that can be said
        return predictions_frame(test, np.eye(len(LABELS))[labels], name, fold=fold)
    calibrated = CalibratedClassifierCV(pipeline, cv=parts, ensemble=False).fit(train["text"], train["label"])
    return predictions_frame(test, calibrated.predict_proba(test["text"]), name, predictions=labels, fold=fold)


# By the name that tables show; each takes the training rows, the rows to judge and the number of the fold.
BASELINES: dict[str, Callable[[pd.DataFrame, pd.DataFrame, int], pd.DataFrame]] = {
    "majority": majority,
    "word_list": lambda _, test, fold: word_list(test, fold),
    "tfidf_svm": tfidf_svm,
    "tfidf_word_list_svm": functools.partial(tfidf_svm, with_word_list=True),
}
