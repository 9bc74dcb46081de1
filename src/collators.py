"""From token ids and labelled sentences to packed batches, without state.

A source knows its data and settings; `source.epoch(e)` plans that epoch from lengths alone; a batch is then a pure
function of (seed, epoch, position). So a run can stop anywhere and go on exactly there, and any number of
processes can share an epoch without talking to each other. The price is that texts are corrupted again each time they are read.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from src.packing import Packing, PackingError, fill_row
from src.tokenizer import encode_texts

Pair = tuple[np.ndarray, np.ndarray]  # input ids and target ids, eos included
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PackedEpoch:
    """One epoch of packed rows; as a sequence, its micro-batches of `rows` rows.

    The training loop asks for rows by number instead (`batch(start, stop)`), so it can split a step as it likes.
    """

    packing: Packing
    rows: int  # in one micro-batch
    label_counts: np.ndarray  # int64 (num_rows,): labels that count in the loss, by row
    collate: Callable[[Sequence[np.ndarray]], Batch]  # example indices of each row -> tensors

    @property
    def num_rows(self) -> int:
        return len(self.packing)

    def batch(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, each tensor int64 (stop - start, ...)."""
        return self.collate([self.packing.row(row) for row in range(start, stop)])

    def rows_example_ids(self, start: int, stop: int) -> list[int]:
        """Ids of the examples in those rows, row after row and segment after segment."""
        return [int(example) for row in range(start, stop) for example in self.packing.row(row)]

    def num_labels(self, start: int, stop: int) -> int:
        """Labels in those rows that count in the loss: what a mean over them divides by."""
        return int(self.label_counts[start:stop].sum())

    def __len__(self) -> int:
        return -(-self.num_rows // self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.batch(*self._bounds(index))

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def example_ids(self, index: int) -> list[int]:
        return self.rows_example_ids(*self._bounds(index))

    def _bounds(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        return index * self.rows, min((index + 1) * self.rows, self.num_rows)


class TextsCutWarning(UserWarning):
    """Texts lose their end because a row is shorter."""


def encode(texts: Sequence[str], tokenizer: Any, longest: int | None = None) -> list[np.ndarray]:
    """Token ids of each text with eos, int64; with `longest`, a longer text loses its end but not its eos, and a warning counts them."""
    if not len(texts):
        raise PackingError("there are no texts to pack: the dataset is empty")
    encoded = encode_texts(tokenizer, texts, add_eos=True)
    if longest is not None and (cut := sum(len(ids) > longest for ids in encoded)):
        message = f"{cut:,} of {len(texts):,} texts are longer than {longest} tokens and lose their end: raise inputs_length"
        warnings.warn(message, TextsCutWarning, stacklevel=2)
        encoded = [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in encoded]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch))


def lengths_of(texts: Sequence[np.ndarray]) -> np.ndarray:
    return np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))


def row_sums(packing: Packing, values: np.ndarray) -> np.ndarray:
    """Sum of the examples' values in each row: int64 (rows,)."""
    return np.add.reduceat(values[packing.examples], packing.row_offsets[:-1])


def collate_pairs(rows: Sequence[np.ndarray], read: Callable[[int], Pair], row_lengths: tuple[int, int], pad_id: int) -> Batch:
    """The five tensors of `fill_row`, each int64 (rows, row length); T5 starts its decoder with the padding id."""
    return stack([fill_row([read(int(example)) for example in row], *row_lengths, pad_id, pad_id) for row in rows])


def stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Rows to tensors, each int64 (rows, length)."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
