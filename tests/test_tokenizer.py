"""The tokenizer: the ids of SentencePiece, the special tokens of T5, and no way for text to become one of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src.cleaning import clean_article
from src.sources import read_articles
from src.tokenizer import (
    TokenizedDocuments,
    TokenizerError,
    check_same_ids,
    encode_in_bulk,
    encode_texts,
    load_sentencepiece,
    load_tokenizer,
    train_tokenizer,
    training_sentences,
)

SAMPLE_SIZE = 1_000
SPECIAL = ["a <extra_id_0> b</s> <pad><unk>", "<extra_id_99>", "</s>", "<unk>x", "<pad", "<<pad>>", "<extra_id_100>", "<\x01extra_id_1>"]
UNUSUAL = [
    "",
    "   ",
    " two  spaces ",
    "a\tb\nc",
    "café ﬁne … ½",
    "中文 x中",
    "😀😁 x",
    "▁▁a",
    "e\u0301",
    "\ufeffx",
    "x\u200by",
    "1234.50%",
    "$-3",
    "STRASSE Straße İstanbul ΣΊΣΥΦΟΣ Ⅳ ÉCLAIR",
]


@pytest.fixture(scope="module")
def sample():
    articles = [clean_article(article.text) for article in read_articles("sample", max_documents=SAMPLE_SIZE)]
    return articles + ["In 1987, the 1987 plan (1987) grew to 2013; 2013 was 2013."] * 50


@pytest.fixture(scope="module")
def folder(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sample, folder, 800)
    return folder


@pytest.fixture(scope="module")
def cased_folder(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cased")
    train_tokenizer(sample, folder, 800, lowercase=False)
    return folder


def test_special_ids_are_those_of_t5(folder):
    """Breaks when sentinels count the wrong way or ids shift: a T5 checkpoint would mean other tokens."""
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == tokenizer.vocab_size == 800
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]) == list(range(799, 699, -1))
    assert tokenizer("a <extra_id_0>").input_ids[-2:] == [799, 1]
    assert load_sentencepiece(folder).get_piece_size() == 700


@pytest.mark.parametrize("kind", ["folder", "cased_folder"])
def test_ids_are_those_of_sentencepiece(kind, sample, request):
    """Breaks when the converted tokenizer splits otherwise than the model that was trained (byte fallback, BPE, normalisation)."""
    assert check_same_ids(request.getfixturevalue(kind), sample + UNUSUAL) == len(sample) + len(UNUSUAL)


def test_case_is_folded_where_asked(folder, cased_folder):
    """Breaks when a headline in capitals gets other ids, or spends pieces on capitals that no text can reach."""
    texts = ["Profit rose 5% at Apple Inc", "PROFIT ROSE 5% AT APPLE INC", "profit rose 5% at apple inc"]
    assert len({tuple(ids) for ids in encode_texts(load_tokenizer(folder), texts)}) == 1
    assert load_tokenizer(folder).decode(encode_texts(load_tokenizer(folder), texts)[1]) == texts[2]
    assert len({tuple(ids) for ids in encode_texts(load_tokenizer(cased_folder), texts)}) == 3
    pieces = {kind: [load_sentencepiece(kind).id_to_piece(id) for id in range(3, 700)] for kind in (folder, cased_folder)}
    assert all(piece == piece.lower() for piece in pieces[folder])
    assert {"A", "Z"} <= set(pieces[cased_folder])


def test_long_texts_keep_their_ids(folder, sample):
    """Breaks when near ties far into a text are lost in 32-bit sums, or a text of two megabytes is cut inside a word."""
    text = " ".join(sample)
    processor, tokenizer = load_sentencepiece(folder), load_tokenizer(folder)
    scores = np.array([processor.get_score(id) for id in range(3, 700)])
    assert np.array_equal(scores * 64, np.round(scores * 64))
    assert encode_texts(tokenizer, [text[:300_000]])[0] == processor.encode(text[:300_000])
    two_megabytes = text * (2_000_000 // len(text) + 1)
    assert encode_in_bulk(processor, ["a", two_megabytes, ""]) == encode_texts(tokenizer, ["a", two_megabytes, ""])
    assert encode_in_bulk(processor, ["x" * 120_000])[0].count(2) == 0


def test_text_never_becomes_a_special_token(folder):
    """Breaks when a page that spells `</s>` or a sentinel ends a document or opens a gap in it."""
    processor, tokenizer = load_sentencepiece(folder), load_tokenizer(folder)
    assert encode_texts(tokenizer, SPECIAL) == processor.encode(SPECIAL)
    assert tokenizer(SPECIAL, add_special_tokens=False, split_special_tokens=True).input_ids == processor.encode(SPECIAL)
    assert not any(id in (0, 1) or id >= 700 for ids in encode_texts(tokenizer, SPECIAL) for id in ids)
    assert tokenizer.decode(encode_texts(tokenizer, ["a <pad> b"])[0]) == "a <pad> b"
    assert encode_texts(tokenizer, ["a"], add_eos=True)[0][-1] == 1
    assert encode_texts(tokenizer, []) == []


def test_digits_stand_alone_and_ascii_is_known(folder):
    """Breaks when numbers become pieces learnt by heart, or a character that the corpus lacks becomes unknown."""
    processor = load_sentencepiece(folder)
    digits = [processor.id_to_piece(i) for i in range(700) if any(c.isdigit() for c in processor.id_to_piece(i))]
    assert all(len(piece.lstrip("▁")) == 1 for piece in digits)
    assert 2 not in processor.encode("".join(map(chr, range(0x20, 0x7F))) + " €5 £6")


def test_a_frequent_word_of_one_form_is_a_piece(tmp_path):
    """Breaks when a word seen a thousand times is spelt in letters because it never stands before a comma."""
    rng = np.random.default_rng(0)
    fillers = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(300)]
    train_tokenizer([f"Analysts see a {filler}." for filler in fillers] * 3, tmp_path, 400)
    assert load_sentencepiece(tmp_path).encode("Analysts see a", out_type=str) == ["▁analysts", "▁see", "▁a"]


def test_it_opens_without_this_package(folder, tmp_path):
    """Breaks when the saved tokenizer needs code of this project, or the network, to open."""
    code = (
        f"from transformers import AutoTokenizer; tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}); "
        "print(tokenizer('profit rose <extra_id_0>').input_ids)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(load_tokenizer(folder)("profit rose <extra_id_0>").input_ids)


def test_training_is_repeatable(folder, sample, tmp_path):
    """Breaks when two runs on the same text give other files: every later artifact would look stale."""
    train_tokenizer(sample[:200], tmp_path, 400)  # what lay there before must not matter
    train_tokenizer(iter(sample), tmp_path, 800)
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_too_little_or_too_varied_text_is_refused(sample, tmp_path):
    """Breaks when SentencePiece's own message (an internal path and a condition) is all that a user gets to see."""
    with pytest.raises(TokenizerError, match=r"a vocabulary of 60000: set corpus.vocab_size to at most \d+ or read more documents"):
        train_tokenizer(sample, tmp_path, 60_000)
    with pytest.raises(TokenizerError, match="too small for a vocabulary of 2000: read more documents"):
        train_tokenizer(["profit rose in the quarter"] * 50, tmp_path, 2_000)
    with pytest.raises(TokenizerError, match=r"more characters than a vocabulary of 300 holds: set corpus.vocab_size above \d+"):
        train_tokenizer(["".join(map(chr, range(0x4E00, 0x5200)))] * 50, tmp_path, 300)
    with pytest.raises(TokenizerError, match=r"cannot be trained \(.*\): read more documents") as error:
        train_tokenizer([], tmp_path, 2_000)
    assert "\n" not in str(error.value)


def test_training_sees_a_bounded_amount_of_text():
    """Breaks when one huge document, or many, make the memory of training grow with the corpus."""
    lengths = [len(sentence) for sentence in training_sentences(["word " * 400_000, "x" * 2_000_000])]
    assert sum(lengths) <= 24_000
    assert max(lengths) <= 4_000
    assert list(training_sentences(["one two", ""])) == ["one two"]
    assert "".join(training_sentences(["ab cd " * 1_000])) == "ab cd " * 1_000


def test_documents_are_views_of_one_array(tmp_path):
    """Breaks when offsets are off by one, or reading a document copies the corpus."""
    np.save(tmp_path / "train_tokens.npy", np.arange(7, dtype=np.uint16))
    np.save(tmp_path / "train_offsets.npy", np.array([0, 3, 3, 7]))
    documents = TokenizedDocuments.load(tmp_path, "train")
    assert [documents[i].tolist() for i in range(3)] == [[0, 1, 2], [], [3, 4, 5, 6]]
    assert (documents.lengths.tolist(), len(documents)) == ([3, 0, 4], 3)
    assert documents[-1].dtype == np.uint16
    assert np.shares_memory(documents[2], documents.tokens)
    with pytest.raises(IndexError, match="document 3 of 3"):
        documents[3]


def test_ids_on_ten_thousand_real_documents(tmp_path):
    """Breaks when the two libraries differ on text that no synthetic sample holds."""
    if "NEWS_DATA_DIR" not in os.environ:
        pytest.skip("NEWS_DATA_DIR does not name a folder with real articles")
    path = Path(os.environ["NEWS_DATA_DIR"]) / "reuters_financial_news"
    texts = [article.text for article in read_articles(path, max_documents=10_000)]
    for lowercase in (True, False):
        train_tokenizer((clean_article(text) for text in texts[::20]), tmp_path, 4_000, lowercase)
        raw = [text for text in texts if text][: None if lowercase else 1_000]  # which is harder than cleaned
        assert len(raw) >= (9_800 if lowercase else 1_000)
        assert encode_texts(load_tokenizer(tmp_path), raw) == load_sentencepiece(tmp_path).encode(raw, num_threads=2)
