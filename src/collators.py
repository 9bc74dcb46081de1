"""From token ids and labelled sentences to packed batches, without state.

A source knows its data and settings; `source.epoch(e)` plans that epoch from lengths alone; a batch is then a pure
function of (seed, epoch, position). So a run can stop anywhere and go on exactly there, and any number of
processes can share an epoch without talking to each other. The price is that texts are corrupted again each time they are read.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from src.config import FinetuningSettings, PretrainingSettings
from src.distant_supervision import LabelledSentences, SentencePairs
from src.labels import LABELS, TASK_PREFIX
from src.packing import IGNORED, Packing, PackingError, best_fit_pack, concatenate_pack, fill_row
from src.span_corruption import (
    SpanCorruptionError,
    corrupt,
    corrupted_lengths,
    example_rng,
    noise_counts,
    noise_mask,
    window_length,
)
from src.tokenizer import encode_texts

Pair = tuple[np.ndarray, np.ndarray]  # input ids and target ids, eos included
Batch = dict[str, torch.Tensor]


class Documents(Protocol):
    """Token ids of documents without eos, e.g. `src.tokenizer.TokenizedDocuments`."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


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


class PretrainingBatches:
    """Documents cut into windows, corrupted, packed: the source of stage 3.

    A document of several windows has its shorter rest at another place in each epoch, so the cuts move. With
    `packing="concatenate"`, windows are cut from the stream of all documents and each fills a row alone.

    Args:
        sentences: a second task, mixed in so that it is `settings.labelled_share` of the input tokens; None: span corruption alone.
        rows: packed rows in one micro-batch.
        shuffle: new order of rows in each epoch; False keeps the packer's order.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        settings: PretrainingSettings,
        rows: int | None = None,
        shuffle: bool = True,
        sentences: LabelledSentences | None = None,
    ) -> None:
        self.documents, self.settings, self.shuffle, self.sentences = documents, settings, shuffle, sentences
        self.rows = rows or settings.rows_per_micro_batch
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.first_sentinel_id, self.num_sentinels = sentinel_range(tokenizer)
        self.noise = (settings.noise_density, settings.mean_noise_span_length)
        self.window = window_length(settings.inputs_length, settings.targets_length, *self.noise)
        spans = noise_counts(self.window, *self.noise)[1]
        if spans > self.num_sentinels:
            raise SpanCorruptionError(
                f"a window of {self.window} tokens has {spans} spans and the tokenizer {self.num_sentinels} sentinels: lower inputs_length"
            )

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Windows of the epoch as (document, start, length), each int64 (windows,); texts under 2 tokens are left out."""
        lengths = np.asarray(self.documents.lengths, dtype=np.int64)
        full, rest = np.divmod(lengths, self.window)
        rng = epoch_rng(self.settings.seed, epoch, self.shuffle)
        rest_at = full if rng is None else rng.integers(0, full + 1)  # which of its windows is a document's short one
        counts = full + (rest >= 2)
        document = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... within its document
        has_rest, rest_at, rest = (rest >= 2)[document], rest_at[document], rest[document]
        start = number * self.window - np.where(has_rest & (number > rest_at), self.window - rest, 0)
        return [document, start, np.where(has_rest & (number == rest_at), rest, self.window)]

    def epoch(self, epoch: int) -> PackedEpoch:
        """Plan one epoch: windows, their corrupted lengths, rows. Labelled sentences are numbered behind the windows."""
        document, start, lengths = self.windows(epoch)
        stream = concatenate_pack(self.documents.lengths, self.window) if self.settings.packing == "concatenate" else None
        if stream is not None:
            lengths = np.full(len(stream), self.window)
        if not len(lengths):
            raise PackingError(f"{len(self.documents)} document(s) hold no text to mask: give more or longer documents")
        input_lengths, target_lengths = corrupted_lengths(lengths, *self.noise)
        pairs = self.labelled_pairs(epoch, int(input_lengths.sum()))
        if pairs is not None:
            input_lengths, target_lengths = map(np.concatenate, zip((input_lengths, target_lengths), pairs.lengths, strict=True))
        row_lengths = (self.settings.inputs_length, self.settings.targets_length)
        packing = best_fit_pack(input_lengths, target_lengths, *row_lengths, epoch_rng(self.settings.seed, epoch, self.shuffle))

        def read(window: int) -> Pair:
            if window >= len(lengths):
                return pairs[window - len(lengths)]
            if stream is not None:
                return self.corrupted(epoch, window, self._concatenated(stream[window]))
            token_ids = self.documents[int(document[window])][start[window] : start[window] + lengths[window]]
            return self.corrupted(epoch, window, token_ids)

        collate = functools.partial(collate_pairs, read=read, row_lengths=row_lengths, pad_id=self.pad_id)
        return PackedEpoch(packing, self.rows, row_sums(packing, target_lengths), collate)

    def labelled_pairs(self, epoch: int, tokens: int) -> SentencePairs | None:
        """The labelled sentences that go with `tokens` of corrupted text: a pure function of (seed, epoch)."""
        if self.sentences is None or not self.settings.labelled_share:
            return None
        share = self.settings.labelled_share
        return self.sentences.draw(tokens * share / (1 - share), np.random.default_rng((self.settings.seed, epoch, 1)))

    def corrupted(self, epoch: int, window: int, token_ids: np.ndarray) -> Pair:
        """Inputs and targets of one window: a pure function of (seed, epoch, window)."""
        mask = noise_mask(len(token_ids), *self.noise, example_rng(self.settings.seed, epoch, window))
        return corrupt(token_ids, mask, self.first_sentinel_id, self.num_sentinels, self.eos_id)

    def _concatenated(self, pieces: Sequence[tuple[int, int, int]]) -> np.ndarray:
        texts = [np.append(self.documents[text], self.eos_id)[start:stop] for text, start, stop in pieces]
        return np.concatenate(texts)


class LabelledBatches:
    """Labelled sentences as token ids: what both sources of fine-tuning share.

    Args:
        labels: indices into `LABELS`; None where there are none to learn from.
        rows: packed rows in one micro-batch.
        shuffle: new order of rows in each epoch; False keeps the packer's order.
        truncate: whether a text that is longer than a row loses its end; else it is an error when the epoch is packed.
    """

    prefix = ""  # of every text

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        tokenizer: Any,
        settings: FinetuningSettings,
        rows: int | None = None,
        shuffle: bool = True,
        truncate: bool = False,
    ) -> None:
        self.settings, self.shuffle = settings, shuffle
        self.rows = rows or settings.rows_per_micro_batch
        self.pad_id = tokenizer.pad_token_id
        self.inputs = encode([self.prefix + text for text in texts], tokenizer, settings.inputs_length if truncate else None)
        self.take_labels(labels, tokenizer)

    def take_labels(self, labels: Sequence[int] | None, tokenizer: Any) -> None:
        """Keep the labels, one for each of `self.inputs`, as what the task learns from."""
        raise NotImplementedError

    def pack(self, epoch: int, target_lengths: np.ndarray, longest_targets: int) -> Packing:
        rng = epoch_rng(self.settings.seed, epoch, self.shuffle)
        return best_fit_pack(lengths_of(self.inputs), target_lengths, self.settings.inputs_length, longest_targets, rng)


class TextToTextBatches(LabelledBatches):
    """`"sentiment: " + text` to the word of its label, packed: the source of text-to-text fine-tuning.

    Without labels the targets are empty, as `generate` wants them.
    """

    prefix = TASK_PREFIX

    def take_labels(self, labels: Sequence[int] | None, tokenizer: Any) -> None:
        count = len(self.inputs)
        self.targets = [np.zeros(0, np.int64)] * count if labels is None else encode([LABELS[label] for label in labels], tokenizer)

    def epoch(self, epoch: int) -> PackedEpoch:
        target_lengths = lengths_of(self.targets)
        packing = self.pack(epoch, target_lengths, self.settings.targets_length)
        row_lengths = (self.settings.inputs_length, self.settings.targets_length)

        def read(example: int) -> Pair:
            return self.inputs[example], self.targets[example]

        collate = functools.partial(collate_pairs, read=read, row_lengths=row_lengths, pad_id=self.pad_id)
        return PackedEpoch(packing, self.rows, row_sums(packing, target_lengths), collate)


class ClassificationBatches(LabelledBatches):
    """Sentences packed in encoder rows with one label per segment: the source of the classification head.

    A batch holds input_ids and encoder_segment_ids (rows, inputs_length) and labels (rows, most segments in a row of the epoch), -100
    where a row has no such segment. Without labels every real segment is labelled 0, so `labels != -100` marks them still.
    """

    def take_labels(self, labels: Sequence[int] | None, tokenizer: Any) -> None:
        self.labels = np.zeros(len(self.inputs), np.int64) if labels is None else np.asarray(labels, dtype=np.int64)

    def epoch(self, epoch: int) -> PackedEpoch:
        no_targets = np.zeros(len(self.inputs), np.int64)
        packing = self.pack(epoch, no_targets, 0)

        def collate(rows: Sequence[np.ndarray]) -> Batch:
            filled = []
            for row in rows:
                laid = fill_row([(self.inputs[e], no_targets[:0]) for e in row], self.settings.inputs_length, 0, self.pad_id, self.pad_id)
                labels = np.full(packing.most_examples, IGNORED)
                labels[: len(row)] = self.labels[row]
                filled.append({"input_ids": laid["input_ids"], "encoder_segment_ids": laid["encoder_segment_ids"], "labels": labels})
            return stack(filled)

        return PackedEpoch(packing, self.rows, np.diff(packing.row_offsets), collate)


def sentinel_range(tokenizer: Any) -> tuple[int, int]:
    """Id of `<extra_id_0>` and how many sentinels count down from it without a gap.

    Raises:
        SpanCorruptionError: the tokenizer has none.
    """
    first, count = tokenizer.convert_tokens_to_ids("<extra_id_0>"), 1
    if first is None or first == tokenizer.unk_token_id:
        raise SpanCorruptionError("the tokenizer has no <extra_id_0>: train it with sentinels")
    while tokenizer.convert_tokens_to_ids(f"<extra_id_{count}>") == first - count:
        count += 1
    return first, count


def encode(texts: Sequence[str], tokenizer: Any, longest: int | None = None) -> list[np.ndarray]:
    """Token ids of each text with eos, int64; with `longest`, a longer text loses its end but not its eos."""
    if not len(texts):
        raise PackingError("there are no texts to pack: the dataset is empty")
    encoded = encode_texts(tokenizer, texts, add_eos=True)
    if longest is not None:
        encoded = [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in encoded]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def epoch_rng(seed: int, epoch: int, shuffle: bool) -> np.random.Generator | None:
    return np.random.default_rng((seed, epoch)) if shuffle else None


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
