"""Packing: many short (inputs, targets) pairs in one row, kept apart by segment ids.

Rows are planned from lengths alone, with best-fit decreasing over both lengths at once: the longest pair goes first,
each into the row where it leaves the least room. That fills rows to within a fraction of a percent, and costs a sort of
the whole epoch. Plain concatenation needs no plan but lets an example see its neighbours; it is here to compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100  # a label that the loss leaves out


class PackingError(ValueError):
    """An example that no row can hold."""


@dataclass(frozen=True)
class Packing:
    """Which examples share a row, in compressed rows, and how full the rows are.

    Row `r` holds `examples[row_offsets[r]:row_offsets[r + 1]]`, int64 indices of the packed examples.
    """

    examples: np.ndarray
    row_offsets: np.ndarray
    row_inputs: int
    row_targets: int
    input_tokens: int
    target_tokens: int

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.examples[self.row_offsets[index] : self.row_offsets[index + 1]]

    @property
    def most_examples(self) -> int:
        """Examples in the row that has most."""
        return int(np.diff(self.row_offsets).max(initial=0))

    @property
    def input_efficiency(self) -> float:
        """Real tokens per encoder position, 0..1."""
        return self.input_tokens / max(1, len(self) * self.row_inputs)

    @property
    def target_efficiency(self) -> float:
        """Real tokens per decoder position, 0..1; 0 where rows have no targets."""
        return self.target_tokens / max(1, len(self) * self.row_targets)


def best_fit_pack(
    input_lengths: np.ndarray, target_lengths: np.ndarray, row_inputs: int, row_targets: int, rng: np.random.Generator | None = None
) -> Packing:
    """Best-fit decreasing in two dimensions.

        row_inputs 10, row_targets 4
        inputs     6 5 4 3 2       targets    2 2 2 1 1       rows [0, 2] [1, 3, 4]

    Args:
        input_lengths: int (examples,), eos included.
        target_lengths: int (examples,); zeros where only the encoder is packed.
        rng: breaks ties between examples of one length and shuffles the rows; None keeps the order.

    Raises:
        PackingError: an example longer than a row.
    """
    inputs, targets = np.asarray(input_lengths, dtype=np.int64), np.asarray(target_lengths, dtype=np.int64)
    for name, lengths, limit in (("input", inputs, row_inputs), ("target", targets, row_targets)):
        if len(lengths) and lengths.max() > limit:
            longest = int(lengths.argmax())
            raise PackingError(
                f"example {longest} has {lengths[longest]} {name} tokens and a row holds {limit}: raise {name}s_length or shorten the text"
            )
    order = np.arange(len(inputs)) if rng is None else rng.permutation(len(inputs))
    order = order[np.lexsort((-targets[order], -inputs[order]))]
    row_of = _assign_rows(inputs[order].tolist(), targets[order].tolist(), row_inputs, row_targets)  # (examples,)
    rows = int(row_of.max(initial=-1)) + 1
    if rng is not None:
        row_of = rng.permutation(rows)[row_of]
    grouped = np.argsort(row_of, kind="stable")
    row_offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=rows))))
    return Packing(order[grouped], row_offsets, row_inputs, row_targets, int(inputs.sum()), int(targets.sum()))


def _assign_rows(inputs: list[int], targets: list[int], row_inputs: int, row_targets: int) -> np.ndarray:
    """Row of each pair, pairs taken in the given order: int64 (pairs,).

    Each pair goes to the row with the fewest free inputs that still hold it, and among those to the one with the fewest
    free targets. Bits say where such rows exist: bit `i` of `some[-1]` that some row has `i` free inputs, bit `t` of
    `some[i]` that one of them has `t` free targets. So the best fit is arithmetic on whole numbers, not a search.
    """
    some = [0] * (row_inputs + 2)
    open_rows: dict[tuple[int, int], list[int]] = {}  # (free inputs, free targets) -> rows
    row_of = np.empty(len(inputs), dtype=np.int64)
    rows = 0
    for pair, (need_inputs, need_targets) in enumerate(zip(inputs, targets, strict=True)):
        candidates = some[-1] >> need_inputs << need_inputs
        while candidates:
            free_inputs = lowest_bit(candidates)
            if fitting := some[free_inputs] >> need_targets << need_targets:
                free_targets = lowest_bit(fitting)
                break
            candidates &= candidates - 1
        else:
            free_inputs, free_targets = row_inputs, row_targets
            open_rows.setdefault((row_inputs, row_targets), []).append(rows)
            rows += 1
        same = open_rows[free_inputs, free_targets]
        row_of[pair] = row = same.pop()
        if not same:
            some[free_inputs] &= ~(1 << free_targets)
            some[-1] &= ~(0 if some[free_inputs] else 1 << free_inputs)
        free_inputs, free_targets = free_inputs - need_inputs, free_targets - need_targets
        open_rows.setdefault((free_inputs, free_targets), []).append(row)
        some[free_inputs] |= 1 << free_targets
        some[-1] |= 1 << free_inputs
    return row_of


def lowest_bit(bits: int) -> int:
    """Index of the lowest set bit."""
    return (bits & -bits).bit_length() - 1


def fill_row(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], row_inputs: int, row_targets: int, pad_id: int, decoder_start_id: int
) -> dict[str, np.ndarray]:
    """Lay packed examples into one row; the decoder's right shift stays inside each segment.

        inputs [5, 1] [6, 7, 1]   targets [3, 8, 1] [9, 1]   rows of 6 and 6, pad 0, decoder start 0
        input_ids             5 1 6 7 1 0        encoder_segment_ids   1 1 2 2 2 0
        labels                3 8 1 9 1 -100     decoder_segment_ids   1 1 1 2 2 0
        decoder_input_ids     0 3 8 0 9 0

    Returns:
        int64 arrays, (row_inputs,) for the encoder and (row_targets,) for the decoder.
    """
    input_ids, encoder_segment_ids = _lay_out([inputs for inputs, _ in examples], row_inputs, pad_id)
    labels, decoder_segment_ids = _lay_out([targets for _, targets in examples], row_targets, IGNORED)
    shifted = [np.concatenate(([decoder_start_id], targets))[: len(targets)] for _, targets in examples]  # no target, no start
    decoder_input_ids, _ = _lay_out(shifted, row_targets, pad_id)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "decoder_input_ids": decoder_input_ids,
        "encoder_segment_ids": encoder_segment_ids,
        "decoder_segment_ids": decoder_segment_ids,
    }


def _lay_out(pieces: Sequence[np.ndarray], row_length: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces one after the other, and their segment ids 1, 2, ...: two int64 (row_length,)."""
    lengths = [len(piece) for piece in pieces]
    if sum(lengths) > row_length:
        raise PackingError(f"{sum(lengths)} tokens do not fit a row of {row_length}: pack fewer examples or raise the row length")
    values = np.full(row_length, padding, dtype=np.int64)
    segment_ids = np.zeros(row_length, dtype=np.int64)
    if pieces:
        values[: sum(lengths)] = np.concatenate(pieces)
        segment_ids[: sum(lengths)] = np.repeat(np.arange(1, len(pieces) + 1), lengths)
    return values, segment_ids


def concatenate_pack(lengths: np.ndarray, window: int) -> list[list[tuple[int, int, int]]]:
    """Cut the stream of all texts, one eos after each, into windows of `window` tokens; a shorter rest is left out.

        lengths 3 2, window 3     stream  a a a / | b b / (eos is /)     windows [(0, 0, 3)] [(0, 3, 4), (1, 0, 2)]

    Returns:
        For each window its (text, start, stop) pieces; `stop` one past the text's length includes its eos.
    """
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64) + 1)  # (texts,): where each text and its eos stop in the stream
    begins = np.concatenate(([0], ends[:-1])).tolist() if len(ends) else []
    starts = np.arange(0, int(ends[-1]) - window + 1 if len(ends) else 0, window)
    firsts = np.searchsorted(ends, starts, side="right").tolist()
    lasts = np.searchsorted(ends, starts + window - 1, side="right").tolist()
    windows = []
    for start, first, last in zip(starts.tolist(), firsts, lasts, strict=True):
        pieces = [(text, max(0, start - begins[text]), start + window - begins[text]) for text in range(first, last + 1)]
        windows.append([(text, begin, min(stop, int(lengths[text]) + 1)) for text, begin, stop in pieces])
    return windows
