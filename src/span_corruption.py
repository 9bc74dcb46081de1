"""Span corruption, the pre-training task of T5 (arXiv 1910.10683, section 3.1.4), on NumPy arrays.

Spans of tokens are replaced by sentinels in the input, and the target spells out what each sentinel hides:

    tokens   10 11 12 13 14 15 16        mask  0 1 1 0 0 0 1        first sentinel 99, eos 1
    inputs   10 99 13 14 15 98  1
    targets  99 11 12 98 16  1

How many tokens and spans are masked depends on the length alone, so an epoch can be packed before a token is read. Only *where* the
spans lie is random, uniformly over all masks with those counts: unlike the reference, which always leaves the first
token and masks the last one, a short text is masked anywhere.
"""

import functools
from typing import TypeVar

import numpy as np

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)


class SpanCorruptionError(ValueError):
    """A text too short to be masked, or more spans than there are sentinels."""


def example_rng(seed: int, epoch: int, example_id: int) -> np.random.Generator:
    """The only source of randomness of one example in one epoch: no global state, no order of workers."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, example_id)))


def noise_counts(length: IntOrArray, noise_density: float, mean_noise_span_length: float) -> tuple[IntOrArray, IntOrArray]:
    """Masked tokens and masked spans of a text of `length` >= 2 tokens; arrays give arrays.

    Both are rounded to the nearest whole number as in T5, with at least one masked and one unmasked token and an
    unmasked token between any two spans.
    """
    lengths = np.asarray(length, dtype=np.int64)
    if lengths.size and lengths.min() < 2:
        raise SpanCorruptionError(f"a text of {lengths.min()} token(s) cannot be masked: drop texts shorter than 2 tokens")
    noise_tokens = np.clip(np.rint(lengths * noise_density).astype(np.int64), 1, lengths - 1)
    spans = np.rint(noise_tokens / mean_noise_span_length).astype(np.int64)
    spans = np.clip(spans, 1, np.minimum(noise_tokens, lengths - noise_tokens + 1))
    return (noise_tokens, spans) if isinstance(length, np.ndarray) else (int(noise_tokens), int(spans))


_counts_of = functools.cache(noise_counts)  # of one length: most windows have the same


def corrupted_lengths(length: IntOrArray, noise_density: float, mean_noise_span_length: float) -> tuple[IntOrArray, IntOrArray]:
    """Tokens of (inputs, targets) after corruption, eos included: `corrupted_lengths(568, 0.15, 3.0) == (512, 114)`."""
    noise_tokens, spans = noise_counts(length, noise_density, mean_noise_span_length)
    return length - noise_tokens + spans + 1, noise_tokens + spans + 1


def window_length(inputs_length: int, targets_length: int, noise_density: float, mean_noise_span_length: float) -> int:
    """The longest text whose corrupted form fits a row: `window_length(512, 114, 0.15, 3.0) == 568`."""
    longest = inputs_length + targets_length  # corruption never shortens the two together
    if longest < 2:
        raise SpanCorruptionError(f"a row of {inputs_length} + {targets_length} tokens holds no masked text: raise inputs_length")
    inputs, targets = corrupted_lengths(np.arange(2, longest + 1), noise_density, mean_noise_span_length)
    fitting = np.flatnonzero((inputs <= inputs_length) & (targets <= targets_length))
    if not fitting.size:
        raise SpanCorruptionError(f"a row of {inputs_length} + {targets_length} tokens holds no masked text: raise both lengths")
    return int(fitting[-1]) + 2


def noise_mask(length: int, noise_density: float, mean_noise_span_length: float, rng: np.random.Generator) -> np.ndarray:
    """Which tokens to mask, drawn uniformly from all masks with the counts of `noise_counts`.

    Returns:
        bool (length,): True where a token is masked.
    """
    noise_tokens, spans = _counts_of(length, noise_density, mean_noise_span_length)
    noise_lengths = _random_composition(noise_tokens, spans, rng)  # (spans,)
    # The gaps before the first and after the last span may be empty, the ones between spans may not.
    gap_lengths = _random_composition(length - noise_tokens + 2, spans + 1, rng)  # (spans + 1,)
    gap_lengths[[0, -1]] -= 1
    run_lengths = np.empty(2 * spans + 1, dtype=np.int64)  # gap, span, gap, ..., span, gap
    run_lengths[0::2], run_lengths[1::2] = gap_lengths, noise_lengths
    return np.repeat(np.arange(2 * spans + 1) % 2 == 1, run_lengths)  # (length,)


def _random_composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Split `total` into `parts` positive whole numbers, all ways equally likely: int64 (parts,)."""
    bounds = np.empty(parts + 1, dtype=np.int64)
    bounds[0], bounds[-1] = 0, total
    bounds[1:-1] = rng.choice(total - 1, size=parts - 1, replace=False)
    bounds[1:-1].sort()
    bounds[1:-1] += 1
    return bounds[1:] - bounds[:-1]


def corrupt(
    token_ids: np.ndarray, mask: np.ndarray, first_sentinel_id: int, num_sentinels: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace each masked span by a sentinel; sentinel ids count down from `first_sentinel_id`.

    Args:
        token_ids: int (length,), without eos.
        mask: bool (length,).

    Returns:
        inputs and targets, int64 (corrupted length,), both ending with eos: see the worked table above.

    Raises:
        SpanCorruptionError: more spans than sentinels.
    """
    tokens = token_ids.astype(np.int64)
    span_starts = mask.copy()  # (length,)
    span_starts[1:] &= ~mask[:-1]
    starts = np.flatnonzero(span_starts)  # (spans,)
    if len(starts) > num_sentinels:
        raise SpanCorruptionError(f"{len(starts)} masked spans and {num_sentinels} sentinels: shorten the window or add sentinels")
    sentinels = first_sentinel_id - np.arange(len(starts))  # (spans,)
    inputs = tokens.copy()
    inputs[starts] = sentinels
    masked_before_span = np.cumsum(mask)[starts] - 1  # (spans,): where in the masked tokens each span begins
    is_sentinel = np.zeros(int(mask.sum()) + len(starts) + 1, dtype=bool)
    is_sentinel[masked_before_span + np.arange(len(starts))] = True
    targets = np.empty(len(is_sentinel), dtype=np.int64)
    targets[is_sentinel], targets[~is_sentinel] = sentinels, np.append(tokens[mask], eos_id)
    return np.append(inputs[~mask | span_starts], eos_id), targets


def reconstruct(inputs: np.ndarray, targets: np.ndarray, first_sentinel_id: int, num_sentinels: int) -> np.ndarray:
    """Undo `corrupt`: put the spans of `targets` back at the sentinels of `inputs` and drop eos; int64 (length,)."""
    last_sentinel_id = first_sentinel_id - num_sentinels + 1

    def is_sentinel(ids: np.ndarray) -> np.ndarray:
        return (ids >= last_sentinel_id) & (ids <= first_sentinel_id)

    body = targets[:-1]
    spans = np.split(body, np.flatnonzero(is_sentinel(body)))[1:]
    hidden = {int(span[0]): span[1:] for span in spans}
    gaps = np.split(inputs[:-1], np.flatnonzero(is_sentinel(inputs[:-1])))
    pieces = [gaps[0]] + [np.concatenate((hidden[int(gap[0])], gap[1:])) for gap in gaps[1:]]
    return np.concatenate(pieces)
