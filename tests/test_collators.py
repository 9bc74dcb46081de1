"""Batches: nothing lost, nothing mixed, the same batch every time it is asked for."""

import csv
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config
from transformers import T5ForConditionalGeneration as StockT5

from src.config import FinetuningSettings, PretrainingSettings
from src.finetuning_batches import ClassificationBatches, TextToTextBatches
from src.modeling_t5 import T5ForConditionalGeneration
from src.packing import PackingError, best_fit_pack
from src.pretraining import SpanCorruptionEvaluation
from src.pretraining_batches import PretrainingBatches, sentinel_range
from src.sources import read_articles
from src.span_corruption import SpanCorruptionError, corrupted_lengths, reconstruct, window_length
from src.tokenizer import TokenizedDocuments, encode_texts, train_tokenizer

SETTINGS = PretrainingSettings(max_steps=1, inputs_length=64, targets_length=20, rows_per_step=4, rows_per_micro_batch=4)
FINETUNING = FinetuningSettings(max_steps=1, inputs_length=64, targets_length=20, rows_per_step=4, rows_per_micro_batch=2)
VOCABULARY, FIRST_SENTINEL = 300, 299


class FixedVocabulary:
    """What the batches ask of a tokenizer, without one."""

    pad_token_id, eos_token_id, unk_token_id = 0, 1, 2

    def __init__(self, sentinels=100):
        self.sentinels = sentinels

    def convert_tokens_to_ids(self, token):
        number = int(re.fullmatch(r"<extra_id_(\d+)>", token)[1])
        return FIRST_SENTINEL - number if number < self.sentinels else self.unk_token_id


def documents(lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(3, FIRST_SENTINEL - 99, sum(lengths)).astype(np.uint16)
    return TokenizedDocuments(tokens, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


@pytest.fixture(scope="module")
def source():
    return PretrainingBatches(documents([5, 90, 200, 30, 64, 12, 150, 71, 2, 1, 33]), FixedVocabulary(), SETTINGS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [article.text for article in read_articles("sample", max_documents=300)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), 500)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=20), st.integers(0, 50))
def test_windows_cover_every_document_once(lengths, epoch):
    """A wrong cut drops or repeats news in every epoch and nothing else would tell; only a rest of one token is left out."""
    source = PretrainingBatches(documents(lengths), FixedVocabulary(), SETTINGS)
    document, start, length = source.windows(epoch)
    assert ((length >= 2) & (length <= source.window)).all()
    for number, total in enumerate(lengths):
        mine = document == number
        read = np.concatenate([np.arange(s, s + n) for s, n in zip(start[mine], length[mine], strict=True)] or [np.zeros(0)])
        lost = total - len(read)
        assert lost == (total % source.window == 1)
        assert len(np.unique(read)) == len(read)


def test_cuts_move_from_epoch_to_epoch():
    """Fixed cuts would show the model the same beginnings for ever."""
    source = PretrainingBatches(documents([400] * 20), FixedVocabulary(), SETTINGS)
    assert source.windows(0)[1].tolist() != source.windows(1)[1].tolist()


def test_an_epoch_holds_every_token(source):
    """From packed rows back to the documents: sentinels filled in, segments taken apart."""
    epoch = source.epoch(3)
    document, start, length = source.windows(3)
    for row in range(epoch.num_rows):
        batch = epoch.batch(row, row + 1)
        for segment, window in enumerate(epoch.rows_example_ids(row, row + 1), 1):
            inputs = batch["input_ids"][0][batch["encoder_segment_ids"][0] == segment].numpy()
            targets = batch["labels"][0][batch["decoder_segment_ids"][0] == segment].numpy()
            text = source.documents[int(document[window])][start[window] : start[window] + length[window]]
            np.testing.assert_array_equal(reconstruct(inputs, targets, FIRST_SENTINEL, 100), text)
    assert sorted(epoch.rows_example_ids(0, epoch.num_rows)) == list(range(len(document)))


def test_a_batch_is_a_pure_function_of_seed_epoch_and_place(source):
    """Resuming mid-epoch, several processes and out-of-memory retries all ask for batches out of order."""
    epoch = source.epoch(1)
    backwards = [epoch[index] for index in reversed(range(len(epoch)))][::-1]
    again = PretrainingBatches(source.documents, FixedVocabulary(), SETTINGS).epoch(1)
    for index in range(len(epoch)):
        assert_same(backwards[index], again[index])
    halves = [epoch.batch(0, 2), epoch.batch(2, 4)]
    assert_same(epoch.batch(0, 4), {key: torch.cat([half[key] for half in halves]) for key in halves[0]})
    others = [source.epoch(2), PretrainingBatches(source.documents, FixedVocabulary(), replace(SETTINGS, seed=1)).epoch(1)]
    for other in others:
        assert not torch.equal(other.batch(0, 1)["input_ids"], epoch.batch(0, 1)["input_ids"])


def test_concatenated_rows_are_one_example_each(source):
    """The comparison must really mix documents, with an eos between them, and hide nothing from attention."""
    mixed = PretrainingBatches(source.documents, FixedVocabulary(), replace(SETTINGS, packing="concatenate")).epoch(0)
    batch = mixed.batch(0, mixed.num_rows)
    assert (batch["encoder_segment_ids"] == 1).all()
    assert mixed.packing.input_efficiency == 1.0
    assert mixed.num_rows == (source.documents.lengths + 1).sum() // source.window


def test_counted_labels_are_those_of_the_batch(source, tokenizer):
    """The loss of a global batch is divided by this count, made from lengths alone; a wrong one scales every gradient."""
    texts, labels = [f"Profit rose {'a lot ' * (number % 5)}" for number in range(40)], [number % 3 for number in range(40)]
    sources = [source, TextToTextBatches(texts, labels, tokenizer, FINETUNING), ClassificationBatches(texts, labels, tokenizer, FINETUNING)]
    for any_source in sources:
        epoch = any_source.epoch(0)
        assert epoch.num_rows > 2
        for start, stop in ((0, 1), (1, 3), (0, epoch.num_rows)):
            assert epoch.num_labels(start, stop) == int((epoch.batch(start, stop)["labels"] != -100).sum())


def test_classification_labels_follow_their_text(tokenizer):
    """A label in another segment's place trains the opposite of what was annotated."""
    texts, labels = [f"news {number} {'rose ' * (number % 4)}" for number in range(30)], [number % 3 for number in range(30)]
    epoch = ClassificationBatches(texts, labels, tokenizer, FINETUNING).epoch(0)
    seen = []
    for index, batch in enumerate(epoch):
        present = batch["labels"] != -100
        assert present.sum(1).tolist() == batch["encoder_segment_ids"].amax(1).tolist()
        places = present.nonzero().tolist()
        for (row, segment), example in zip(places, epoch.example_ids(index), strict=True):
            ids = batch["input_ids"][row][batch["encoder_segment_ids"][row] == segment + 1]
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == texts[example].strip()
            assert ids[-1] == tokenizer.eos_token_id
            assert batch["labels"][row, segment] == labels[example]
            seen.append(example)
    assert sorted(seen) == list(range(30))


def test_text_to_text_writes_prefix_and_label_word(tokenizer):
    """Without the prefix, or with labels in another order, the task is another one."""
    epoch = TextToTextBatches(["Profit rose", "Loss <extra_id_0> </s> grew"], [2, 0], tokenizer, FINETUNING, shuffle=False).epoch(0)
    batch, ids = epoch.batch(0, 1), epoch.rows_example_ids(0, 1)
    for segment, example in enumerate(ids, 1):
        inputs = batch["input_ids"][0][batch["encoder_segment_ids"][0] == segment]
        target = batch["labels"][0][batch["decoder_segment_ids"][0] == segment]
        assert tokenizer.decode(inputs, skip_special_tokens=True).startswith("sentiment: ")
        assert tokenizer.decode(target, skip_special_tokens=True) == ("bullish", "bearish")[example]
        assert (inputs == tokenizer.eos_token_id).sum() == 1
        assert (inputs < sentinel_range(tokenizer)[0] - 99).all()


def test_a_long_labelled_text_is_cut_before_its_eos(tokenizer):
    """One long tweet would otherwise stop fine-tuning; the model has only seen texts that end in eos."""
    batch = ClassificationBatches(["Profit rose " * 100], [0], tokenizer, FINETUNING).epoch(0).batch(0, 1)
    assert batch["input_ids"].shape == (1, 64)
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id


@torch.no_grad()
def test_validation_losses_are_of_the_labels_they_name(tokenizer):
    """Sentinels are easy to predict: counted where they should not be, a model looks better than it is."""
    articles = encode_texts(tokenizer, [article.text for article in read_articles("sample", max_documents=12)])
    documents = TokenizedDocuments(np.concatenate(articles).astype(np.uint16), np.cumsum([0, *map(len, articles)]))
    source = PretrainingBatches(documents, tokenizer, SETTINGS)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    every, plain, text, words = [], [], [], 0
    batch = source.epoch(0).batch(0, 5)
    probabilities = model(**{key: values for key, values in batch.items() if key != "labels"}).logits.softmax(-1)
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            if label == -100:
                continue
            nats, piece = -math.log(probabilities[row, place, label]), tokenizer.convert_ids_to_tokens(label)
            every.append(nats)
            if not piece.startswith("<extra_id_"):
                plain.append(nats)
                if piece != "</s>":
                    text.append(nats)
                    words += piece.startswith("▁")
    found = SpanCorruptionEvaluation(source, tokenizer, 5)(model)
    assert found == pytest.approx(
        {
            "validation_loss": np.mean(every),
            "validation_loss_without_sentinels": np.mean(plain),
            "validation_bits_per_word": sum(text) / words / math.log(2),
        },
        rel=1e-5,
    )


def test_too_few_sentinels_and_no_text():
    """Both would otherwise surface as a wrong id or an empty loop deep inside a run."""
    with pytest.raises(SpanCorruptionError, match="2 sentinels: lower inputs_length"):
        PretrainingBatches(documents([100]), FixedVocabulary(sentinels=2), SETTINGS)
    with pytest.raises(PackingError, match="hold no text to mask"):
        PretrainingBatches(documents([1, 0]), FixedVocabulary(), SETTINGS).epoch(0)


@pytest.fixture(scope="module")
def models():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_decoder_layers=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = StockT5(config).eval()
    ours = T5ForConditionalGeneration(config).eval()
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def test_packed_examples_are_as_if_alone(source, models):
    """Contamination: packed logits and the batch's loss equal stock T5's on each example alone."""
    ours, stock = models
    epoch = source.epoch(0)
    row = int(np.diff(epoch.packing.row_offsets).argmax())
    batch = epoch.batch(row, row + 1)
    with torch.no_grad():
        packed = ours(**batch)
        total, count = 0.0, 0
        for segment in range(1, int(batch["encoder_segment_ids"].max()) + 1):
            inputs = batch["input_ids"][batch["encoder_segment_ids"] == segment][None]
            labels = batch["labels"][batch["decoder_segment_ids"] == segment][None]
            alone = stock(input_ids=inputs, labels=labels)
            in_row = packed.logits[batch["decoder_segment_ids"] == segment]
            torch.testing.assert_close(in_row, alone.logits[0], atol=1e-5, rtol=1e-5)
            total, count = total + alone.loss.item() * labels.numel(), count + labels.numel()
    assert segment > 1
    assert packed.loss.item() == pytest.approx(total / count, abs=1e-5)


@pytest.fixture(scope="module")
def data_dir():
    folder = os.environ.get("NEWS_DATA_DIR")
    if not folder:
        pytest.skip("NEWS_DATA_DIR is not set: the efficiency on real text is not checked")
    return Path(folder)


def words_and_marks(text):
    """About the number of subword pieces of a text, enough for its packing."""
    return round(1.15 * len(re.findall(r"\w+|[^\w\s]", text)))


def test_efficiency_on_real_articles(data_dir):
    """Real articles fill at least 99.5 % of the encoder with the default lengths."""
    import pyarrow.parquet as pq

    folder = data_dir / "reuters_financial_news"
    articles = pq.read_table(sorted(folder.glob("*.parquet"))[0], columns=["Article"]).column(0).to_pylist()
    lengths = np.array([words_and_marks(article or "") for article in articles])
    defaults = PretrainingSettings(max_steps=1)
    noise = (defaults.noise_density, defaults.mean_noise_span_length)
    full, rest = np.divmod(lengths, window_length(defaults.inputs_length, defaults.targets_length, *noise))
    pieces = np.concatenate([np.full(full.sum(), 568), rest[rest >= 2]])
    packing = best_fit_pack(*corrupted_lengths(pieces, *noise), defaults.inputs_length, defaults.targets_length)
    assert packing.input_efficiency >= 0.995


def test_efficiency_on_real_sentences(data_dir, tokenizer):
    """Real labelled sentences fill at least 98 % of the encoder in fine-tuning."""
    path = data_dir / "financial_phrasebank" / "sentences_50agree.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    lengths = np.array([words_and_marks(text) for text in texts])
    packing = best_fit_pack(lengths, np.full(len(lengths), 3), 512, 114, np.random.default_rng(0))
    assert packing.input_efficiency >= 0.98
