"""A finance word list: which words make news good or bad, alone and beside others.

It is our own, a page of common words, and short of what a lexicon holds (Loughran and McDonald 2011). Two things read it: the baselines,
and distant supervision, which labels sentences of the corpus by it. Words were chosen by reading sentences of the corpus, not by labels.

What rises or falls says which: *sales rose* is good news, *costs rose* and *a wider loss* are bad. So a word of direction is turned round
beside such a noun, and left undecided beside a rate or a price. Beside: next to it, or one word away (*higher fuel costs*), unless that
is a connective (*fell as costs*).
"""

import functools
import re
from collections.abc import Iterable, Sequence
from enum import IntEnum, auto

import numpy as np


class Kind(IntEnum):
    """What the list says of a word."""

    NONE = 0
    GOOD = auto()
    BAD = auto()
    SUCCESS = auto()  # good, but hardly by itself
    TROUBLE = auto()  # bad, but hardly by itself
    RISING = auto()
    FALLING = auto()
    DECLINE = auto()  # falling, unless it is a refusal: declined to comment
    UP = auto()  # rising, before an amount only: to set up is neither
    DOWN = auto()
    LOSS = auto()  # bad by itself; turns direction round
    COST = auto()  # says nothing by itself; turns direction round
    GROWTH = auto()  # undecided by itself; direction stays
    RATE = auto()  # leaves direction undecided
    CONNECTIVE = auto()
    FROM = auto()  # a connective behind which a loss was before: from a loss, compared with a loss
    TO = auto()
    COMMENT = auto()
    AMOUNT = auto()


STEMS = {
    Kind.GOOD: (
        "accelerat beat boost breakthrough bullish buyback exceed improv outperform overweight positive rallie rally rebound recover"
        " robust solid strong strength surpass topped tops upbeat upgrad upside upturn"
    ),
    Kind.BAD: (
        "bearish deteriorat disappoint downbeat downgrad downside downturn hurt layoff missed misses negativ recession slash struggl"
        " underperform underweight warn weak worse worst"
    ),
    Kind.SUCCESS: "award milestone success",
    Kind.TROUBLE: "bankrupt closure crash delay fail fear fraud halt investigation lawsuit lose losing lost probe recall suspend",
    Kind.GROWTH: "growth",  # before "grow"
    Kind.RISING: "climb doubl expan gain grew grow higher highest increas jump lift record rise rising rose soar surge surging widen",
    Kind.FALLING: (
        "cut decreas dip dipped drop fall fell low lower lowest narrowe narrowing plummet plung sank shrank shrink sink slid"
        " slow slump tumbl"
    ),
    Kind.DECLINE: "declin",
    Kind.UP: "up",
    Kind.DOWN: "down",
    Kind.LOSS: "deficit loss losses shortfall",
    Kind.COST: (
        "charge claims cost default delinquenc debt expenditure expens foreclosure inflation jobless jobseeker provision risk"
        " spread tax taxes unemploy writedown"
    ),
    Kind.RATE: "price rate rates yield",
    Kind.CONNECTIVE: "although amid and as because but by despite if on or since than though when while with",
    Kind.FROM: "against compared from versus vs",
    Kind.TO: "to",
    Kind.COMMENT: "comment",
}
# What begins with one of these stems by chance: Tumblr, Time Warner, a fellow, a successor.
OTHER_STEMS = (
    "beatle costco costum doublec doublel fellow halter robusta rosen sanko sanky slides solidarit solidiu successi successo surgeo surger"
    " tumblr warner"
)
WHOLE_WORDS = (Kind.RATE, Kind.CONNECTIVE, Kind.FROM, Kind.TO)  # these are not stems
AMOUNT = r"[\d$€£]"
UNIT = re.compile(rf"[^\W\d_]+|{AMOUNT}")  # words of letters, and amounts
DIRECTION = {Kind.RISING: 1, Kind.UP: 1, Kind.FALLING: -1, Kind.DECLINE: -1, Kind.DOWN: -1}
ALONE = {Kind.GOOD: 1, Kind.SUCCESS: 1, Kind.BAD: -1, Kind.TROUBLE: -1, Kind.LOSS: -1}
SURE = (Kind.GOOD, Kind.BAD)


@functools.cache
def kind_patterns() -> dict[Kind, re.Pattern[str]]:
    """Matches the words of each kind. Stems of two or three letters stand for themselves and -s, -er, -est."""
    others = f"(?!{OTHER_STEMS.replace(' ', '|')})"
    patterns = {}
    for kind, stems in STEMS.items():
        endings = (stem if kind in WHOLE_WORDS else stem + (r"(?:s|er|est)?" if len(stem) < 4 else r"\w*") for stem in stems.split())
        patterns[kind] = re.compile(rf"{others}(?:{'|'.join(endings)})")
    return patterns


@functools.lru_cache(maxsize=1 << 16)
def kind_of(word: str) -> Kind:
    """Kind of a word of letters, or of an amount."""
    if not word.isalpha():
        return Kind.AMOUNT if re.match(AMOUNT, word) else Kind.NONE
    lower = word.lower()
    return next((kind for kind, pattern in kind_patterns().items() if pattern.fullmatch(lower)), Kind.NONE)


def may_begin_listed_word(letters: str) -> bool:
    """Whether a word of the list can begin with these letters: then they begin a stem or a stem begins them."""
    return any(stem.startswith(letters) or letters.startswith(stem) for stems in STEMS.values() for stem in stems.split())


def polarities(kinds: np.ndarray, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which words count, bool (words,), and what they say: int8 (words,), 1 good, -1 bad, 0 undecided.

    Args:
        kinds: `Kind` of each word and amount in order, int8 (words,).
        sentences: number of the sentence that each stands in, in ascending order, (words,).
    """
    direction = by_kind(DIRECTION)[kinds]
    after, second = (neighbours(kinds, sentences, distance) for distance in (1, 2))
    direction[np.isin(kinds, (Kind.UP, Kind.DOWN)) & (after != Kind.AMOUNT)] = 0
    refuses = ((after == Kind.TO) & (second != Kind.AMOUNT)) | (after == Kind.COMMENT) | (second == Kind.COMMENT)
    direction[(kinds == Kind.DECLINE) & refuses] = 0
    connective = np.isin(kinds, (Kind.CONNECTIVE, Kind.FROM))

    def beside(wanted: np.ndarray) -> np.ndarray:
        found = np.zeros(len(kinds), dtype=bool)
        for side in (-1, 1):
            between = neighbours(connective, sentences, side)
            found |= neighbours(wanted, sentences, side) | (neighbours(wanted, sentences, 2 * side) & ~between)
        return found

    is_noun = np.isin(kinds, (Kind.LOSS, Kind.GROWTH))
    turned = beside(np.isin(kinds, (Kind.LOSS, Kind.COST)))
    undecided = ~turned & beside(kinds == Kind.RATE) & ~beside(kinds == Kind.GROWTH)
    polarity = direction * np.where(turned, -1, np.where(undecided, 0, 1)).astype(np.int8)
    before = (kinds == Kind.LOSS) & np.any([neighbours(kinds, sentences, -back) == Kind.FROM for back in (1, 2, 3)], axis=0)
    polarity += by_kind(ALONE)[kinds] * ~(before | (is_noun & beside(direction != 0)))
    return (polarity != 0) | (direction != 0) | is_noun, polarity


def are_sure(kinds: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """Which words, if they count, say enough by themselves, bool (words,): direction only within two words of an amount behind it.

    A lower court, a higher bid or plans to cut are no news of their own; what fell 16 percent or rose to $4.5 is. For the arguments see
    `polarities`.
    """
    amount = np.any([neighbours(kinds, sentences, distance) == Kind.AMOUNT for distance in (1, 2)], axis=0)
    return np.isin(kinds, SURE) | (np.isin(kinds, list(DIRECTION)) & amount)


def begins_unit(kinds: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """False for an amount behind another one, bool (words,): the signs of 4.5 are one amount, not two words apart."""
    return ~((kinds == Kind.AMOUNT) & (neighbours(kinds, sentences, -1) == Kind.AMOUNT))


def by_kind(values: dict[Kind, int]) -> np.ndarray:
    return np.array([values.get(kind, 0) for kind in Kind], dtype=np.int8)


def neighbours(values: np.ndarray, sentences: np.ndarray, distance: int) -> np.ndarray:
    """The value so many words on, or back where `distance` is negative; 0 where the sentence ends before."""
    found = np.zeros_like(values)
    here, there = (slice(None, -distance), slice(distance, None)) if distance > 0 else (slice(-distance, None), slice(None, distance))
    found[here] = np.where(sentences[here] == sentences[there], values[there], 0)
    return found


def polar_word_counts(texts: Iterable[str]) -> np.ndarray:
    """How many good and how many bad words each text holds: int64 (texts, 2)."""
    words: Sequence[list[str]] = [UNIT.findall(text) for text in texts]
    kinds = np.array([kind_of(word) for text in words for word in text], dtype=np.int8)
    numbers = np.repeat(np.arange(len(words)), [len(text) for text in words])
    kept = begins_unit(kinds, numbers)
    kinds, numbers = kinds[kept], numbers[kept]
    _, polarity = polarities(kinds, numbers)
    return np.stack([np.bincount(numbers[polarity == sign], minlength=len(words)) for sign in (1, -1)], axis=1)
