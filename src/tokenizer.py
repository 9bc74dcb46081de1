"""The tokenizer: SentencePiece Unigram trained on the corpus, wrapped as a `transformers` T5 tokenizer.

Only a plain Unigram model with nmt_nfkc, or nmt_nfkc_cf, which folds case, gives the same ids in both libraries (byte fallback becomes
`<unk>` and BPE goes wrong without a word), so nothing else is offered. Bulk text is encoded by SentencePiece itself, about eight times
as fast; the `transformers` tokenizer serves everyone who opens a checkpoint.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from src.config import CorpusSettings
from src.verified_folders import describe_file

SENTINELS = 100
SMALLEST_VOCABULARY = 300  # that the settings allow
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
MODEL_FILE = "spiece.model"
WORD_START = "▁"  # SentencePiece's mark on a piece that begins a word
THREADS = 2  # fixed: the sums of a training step depend on how many threads share it
# What training sees is bounded, whatever the corpus: SentencePiece takes about 30 bytes of memory for each character.
CHARACTERS_PER_DOCUMENT, CHARACTERS_IN_ALL, CHARACTERS_PER_SENTENCE = 12_000, 50_000_000, 4_000
# Every printable ASCII character is a piece, so no price, ticker or name in plain English has an unknown character.
REQUIRED_CHARACTERS = "".join(map(chr, range(0x21, 0x7F))) + "€£"
# Scores of pieces are multiples of this, so that sums of up to 2^24 of them are exact in the 32-bit floats of SentencePiece.
# Otherwise near ties far into a long text go wrong there, and `transformers`, which adds up in 64 bits, gives other ids.
SCORE_STEP = 1 / 64
LONGEST_EXACT = 50_000  # characters; worth about -80,000 in score, of the 262,144 that are exact
LETTERS = re.compile(r"[^\W\d_]+")
SPECIAL_TOKEN = re.compile(r"<(?=(?:pad|unk|/s|extra_id_\d{1,2})>)")
SPECIAL_SCORE = -10_000.0  # below any spelling in plain pieces, so that text never becomes a special token


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read."""


def split_at_spaces(text: str, characters: int) -> Iterator[str]:
    """Parts of at most `characters`, cut before a space where there is one; joined they are the text."""
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text) and (space := text.rfind(" ", start + 1, end)) > 0:
            end = space
        yield text[start:end]
        start = end


def training_sentences(texts: Iterable[str], frequent_words: int = 0) -> Iterator[str]:
    """Parts of the documents, within the bounds on what training sees, then the most frequent words once more.

    SentencePiece takes its candidates from *distinct* words in which they are followed by different characters: a word always
    followed by the same one (a space, a colon) is no candidate, however frequent. So each frequent word is shown once more,
    before a comma. That makes 2 % fewer tokens of 2,000 news articles (16,000 ids) and 24 % fewer of the bundled sample (1,200).
    """
    characters, words = 0, Counter()
    for text in texts:
        for sentence in split_at_spaces(text[:CHARACTERS_PER_DOCUMENT], CHARACTERS_PER_SENTENCE):
            yield sentence
            characters += len(sentence)
            words.update(LETTERS.findall(sentence))
        if characters >= CHARACTERS_IN_ALL:
            break
    yield from split_at_spaces(" ".join(f"{word}," for word, _ in words.most_common(frequent_words)), CHARACTERS_PER_SENTENCE)


def train_sentencepiece(texts: Iterable[str], model_path: Path, vocab_size: int, lowercase: bool) -> None:
    """Train a Unigram model (Kudo 2018, arXiv 1804.10959) whose pieces leave room for the sentinels.

    Args:
        texts: documents, streamed.
        model_path: the `.model` file to write.
        vocab_size: pieces and sentinels together.
        lowercase: give text the same ids whatever its case; what is decoded is lower case then.

    Raises:
        TokenizerError: the corpus has too little text, or too many characters, for the vocabulary.
    """
    texts = (text.lower() for text in texts) if lowercase else texts  # the model folds case too; here so that words are counted in any
    try:
        with model_path.open("wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=training_sentences(texts, frequent_words=vocab_size),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size - SENTINELS,
                normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
                split_digits=True,
                byte_fallback=False,
                character_coverage=0.9999,
                required_chars="".join(dict.fromkeys(REQUIRED_CHARACTERS.lower())) if lowercase else REQUIRED_CHARACTERS,
                max_sentence_length=4 * CHARACTERS_PER_SENTENCE,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                num_threads=THREADS,
                minloglevel=2,
            )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(training_failure(str(error), vocab_size)) from None
    round_scores(model_path)


def round_scores(model_path: Path) -> None:
    """Bring the scores of a model file to multiples of `SCORE_STEP`."""
    model = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes())
    for piece in model.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    model_path.write_bytes(model.SerializeToString(deterministic=True))


def training_failure(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint as one line with the cure."""
    if most := re.search(r"too high.*?<= (\d+)", message, re.DOTALL):
        largest = int(most[1]) + SENTINELS
        cure = (
            f"set corpus.vocab_size to at most {largest} or read more documents"
            if largest >= SMALLEST_VOCABULARY
            else "read more documents"
        )
        return f"the corpus is too small for a vocabulary of {vocab_size}: {cure}"
    if least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        cure = f"set corpus.vocab_size above {int(least[1]) + SENTINELS}"
        return f"the corpus has more characters than a vocabulary of {vocab_size} holds: {cure}"
    return f"the tokenizer cannot be trained ({(message.strip().splitlines() or ['no reason given'])[-1]}): read more documents"


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int, lowercase: bool = True) -> PreTrainedTokenizerBase:
    """Train on documents and write `spiece.model` and the files of a `transformers` T5 tokenizer into `folder`.

    Returns:
        The tokenizer as loaded back: pad 0, eos 1, unk 2, `<extra_id_0>` the last id and `<extra_id_99>` the 100th last.
    """
    (folder / "tokenizer.json").unlink(missing_ok=True)  # an older one would be read in place of the new model
    train_sentencepiece(texts, folder / MODEL_FILE, vocab_size, lowercase)
    T5Tokenizer.from_pretrained(folder, extra_ids=SENTINELS).save_pretrained(folder)
    # `transformers` puts special tokens among the pieces with the best score of all, 0. There, text that spells one
    # would become it even when the special token itself is not looked for.
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    special = {token["content"] for token in content["added_tokens"]}
    content["model"]["vocab"] = [[piece, SPECIAL_SCORE if piece in special else score] for piece, score in content["model"]["vocab"]]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != vocab_size:
        raise TokenizerError(f"{folder}: the tokenizer has {len(tokenizer)} ids instead of {vocab_size}: update transformers")
    return tokenizer


def make_tokenizer(texts: Iterable[str], folder: Path, settings: CorpusSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of the settings, written into `folder`: a copy of the one they name, else one trained on documents."""
    if settings.tokenizer is None:
        return train_tokenizer(texts, folder, settings.vocab_size, settings.lowercase)
    source = sentencepiece_of(settings.tokenizer).parent
    save_tokenizer(load_tokenizer(source), source, folder)
    return load_tokenizer(folder)


def sentencepiece_of(folder: str | Path) -> Path:
    """The SentencePiece model of a tokenizer's folder.

    Raises:
        TokenizerError: there is none.
    """
    path = Path(folder).expanduser() / MODEL_FILE
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: let corpus.tokenizer name a folder with a tokenizer of this project, or none")
    return path


def tokenizer_sources(settings: CorpusSettings) -> list[dict[str, Any]]:
    """What a manifest says of the tokenizer that the settings name, if they name one."""
    return [] if settings.tokenizer is None else [describe_file(sentencepiece_of(settings.tokenizer))]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The `transformers` tokenizer of a folder, without asking the Hub."""
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def load_sentencepiece(folder: str | Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model of a folder: the same ids, faster in bulk, and no special tokens in text."""
    return sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / MODEL_FILE))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, target: Path) -> None:
    """Write a tokenizer's files into `target`, and the `.model` of its folder `source`, which `save_pretrained` leaves out."""
    tokenizer.save_pretrained(target)
    shutil.copyfile(source / MODEL_FILE, target / MODEL_FILE)


def encode_in_bulk(processor: sentencepiece.SentencePieceProcessor, texts: Sequence[str]) -> list[list[int]]:
    """The ids that `encode_texts` gives, by SentencePiece on two threads; a very long text goes through in parts."""
    long = {number for number, text in enumerate(texts) if len(text) > LONGEST_EXACT}
    encoded = processor.encode(["" if number in long else text for number, text in enumerate(texts)], num_threads=THREADS)
    for number in long:
        parts = processor.encode(list(split_at_spaces(texts[number], LONGEST_EXACT)), num_threads=THREADS)
        encoded[number] = [token for ids in parts for token in ids]
    return encoded


def escape_special_tokens(text: str) -> str:
    """Keep text that spells `<extra_id_0>`, `<pad>`, `</s>` or `<unk>` from becoming that token.

    A control character goes in behind the `<`; the tokenizer's normalisation removes it again, so the ids are those
    that SentencePiece gives the text as it was.
    """
    return SPECIAL_TOKEN.sub("<\x01", text) if "<" in text else text


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_eos: bool = False) -> list[list[int]]:
    """Ids of texts (never padded or cut); no text becomes a special token.

    Args:
        tokenizer: from `load_tokenizer`.
        texts: raw or cleaned.
        add_eos: end each with id 1.
    """
    if not len(texts):
        return []
    escaped = [escape_special_tokens(text) for text in texts]
    return tokenizer(escaped, add_special_tokens=add_eos, return_attention_mask=False, verbose=False).input_ids


def check_same_ids(folder: str | Path, texts: Sequence[str]) -> int:
    """Compare the `transformers` tokenizer of a folder with its SentencePiece model; returns the number of texts compared.

    Raises:
        TokenizerError: names the first text whose ids differ.
    """
    expected = encode_in_bulk(load_sentencepiece(folder), texts)
    for number, (ids, other) in enumerate(zip(encode_texts(load_tokenizer(folder), texts), expected, strict=True)):
        if ids != other:
            raise TokenizerError(f"{folder}: text {number} ({texts[number][:40]!r}) has other ids than SentencePiece gives: train again")
    return len(texts)


class TokenizedDocuments:
    """Token ids of many documents in one flat array: `documents[i]` is a view, nothing is copied.

    Args:
        tokens: uint16 (tokens in all,), without end-of-sequence ids.
        offsets: int64 (documents + 1,); document i is `tokens[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self.tokens, self.offsets = tokens, offsets

    @classmethod
    def load(cls, folder: str | Path, split: str) -> "TokenizedDocuments":
        """Memory-map `<split>_tokens.npy` and read `<split>_offsets.npy`."""
        folder = Path(folder)
        tokens = np.load(folder / f"{split}_tokens.npy", mmap_mode="r", allow_pickle=False)
        return cls(tokens.view(np.ndarray), np.load(folder / f"{split}_offsets.npy", allow_pickle=False))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]  # uint16 (length,)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self.offsets)
