"""The source of stage 3: documents cut into windows, corrupted and packed, and labelled sentences mixed in where they are wanted."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.collators import PackedEpoch, Pair, collate_pairs, epoch_rng, row_sums
from src.config import PretrainingSettings
from src.distant_supervision import LabelledSentences, SentencePairs
from src.packing import PackingError, best_fit_pack, concatenate_pack
from src.span_corruption import (
    SpanCorruptionError,
    corrupt,
    corrupted_lengths,
    example_rng,
    noise_counts,
    noise_mask,
    window_length,
)
from src.tokenizer import TokenizedDocuments


class PretrainingBatches:
    """Documents cut into windows, corrupted, packed: the source of stage 3.

    A document of several windows has its shorter rest at another place in each epoch, so the cuts move. With
    `packing="concatenate"`, windows are cut from the stream of all documents and each fills a row alone.

    Args:
        sentences: a second task, mixed in so that it is `settings.labelled_share` of the input tokens; None: span corruption alone.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        tokenizer: Any,
        settings: PretrainingSettings,
        sentences: LabelledSentences | None = None,
    ) -> None:
        self.documents, self.settings, self.sentences = documents, settings, sentences
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.first_sentinel_id, self.num_sentinels = sentinel_range(tokenizer)
        self.noise = (settings.noise_density, settings.mean_noise_span_length)
        self.window = window_length(settings.inputs_length, settings.targets_length, *self.noise)
        if sentences is not None:
            sentences.require_room(settings.inputs_length, settings.targets_length)
        spans = noise_counts(self.window, *self.noise)[1]
        if spans > self.num_sentinels:
            raise SpanCorruptionError(
                f"a window of {self.window} tokens has {spans} spans and the tokenizer {self.num_sentinels} sentinels: lower inputs_length"
            )

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Windows of the epoch as (document, start, length), each int64 (windows,); texts under 2 tokens are left out."""
        lengths = np.asarray(self.documents.lengths, dtype=np.int64)
        full, rest = np.divmod(lengths, self.window)
        rest_at = epoch_rng(self.settings.seed, epoch).integers(0, full + 1)  # which of its windows is a document's short one
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
        packing = best_fit_pack(input_lengths, target_lengths, *row_lengths, epoch_rng(self.settings.seed, epoch))

        def read(window: int) -> Pair:
            if window >= len(lengths):
                return pairs[window - len(lengths)]
            if stream is not None:
                return self.corrupted(epoch, window, self._concatenated(stream[window]))
            token_ids = self.documents[int(document[window])][start[window] : start[window] + lengths[window]]
            return self.corrupted(epoch, window, token_ids)

        collate = functools.partial(collate_pairs, read=read, row_lengths=row_lengths, pad_id=self.pad_id)
        return PackedEpoch(packing, self.settings.rows_per_micro_batch, row_sums(packing, target_lengths), collate)

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
