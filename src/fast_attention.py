"""Training-time attention: the plain formula in chunks that stay in the processor's cache, with its own backward.

A learned bias rules out the framework's fused CPU kernels, and the plain formula moves every score through main memory a dozen
times. Here a few rows at a time go through all steps before the next rows do; only the attention weights are kept, with the
dropout mask in their sign. `src.attention.plain_attention` is the reference that a test holds this equal to.
"""

import torch
from torch import Tensor, nn

from src.attention import merge_heads, plain_attention, split_heads
from src.dropout import clear, is_fast, keep_bits

CHUNK_SCORES = 2 << 20  # scores that go through all steps at once: 4 MB in 16 bit
SIGN_BIT = -(1 << 15)  # of a 16-bit float seen as an integer


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, rate: float = 0.0) -> Tensor:
    """softmax(Q K^T + bias + mask) V with the fastest way for the device.

    Args:
        query: (batch, query_length, heads x d_kv).
        key, value: (batch, key_length, heads x d_kv).
        bias: learned, (1, heads, query_length, key_length), or None.
        mask: additive, (batch or 1, 1, query_length or 1, key_length), or None.
        heads: number of heads.
        rate: dropout rate of the attention weights.

    Returns:
        (batch, query_length, heads x d_kv).
    """
    if query.device.type == "cpu" and (rate == 0 or is_fast(query)):
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
        return _ChunkedAttention.apply(query, key, value, bias, mask, heads, rate, keep)
    q, k, v = (split_heads(states, heads) for states in (query, key, value))
    if query.device.type == "cpu":
        return merge_heads(plain_attention(q, k, v, bias, mask, rate))
    terms = [term.to(q.dtype) for term in (bias, mask) if term is not None]
    added = sum(terms).expand(len(q), heads, q.shape[2], k.shape[2]) if terms else None
    return merge_heads(nn.functional.scaled_dot_product_attention(q, k, v, added, rate, scale=1.0))


class _ChunkedAttention(torch.autograd.Function):
    """Forward keeps the weights of each chunk; backward walks the chunks again."""

    @staticmethod
    def forward(ctx, query, key, value, bias, mask, heads: int, rate: float, keep_weights: bool) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            chunk, kept = max(1, CHUNK_SCORES // (heads * query.shape[1] * key.shape[1])), []
            output = torch.empty_like(query)
            small_bias = None if bias is None else bias.to(query.dtype)
            for rows in _slices(len(query), chunk):
                q, k, v = (_by_head(states[rows], heads) for states in (query, key, value))
                weights = _softmax_scores(q, k, small_bias, mask if mask is None or len(mask) == 1 else mask[rows], heads)
                weights, dropped = _drop(weights, rate) if rate else (weights, weights)
                context = torch.bmm(dropped, v)
                output[rows] = _by_row(context.mul_(1 / (1 - rate)) if rate else context, heads)
                kept.append(weights if keep_weights else None)
        if keep_weights:
            ctx.save_for_backward(query, key, value, *kept)
        ctx.options = heads, rate, chunk, None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, *kept = ctx.saved_tensors
        heads, rate, chunk, bias_dtype = ctx.options
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        d_bias = None if bias_dtype is None else query.new_zeros((1, heads, query.shape[1], key.shape[1]), dtype=bias_dtype)
        for rows, weights in zip(_slices(len(query), chunk), kept, strict=True):
            q, k, v = (_by_head(states[rows], heads) for states in (query, key, value))
            d_output = _by_head(gradient[rows].to(query.dtype), heads)
            d_weights, d_v, weights = _through_values(d_output, weights, v, rate)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[rows], d_key[rows] = _by_row(torch.bmm(d_scores, k), heads), _by_row(torch.bmm(d_scores.mT, q), heads)
            d_value[rows] = _by_row(d_v, heads)
            if d_bias is not None:
                for one in d_scores.unflatten(0, (-1, heads)):
                    d_bias[0].add_(one)
        return d_query, d_key, d_value, d_bias, None, None, None, None


def _slices(total: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, total, step)]


def _by_head(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads x d_kv) to contiguous (rows x heads, length, d_kv)."""
    return split_heads(states, heads).flatten(0, 1).contiguous()


def _by_row(states: Tensor, heads: int) -> Tensor:
    """(rows x heads, length, d_kv) to (rows, length, heads x d_kv)."""
    return merge_heads(states.unflatten(0, (-1, heads)))


def _softmax_scores(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int) -> Tensor:
    """Attention weights, (rows x heads, query_length, key_length)."""
    scores = torch.bmm(q, k.mT)
    by_row = scores.unflatten(0, (-1, heads))
    for term in (bias, mask):
        if term is not None:
            by_row += term
    return torch.softmax(scores, dim=-1)


def _drop(weights: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """(weights with the sign set where dropped, weights with zeros there)."""
    keep = keep_bits(weights.shape, rate)
    signed = weights.view(torch.int16) | (~keep & SIGN_BIT)
    return signed.view(weights.dtype), clear(weights, keep)


def _through_values(d_output: Tensor, weights: Tensor, v: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weights and of V, and the weights without their sign; `weights` are what `_drop` returned."""
    if rate == 0:
        return torch.bmm(d_output, v.mT), torch.bmm(weights.mT, d_output), weights
    d_output = d_output * (1 / (1 - rate))
    keep = ~(weights.view(torch.int16) >> 15)  # the shift copies the sign: all ones where dropped
    weights = weights.abs()
    return clear(torch.bmm(d_output, v.mT), keep), torch.bmm(clear(weights, keep).mT, d_output), weights
