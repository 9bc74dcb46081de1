"""Span corruption against worked integers and its own invariants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.inspection import split_spans
from src.span_corruption import (
    SpanCorruptionError,
    corrupt,
    corrupted_lengths,
    example_rng,
    noise_counts,
    noise_mask,
    reconstruct,
    window_length,
)

FIRST_SENTINEL, SENTINELS, EOS = 999, 100, 1
densities = st.floats(0.05, 0.6)
mean_spans = st.floats(1.0, 8.0)
lengths = st.integers(2, 400)


def spans_of(mask: np.ndarray) -> int:
    return int((mask & ~np.concatenate(([False], mask[:-1]))).sum())


def test_worked_table():
    """The docstring's table; without it sentinels could be off by one or eos missing and everything would still train."""
    mask = np.array([0, 1, 1, 0, 0, 0, 1], dtype=bool)
    inputs, targets = corrupt(np.arange(10, 17, dtype=np.uint16), mask, 99, 10, EOS)
    assert inputs.tolist() == [10, 99, 13, 14, 15, 98, 1]
    assert targets.tolist() == [99, 11, 12, 98, 16, 1]


def test_a_span_at_the_start_is_masked_too():
    """The reference never masks the first token; ours must, and put its sentinel first."""
    inputs, targets = corrupt(np.array([7, 8, 9]), np.array([True, False, False]), 99, 10, EOS)
    assert inputs.tolist() == [99, 8, 9, 1]
    assert targets.tolist() == [99, 7, 1]


@given(lengths, densities, mean_spans, st.integers(0, 2**31))
def test_nothing_is_lost_and_lengths_are_as_planned(length, density, mean_span, seed):
    """Packing plans an epoch from lengths alone: a row overflows, or text is lost, when this does not hold."""
    tokens = np.arange(3, 3 + length)
    mask = noise_mask(length, density, mean_span, np.random.default_rng(seed))
    inputs, targets = corrupt(tokens, mask, 10_000, 1_000, EOS)
    assert (len(inputs), len(targets)) == corrupted_lengths(length, density, mean_span)
    assert inputs[-1] == targets[-1] == EOS
    np.testing.assert_array_equal(reconstruct(inputs, targets, 10_000, 1_000), tokens)
    sentinels = inputs[inputs > 9_000]
    np.testing.assert_array_equal(sentinels, 10_000 - np.arange(len(sentinels)))
    assert not mask.all()


@given(st.integers(2, 2_000))
def test_counts_are_nearest_to_the_settings(length):
    """Density and mean span length match the settings as closely as whole numbers allow, at every length (T5's own rounding)."""
    noise, spans = noise_counts(length, 0.15, 3.0)
    mask = noise_mask(length, 0.15, 3.0, np.random.default_rng(length))
    assert (mask.sum(), spans_of(mask)) == (noise, spans)
    assert abs(noise - max(1, 0.15 * length)) <= 0.5
    assert abs(spans - max(1, noise / 3.0)) <= 0.5


def test_density_and_span_length_over_many_lengths():
    """Rounding errors must cancel over a corpus: a biased rounding would quietly train on another task."""
    noise, spans = noise_counts(np.arange(30, 1_000), 0.15, 3.0)
    assert noise.sum() / np.arange(30, 1_000).sum() == pytest.approx(0.15, rel=1e-3)
    assert noise.sum() / spans.sum() == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("length", [2, 3, 7, 12, 40])
def test_every_place_is_masked_often(length):
    """Short texts must not always lose their tail, nor keep their first token: both teach the model a fixed place."""
    draws = 4_000
    counts = np.zeros(length)
    for example in range(draws):
        counts += noise_mask(length, 0.15, 3.0, example_rng(0, 0, example))
    expected = noise_counts(length, 0.15, 3.0)[0] / length
    inner = counts / draws
    # Spans near the ends have fewer placements, so the outermost tokens may be hidden less often, but never seldom.
    assert inner.min() > 0.3 * expected
    assert inner.max() < 1.7 * expected


def test_a_full_window_fills_a_row():
    """A window one token too long overflows every row; one too short wastes a position in each."""
    assert window_length(512, 114, 0.15, 3.0) == 568
    assert corrupted_lengths(568, 0.15, 3.0) == (512, 114)
    assert corrupted_lengths(np.array([2, 568]), 0.15, 3.0)[0].tolist() == [3, 512]


@given(st.integers(12, 600), densities, mean_spans)
def test_window_length_is_the_longest_that_fits(inputs_length, density, mean_span):
    """For other row lengths and densities too."""
    targets_length = inputs_length
    window = window_length(inputs_length, targets_length, density, mean_span)
    fits = [max(corrupted_lengths(length, density, mean_span)) <= inputs_length for length in (window, window + 1)]
    assert fits == [True, False]


def test_randomness_is_a_pure_function_of_its_arguments():
    """Exact resume and agreement of processes rest on this: another order of calls must not change an example."""
    first = [noise_mask(100, 0.15, 3.0, example_rng(1, 2, example)) for example in range(5)]
    np.random.seed(0)
    again = [noise_mask(100, 0.15, 3.0, example_rng(1, 2, example)) for example in reversed(range(5))][::-1]
    np.testing.assert_array_equal(first, again)
    others = [example_rng(*key) for key in ((0, 2, 0), (1, 3, 0), (1, 2, 1), (2, 1, 0))]
    assert len({noise_mask(100, 0.15, 3.0, rng).tobytes() for rng in [example_rng(1, 2, 0), *others]}) == 5


def test_errors_name_the_cure():
    """Running out of sentinels would write ordinary words as sentinels; a text of one token has nothing left to show."""
    with pytest.raises(SpanCorruptionError, match="2 masked spans and 1 sentinels"):
        corrupt(np.array([5, 6, 7]), np.array([True, False, True]), 99, 1, EOS)
    with pytest.raises(SpanCorruptionError, match="drop texts shorter than 2"):
        noise_counts(np.array([5, 1]), 0.15, 3.0)
    with pytest.raises(SpanCorruptionError, match="holds no masked text"):
        window_length(1, 1, 0.15, 3.0)


def test_spans_that_a_model_wrote_by_integers():
    """A model that has hardly learned writes no sentinel at all, or one twice: neither may stop the notebook that shows its spans."""
    first, count = 99, 10

    def spans(*ids):
        return {number: span.tolist() for number, span in split_spans(np.array(ids, dtype=np.int64), first, count).items()}

    assert spans(99, 5, 6, 98, 97, 7) == {0: [5, 6], 1: [], 2: [7]}
    assert spans(4, 99, 5, 99, 6) == {0: [5]}
    assert spans(4, 5) == spans() == {}
