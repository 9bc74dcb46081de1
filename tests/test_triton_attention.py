"""The GPU kernel of packed attention against float64: compiled where there is a GPU, else in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch

from src.attention import SegmentMask, merge_heads, split_heads
from src.triton_attention import packed_attention

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter computes on NumPy arrays, which know no bf16.
TOLERANCES = {torch.float16: 3e-3, torch.bfloat16: 2e-2} if ON_GPU else {torch.float32: 2e-6, torch.float16: 3e-3}
BIAS, PLAIN = True, False
CASES = [(130, 130, False, BIAS, 16), (70, 70, True, BIAS, 32), (33, 150, False, PLAIN, 64)]  # queries, keys, causal, bias, d_kv


def segments_of(rows, length, padding, generator):
    """Rising segment ids with padding at the end, int64 (rows, length)."""
    ids = torch.randint(1, 4, (rows, length - padding), generator=generator).sort(dim=1).values
    return torch.nn.functional.pad(ids, (0, padding)).to(DEVICE)


def inputs_of(queries, keys, biased, d_kv, dtype, rows=2, heads=3):
    generator = torch.Generator().manual_seed(queries)
    tensors = [torch.randn(rows, n, heads * d_kv, generator=generator) for n in (queries, keys, keys)]
    tensors[0] *= d_kv**-0.5
    tensors = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]
    if biased:
        tensors.append(torch.randn(1, heads, queries, keys, generator=generator).to(DEVICE).requires_grad_())
    key_segments = segments_of(rows, keys, 7, generator)
    query_segments = key_segments if queries == keys else segments_of(rows, queries, 3, generator)
    upstream = torch.randn(rows, queries, heads * d_kv, generator=generator).to(DEVICE) * (query_segments > 0)[..., None]
    return tensors, query_segments, key_segments, upstream.to(dtype)


def expected_of(tensors, mask, heads, keep=1.0):
    """Attention in float64 and the float64 tensors it was computed from; `keep` multiplies the weights."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    q, k, v = (split_heads(tensor, heads) for tensor in exact[:3])
    scores = q @ k.mT + (exact[3] if len(exact) > 3 else 0)
    weights = torch.softmax(scores.masked_fill(~mask.matrix(), -1e300), dim=-1) * keep
    return merge_heads(weights @ v), exact


def error(found, expected):
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("queries", "keys", "causal", "biased", "d_kv"), CASES)
def test_output_and_gradients_are_those_of_float64(queries, keys, causal, biased, d_kv, dtype):
    """Breaks when a tile is skipped that should not be, a mask is off by one, or a gradient's kernel departs from the formula."""
    tensors, query_segments, key_segments, upstream = inputs_of(queries, keys, biased, d_kv, dtype)
    bias = tensors[3] if biased else None
    found = packed_attention(*tensors[:3], bias, query_segments, key_segments, causal, 3, 0.0)[0]
    expected, exact = expected_of(tensors, SegmentMask(query_segments, key_segments, causal), 3)
    real = (query_segments > 0)[..., None]
    assert error(found * real, expected * real) < TOLERANCES[dtype]
    gradients = torch.autograd.grad(found, tensors, upstream)
    for name, gradient, exact_gradient in zip("qkvb", gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=False):
        assert error(gradient, exact_gradient) < TOLERANCES[dtype], name
        assert gradient.dtype == (torch.float32 if name == "b" else dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_of_the_bias_is_summed_over_rows(monkeypatch, causal):
    """Breaks when a program that takes several rows, as in training, loses one; each row has a program of its own in a small test."""
    monkeypatch.setattr("src.triton_attention.BIAS_PROGRAMS", 1)
    dtype = next(iter(TOLERANCES))
    tensors, segments, _, upstream = inputs_of(128, 128, True, 16, dtype, rows=3)
    found = packed_attention(*tensors, segments, segments, causal, 3, 0.0)[0]
    expected, exact = expected_of(tensors, SegmentMask(segments, segments, causal), 3)
    (gradient,) = torch.autograd.grad(found, tensors[3], upstream)
    (exact_gradient,) = torch.autograd.grad(expected, exact[3], upstream.double())
    assert error(gradient, exact_gradient) < TOLERANCES[dtype]


def test_dropout_has_the_gradient_of_what_it_dropped():
    """Breaks when forward and backward draw different masks, or the rate is another: V = 1 shows which weights were kept."""
    rate, heads, length, dtype = 0.25, 2, 64, next(iter(TOLERANCES))
    tensors, segments, _, upstream = inputs_of(length, length, True, 64, dtype, heads=heads)
    with torch.no_grad():
        tensors[2].copy_(torch.eye(length).repeat(1, heads))
    torch.manual_seed(0)
    found = packed_attention(*tensors, segments, segments, False, heads, rate)[0]
    keep, visible = split_heads(found, heads) != 0, SegmentMask(segments, segments).matrix()
    assert float((keep & visible).sum() / (heads * visible.sum())) == pytest.approx(1 - rate, abs=0.03)
    expected, exact = expected_of(tensors, SegmentMask(segments, segments), heads, keep.double() / (1 - rate))
    for gradient, exact_gradient in zip(
        (found, *torch.autograd.grad(found, tensors, upstream)),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        strict=True,
    ):
        assert error(gradient, exact_gradient) < TOLERANCES[dtype]
    torch.manual_seed(0)
    assert torch.equal(found, packed_attention(*tensors, segments, segments, False, heads, rate)[0])
    assert not torch.equal(found, packed_attention(*tensors, segments, segments, False, heads, rate)[0])


def test_a_query_without_keys_gives_zero():
    """Breaks when a decoder's padding, beside an encoder row that is full, divides by zero: NaN would spread to every weight."""
    tensors, query_segments, key_segments, upstream = inputs_of(40, 70, False, 16, next(iter(TOLERANCES)))
    query_segments = query_segments.masked_fill(query_segments == 1, 9)  # a segment that no key belongs to
    found = packed_attention(*tensors, None, query_segments, key_segments, False, 3, 0.0)[0]
    assert (found[query_segments == 9] == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found, tensors, torch.ones_like(upstream)))
