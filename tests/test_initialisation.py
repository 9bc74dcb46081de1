"""First weights: counts by hand and what each part of them is there for, and the checkpoint that training goes on from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from src.initialisation import (
    CheckpointStart,
    InformedStart,
    InitialisationError,
    neighbour_counts,
    neighbourhood_vectors,
    positive_information,
)
from src.pretraining import model_config, new_model
from src.pretraining_batches import PretrainingBatches
from src.t5_layers import T5Attention
from src.tokenizer import MODEL_FILE, TokenizedDocuments
from tests import tiny_run

MODEL = replace(tiny_run.MODEL, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, dropout_rate=0.0)


def corpus(*texts):
    return TokenizedDocuments(np.concatenate(texts).astype(np.uint16), np.concatenate(([0], np.cumsum([len(text) for text in texts]))))


def random_corpus(seed=0, tokens=20_000):
    """Tokens 40 and 41 stand in the same places; the others follow each other in fixed pairs."""
    rng = np.random.default_rng(seed)
    firsts = rng.integers(3, 23, tokens // 2)
    text = np.stack([firsts, firsts + 20], axis=1).ravel()
    text[text == 40] = rng.choice([40, 41], (text == 40).sum())
    return corpus(text)


def drawn_model(seed=0, **changes):
    """With the weights that it is drawn with."""
    return new_model(model_config(replace(MODEL, **changes), tiny_run.FixedVocabulary()), seed)


def informed_model():
    model = drawn_model()
    InformedStart(random_corpus(), model.config, seed=0)(model)
    return model.eval()


def test_counts_and_information_by_hand():
    """2 3 2 4: pairs at one place 23, 32, 24 and at two 22, 34, which count half. Twice-counted or transposed, followers become
    predecessors. p(3 | 2) = 1 / 2.5; contexts 2, 3, 4 are seen 1.5, 1, 1.5 times, smoothed by the power .75."""
    counts = neighbour_counts(corpus([2, 3, 2, 4]), 6)
    expected = np.zeros((6, 6))
    expected[2, 3] = expected[3, 2] = expected[2, 4] = 1
    expected[2, 2] = expected[3, 4] = 0.5
    np.testing.assert_array_equal(counts.toarray(), expected)
    contexts = np.array([1.5, 1, 1.5]) ** 0.75
    of_2_3 = np.log((1 / 2.5) / (contexts[1] / contexts.sum()))
    information = positive_information(counts).toarray()
    np.testing.assert_allclose(information[2, 3], of_2_3, rtol=1e-6)
    assert information.min() == 0


def test_tokens_of_the_same_neighbourhood_are_close_and_others_are_not():
    """What the start is for: a wrong axis, or rows of the wrong token, gives vectors that say nothing about meaning."""
    vectors = neighbourhood_vectors(neighbour_counts(random_corpus(), 160), 32, seed=0)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    similarity = vectors @ vectors.T
    assert similarity[40, 41] > 0.9
    others = [token for token in range(3, 43) if token not in (40, 41)]
    assert similarity[40, others].max() < 0.5


def test_counting_takes_evenly_spaced_parts_of_a_large_corpus(monkeypatch):
    """Reading the first part only would know the first years of the news; reading all would take minutes and gigabytes."""
    monkeypatch.setattr("src.initialisation.MOST_TOKENS", 40)
    monkeypatch.setattr("src.initialisation.CHUNK", 10)
    counts = neighbour_counts(corpus(np.repeat([2, 3, 4, 5, 6, 7, 8, 9], 10)), 12)
    assert counts.diagonal().astype(int).tolist() == [0, 0, 13, 0, 13, 0, 13, 0, 13, 0, 0, 0]  # 9 pairs and 8 half ones of every other run


def test_unseen_tokens_keep_their_vectors_and_all_have_one_size():
    """Sentinels do not occur in the texts: a zero vector would make them all the same, a longer one would drown the others."""
    model, drawn = informed_model(), drawn_model()
    torch.testing.assert_close(model.shared.weight[120:], drawn.shared.weight[120:], rtol=0, atol=0)
    sizes = model.shared.weight.detach().square().mean(1).sqrt()
    torch.testing.assert_close(sizes[3:43], torch.ones(40))
    similarity = torch.cosine_similarity(model.shared.weight[40], model.shared.weight[3:43], dim=1)
    assert similarity.argsort(descending=True)[:2].tolist() == [37, 38]  # 40 itself and 41: each row is its token's
    assert model.lm_head.weight is model.shared.weight


def test_nearest_tokens_are_words_with_the_words_that_keep_their_company():
    """What the notebook shows people: an index into the wrong table would show them nonsense with confidence."""

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"▁word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in ids]

    start = InformedStart(random_corpus(), informed_model().config, seed=0)
    shown = start.nearest_tokens(Tokenizer(), tokens=200, nearest=1, every=1).set_index("token")["nearest"]
    assert shown["wordbo"] == "wordbp"  # tokens 40 and 41
    assert start.nearest_tokens(Tokenizer(), tokens=1, nearest=6)["nearest"].str.count(",").tolist() == [5]


def share_on_own_sentinel(model) -> float:
    """Of the cross-attention from sentinels in the first decoder layer, how much lies on the same sentinel of the source."""
    batch = PretrainingBatches(random_corpus(1), tiny_run.FixedVocabulary(), tiny_run.SETTINGS).epoch(0)[0]
    seen = {}
    cross = model.decoder.block[0].layer[1].EncDecAttention
    hooks = [getattr(cross, name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out)) for name in ("q", "k")]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    query, key = (seen[name].unflatten(-1, (MODEL.num_heads, MODEL.d_kv)) for name in ("q", "k"))  # (rows, length, heads, d_kv)
    inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"], batch["decoder_segment_ids"])
    shares = []
    for row, (ids, sources) in enumerate(zip(inputs, batch["input_ids"], strict=True)):
        probabilities = torch.einsum("thd,shd->hts", query[row], key[row]).softmax(-1).mean(0)
        shares += [float(probabilities[at, sources == token].sum()) for at, token in enumerate(ids) if token >= 120]
    return float(np.mean(shares))


def checkpoint(folder, spiece=b"pieces", vocab_size=None, **changes):
    """A checkpoint of random weights with what stands for a tokenizer."""
    model = drawn_model(seed=1, **changes)
    if vocab_size:
        model.resize_token_embeddings(vocab_size)
    model.save_pretrained(folder)
    (folder / MODEL_FILE).write_bytes(spiece)
    return model


def test_a_checkpoint_is_gone_on_from_as_it_is(tmp_path):
    """Weights left out, or put in the wrong place, would be trained anew without a word."""
    earlier = checkpoint(tmp_path)
    model = drawn_model()
    CheckpointStart(tmp_path, tmp_path, model.config)(model)
    for (name, ours), theirs in zip(model.named_parameters(), earlier.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert model.lm_head.weight is model.shared.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spiece": b"other pieces"}, "has another tokenizer than the dataset: set corpus.tokenizer=.* and run notebook 1"),
        ({"num_layers": 3}, "has num_layers 3, not 2: set model.num_layers=3"),
        ({"feed_forward_proj": "gated-gelu"}, "has feed_forward_proj gated-gelu, not relu"),
        ({"vocab_size": 192}, "has a vocabulary of 192 rows for the 160 tokens of its tokenizer: save it with resize_token_embeddings"),
        (None, "config.json is missing: pretraining.initialisation takes a checkpoint and its tokenizer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    """With other pieces behind the ids the loss starts worse than at random; other widths fail late, in the words of PyTorch."""
    for name in ("earlier", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / MODEL_FILE).write_bytes(b"pieces")
    if change is not None:
        checkpoint(tmp_path / "earlier", **change)
    config = drawn_model().config
    with pytest.raises(InitialisationError, match=message):
        CheckpointStart(tmp_path / "earlier", tmp_path / "tokenizer", config)


def test_sentinels_of_the_decoder_find_theirs_in_the_encoder():
    """Without this the decoder averages the whole source for its first thousand steps."""
    assert share_on_own_sentinel(drawn_model()) < 0.1
    assert share_on_own_sentinel(informed_model()) > 0.3


def test_nearer_tokens_weigh_more_on_both_sides():
    """A sign or a bucket taken wrongly makes a head look away from its neighbours, or to one side only."""
    model = informed_model()
    attentions = {module for module in model.modules() if isinstance(module, T5Attention) and hasattr(module, "relative_attention_bias")}
    assert len(attentions) == 2
    for stack, distances in ((model.encoder, range(-9, 10)), (model.decoder, range(-9, 1))):
        bias = stack._bias(9, 1, None)[0, :, 0] if stack.config.is_decoder else stack._bias(0, 19, None)[0, :, 9]
        near = torch.tensor([-abs(distance) for distance in distances]).argsort(descending=True, stable=True)
        assert (bias[:, near].diff(dim=-1) <= 1e-6).all()
        assert (bias[0].max() - bias[0].min()) > 4 * (bias[-1].max() - bias[-1].min()) > 0
