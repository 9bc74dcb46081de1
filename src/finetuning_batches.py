"""The sources of stages 4 and 5: labelled sentences packed for a head on the encoder, or as text to text."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.collators import Batch, PackedEpoch, Pair, collate_pairs, encode, epoch_rng, lengths_of, row_sums, stack
from src.config import FinetuningSettings
from src.labels import LABELS, TASK_PREFIX
from src.packing import IGNORED, Packing, best_fit_pack, fill_row


class LabelledBatches:
    """Labelled sentences as token ids: what both sources of fine-tuning share. A text longer than a row loses its end.

    Args:
        labels: indices into `LABELS`; None where there are none to learn from.
        shuffle: new order of rows in each epoch; False keeps the packer's order.
    """

    prefix = ""  # of every text

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        tokenizer: Any,
        settings: FinetuningSettings,
        shuffle: bool = True,
    ) -> None:
        self.settings, self.shuffle = settings, shuffle
        self.pad_id = tokenizer.pad_token_id
        self.inputs = encode([self.prefix + text for text in texts], tokenizer, settings.inputs_length)
        self.take_labels(labels, tokenizer)

    def take_labels(self, labels: Sequence[int] | None, tokenizer: Any) -> None:
        """Keep the labels, one for each of `self.inputs`, as what the task learns from."""
        raise NotImplementedError

    def pack(self, epoch: int, target_lengths: np.ndarray, longest_targets: int) -> Packing:
        rng = epoch_rng(self.settings.seed, epoch) if self.shuffle else None
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
        return PackedEpoch(packing, self.settings.rows_per_micro_batch, row_sums(packing, target_lengths), collate)


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

        return PackedEpoch(packing, self.settings.rows_per_micro_batch, np.diff(packing.row_offsets), collate)
