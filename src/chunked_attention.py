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
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, rate: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention output like `query`, then what backward reads, empty unless `keep`.

    That is the attention weights (heads x rows, query_length, key_length), and query, key and value by head: they take the place of
    those given, which then nobody keeps.
    """
    q, k, v = (_by_head(states, heads) for states in (query, key, value))
    context, kept = torch.empty_like(q), q.new_empty((len(q) if keep else 0, q.shape[1], k.shape[1]))
    bias = None if bias is None else bias[0].to(q.dtype)
    for part in _chunks(heads, *query.shape[:2], key.shape[1]):
        terms = None if bias is None else bias[part.heads], None if mask is None else _of_rows(mask, part.rows)
        scores = _scores(q[part.all], k[part.all], *terms)
        weights = kept[part.all] if keep else torch.empty_like(scores)
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)  # torch.softmax(out=) would make it elsewhere and copy
        torch.bmm(_drop_(weights, rate) if rate else weights, v[part.all], out=context[part.all])
    by_head = (q, k, v) if keep else (states.new_empty(0) for states in (q, k, v))
    return _by_row(context.mul_(1 / (1 - rate)) if rate else context, heads), kept, *by_head


@chunked_attention.register_fake
def _(query, key, value, bias, mask, heads, rate, keep):
    count, width = heads * len(query), query.shape[2] // heads
    kept = query.new_empty((count if keep else 0, query.shape[1], key.shape[1]))
    by_head = (t.new_empty((count, t.shape[1], width) if keep else 0) for t in (query, key, value))
    return torch.empty_like(query), kept, *by_head


@torch.library.custom_op("market_news_t5::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    gradient: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, rate: float, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the bias (empty where there is none)."""
    d_context = _by_head(gradient.to(q.dtype), heads)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_bias = q.new_empty(_bias_shape(kept, heads, bias_dtype), dtype=bias_dtype)
    if rate:
        d_context.mul_(1 / (1 - rate))
    for part in _chunks(heads, *gradient.shape[:2], k.shape[1]):
        d_output, kept_weights = d_context[part.all], kept[part.all]
        weights, dropped, passed = _undrop(kept_weights) if rate else (kept_weights, kept_weights, None)
        torch.bmm(dropped.mT, d_output, out=d_v[part.all])
        d_weights = torch.bmm(d_output, v[part.all].mT)
        if rate:
            d_weights.view(passed.dtype).bitwise_and_(passed)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.bmm(d_scores, k[part.all], out=d_q[part.all])
        torch.bmm(d_scores.mT, q[part.all], out=d_k[part.all])
        if bias_dtype is not None:
            _add_over_rows(d_bias[0], d_scores, part)
    return *(_by_row(states, heads) for states in (d_q, d_k, d_v)), d_bias


@chunked_attention_backward.register_fake
def _(gradient, kept, q, k, v, heads, rate, bias_dtype):
    rows, width = len(q) // heads, heads * q.shape[2]
    by_row = (t.new_empty((rows, t.shape[1], width)) for t in (q, k, v))
    return *by_row, q.new_empty(_bias_shape(kept, heads, bias_dtype), dtype=bias_dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    bias, heads, rate = inputs[3], *inputs[5:7]
    ctx.set_materialize_grads(False)  # none ever comes for what is kept: zeros for it would be as large as all scores
    ctx.save_for_backward(*output[1:])
    ctx.options = heads, rate, None if bias is None else bias.dtype


def _backward(ctx, gradient, *_):
    *gradients, d_bias = chunked_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return *gradients, d_bias if ctx.options[-1] is not None else None, None, None, None, None


chunked_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _bias_shape(kept: Tensor, heads: int, dtype: torch.dtype | None) -> tuple[int, ...]:
    return (0,) if dtype is None else (1, heads, *kept.shape[1:])


class Chunk(NamedTuple):
    """Heads and rows that go through all steps together, and where they lie among all heads x rows."""

    heads: slice
    rows: slice
    all: slice


def _chunks(heads: int, rows: int, query_length: int, key_length: int) -> list[Chunk]:
    """All rows of a few heads at a time, or some rows of one: so a head's bias is read, and its gradient summed, for many rows at once."""
    rows_at_once = min(rows, max(1, CHUNK_SCORES // (query_length * key_length)))
    heads_at_once = max(1, CHUNK_SCORES // (query_length * key_length * rows_at_once))
    chunks = []
    for head in range(0, heads, heads_at_once):
        for row in range(0, rows, rows_at_once):
            last_head, last_row = min(head + heads_at_once, heads), min(row + rows_at_once, rows)
            whole = slice(head * rows + row, (last_head - 1) * rows + last_row)
            chunks.append(Chunk(slice(head, last_head), slice(row, last_row), whole))
    return chunks


def _by_head(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads x d_kv) to a copy of shape (heads x rows, length, d_kv)."""
    return split_heads(states, heads).transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _by_row(states: Tensor, heads: int) -> Tensor:
    """(heads x rows, length, d_kv) to contiguous (rows, length, heads x d_kv)."""
    return merge_heads(states.unflatten(0, (heads, -1)).transpose(0, 1))


def _of_rows(mask: Tensor, rows: slice) -> Tensor:
    """The mask of those rows: (1, rows or 1, query_length or 1, key_length)."""
    return (mask if len(mask) == 1 else mask[rows]).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Q K^T of (heads x rows, length, d_kv) with bias and mask added: (heads x rows, query_length, key_length)."""
    if bias is None:
        scores = torch.bmm(q, k.mT)
    else:  # the product adds itself to the bias: one pass less than the other way round
        scores = q.new_empty((len(q), q.shape[1], k.shape[1]))
        scores.view(len(bias), -1, *bias.shape[1:]).copy_(bias[:, None])
        scores.baddbmm_(q, k.mT)
    if mask is not None:
        scores.unflatten(0, (-1, mask.shape[1]) if mask.shape[1] > 1 else (1, -1)).add_(mask)
    return scores


def _add_over_rows(d_bias: Tensor, d_scores: Tensor, part: Chunk) -> None:
    """Add the sum over rows of (heads x rows, query_length, key_length) to those heads of (heads, query_length, key_length)."""
    by_head = d_scores.unflatten(0, (-1, part.rows.stop - part.rows.start))
    if part.rows.start == 0:  # the first of these heads, so what is there counts for nothing
        torch.sum(by_head, 1, out=d_bias[part.heads])
    else:
        d_bias[part.heads] += by_head.sum(1)


def _drop_(weights: Tensor, rate: float) -> Tensor:
    """The weights with zeros where dropped; there, `weights` themselves change their sign."""
    bits = weights.view(BITS[weights.dtype])
    drop = drop_bits(weights.shape, rate).to(bits.dtype)
    bits.add_(drop, alpha=torch.iinfo(bits.dtype).min)  # of a float seen as an integer, the sign bit alone
    return bits.bitwise_and(drop.sub_(1)).view(weights.dtype)


def _undrop(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_drop_` left: the weights without their sign, with zeros where dropped, and the bits that say where they were not."""
    bits = BITS[weights.dtype]
    passed = (weights.view(bits) >> torch.iinfo(bits).bits - 1).bitwise_not_()  # the shift copies the sign: all ones where dropped
    return weights.abs(), clear(weights, passed), passed
