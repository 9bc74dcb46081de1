"""The three classes, the text-to-text prefix, and the label spellings of known sources.

An integer label means nothing by itself: Yahoo counts 0 = bullish, Twitter counts 0 = bearish. So integers are
read only through a declared map, never guessed; words (`positive`, `Bearish`) are read by their meaning.
"""

import re
from collections.abc import Iterable, Mapping

LABELS = ("bearish", "neutral", "bullish")
TASK_PREFIX = "sentiment: "
LABEL_IDS = {name: index for index, name in enumerate(LABELS)}

YAHOO_LABEL_MAP = {"0": "bullish", "1": "neutral", "2": "bearish"}  # ugursa/Yahoo-Finance-News-Sentences
TWITTER_LABEL_MAP = {"0": "bearish", "1": "bullish", "2": "neutral"}  # zeroshot/twitter-financial-news-sentiment

SPELLINGS = {
    "bearish": "bearish", "negative": "bearish", "neg": "bearish",
    "neutral": "neutral", "neu": "neutral",
    "bullish": "bullish", "positive": "bullish", "pos": "bullish",
}  # fmt: skip


class LabelError(ValueError):
    """A label that cannot be read as bearish, neutral or bullish."""


def absent_labels(labels: Iterable[int]) -> list[str]:
    """The labels that none of these is, in the order of `LABELS`."""
    present = set(labels)
    return [name for index, name in enumerate(LABELS) if index not in present]


def require_all_labels(labels: Iterable[int]) -> None:
    """Refuse training rows in which no text has one of the labels: a classifier would never say it.

    Raises:
        LabelError: names the label.
    """
    if absent := absent_labels(labels):
        raise LabelError(f"the training rows hold no {absent[0]} text: give more labelled rows, every label needs one")


def parse_label_map(text: str) -> dict[str, str]:
    """Read a map written as `0=bearish,1=bullish,2=neutral` into `{"0": "bearish", ...}`."""
    label_map = {}
    for pair in text.split(","):
        source, separator, target = (part.strip() for part in pair.partition("="))
        if not separator or target not in LABELS:
            raise LabelError(f"label map {text!r}: {pair!r} is not SOURCE=LABEL with LABEL one of {', '.join(LABELS)}")
        label_map[source] = target
    return label_map


def label_id(value: object, label_map: Mapping[str, str] | None = None) -> int:
    """Index into `LABELS` of one raw label.

    Args:
        value: what the source holds: a word or an integer (or its text, `"2"`, or `2.0` as some readers make it).
        label_map: raw spelling to one of `LABELS`; when given, it alone decides.

    Raises:
        LabelError: an unknown word, an integer without a map, or a value that the map does not hold.
    """
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+(?:\.0+)?", text):
        text = str(int(float(text)))
    if label_map is not None:
        if text not in label_map:
            raise LabelError(f"label {text!r} is not in the label map {dict(label_map)}: add it to LABEL_MAP")
        return LABEL_IDS[label_map[text]]
    if text.lstrip("-").isdigit():
        raise LabelError(f"label {text!r} is a number without a declared meaning: pass LABEL_MAP, e.g. 0=bearish,1=bullish,2=neutral")
    if text.lower() not in SPELLINGS:
        raise LabelError(f"label {text!r} is unknown: expected one of {', '.join(SPELLINGS)}, or pass LABEL_MAP")
    return LABEL_IDS[SPELLINGS[text.lower()]]
