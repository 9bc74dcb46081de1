"""Packing: worked integers, invariants over random lengths, and how full the rows get."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.packing import PackingError, best_fit_pack, concatenate_pack, fill_row

ROW_INPUTS, ROW_TARGETS = 40, 16
pairs = st.lists(st.tuples(st.integers(1, ROW_INPUTS), st.integers(0, ROW_TARGETS)), max_size=60)


def toy(lengths, first=1):
    """Documents `[1], [2, 2], [3, 3, 3]`: where a token came from is visible in a row."""
    return [np.full(length, number) for number, length in enumerate(lengths, first)]


def test_worked_plan():
    """The docstring's table: longest first, each where it leaves the least room."""
    packing = best_fit_pack(np.array([6, 5, 4, 3, 2]), np.array([2, 2, 2, 1, 1]), 10, 4)
    assert [packing.row(row).tolist() for row in range(len(packing))] == [[0, 2], [1, 3, 4]]
    assert packing.input_efficiency == 1.0
    assert packing.target_efficiency == 1.0


def test_targets_bound_a_row_too():
    """Rows planned by inputs alone overflow the decoder."""
    packing = best_fit_pack(np.array([2, 2, 2]), np.array([3, 3, 1]), 10, 4)
    assert sorted(len(packing.row(row)) for row in range(len(packing))) == [1, 2]
    assert not {0, 1} <= set(packing.row(0).tolist())


def test_worked_row():
    """Segment ids, ignored labels and the decoder's shift inside each segment: a shift across examples leaks the neighbour."""
    row = fill_row([(np.array([5, 1]), np.array([3, 8, 1])), (np.array([6, 7, 1]), np.array([9, 1]))], 6, 6, 0, 0)
    assert row["input_ids"].tolist() == [5, 1, 6, 7, 1, 0]
    assert row["encoder_segment_ids"].tolist() == [1, 1, 2, 2, 2, 0]
    assert row["labels"].tolist() == [3, 8, 1, 9, 1, -100]
    assert row["decoder_input_ids"].tolist() == [0, 3, 8, 0, 9, 0]
    assert row["decoder_segment_ids"].tolist() == [1, 1, 1, 2, 2, 0]


def test_toy_documents_keep_their_segment():
    """A token under another example's segment id would be attended by the wrong example."""
    inputs, targets = toy([3, 1, 4]), toy([2, 1, 1])
    row = fill_row(list(zip(inputs, targets, strict=True)), 10, 6, 0, 0)
    np.testing.assert_array_equal(row["input_ids"], row["encoder_segment_ids"])
    real = row["labels"] != -100
    np.testing.assert_array_equal(row["labels"][real], row["decoder_segment_ids"][real])


@given(pairs, st.one_of(st.none(), st.integers(0, 100)))
def test_every_example_once_and_no_row_overflows(lengths, seed):
    """Lost or doubled examples change what is learnt and nothing else would tell."""
    inputs, targets = np.array([p[0] for p in lengths], dtype=int), np.array([p[1] for p in lengths], dtype=int)
    packing = best_fit_pack(inputs, targets, ROW_INPUTS, ROW_TARGETS, None if seed is None else np.random.default_rng(seed))
    assert sorted(packing.examples.tolist()) == list(range(len(lengths)))
    for row in range(len(packing)):
        assert 0 < inputs[packing.row(row)].sum() <= ROW_INPUTS
        assert targets[packing.row(row)].sum() <= ROW_TARGETS
    assert packing.input_tokens == inputs.sum()
    assert packing.most_examples == max((len(packing.row(row)) for row in range(len(packing))), default=0)


@given(pairs)
def test_no_two_rows_could_be_one(lengths):
    """What best fit promises at least; a packer that opens rows too early wastes encoder work everywhere."""
    inputs, targets = np.array([p[0] for p in lengths], dtype=int), np.array([p[1] for p in lengths], dtype=int)
    packing = best_fit_pack(inputs, targets, ROW_INPUTS, ROW_TARGETS)
    rows = [(inputs[packing.row(row)].sum(), targets[packing.row(row)].sum()) for row in range(len(packing))]
    # The smallest example of the younger row did not fit the older one when it was placed.
    for younger in range(1, len(rows)):
        first = packing.row(younger)[0]
        for older in range(younger):
            placed_before = [e for e in packing.row(older) if (-inputs[e], -targets[e]) <= (-inputs[first], -targets[first])]
            free = ROW_INPUTS - inputs[placed_before].sum(), ROW_TARGETS - targets[placed_before].sum()
            assert (
                inputs[first] > free[0]
                or targets[first] > free[1]
                or any((inputs[e], targets[e]) == (inputs[first], targets[first]) for e in packing.row(older))
            )


def test_sentences_fill_rows():
    """Fine-tuning packs short sentences; under 98 % something is wrong with the fit."""
    lengths = np.random.default_rng(0).normal(31, 12, 4_846).clip(5, 120).astype(int)
    packing = best_fit_pack(lengths, np.full(len(lengths), 3), 512, 114, np.random.default_rng(0))
    assert packing.input_efficiency >= 0.98


def test_randomness_only_reorders():
    """Epochs must differ in order and in who shares a row, and be equal under one seed."""
    lengths, none = np.repeat([20, 10, 5], 30), np.zeros(90, int)
    one, same, other = (best_fit_pack(lengths, none, 40, 0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.examples, same.examples)
    assert one.examples.tolist() != other.examples.tolist()
    assert len(one) == len(other)


def test_concatenation():
    """The comparison with packing is honest only if the stream is cut without loss and documents end with eos."""
    assert concatenate_pack(np.array([3, 2]), 3) == [[(0, 0, 3)], [(0, 3, 4), (1, 0, 2)]]
    assert concatenate_pack(np.array([], dtype=int), 3) == []


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 40))
def test_concatenated_windows_are_full_and_in_order(lengths, window):
    windows = concatenate_pack(np.array(lengths), window)
    stream = [(text, position) for text, length in enumerate(lengths) for position in range(length + 1)]
    read = [(text, position) for pieces in windows for text, start, stop in pieces for position in range(start, stop)]
    assert read == stream[: len(windows) * window]
    assert len(windows) == len(stream) // window


def test_errors_name_the_example_and_the_cure():
    """A text longer than a row must stop with its number, not be cut in silence."""
    with pytest.raises(PackingError, match="example 1 has 9 input tokens and a row holds 8: raise inputs_length"):
        best_fit_pack(np.array([3, 9]), np.array([1, 1]), 8, 4)
    with pytest.raises(PackingError, match="example 0 has 5 target tokens and a row holds 4: raise targets_length"):
        best_fit_pack(np.array([3, 8]), np.array([5, 1]), 8, 4)
    with pytest.raises(PackingError, match="5 tokens do not fit a row of 4"):
        fill_row([(np.ones(5, int), np.ones(1, int))], 4, 4, 0, 0)
