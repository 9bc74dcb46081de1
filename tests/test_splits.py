"""Grouped, stratified splits and folds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.splits import SplitError, grouped_stratified_folds, grouped_stratified_split

FRACTIONS = (0.70, 0.15, 0.15)


def labelled_groups(seed, rows, group_size=3):
    rng = np.random.default_rng(seed)
    return rng.choice(3, rows, p=(0.15, 0.6, 0.25)), rng.integers(0, max(rows // group_size, 1), rows)


def sides_of_groups(parts, groups):
    return [len(set(parts[groups == group])) for group in np.unique(groups)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(80, 600), group_size=st.integers(1, 6), folds=st.integers(2, 5))
def test_no_group_stands_on_two_sides(seed, rows, group_size, folds):
    """A group on both sides leaks: its test texts have been trained on, nearly word for word."""
    labels, groups = labelled_groups(seed, rows, group_size)
    try:
        split, fold = (
            grouped_stratified_split(labels, groups, FRACTIONS, seed),
            grouped_stratified_folds(labels, groups, folds, seed),
        )
    except SplitError:
        return
    assert set(sides_of_groups(split, groups)) == {1}
    assert set(sides_of_groups(fold, groups)) == {1}
    for sides, parts in ((split, 3), (fold, folds)):
        assert [len(set(labels[sides == part])) for part in range(parts)] == [3] * parts


@pytest.mark.parametrize("group_size", [1, 3])
def test_class_shares_are_close_on_every_side(group_size):
    """An unstratified test split of a rare class can be off by half and moves every score."""
    labels, groups = labelled_groups(7, 4_000, group_size)
    share = np.bincount(labels) / len(labels)
    split = grouped_stratified_split(labels, groups, FRACTIONS, 0)
    for part, fraction in enumerate(FRACTIONS):
        inside = labels[split == part]
        assert len(inside) / len(labels) == pytest.approx(fraction, abs=0.005)
        assert np.bincount(inside, minlength=3) / len(inside) == pytest.approx(share, abs=0.01)
    folds = grouped_stratified_folds(labels, groups, 10, 0)
    for fold in range(10):
        inside = labels[folds == fold]
        assert len(inside) == pytest.approx(400, rel=0.1)
        assert np.bincount(inside, minlength=3) / len(inside) == pytest.approx(share, abs=0.03)


def test_large_groups_are_placed_first():
    """Placed last, a large group finds every part full and overfills one."""
    labels = np.arange(1_200) % 3
    groups = np.concatenate([np.repeat(np.arange(12), 45), np.arange(100, 760)])
    split = grouped_stratified_split(labels, groups, FRACTIONS, 0)
    assert np.bincount(split) / len(labels) == pytest.approx(FRACTIONS, abs=0.005)


def test_a_large_group_is_as_likely_in_a_part_as_the_part_is_large():
    """Always in the smallest part, the largest groups are held out for the temperature in every fold, and never trained on."""
    labels = np.arange(300) % 3
    groups = np.concatenate([np.zeros(6), np.arange(6, 300)]).astype(int)  # one of six rows, the others of one
    held_out = [grouped_stratified_split(labels, groups, (0.1, 0.9), seed)[0] == 0 for seed in range(200)]
    assert np.mean(held_out) == pytest.approx(0.1, abs=0.06)


def test_each_part_has_a_row_of_a_rare_class():
    """Drawn by chance alone, three rows would often all fall into the largest part."""
    labels = np.repeat([0, 1, 2], (3, 40, 40))
    for seed in range(20):
        split = grouped_stratified_split(labels, np.arange(83), FRACTIONS, seed)
        assert sorted(split[:3]) == [0, 1, 2]


def test_the_seed_alone_decides():
    """A split that differs between runs makes results incomparable; a seed that is ignored makes repeats worthless."""
    labels, groups = labelled_groups(1, 600)
    for split in (
        lambda seed: grouped_stratified_split(labels, groups, FRACTIONS, seed),
        lambda s: grouped_stratified_folds(labels, groups, 5, s),
    ):
        assert np.array_equal(split(3), split(3))
        assert not np.array_equal(split(3), split(4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 0, 1, 1, 1], "no row is bullish (only bearish, neutral): add rows of that class, or correct LABEL_MAP"),
        ([0, 0, 0, 1, 1, 1, 2, 2], "2 different bullish texts are too few, 3 are needed: add rows or raise labelled.max_documents"),
        ([], "there is no row: check the text and label columns"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(labels, message):
    """Without it a class is silently missing from a split, and macro-F1 counts a class nobody can predict."""
    for split in (
        lambda: grouped_stratified_split(labels, range(len(labels)), FRACTIONS, 0),
        lambda: grouped_stratified_folds(labels, range(len(labels)), 3, 0),
    ):
        with pytest.raises(SplitError) as error:
            split()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_one_group_of_a_class_is_too_few_however_many_rows_it_has():
    """Rows of one group stay together, so ten copies of one text can fill one part only."""
    labels = [0] * 10 + [1] * 10 + [2] * 10
    groups = [0] * 10 + list(range(1, 21))
    with pytest.raises(SplitError, match="1 different bearish texts"):
        grouped_stratified_split(labels, groups, FRACTIONS, 0)
