"""Near duplicates as groups.

Near duplicates are texts whose sets of word n-grams have a Jaccard similarity of at least the threshold. MinHash
signatures and banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3) propose pairs, and the
exact similarity decides: no pair below the threshold is ever joined by an unlucky estimate. The price is a temporary
file with the n-gram hashes (about 4 bytes a word), so that memory holds only 256 bytes a document.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from datasketch import MinHash

from src.word_ngrams import MULTIPLIER, WordHashes, comparison_key, digest, ngram_hashes, words

NUM_PERMUTATIONS = 128
BLOCK = 1024  # n-grams hashed at once: the (n-grams, permutations) products stay in the processor's cache
ESTIMATE_MARGIN = 0.15  # 4 standard errors of a 128-permutation estimate at 0.8: worth an exact look
NEIGHBOURS = 64  # members of one bucket that each member is compared with: keeps work linear in the texts


class ShingleFile:
    """Sets of n-gram hashes in a temporary file: written in order, read back two at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.ends = array("q", [0])

    def append(self, shingles: np.ndarray) -> None:
        self.file.write(shingles.astype(np.uint32).tobytes())
        self.ends.append(self.ends[-1] + len(shingles))

    def read(self, index: int) -> np.ndarray:
        start, end = self.ends[index], self.ends[index + 1]
        self.file.seek(4 * start)
        return np.frombuffer(self.file.read(4 * (end - start)), np.uint32)

    def jaccard(self, left: int, right: int) -> float:
        a, b = self.read(left), self.read(right)
        shared = len(np.intersect1d(a, b, assume_unique=True))
        return shared / (len(a) + len(b) - shared)


class DisjointSets:
    """Union-find whose root is the smallest member."""

    def __init__(self, count: int) -> None:
        self.parents = np.arange(count)

    def find(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]
            item = self.parents[item]
        return item

    def join(self, left: int, right: int) -> None:
        left, right = self.find(left), self.find(right)
        self.parents[max(left, right)] = min(left, right)

    def roots(self) -> np.ndarray:
        while not np.array_equal(self.parents, grand := self.parents[self.parents]):
            self.parents = grand
        return self.parents


def shingles_of(word_hashes: np.ndarray, ngram: int) -> np.ndarray:
    """The set of n-gram hashes of one text, uint32, sorted; a text shorter than `ngram` is one n-gram of all its words."""
    hashes = ngram_hashes(word_hashes, max(min(ngram, len(word_hashes)), 1))
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def minhash_signature(shingles: np.ndarray, minhash: MinHash) -> np.ndarray:
    """Low halves of the MinHash values, uint16 (permutations,): halves the memory, and 2^-16 of false agreement is no matter."""
    minhash.clear()
    for start in range(0, len(shingles), BLOCK):
        minhash.update_batch(shingles[start : start + BLOCK].tolist())
    return minhash.hashvalues.astype(np.uint16)


def band_rows(threshold: float) -> int:
    """Rows of a band: the most (fewest false candidates) that propose 99.5 % of the pairs at the threshold."""
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.995:
            return rows
    return 1


def band_keys(band: np.ndarray) -> np.ndarray:
    """One uint64 for each row of a band (documents, rows): equal rows get equal keys."""
    key = np.zeros(len(band), np.uint64)
    for column in band.T:
        key = (key + column) * MULTIPLIER
        key ^= key >> np.uint64(31)
    return key


def candidate_pairs(signatures: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that agree in a whole band of the signature, as arrays of left and right indices, each array (pairs,)."""
    rows = band_rows(threshold)
    for first in range(0, NUM_PERMUTATIONS - rows + 1, rows):
        key = band_keys(signatures[:, first : first + rows])
        order = np.argsort(key, kind="stable")
        key = key[order]
        for distance in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(key[distance:] == key[:-distance])
            if not len(same):
                break
            yield order[same], order[same + distance]


def join_near_duplicates(signatures: np.ndarray, shingles: ShingleFile, threshold: float) -> np.ndarray:
    """Root of every document after joining all verified candidate pairs, int64 (documents,)."""
    sets = DisjointSets(len(signatures))
    rejected: set[tuple[int, int]] = set()
    for left, right in candidate_pairs(signatures, threshold):
        roots = sets.roots()
        apart = roots[left] != roots[right]
        left, right = left[apart], right[apart]
        estimate = np.concatenate(
            [(signatures[left[i : i + 4096]] == signatures[right[i : i + 4096]]).mean(axis=1) for i in range(0, len(left), 4096)] or [[]]
        )
        for pair in zip(*(side[estimate >= threshold - ESTIMATE_MARGIN].tolist() for side in (left, right)), strict=True):
            if pair in rejected or sets.find(pair[0]) == sets.find(pair[1]):
                continue
            if shingles.jaccard(*pair) >= threshold:
                sets.join(*pair)
            else:
                rejected.add(pair)
    return sets.roots()


def near_duplicate_groups(texts: Iterable[str], threshold: float = 0.8, ngram: int = 5) -> np.ndarray:
    """Groups of texts that are the same, or nearly: connected components of pairs with Jaccard >= threshold.

    Texts are streamed: none is kept. Equal words are an exact duplicate whatever the case and punctuation. A text of
    fewer than `ngram` words has only exact duplicates.

    Args:
        texts: any number of texts.
        threshold: Jaccard similarity of the sets of word n-grams, in (0, 1].
        ngram: words in an n-gram.

    Returns:
        int64 (texts,): the index of the first text of the group, so `groups == np.arange(len(groups))` keeps one of each.
    """
    word_hashes, minhash = WordHashes(), MinHash(NUM_PERMUTATIONS, hashfunc=int)
    first_seen: dict[bytes, int] = {}  # hash of all words → document
    document_of, first_rows, signatures = array("q"), array("q"), bytearray()
    with tempfile.TemporaryFile(prefix="shingles-") as file:
        shingles = ShingleFile(file)
        for row, text in enumerate(texts):
            hashes = word_hashes.of(words(text) or [comparison_key(text)])
            document = first_seen.setdefault(digest(hashes.tobytes()), len(first_rows))
            document_of.append(document)
            if document == len(first_rows):
                first_rows.append(row)
                text_shingles = shingles_of(hashes, ngram)
                shingles.append(text_shingles)
                signatures += minhash_signature(text_shingles, minhash).tobytes()
        roots = join_near_duplicates(np.frombuffer(signatures, np.uint16).reshape(-1, NUM_PERMUTATIONS), shingles, threshold)
    return np.asarray(first_rows, np.int64)[roots[np.asarray(document_of, np.int64)]]
