"""Attention for CPUs: the plain formula in chunks that stay in the processor's cache.

A learned bias rules out the framework's fused CPU kernels, and the plain formula moves every score through main memory a dozen
times. Here a head or a few at a time go through all steps before the next ones do; only the attention weights are kept, with the
dropout mask in their sign. `src.attention.plain_attention` is the reference that a test holds this equal to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from src.attention import merge_heads, split_heads
from src.dropout import BITS, clear, drop_bits

CHUNK_SCORES = 2 << 20  # scores that go through all steps at once: 4 MB in 16 bit


# Operators of their own, because a compiler that looked inside would unroll the chunks of every layer.
@torch.library.custom_op("market_news_t5::chunked_attention", mutates_args=())
def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, rate: float, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """(attention output like `query`, attention weights (heads x rows, query_length, key_length) or, unless they are kept, nothing)."""
    kept = query.new_empty(_kept_shape(query, key, heads, keep_weights))
    q, k, v = (_by_head(states, heads) for states in (query, key, value))
    context, bias = torch.empty_like(q), None if bias is None else bias[0].to(q.dtype)
    for part in _chunks(query, key, heads):
        terms = None if bias is None else bias[part.heads], None if mask is None else _of_rows(mask, part.rows)
        scores = _scores(q[part], k[part], *terms)
        weights = _of_chunk(kept, heads, part) if keep_weights else torch.empty_like(scores)
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)  # torch.softmax(out=) would make it elsewhere and copy
        torch.bmm(_drop_(weights, rate) if rate else weights, v[part].flatten(0, 1), out=context[part].flatten(0, 1))
    return _by_row(context.mul_(1 / (1 - rate)) if rate else context), kept


@chunked_attention.register_fake
def _(query, key, value, bias, mask, heads, rate, keep_weights):
    return torch.empty_like(query), query.new_empty(_kept_shape(query, key, heads, keep_weights))


@torch.library.custom_op("market_news_t5::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, heads: int, rate: float, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the bias (empty where there is none)."""
    q, k, v, d_context = (_by_head(states.to(query.dtype), heads) for states in (query, key, value, gradient))
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_bias = query.new_zeros(_bias_shape(query, key, heads, bias_dtype), dtype=bias_dtype)
    if rate:
        d_context = d_context * (1 / (1 - rate))
    for part in _chunks(query, key, heads):
        d_output, kept_weights = d_context[part].flatten(0, 1), _of_chunk(kept, heads, part)
        weights, dropped, keep = _undrop(kept_weights) if rate else (kept_weights, kept_weights, None)
        torch.bmm(dropped.mT, d_output, out=d_v[part].flatten(0, 1))
        d_weights = torch.bmm(d_output, v[part].flatten(0, 1).mT)
        if rate:
            d_weights.view(keep.dtype).bitwise_and_(keep)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.bmm(d_scores, k[part].flatten(0, 1), out=d_q[part].flatten(0, 1))
        torch.bmm(d_scores.mT, q[part].flatten(0, 1), out=d_k[part].flatten(0, 1))
        if bias_dtype is not None:
            d_bias[0, part.heads] += d_scores.view(*q[part].shape[:3], -1).sum(1)
    return _by_row(d_q), _by_row(d_k), _by_row(d_v), d_bias


@chunked_attention_backward.register_fake
def _(gradient, query, key, value, kept, heads, rate, bias_dtype):
    d_bias = query.new_empty(_bias_shape(query, key, heads, bias_dtype), dtype=bias_dtype)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), d_bias


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, bias, _, heads, rate, _ = inputs
    ctx.set_materialize_grads(False)  # none ever comes for the kept weights: zeros for it would be as large as all scores
    ctx.save_for_backward(query, key, value, output[1])
    ctx.options = heads, rate, None if bias is None else bias.dtype


def _backward(ctx, gradient, _):
    *gradients, d_bias = chunked_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return *gradients, d_bias if ctx.options[-1] is not None else None, None, None, None, None


chunked_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _bias_shape(query: Tensor, key: Tensor, heads: int, dtype: torch.dtype | None) -> tuple[int, ...]:
    return (0,) if dtype is None else (1, heads, query.shape[1], key.shape[1])


def _kept_shape(query: Tensor, key: Tensor, heads: int, keep_weights: bool) -> tuple[int, ...]:
    return (heads * len(query) if keep_weights else 0, query.shape[1], key.shape[1])


class Chunk(NamedTuple):
    """Heads and rows that go through all steps together."""

    heads: slice
    rows: slice


def _chunks(query: Tensor, key: Tensor, heads: int) -> list[Chunk]:
    """All rows of a few heads at a time, or some rows of one: so a head's bias is read, and its gradient summed, for many rows at once."""
    scores = query.shape[1] * key.shape[1]  # of one head in one row
    rows_at_once = min(len(query), max(1, CHUNK_SCORES // scores))
    heads_at_once = max(1, CHUNK_SCORES // (scores * rows_at_once))
    return [
        Chunk(slice(head, min(head + heads_at_once, heads)), slice(row, min(row + rows_at_once, len(query))))
        for head in range(0, heads, heads_at_once)
        for row in range(0, len(query), rows_at_once)
    ]


def _by_head(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads x d_kv) to contiguous (heads, rows, length, d_kv)."""
    return split_heads(states, heads).transpose(0, 1).contiguous()


def _by_row(states: Tensor) -> Tensor:
    """(heads, rows, length, d_kv) to contiguous (rows, length, heads x d_kv)."""
    return merge_heads(states.transpose(0, 1))


def _of_chunk(kept: Tensor, heads: int, part: Chunk) -> Tensor:
    """The chunk's attention weights, a view: (heads x rows, query_length, key_length)."""
    return kept.unflatten(0, (heads, -1))[part].flatten(0, 1)


def _of_rows(mask: Tensor, rows: slice) -> Tensor:
    """The mask of those rows: (1, rows or 1, query_length or 1, key_length)."""
    return (mask if len(mask) == 1 else mask[rows]).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Q K^T of (heads, rows, length, d_kv) with bias and mask added: (heads x rows, query_length, key_length)."""
    shape = (*q.shape[:3], k.shape[2])
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    if bias is None:
        scores = torch.bmm(q, k.mT)
    else:  # the product adds itself to the bias: one pass less than the other way round
        scores = q.new_empty((len(q), *shape[2:]))
        scores.view(shape).copy_(bias[:, None])
        scores.baddbmm_(q, k.mT)
    if mask is not None:
        scores.view(shape).add_(mask)
    return scores


def _drop_(weights: Tensor, rate: float) -> Tensor:
    """The weights with zeros where dropped; there, `weights` themselves change their sign."""
    bits = weights.view(BITS[weights.dtype])
    drop = drop_bits(weights.shape, rate).to(bits.dtype)
    bits.add_(drop, alpha=torch.iinfo(bits.dtype).min)  # of a float seen as an integer, the sign bit alone
    return bits.bitwise_and(drop.sub_(1)).view(weights.dtype)


def _undrop(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_drop_` left: the weights without their sign, with zeros where dropped, and the bits that say where they were not."""
    bits = BITS[weights.dtype]
    keep = (weights.view(bits) >> torch.iinfo(bits).bits - 1).bitwise_not_()  # the shift copies the sign: all ones where dropped
    return weights.abs(), clear(weights, keep), keep
