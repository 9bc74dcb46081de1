"""Compiled blocks compute what the blocks compute, and leave the model as it was."""

import shutil

import pytest
import torch
from transformers import T5Config

from src.compilation import compiled_blocks, uncompiled
from src.dropout import dropout, relu_dropout
from src.modeling_t5 import T5ForConditionalGeneration


def loss_and_gradients(model, rows: int):
    generator = torch.Generator().manual_seed(rows)
    segments = torch.tensor([[1] * 7 + [2] * 4 + [0]]).expand(rows, -1)
    batch = {name: torch.randint(3, 60, (rows, 12), generator=generator) for name in ("input_ids", "labels")}
    model.zero_grad()
    loss = model.train()(**batch, encoder_segment_ids=segments, decoder_segment_ids=segments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_compiled_blocks_have_the_loss_and_gradients_of_the_blocks(feed_forward):
    """Breaks when the compiler's view of attention or norm differs from the code that runs uncompiled, or a batch of another size does."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=64, feed_forward_proj=feed_forward, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config)
    expected = {rows: loss_and_gradients(model, rows) for rows in (4, 3)}
    with compiled_blocks(model, wanted=True):
        assert all(block._compiled_call_impl is not None for block in (*model.encoder.block, *model.decoder.block))
        for rows, (loss, gradients) in expected.items():
            found = loss_and_gradients(model, rows)
            torch.testing.assert_close(found[0], loss)
            torch.testing.assert_close(found[1], gradients, atol=1e-6, rtol=1e-4)
        with uncompiled():
            torch.testing.assert_close(loss_and_gradients(model, 3)[0], expected[3][0])
    assert all(block._compiled_call_impl is None for block in (*model.encoder.block, *model.decoder.block))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_dropout_drops_each_time_anew_and_passes_the_gradient_of_what_it_kept():
    """Breaks when a compiler takes two masks of one shape for the same, or the hand-written backward departs from the forward."""

    def three(states):
        return dropout(states, 0.25, True), dropout(states, 0.25, True), relu_dropout(states, 0.25, True)

    generator = torch.Generator().manual_seed(0)
    states, *upstream = (torch.randn(100, 101, generator=generator).bfloat16() for _ in range(4))
    compiled = torch.compile(three, dynamic=True)
    torch.manual_seed(0)
    results = compiled(states.requires_grad_())
    expected = torch.zeros_like(states, dtype=torch.float32)
    for result, values, gradient in zip(results, (states, states, states.relu()), upstream, strict=True):
        kept = result != 0
        assert kept[states > 0].double().mean() == pytest.approx(0.75, abs=0.03)
        torch.testing.assert_close(result[kept], (values / 0.75)[kept], atol=0, rtol=0.01)
        expected += kept * gradient / 0.75
    assert not torch.equal(results[0] != 0, results[1] != 0)
    (gradient,) = torch.autograd.grad(results, states, upstream)
    torch.testing.assert_close(gradient.float(), expected, atol=0.02, rtol=0.02)
    torch.manual_seed(0)
    assert all(torch.equal(again, result) for again, result in zip(compiled(states), results, strict=True))


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch, capsys):
    """Breaks when a machine without a C++ compiler stops with the compiler's own error in the middle of a run."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, dropout_rate=0.0, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    with compiled_blocks(model, wanted=True):
        assert model.encoder.block[0]._compiled_call_impl is None
    assert "uncompiled" in capsys.readouterr().out
