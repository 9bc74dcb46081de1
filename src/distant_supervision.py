"""A second task for pre-training: sentences of the corpus, labelled by the good and bad words that they hold.

Span corruption alone gives a model no reason to know good news from bad. Here a word list says which sentences are bullish, bearish or
neutral, most of the words that say so are taken out, and the model learns to write the label from what is left: from all the other words
that go with good and bad news, which no list holds. Labels by such a rule are *distant supervision* (Mintz et al. 2009, ACL P09-1113;
of sentiment, by emoticons: Go, Bhayani and Huang 2009), mixed with span corruption as T5's multi-task pre-training does (arXiv 1910.10683,
section 3.5.3). No human labelled anything, but the word list is knowledge that the corpus does not hold.

    text     sales rose sharply in asia .      polar words   rose (bullish)
    inputs   sentiment : sales sharply in asia . </s>      targets   bullish </s>
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from src.labels import LABEL_IDS, LABELS, TASK_PREFIX
from src.tokenizer import EOS_ID, WORD_START, TokenizedDocuments, encode_texts
from src.word_list import Kind, are_sure, begins_unit, kind_of, may_begin_listed_word, polarities

SHORTEST, LONGEST = 10, 80  # tokens of a sentence that is used
REMOVED = 0.7  # of the polar words: some stay, so that they are learned too
SENTENCE_ENDS = (".", "?", "!")
# Behind these a dot seldom ends a sentence. Looked for among words of one piece: where none is, two sentences too many are cut.
ABBREVIATIONS = (
    *("jan", "feb", "aug", "sept", "oct", "nov", "dec", "no", "st", "vs", "co", "corp", "inc", "ltd", "plc"),
    *("dr", "gen", "gov", "jr", "mr", "mrs", "ms", "rep", "sen"),
)


class DistantSupervisionError(ValueError):
    """A corpus in which the word list finds no sentence of some label, or rows too short for one."""


class Pieces:
    """What each piece of a vocabulary says about words and sentences, as arrays of bool (vocab_size,).

    Attributes:
        kind: of a word of this one piece, or of an amount that it begins: int8 (vocab_size,).
    """

    def __init__(self, tokenizer: Any) -> None:
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.letters = [piece.removeprefix(WORD_START).lower() for piece in pieces]
        self.starts_word = np.array([piece.startswith(WORD_START) for piece in pieces])
        self.is_word = np.array([letters.isalpha() for letters in self.letters])
        self.is_shortened = self.is_word & np.array([len(letters) == 1 or letters in ABBREVIATIONS for letters in self.letters])
        self.ends_sentence = np.array([letters.rstrip('"') in SENTENCE_ENDS for letters in self.letters])
        self.may_begin = self.is_word & np.array([may_begin_listed_word(letters) for letters in self.letters])
        self.kind = np.array([kind_of(letters) for letters in self.letters], dtype=np.int8)


@dataclass(frozen=True)
class SentencePairs:
    """Drawn sentences as (inputs, targets): `pairs[i]`, and the lengths that packing needs."""

    sentences: "LabelledSentences"
    chosen: np.ndarray  # int64 (pairs,): which sentences
    removed: np.ndarray  # bool (polar words of the corpus,)

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the inputs and of the targets, eos included: two int64 (pairs,)."""
        corpus = self.sentences
        gone = np.concatenate(([0], np.cumsum(corpus.word_lengths * self.removed)))[corpus.word_offsets]
        inputs = len(corpus.prefix) + corpus.lengths - np.diff(gone) + 1
        targets = np.array([len(label) for label in corpus.label_words])
        return inputs[self.chosen], targets[corpus.labels[self.chosen]]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        corpus, number = self.sentences, self.chosen[index]
        start, length = corpus.starts[number], corpus.lengths[number]
        kept = np.ones(length, dtype=bool)
        for word in range(corpus.word_offsets[number], corpus.word_offsets[number + 1]):
            if self.removed[word]:
                begin = corpus.word_starts[word] - start
                kept[begin : begin + corpus.word_lengths[word]] = False
        text = corpus.tokens[start : start + length][kept].astype(np.int64)
        return np.concatenate((corpus.prefix, text, [EOS_ID])), corpus.label_words[corpus.labels[number]]

    def frame(self, tokenizer: Any) -> pd.DataFrame:
        """Columns `text_id`, `label`, `text` (what is left of a sentence) and `whole`, a row a pair."""
        corpus = self.sentences
        spans = [corpus.tokens[corpus.starts[number] : corpus.starts[number] + corpus.lengths[number]] for number in self.chosen]
        rows = {
            "text_id": [f"sentence-{number}" for number in self.chosen],
            "label": corpus.labels[self.chosen],
            "text": tokenizer.batch_decode([self[index][0][len(corpus.prefix) : -1] for index in range(len(self))]),
            "whole": tokenizer.batch_decode(spans),
        }
        return pd.DataFrame(rows)


class LabelledSentences:
    """The sentences of a corpus of `SHORTEST` to `LONGEST` tokens on which the word list is of one mind.

    One with more bullish than bearish words is bullish, with more bearish ones bearish, without either neutral. Others are left out, and so
    is what a single word says that may say nothing (`word_list.are_sure`): four in ten such labels were wrong.

    Args:
        documents: of the corpus.
        tokenizer: that their ids are of.

    Attributes:
        starts, lengths, labels: int64 (sentences,): where each lies in `documents.tokens`, and its index into `LABELS`.
        word_starts, word_lengths: int64 (polar words,), in order; those of sentence i are `word_offsets[i] : word_offsets[i + 1]`.
    """

    def __init__(self, documents: TokenizedDocuments, tokenizer: Any) -> None:
        self.tokens = documents.tokens
        self.prefix = np.array(encode_texts(tokenizer, [TASK_PREFIX])[0])
        self.label_words = [np.array(ids) for ids in encode_texts(tokenizer, list(LABELS), add_eos=True)]
        words = Words(np.asarray(self.tokens), Pieces(tokenizer))
        bounds = np.union1d(words.sentence_starts(), documents.offsets)  # (sentences + 1,)
        polar, polarity, sure = words.polar(bounds)
        inside = np.searchsorted(polar, bounds)  # (sentences + 1,)
        balance, certain = (np.diff(np.concatenate(([0], np.cumsum(values)))[inside]) for values in (polarity, sure))  # (sentences,) each
        counts, lengths = np.diff(inside), np.diff(bounds)
        told = (np.abs(balance) > 1) | ((balance != 0) & (certain > 0))
        used = (lengths >= SHORTEST) & (lengths <= LONGEST) & ((counts == 0) | told)
        self.starts, self.lengths = bounds[:-1][used], lengths[used]
        self.labels = np.select([balance[used] > 0, balance[used] < 0], [LABEL_IDS["bullish"], LABEL_IDS["bearish"]], LABEL_IDS["neutral"])
        self.word_starts = polar[inside[0] : inside[-1]][np.repeat(used, counts)]
        self.word_lengths = words.lengths(self.word_starts)
        self.word_offsets = np.concatenate(([0], np.cumsum(counts[used])))

    def __len__(self) -> int:
        return len(self.starts)

    def require_room(self, inputs_length: int, targets_length: int) -> None:
        """Raises DistantSupervisionError unless the longest sentence that may be drawn fits into a row, or a later epoch would stop."""
        longest = len(self.prefix) + LONGEST + 1, max(map(len, self.label_words))
        for name, length, needed in zip(("inputs_length", "targets_length"), (inputs_length, targets_length), longest, strict=True):
            if length < needed:
                raise DistantSupervisionError(
                    f"pretraining.{name} is {length}, and a labelled sentence may need {needed}: raise it, or set labelled_share=0"
                )

    def draw(self, tokens: float, rng: np.random.Generator) -> SentencePairs:
        """As many sentences of each label, their inputs about `tokens` long in all, or fewer where a label has no more.

        Raises:
            DistantSupervisionError: a label has no sentence.
        """
        by_label = [np.flatnonzero(self.labels == label) for label in range(len(LABELS))]
        for label, numbers in zip(LABELS, by_label, strict=True):
            if not len(numbers):
                raise DistantSupervisionError(
                    f"the word list finds no {label} sentence in the corpus: set pretraining.labelled_share=0 or read more documents"
                )
        every = SentencePairs(self, np.arange(len(self)), rng.random(len(self.word_starts)) < REMOVED)
        lengths = every.lengths[0]
        per_label = min(int(tokens / sum(lengths[numbers].mean() for numbers in by_label)), *map(len, by_label))
        return replace(every, chosen=np.concatenate([rng.permutation(numbers)[:per_label] for numbers in by_label]))


class Words:
    """The words of a text: each a piece of letters and the pieces of letters that go on without a space.

    Args:
        tokens: uint16 (tokens,).
        pieces: of the vocabulary.
    """

    def __init__(self, tokens: np.ndarray, pieces: Pieces) -> None:
        self.tokens, self.pieces = tokens, pieces
        is_word = pieces.is_word[tokens]
        goes_on = np.zeros(len(tokens) + 1, dtype=bool)  # the token is inside a word; one past the end is not
        goes_on[1:-1] = is_word[1:] & is_word[:-1] & ~pieces.starts_word[tokens[1:]]
        self.begins = is_word & ~goes_on[:-1]  # bool (tokens,)
        self.stops = np.flatnonzero(~goes_on)  # where a token goes no word on

    def lengths(self, starts: np.ndarray) -> np.ndarray:
        """Tokens of the words that begin at `starts`: int64 (words,)."""
        return self.stops[np.searchsorted(self.stops, starts, side="right")] - starts

    def sentence_starts(self) -> np.ndarray:
        """Where a word follows the end of a sentence: int64 (starts,). A dot behind a letter or a short form ends none: u.s., no. 1."""
        before, end, after = self.tokens[:-2], self.tokens[1:-1], self.tokens[2:]
        shortened = self.begins[:-2] & self.pieces.is_shortened[before]
        return np.flatnonzero(self.pieces.ends_sentence[end] & self.pieces.starts_word[after] & ~shortened) + 2

    def polar(self, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where words that count begin, in order, int64 (polar words,), their polarity, int8, and whether each says enough alone, bool.

        Args:
            bounds: where sentences begin, and the end of the last: int64 (sentences + 1,).
        """
        amounts = self.pieces.kind[self.tokens] == Kind.AMOUNT
        starts = np.flatnonzero(self.begins | amounts)
        kinds = self.pieces.kind[self.tokens[starts]]  # of words of one piece
        maybe = np.flatnonzero(self.pieces.may_begin[self.tokens[starts]] & self.begins[starts])
        lengths = self.lengths(starts[maybe])
        for word, length in zip(maybe[lengths > 1], lengths[lengths > 1], strict=True):
            ids = self.tokens[starts[word] : starts[word] + length]
            kinds[word] = kind_of("".join(self.pieces.letters[token] for token in ids))
        numbers = np.searchsorted(bounds, starts, side="right")
        kept = begins_unit(kinds, numbers)
        starts, kinds, numbers = starts[kept], kinds[kept], numbers[kept]
        counts, polarity = polarities(kinds, numbers)
        return starts[counts], polarity[counts], are_sure(kinds, numbers)[counts]
