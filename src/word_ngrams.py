"""Words of a text and hashes of word n-grams: what deduplication and overlap checks compare.

Comparison looks at words alone: case, punctuation, spacing and URLs do not count, numbers and their signs do.
A word is hashed once and remembered; n-grams are combined from word hashes in NumPy, so 50 million words take
seconds. 64-bit hashes stand for the words: a collision (about 1e-9 for a vocabulary of 200,000) is accepted.
"""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
# A run of anything but spaces and punctuation; a sign counts when a number follows it ("-3%" is not "+3%").
WORD = re.compile(r"[+\-](?=[$€£]?\.?\d)|[^\s.,;:!?\"'`´()\[\]{}<>“”„‘’…*|/\\_~+=\-–—]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
REMEMBERED_WORDS = 200_000  # bounds the memory of the word hashes, whatever the corpus


def words(text: str) -> list[str]:
    """Lower-case words of a text, without URLs and punctuation.

    `"Sales FELL -3.5% (https://t.co/x)"` → `["sales", "fell", "-", "3", "5%"]`.
    """
    if "://" in text or "www." in text:
        text = URL.sub(" ", text)
    return WORD.findall(text.lower())


def comparison_key(text: str) -> str:
    """The form in which two texts are exact duplicates: words joined by spaces, or the stripped text if it has no word."""
    return " ".join(words(text)) or text.strip()


def digest(data: bytes) -> bytes:
    """8 bytes that name some bytes, the same on every machine."""
    return hashlib.blake2b(data, digest_size=8).digest()


class WordHashes(dict):
    """word → 64-bit hash, computed at first sight; forgets everything when full."""

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED_WORDS:
            self.clear()
        value = int.from_bytes(digest(word.encode("utf-8", "surrogatepass")), "little")
        self[word] = value
        return value

    def of(self, text_words: list[str]) -> np.ndarray:
        """Hashes of words, uint64 (words,)."""
        return np.fromiter(map(self.__getitem__, text_words), np.uint64, len(text_words))


def ngram_hashes_by_length(word_hashes: np.ndarray, longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """For n = 1..longest: (n, hashes of all n-grams of consecutive words, in order, uint64 (words - n + 1,))."""
    hashes = np.zeros(len(word_hashes), np.uint64)
    for ngram in range(1, min(longest, len(word_hashes)) + 1):
        hashes = hashes[: len(word_hashes) - ngram + 1] * MULTIPLIER + word_hashes[ngram - 1 :]
        hashes ^= hashes >> np.uint64(29)  # a mere sum of products would let changes in distant words cancel
        yield ngram, hashes


def ngram_hashes(word_hashes: np.ndarray, ngram: int) -> np.ndarray:
    """Hashes of all n-grams of consecutive words, in order.

    Args:
        word_hashes: uint64 (words,).
        ngram: words in an n-gram.

    Returns:
        uint64 (words - ngram + 1,), empty for a shorter text.
    """
    *_, (length, hashes) = [(0, word_hashes[:0]), *ngram_hashes_by_length(word_hashes, ngram)]
    return hashes if length == ngram else word_hashes[:0]
