"""Buckets, bias and masks by worked numbers, and the fast attention against the plain one, values and gradients."""

import pytest
import torch
from torch import nn

from src.attention import (
    SegmentError,
    additive,
    causal_mask,
    merge_heads,
    plain_attention,
    position_bias,
    relative_position_bucket,
    segment_mask,
    split_heads,
)
from src.dropout import clear, drop_bits, dropout, keep_bits, relu_dropout
from src.fast_attention import attention
from src.norm import rms_norm

HEADS, WIDTH = 4, 32


def test_buckets_are_the_table_of_the_docstring():
    """Breaks when a boundary between exact and logarithmic buckets moves: old checkpoints would read wrong biases."""
    distance = torch.tensor([-20, -16, -8, -4, -3, -2, -1, 0, 1, 2, 3, 4, 8, 16, 20])
    assert relative_position_bucket(distance, True, 8, 16).tolist() == [3, 3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7, 7]
    assert relative_position_bucket(distance, False, 8, 16).tolist() == [7, 7, 6, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_position_bias_is_the_table_at_each_distance(bidirectional):
    """Breaks when the lookup by distance misplaces a row, for a whole sequence or for later queries of a decoding step."""
    table = nn.Embedding(8, HEADS)
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    expected = table(relative_position_bucket(distance, bidirectional, 8, 16)).permute(2, 0, 1)[None]
    torch.testing.assert_close(position_bias(table, 0, 9, 9, bidirectional, 16), expected)
    torch.testing.assert_close(position_bias(table, 6, 2, 8, bidirectional, 16), expected[:, :, 6:8, :8])


def test_masks_by_hand():
    """Breaks when an example sees another, when padding sees text, or a token its future."""
    mask = segment_mask(torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 2, 0]]))
    assert mask.int().tolist() == [[[[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]]
    assert causal_mask(2, 3, torch.device("cpu")).int().tolist() == [[[[1, 1, 0], [1, 1, 1]]]]
    assert additive(torch.tensor([True, False]), torch.float32).tolist() == [0.0, torch.finfo(torch.float32).min / 2]
    assert additive(torch.ones(2, dtype=torch.bool), torch.float32) is None
    with pytest.raises(SegmentError, match="must be the same"):
        segment_mask(torch.ones(2, 3), torch.ones(1, 3))


def test_a_query_that_sees_no_key_is_finite_in_float16():
    """Padding of the decoder beside a full row of the encoder: what comes out is not used, but as NaN it would poison every gradient."""
    query, key = torch.full((1, 2, 8), -4.0).half(), torch.ones(1, 3, 8).half()  # scores of -32
    mask = additive(torch.tensor([[[[True, False, True], [False, False, False]]]]), torch.float16)
    assert attention(query, key, key, None, mask, 1).isfinite().all()
    assert plain_attention(query[:, None], key[:, None], key[:, None], None, mask).isfinite().all()


def inputs(rows: int, queries: int, keys: int, mask_rows: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows + queries)
    query, key, value = (torch.randn(rows, n, WIDTH, generator=generator, dtype=dtype).requires_grad_() for n in (queries, keys, keys))
    bias = torch.randn(1, HEADS, queries, keys, generator=generator, dtype=dtype).requires_grad_()
    mask = None
    if mask_rows:
        segments = [torch.randint(1, 4, (mask_rows, n), generator=generator).sort(dim=1).values for n in (queries, keys)]
        mask = additive(segment_mask(*segments), dtype)
    return (query, key, value, bias), mask


@pytest.mark.parametrize("masked", ["no row", "one row for all", "each row"])
@pytest.mark.parametrize(("rows", "queries", "keys", "at_once"), [(5, 7, 7, 2), (3, 1, 9, 3), (2, 40, 12, 4)])
def test_fast_attention_is_the_plain_one(monkeypatch, rows, queries, keys, at_once, masked):
    """Breaks when chunks (some rows of a head, a head, two heads) or the hand-written backward depart from the formula: float64 leaves no
    room for noise."""
    monkeypatch.setattr("src.chunked_attention.CHUNK_SCORES", at_once * queries * keys)
    tensors, mask = inputs(rows, queries, keys, {"no row": 0, "one row for all": 1, "each row": rows}[masked])
    found = attention(*tensors, mask, HEADS)
    expected = merge_heads(plain_attention(*(split_heads(t, HEADS) for t in tensors[:3]), tensors[3], mask))
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    for fast, plain in zip(torch.autograd.grad(found, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_attention_dropout_has_the_gradient_of_what_it_dropped(monkeypatch, dtype, error):
    """Breaks when backward reads the mask from the sign wrongly: the same mask, applied plainly, must give the same gradients."""
    rate, rows, length = 0.3, 2, 6
    tensors, mask = inputs(rows, length, length, rows, dtype)
    drop = drop_bits((HEADS, rows, length, length), rate)
    monkeypatch.setattr("src.chunked_attention.drop_bits", lambda shape, rate: drop.clone().view(shape))
    found = attention(*tensors, mask, HEADS, rate)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    q, k, v = (split_heads(t, HEADS) for t in exact[:3])
    weights = torch.softmax(q @ k.mT + exact[3] + mask.double().clamp(min=-1e30), dim=-1)
    expected = merge_heads((weights * (1 - drop.transpose(0, 1).double()) / (1 - rate)) @ v)
    assert (found - expected).abs().max() < 0.05
    assert (found - expected).norm() < error * expected.norm()
    for fast, plain in zip(torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (fast - plain).norm() < error * (plain.norm() + 0.05)


def test_a_frozen_bias_costs_no_pass_over_the_scores(monkeypatch):
    """Breaks when adapters, which freeze the bias, pay for a gradient that nobody asked for; the others stay the same."""
    *states, bias = inputs(2, 6, 6, 2, torch.float32)[0]
    expected = torch.autograd.grad(attention(*states, bias, None, HEADS, 0.0).sum(), states)
    monkeypatch.setattr("src.chunked_attention._add_over_rows", None)
    found = torch.autograd.grad(attention(*states, bias.detach(), None, HEADS, 0.0).sum(), states)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
def test_keep_bits_drop_at_the_rate(rate):
    """Breaks when the threshold is off: a wrong rate changes training without any error."""
    torch.manual_seed(0)
    keep = keep_bits((1000, 1001), rate)
    assert set(keep.unique().tolist()) == {-1, 0}
    dropped = (keep == 0).double()
    assert float(dropped.mean()) == pytest.approx(rate, abs=5 * (rate * (1 - rate) / dropped.numel()) ** 0.5 + 1e-5)
    torch.manual_seed(0)
    assert torch.equal(keep, keep_bits((1000, 1001), rate))
    assert not torch.equal(keep, keep_bits((1000, 1001), rate))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.01), (torch.float32, 1e-6)])
def test_dropout_values_and_gradients(dtype, error):
    """Breaks when kept elements are not scaled up, or a gradient passes a dropped or negative element."""
    torch.manual_seed(0)
    states = torch.randn(64, 64).to(dtype).requires_grad_()
    found = dropout(states, 0.25, True)
    kept = found != 0
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.04)
    torch.testing.assert_close(found[kept], (states * (1 / 0.75))[kept], atol=0, rtol=error)
    (gradient,) = torch.autograd.grad(found.sum(), states)
    torch.testing.assert_close(gradient, kept.to(dtype) * torch.tensor(1 / 0.75, dtype=dtype))
    hidden = relu_dropout(states * 1, 0.25, True)
    (gradient,) = torch.autograd.grad(hidden.sum(), states)
    assert torch.equal(gradient != 0, hidden > 0)
    assert not (hidden > 0)[states <= 0].any()
    torch.testing.assert_close(hidden[hidden > 0], (states * (1 / 0.75))[hidden > 0], atol=0, rtol=error)
    assert dropout(states, 0.25, False) is states
    assert torch.equal(clear(states, torch.zeros(64, 64, dtype=torch.int16)), torch.zeros_like(states))


def test_rms_norm_has_the_gradient_of_its_formula():
    """Breaks when the hand-written backward is wrong: finite differences in float64 decide."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, torch.float64), (states, weight))
    expected = weight * states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(states, weight, 1e-6, torch.float64), expected)
    with torch.no_grad():  # another way there
        torch.testing.assert_close(rms_norm(states, weight, 1e-6, torch.float64), expected)
