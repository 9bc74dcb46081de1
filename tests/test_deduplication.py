"""Near duplicates, words and n-grams, and the overlap with another corpus."""

import tracemalloc

import numpy as np
import pytest

from src.deduplication import near_duplicate_groups
from src.overlap import find_overlap
from src.word_ngrams import WordHashes, comparison_key, ngram_hashes, words

VOCABULARY = [f"word{index}" for index in range(3_000)]


def random_words(rng, count):
    return list(rng.choice(VOCABULARY, count))


def jaccard(left, right, ngram=5):
    a, b = ({tuple(text[i : i + ngram]) for i in range(len(text) - ngram + 1)} for text in (left, right))
    return len(a & b) / len(a | b)


def edited(rng, text):
    """The text with up to one word in thirty replaced."""
    changed = list(text)
    for _ in range(rng.integers(1, max(2, len(text) // 30 + 1))):
        changed[rng.integers(len(text))] = "changed"
    return changed


def test_planted_near_duplicates_are_found_and_different_texts_kept():
    """Without it a weak banding would let copies through, and a loose threshold would throw news away."""
    rng = np.random.default_rng(0)
    originals = [random_words(rng, rng.integers(40, 400)) for _ in range(1_200)]
    copies = [edited(rng, text) for text in originals]
    similarity = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    groups = near_duplicate_groups(" ".join(text) for pair in zip(originals, copies, strict=True) for text in pair).reshape(-1, 2)
    together = groups[:, 0] == groups[:, 1]
    near, apart = similarity >= 0.8, similarity < 0.8
    assert near.sum() > 500
    assert together[near].mean() >= 0.99
    assert apart.sum() > 100
    assert together[apart].mean() <= 0.01
    assert len(np.unique(groups[:, 0])) == len(originals)


@pytest.mark.parametrize(("threshold", "found"), [(0.5, True), (0.9, False)])
def test_the_threshold_decides(threshold, found):
    """A threshold that is not passed on would give the same groups for all of them."""
    text = random_words(np.random.default_rng(1), 60)
    other = [*text[:50], *random_words(np.random.default_rng(2), 10)]
    assert 0.6 < jaccard(text, other) < 0.8
    assert (near_duplicate_groups([" ".join(text), " ".join(other)], threshold).tolist() == [0, 0]) is found


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Sales fell.", "SALES  fell !", True),
        ("Sales fell https://t.co/a1", "Sales fell", True),
        ("Sales fell", "Profit fell", False),
        ("one two three four", "one two three five", False),
        ("shares -3%", "shares +3%", False),
        ("shares 3%", "shares 3", False),
        ("", "  ", True),
        ("!!!", "???", False),
        ("", "Sales fell", False),
        ("a", "b", False),
    ],
)
def test_what_counts_as_the_same_text(left, right, same):
    """Short texts have no 5-gram: without care they would all be one group, or never be duplicates."""
    assert (near_duplicate_groups([left, right]).tolist() == [0, 0]) is same


def test_groups_are_named_by_their_first_text_and_do_not_depend_on_the_run():
    """The caller keeps one of each group by comparing with the row number; a chain of near duplicates is one group."""
    text = random_words(np.random.default_rng(3), 100)
    chain = [" ".join([*text[shift:], *(f"tail{i}" for i in range(shift))]) for shift in range(0, 30, 5)]
    texts = ["an unrelated short text of eight words indeed", *chain, "an unrelated short text of eight words INDEED"]
    groups = near_duplicate_groups(texts)
    assert groups.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert near_duplicate_groups(iter(texts)).tolist() == groups.tolist()
    assert near_duplicate_groups([]).tolist() == []


def test_a_crowd_of_near_duplicates_is_one_group():
    """Comparing every pair of a large bucket would take hours; comparing only neighbours must still join them all."""
    text = random_words(np.random.default_rng(4), 80)
    crowd = [" ".join([*text, f"edition{number}"]) for number in range(2_000)]
    assert set(near_duplicate_groups(crowd).tolist()) == {0}


def test_memory_holds_signatures_and_not_texts():
    """A list of texts or n-grams would grow to gigabytes on a whole corpus."""

    def peak(count):
        rng = np.random.default_rng(5)
        tracemalloc.start()
        near_duplicate_groups(" ".join(random_words(rng, 300)) for _ in range(count))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(100), peak(400)
    assert (large - small) / 300 < 1_500  # bytes a document; its text alone has over 2,000


def test_ngram_hashes_tell_order_length_and_place():
    """A symmetric combination would call "a beat b" and "b beat a" the same."""
    hashes = WordHashes()
    left, right = hashes.of(words("profit beat costs in may")), hashes.of(words("costs beat profit in may"))
    assert len(ngram_hashes(left, 3)) == 3
    assert len(ngram_hashes(left, 6)) == 0
    assert ngram_hashes(left, 3)[0] != ngram_hashes(right, 3)[0]
    assert ngram_hashes(left, 2)[-1] == ngram_hashes(right, 2)[-1]
    assert not set(ngram_hashes(left, 2)) & set(ngram_hashes(left, 3))


def test_words_keep_signs_and_drop_the_rest():
    """ "+3%" and "-3%" have opposite labels; a URL differs in every copy of a tweet."""
    assert words("Sales FELL -3.5% (www.a.b/c), profit-taking: $4m") == ["sales", "fell", "-", "3", "5%", "profit", "taking", "$4m"]
    assert comparison_key("“Sales” fell…") == "sales fell"
    assert comparison_key(" ?! ") == "?!"


def test_overlap_finds_shared_13_grams_and_whole_short_texts():
    """A missed overlap would report test sentences as unseen that pre-training has read."""
    rng = np.random.default_rng(6)
    long = random_words(rng, 30)
    document = " ".join([*random_words(rng, 50), *long[5:18], *random_words(rng, 50)]) + ". Sales at Acme FELL, a lot."
    other = " ".join(random_words(rng, 100))
    texts = [" ".join(long), " ".join(long[6:]), "sales at acme fell", "sales at acme rose", "", " ".join(long[5:18])]
    assert find_overlap(texts, iter([other, document, ""])).tolist() == [True, False, True, False, False, True]
    assert find_overlap(texts, []).tolist() == [False] * 6
    assert find_overlap([], [document]).tolist() == []
    assert find_overlap([" ".join(long[6:])], [document], ngram=12).tolist() == [True]
