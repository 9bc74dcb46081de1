"""Labelled sentences of the corpus: the right sentences, the right words taken out, mixed in without loss."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import pretraining_recipe
from src.config import PretrainingSettings
from src.distant_supervision import LONGEST, SHORTEST, DistantSupervisionError, LabelledSentences
from src.inspection import sentences_without_list_words
from src.labels import LABEL_IDS, LABELS, TASK_PREFIX
from src.pretraining_batches import PretrainingBatches
from src.profiles import settings_for
from src.sources import read_articles
from src.tokenizer import TokenizedDocuments, encode_texts, train_tokenizer
from src.word_list import polar_word_counts

SETTINGS = PretrainingSettings(
    max_steps=1, inputs_length=128, targets_length=40, rows_per_step=4, rows_per_micro_batch=4, labelled_share=0.15
)


@pytest.fixture(scope="module")
def texts():
    return [article.text for article in read_articles("sample", max_documents=400)]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return train_tokenizer([*texts, *["The group is no. 4."] * 100], tmp_path_factory.mktemp("tokenizer"), 600)


def tokenized(texts, tokenizer):
    ids = encode_texts(tokenizer, texts)
    return TokenizedDocuments(np.concatenate(ids).astype(np.uint16), np.cumsum([0, *map(len, ids)]))


@pytest.fixture(scope="module")
def sentences(texts, tokenizer):
    return LabelledSentences(tokenized(texts, tokenizer), tokenizer)


def test_sentences_of_a_worked_text(tokenizer):
    """Cuts at dots inside numbers and abbreviations, or across documents, would give halves of sentences the label of the whole."""
    documents = [
        "In Asia sales of the group rose 4.5 percent in March. The U.S. unit of the group was weak again in April! It met."
        " Its board will meet in June at No. 4",
        "Profit fell but sales rose at the group in the quarter. The group will meet its lenders on Monday at noon",
    ]
    found = LabelledSentences(tokenized(documents, tokenizer), tokenizer)
    whole = [tokenizer.decode(found.tokens[start : start + length]) for start, length in zip(found.starts, found.lengths, strict=True)]
    assert list(zip(whole, found.labels, strict=True)) == [  # without one that is too short and one both good and bad
        ("in asia sales of the group rose 4.5 percent in march.", LABEL_IDS["bullish"]),
        ("the u.s. unit of the group was weak again in april!", LABEL_IDS["bearish"]),
        ("its board will meet in june at no. 4", LABEL_IDS["neutral"]),
        ("the group will meet its lenders on monday at noon", LABEL_IDS["neutral"]),
    ]


@pytest.mark.parametrize(
    ("text", "label", "counts"),
    [
        ("Shares of the group were up 4 percent in Asia.", "bullish", [1, 0]),
        ("Shares of the group were down $3 in Asia.", "bearish", [0, 1]),
        ("The group has set up a unit in Asia.", "neutral", [0, 0]),  # most of what is up in the news is set up, or up to somebody
        ("A spokesman of the group declined to comment.", "neutral", [0, 0]),
        ("The shares of the group declined to 4 dollars.", "bearish", [0, 1]),
        ("Fuel costs rose 4 percent at the group in Asia.", "bearish", [0, 1]),
        ("The net loss narrowed to 4 dollars at the group in Asia.", "bullish", [1, 0]),
        ("The group in Asia made a net loss.", None, [0, 1]),  # may be stop-loss insurance: one such word alone says too little
        ("Profit of the group fell 3 percent as costs in Asia stayed.", "bearish", [0, 1]),
        ("The group met a profit from a net loss in Asia.", None, [0, 0]),
        ("Interest rates rose again in Asia in March.", None, [0, 0]),
        ("Economic growth slowed to 4 percent in Asia.", "bearish", [0, 1]),
        ("The group has asked a lower court in Asia.", None, [0, 1]),
        ("Rivals at the group fear that it lost sales in Asia.", "bearish", [0, 2]),  # two such words say enough
    ],
)
def test_what_rises_says_whether_it_is_good_news(tokenizer, text, label, counts):
    """Rising costs and a smaller loss had the wrong label, and every spokesman who declined to comment was bad news."""
    found = LabelledSentences(tokenized([text], tokenizer), tokenizer)
    assert [LABELS[label] for label in found.labels] == ([label] if label else [])
    assert polar_word_counts([text]).tolist() == [counts]


def test_labels_are_those_of_the_words_in_the_text(sentences, tokenizer):
    """Words are put together from pieces here; a regular expression on the decoded text must find the same ones."""
    spans = [sentences.tokens[start : start + length] for start, length in zip(sentences.starts, sentences.lengths, strict=True)]
    assert all(SHORTEST <= len(span) <= LONGEST for span in spans)
    bullish, bearish = polar_word_counts(tokenizer.batch_decode(spans)).T
    np.testing.assert_array_equal(sentences.labels, np.sign(bullish - bearish) + 1)
    assert not ((bullish == bearish) & (bullish > 0)).any()


def test_what_is_taken_out(sentences, tokenizer):
    """A word that stays in part gives the label away; a neighbour that goes with it takes the reason along."""
    pairs = sentences.draw(20_000, np.random.default_rng(1))
    everything = replace(pairs, removed=np.ones_like(pairs.removed))
    frame = everything.frame(tokenizer)
    assert polar_word_counts(frame["text"]).sum() == 0
    words = frame.map(lambda value: len(str(value).split()))  # punctuation behind a word stays
    assert ((words["whole"] - words["text"]).to_numpy() <= np.diff(sentences.word_offsets)[pairs.chosen]).all()
    nothing = replace(pairs, removed=np.zeros_like(pairs.removed)).frame(tokenizer)
    assert nothing["text"].tolist() == nothing["whole"].tolist()


def test_pairs_are_as_long_as_they_say_and_hold_prefix_and_label(sentences, tokenizer):
    """Rows are planned from these lengths: one that is wrong overflows a row in the middle of a run."""
    pairs = sentences.draw(20_000, np.random.default_rng(2))
    read = [pairs[index] for index in range(len(pairs))]
    np.testing.assert_array_equal(pairs.lengths, np.transpose([[len(inputs), len(targets)] for inputs, targets in read]))
    written = tokenizer.batch_decode([targets for _, targets in read], skip_special_tokens=True)
    assert written == [LABELS[label] for label in pairs.frame(tokenizer)["label"]]
    for (inputs, _), text in zip(read, pairs.frame(tokenizer)["text"], strict=True):
        assert tokenizer.decode(inputs) == f"{TASK_PREFIX}{text}{tokenizer.eos_token}"


def test_draws_are_even_and_bounded(sentences):
    """Labels as frequent as the words of the list would teach that most news is neutral."""
    pairs = sentences.draw(3_000, np.random.default_rng(3))
    counts = np.bincount(sentences.labels[pairs.chosen])
    assert len(set(counts)) == 1
    assert len(set(pairs.chosen)) == len(pairs)
    assert pairs.lengths[0].sum() == pytest.approx(3_000, rel=0.1)
    rarest = np.bincount(sentences.labels).min()
    assert len(sentences.draw(10**9, np.random.default_rng(3))) == 3 * rarest


def test_a_corpus_without_bad_news(tokenizer):
    """An epoch of fewer labels than three would teach the model to write the others everywhere."""
    documents = tokenized(
        ["Sales of the group in Asia rose again in the third quarter. The group will meet its lenders on Monday at noon."], tokenizer
    )
    with pytest.raises(DistantSupervisionError, match="no bearish sentence in the corpus: set "):
        LabelledSentences(documents, tokenizer).draw(100, np.random.default_rng(0))


def test_rows_too_short_for_a_sentence_are_refused_at_once(sentences, texts, tokenizer):
    """The longest sentences are few: a run would stop in the epoch that draws the first of them."""
    for name, length in (("inputs_length", 80), ("targets_length", max(map(len, sentences.label_words)) - 1)):
        settings = replace(SETTINGS, **{name: length})
        with pytest.raises(DistantSupervisionError, match=f"pretraining.{name} is {length}, and a labelled sentence may need"):
            PretrainingBatches(tokenized(texts, tokenizer), tokenizer, settings, sentences=sentences)


def test_a_validation_part_without_some_label_is_no_reason_to_stop(tokenizer):
    """A few articles of one's own hold no bad news in the twentieth that is held out, and the model is trained by then."""
    one = tokenized(["Sales of the group in Asia rose again in the third quarter."], tokenizer)
    with pytest.warns(UserWarning, match="no bearish sentence in the corpus, so the check of labels is left out"):
        assert sentences_without_list_words(one, tokenizer) is None


def test_the_recipe_benchmark_takes_a_profile_with_a_second_task(texts, tokenizer):
    """Its baseline is the paper's, which has none; its default learns what the training loop would."""
    settings = settings_for("sample")
    assert settings.pretraining.labelled_share > 0
    settings = replace(settings, pretraining=replace(settings.pretraining, initialisation="t5"))
    documents = tokenized(texts, tokenizer)
    corpus = pretraining_recipe.Corpus(tokenizer, None, documents, documents)
    baseline = pretraining_recipe.paper_recipe("baseline", settings, corpus)
    default = pretraining_recipe.own_recipe("default", settings, corpus)
    assert baseline.source.sentences is None
    assert default.source.sentences is not None


def test_the_mixture_loses_nothing(sentences, texts, tokenizer):
    """Windows are still all there, sentences make up their share, and an epoch can be planned again anywhere."""
    documents = tokenized(texts, tokenizer)
    source = PretrainingBatches(documents, tokenizer, SETTINGS, sentences=sentences)
    windows = len(source.windows(1)[0])
    epoch, again, alone = source.epoch(1), source.epoch(1), PretrainingBatches(documents, tokenizer, SETTINGS).epoch(1)
    pairs = source.labelled_pairs(1, alone.packing.input_tokens)
    assert sorted(epoch.rows_example_ids(0, epoch.num_rows)) == list(range(windows + len(pairs)))
    row = next(row for row in range(epoch.num_rows) if max(epoch.rows_example_ids(row, row + 1)) >= windows)
    for segment, example in enumerate(epoch.rows_example_ids(row, row + 1), 1):
        if example >= windows:
            batch = epoch.batch(row, row + 1)
            assert batch["input_ids"][batch["encoder_segment_ids"] == segment].tolist() == pairs[example - windows][0].tolist()
            assert batch["labels"][batch["decoder_segment_ids"] == segment].tolist() == pairs[example - windows][1].tolist()
    assert sorted(alone.rows_example_ids(0, alone.num_rows)) == list(range(windows))
    tokens = epoch.packing.input_tokens
    assert (tokens - alone.packing.input_tokens) / tokens == pytest.approx(SETTINGS.labelled_share, abs=0.02)
    middle = epoch.num_rows // 2
    for key, values in epoch.batch(middle, middle + 4).items():
        assert (values == again.batch(middle, middle + 4)[key]).all()
    assert source.labelled_pairs(2, 1000).chosen.tolist() != source.labelled_pairs(1, 1000).chosen.tolist()
