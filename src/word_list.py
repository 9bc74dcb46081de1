"""A finance word list: stems of words that make news good or bad.

It is our own, a page of common words, and short of what a lexicon holds (Loughran and McDonald 2011). Two things read it: the baselines,
and distant supervision, which labels sentences of the corpus by it.
"""

import functools
import re
from collections.abc import Iterable

import numpy as np

BULLISH_STEMS = (
    "advanc accelerat award beat better boom boost breakthrough bullish buyback climb doubl exceed expan gain grew grow higher"
    " highest improv increas jump lift milestone outperform overweight positive rallie rally rebound record recover rise rising robust"
    " rose soar solid strength strong success surge surging surpass topped tops upbeat upgrad upside upturn win"
)
BEARISH_STEMS = (
    "bankrupt bearish closure crash cut declin decreas deficit delay deteriorat dip dipped disappoint downbeat downgrad downside"
    " downturn drop fail fall fear fell fraud halt hurt investigation lawsuit layoff lose losing loss lost low missed misses negativ"
    " plummet plung probe recall recession sank shrank shrink sink slash slid slow slump struggl suspend tumbl underperform"
    " underweight warn weak worse worst"
)
UP, DOWN = "up", "down"  # count before an amount only, as in "up 3 percent": to step down or set up is neither
AMOUNT = r"[\d$€£]"
# What begins with one of these stems by chance: Tumblr, Time Warner, a fellow, a successor.
OTHER_STEMS = "beatle doublec doublel fellow halter robusta rosen sanko sanky solidarit successi successo surgeo surger tumblr warner"


@functools.cache
def stem_pattern(stems: str, direction: str) -> re.Pattern[str]:
    """Matches words that start with a stem and none of the others, and `direction` before an amount.

    Stems of two or three letters stand for themselves and -s, -er, -est.
    """
    endings = (stem + (r"(?:s|er|est)?\b" if len(stem) < 4 else r"\w*") for stem in stems.split())
    words = rf"(?!{OTHER_STEMS.replace(' ', '|')})(?:{'|'.join(endings)})"
    return re.compile(rf"\b(?:{words}|{direction}(?=\s+{AMOUNT}))", re.IGNORECASE)


def bullish() -> re.Pattern[str]:
    return stem_pattern(BULLISH_STEMS, UP)


def bearish() -> re.Pattern[str]:
    return stem_pattern(BEARISH_STEMS, DOWN)


def polar_word_counts(texts: Iterable[str]) -> np.ndarray:
    """How many bullish and how many bearish words each text holds: int64 (texts, 2)."""
    return np.array([(len(bullish().findall(text)), len(bearish().findall(text))) for text in texts], dtype=np.int64).reshape(-1, 2)


def word_polarity(word: str, before_amount: bool = False) -> int:
    """1 for a bullish word, -1 for a bearish one, else 0."""
    text = f"{word} 1" if before_amount else word
    return bool(bullish().match(text)) - bool(bearish().match(text))


def may_begin_polar_word(letters: str) -> bool:
    """Whether a polar word can begin with these letters: then they begin a stem or a stem begins them."""
    return any(stem.startswith(letters) or letters.startswith(stem) for stem in f"{BULLISH_STEMS} {UP} {BEARISH_STEMS} {DOWN}".split())
