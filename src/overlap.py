"""Which texts occur in another corpus: shared runs of words, found while the corpus streams by.

A text occurs when one of its word 13-grams stands in the corpus (the length that GPT-3 and later contamination studies use), or
when a shorter text stands there whole, word for word. Memory holds the n-grams of the texts, nothing of the corpus.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from src.word_ngrams import WordHashes, ngram_hashes, ngram_hashes_by_length, words


@dataclass
class WantedNgrams:
    """The n-grams of one length: whose they are, and which were found."""

    hashes: list[np.ndarray] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)

    def seal(self) -> None:
        self.owner = np.repeat(self.texts, [len(part) for part in self.hashes])
        self.sorted, self.inverse = np.unique(np.concatenate(self.hashes), return_inverse=True)
        self.found = np.zeros(len(self.sorted), bool)
        bits = max(int(np.ceil(np.log2(16 * len(self.sorted)))), 8)
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, bool)  # spares the binary search of 15 in 16 corpus n-grams
        self.filter[self.sorted >> self.shift] = True

    def look_up(self, hashes: np.ndarray) -> None:
        possible = hashes[self.filter[hashes >> self.shift]]
        place = np.minimum(np.searchsorted(self.sorted, possible), len(self.sorted) - 1)
        self.found[place[self.sorted[place] == possible]] = True

    def texts_found(self) -> np.ndarray:
        return self.owner[self.found[self.inverse]]


def find_overlap(texts: Sequence[str], corpus: Iterable[str], ngram: int = 13) -> np.ndarray:
    """Which texts share a word n-gram with the corpus, or stand in it whole if they are shorter.

    Args:
        texts: the texts to check.
        corpus: documents; streamed once.
        ngram: words in an n-gram.

    Returns:
        bool (texts,). A text without words is never found.
    """
    word_hashes = WordHashes()
    wanted: dict[int, WantedNgrams] = {}
    for index, text in enumerate(texts):
        hashes = word_hashes.of(words(text))
        if length := min(len(hashes), ngram):
            entry = wanted.setdefault(length, WantedNgrams())
            entry.hashes.append(ngram_hashes(hashes, length))
            entry.texts.append(index)
    for entry in wanted.values():
        entry.seal()
    for document in corpus:
        for length, hashes in ngram_hashes_by_length(word_hashes.of(words(document)), max(wanted, default=0)):
            if length in wanted:
                wanted[length].look_up(hashes)
    overlap = np.zeros(len(texts), bool)
    for entry in wanted.values():
        overlap[entry.texts_found()] = True
    return overlap
