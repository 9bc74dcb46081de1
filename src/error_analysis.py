"""Where a model errs: its most confident mistakes, and its scores by the length of the text."""

import pandas as pd

from src.evaluation import NO_LABEL, PROBABILITY_COLUMNS, confusion_cells, scores_from_confusion
from src.labels import LABELS


def worst_errors(predictions: pd.DataFrame, rows: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """The most confident mistakes: `text`, `label`, `prediction`, `confidence`; `rows` brings `text_id` and `text`."""
    wrong = predictions[predictions["prediction"] != predictions["label"]].copy()
    wrong["confidence"] = wrong[list(PROBABILITY_COLUMNS)].max(axis=1)
    wrong = wrong.sort_values("confidence", ascending=False).head(count).merge(rows[["text_id", "text"]], on="text_id")
    names = dict(enumerate(LABELS)) | {NO_LABEL: "(no label)"}
    wrong["label"], wrong["prediction"] = wrong["label"].map(names), wrong["prediction"].map(names)
    return wrong[["text", "label", "prediction", "confidence"]]


def macro_f1_by_length(predictions: pd.DataFrame, rows: pd.DataFrame, quantiles: int = 4) -> pd.DataFrame:
    """Accuracy and macro-F1 in groups of equal size by number of words: `words` (range), `rows`, `accuracy`, `macro_f1`.

    The mean is over the classes that a group holds: with another one counted as 0 a group would look worse than it is.
    """
    frame = predictions.merge(rows[["text_id", "text"]], on="text_id")
    frame["words"] = frame["text"].str.split().str.len()
    table = []
    ranges = pd.qcut(frame["words"], quantiles, duplicates="drop") if frame["words"].nunique() > 1 else frame["words"]
    for _, group in frame.groupby(ranges, observed=True):
        confusion = confusion_cells(group).sum(0).reshape(3, 4)
        scores = scores_from_confusion(confusion)
        f1 = scores["f1"][confusion.sum(1) > 0].mean()
        words = "-".join(str(words) for words in sorted({group["words"].min(), group["words"].max()}))
        table.append({"words": words, "rows": len(group), "accuracy": float(scores["accuracy"]), "macro_f1": float(f1)})
    return pd.DataFrame(table)
