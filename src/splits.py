"""Grouped, stratified splits and folds: no group on both sides, every class in about its share on each side.

Folds are scikit-learn's `StratifiedGroupKFold`. It only makes equal parts, so splits of given fractions are drawn here: large
groups first, each to a part at random, as likely as the part would still miss its labels with half of the group in it (none of it
counted, parts overshoot). Were it the part that misses most, the largest groups would stand in the smallest part every time. Both
are pure functions of labels, groups and seed.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from src.labels import LABELS, absent_labels

SPLITS = ("train", "validation", "test")
DRAWS, FAR_SEED = 20, 1_000_003  # of folds, until each holds every class, and how far apart their seeds are


class SplitError(ValueError):
    """Rows that cannot be split as asked; says what to change."""


def check_classes(labels: np.ndarray, groups: np.ndarray, parts: int, purpose: str) -> None:
    """Every class needs at least one group for each part.

    Raises:
        SplitError: names the class that is missing or too rare, and the cure.
    """
    if not len(labels):
        raise SplitError(f"{purpose}: there is no row: check the text and label columns")
    present = set(np.unique(labels).tolist())
    if missing := absent_labels(present):
        seen = ", ".join(LABELS[index] for index in sorted(present))
        raise SplitError(f"{purpose}: no row is {' or '.join(missing)} (only {seen}): add rows of that class, or correct LABEL_MAP")
    for index, name in enumerate(LABELS):
        count = len(np.unique(groups[labels == index]))
        if count < parts:
            raise SplitError(
                f"{purpose}: {count} different {name} texts are too few, {parts} are needed: add rows or raise labelled.max_documents"
            )


def grouped_stratified_split(labels: Sequence[int], groups: Sequence[int], fractions: Sequence[float], seed: int) -> np.ndarray:
    """Part of every row: rows of one group together, each class divided as `fractions` says.

    Args:
        labels: class of every row, indices into `LABELS`, (rows,).
        groups: group of every row, any integers, (rows,).
        fractions: share of each part, adding up to 1.
        seed: of the order in which equally large groups are assigned, and of their parts.

    Returns:
        int8 (rows,): index into `fractions`.

    Raises:
        SplitError: a class is missing, has fewer groups than there are parts, or could not be given to each.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    check_classes(labels, groups, len(fractions), f"split into {len(fractions)} parts")
    _, group_of = np.unique(groups, return_inverse=True)
    counts = np.zeros((group_of.max() + 1, len(LABELS)))
    np.add.at(counts, (group_of, labels), 1)  # (groups, classes)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    wanted = np.outer(fractions, counts.sum(axis=0))  # (parts, classes), rows still to be given
    part_of = np.zeros(len(counts), np.int8)
    for group in order:
        missing = (wanted - counts[group] / 2).clip(0) @ counts[group]
        if not missing.any():  # a group larger than twice what any part misses goes where most is missing
            missing = np.arange(len(fractions)) == (wanted @ counts[group]).argmax()
        part_of[group] = part = rng.choice(len(fractions), p=missing / missing.sum())
        wanted[part] -= counts[group]
    held = np.zeros(wanted.shape, np.int64)  # groups with rows of a class in a part
    np.add.at(held, part_of, counts > 0)
    for part, label in np.argwhere(held == 0):  # a class of few rows may have missed a small part: the smallest group moves there
        donor = held[:, label].argmax()
        group = next(group for group in order[::-1] if part_of[group] == donor and counts[group, label])
        part_of[group] = part
        held[donor] -= counts[group] > 0
        held[part] += counts[group] > 0
    if (held == 0).any():
        raise SplitError(
            f"no split into {len(fractions)} parts has every class in each: near duplicates carry several labels, correct them"
        )
    return part_of[group_of]


def grouped_stratified_folds(labels: Sequence[int], groups: Sequence[int], folds: int, seed: int) -> np.ndarray:
    """Fold of every row for cross-validation, int64 (rows,): rows of one group together, classes in equal shares.

    Raises:
        SplitError: a class is missing, has fewer groups than there are folds, or is in no draw in each of them.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    check_classes(labels, groups, folds, f"{folds}-fold cross-validation")
    fold_of = np.zeros(len(labels), np.int64)
    for draw in range(DRAWS):  # a draw may leave a rare class out of a fold where groups carry several labels
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=(seed + draw * FAR_SEED) % 2**32)
        for fold, (_, test) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
            fold_of[test] = fold
        if all(len(np.unique(labels[fold_of == fold])) == len(LABELS) for fold in range(folds)):
            return fold_of
    raise SplitError(f"{DRAWS} draws of {folds} folds left a class out of one: use fewer folds or more labelled rows")
