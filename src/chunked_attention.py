"""Attention for CPUs: the plain formula in chunks that stay in the processor's cache.

A learned bias rules out the framework's fused CPU kernels, and the plain formula moves every score through main memory a dozen
times. Here a head or a few at a time go through all steps before the next ones do; only the attention weights are kept, with the
dropout mask in their sign. `src.attention.plain_attention` is the reference that a test holds this equal to.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from src.attention import split_heads
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
    context, kept = torch.empty_like(query), q.new_empty((len(q) if keep else 0, q.shape[1], k.shape[1]))
    bias = None if bias is None else bias[0].to(q.dtype)
    chunks = _chunks(heads, *query.shape[:2], key.shape[1])
    for part, q_part, k_part, v_part, kept_part in _split(chunks, q, k.mT, v, kept if keep else None):
        weights = q.new_empty((len(q_part), q.shape[1], k.shape[1])) if kept_part is None else kept_part
        terms = None if bias is None else bias[part.heads], None if mask is None else _of_rows(mask, part.rows)
        _write_scores(weights, q_part, k_part, *terms)
        # In place, for a second buffer would push the first out of the cache; torch.softmax(out=) would make it elsewhere and copy.
        torch.ops.aten._softmax.out(weights, -1, False, out=weights)
        _write_product(context, part, _drop_(weights, rate) if rate else weights, v_part, heads)
    by_head = (q, k, v) if keep else (states.new_empty(0) for states in (q, k, v))
    return context.mul_(1 / (1 - rate)) if rate else context, kept, *by_head


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
    d_query, d_key, d_value = (q.new_empty(_shape_by_row(states, heads)) for states in (q, k, v))
    d_bias = q.new_empty(_bias_shape(kept, heads, bias_dtype), dtype=bias_dtype)
    if rate:
        d_context.mul_(1 / (1 - rate))
    chunks = _chunks(heads, *gradient.shape[:2], k.shape[1])
    for part, kept_part, q_part, k_part, v_part, d_output in _split(chunks, kept, q, k, v.mT, d_context):
        weights, dropped, passed = _undrop(kept_part) if rate else (kept_part, kept_part, None)
        _write_product(d_value, part, dropped.mT, d_output, heads)
        d_weights = torch.bmm(d_output, v_part)
        if rate:
            d_weights.view(passed.dtype).bitwise_and_(passed)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        _write_product(d_query, part, d_scores, k_part, heads)
        _write_product(d_key, part, d_scores.mT, q_part, heads)
        if bias_dtype is not None:
            _add_over_rows(d_bias[0], d_scores, part)
    return d_query, d_key, d_value, d_bias


@chunked_attention_backward.register_fake
def _(gradient, kept, q, k, v, heads, rate, bias_dtype):
    by_row = (q.new_empty(_shape_by_row(states, heads)) for states in (q, k, v))
    return *by_row, q.new_empty(_bias_shape(kept, heads, bias_dtype), dtype=bias_dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    bias, heads, rate = inputs[3], *inputs[5:7]
    ctx.set_materialize_grads(False)  # none ever comes for what is kept: zeros for it would be as large as all scores
    ctx.save_for_backward(*output[1:])
    ctx.options = heads, rate, None if bias is None else bias.dtype


def _backward(ctx, gradient, *_):
    heads, rate, bias_dtype = ctx.options
    bias_dtype = bias_dtype if ctx.needs_input_grad[3] else None  # with adapters the bias is frozen, and its sum a pass over all scores
    *gradients, d_bias = chunked_attention_backward(gradient, *ctx.saved_tensors, heads, rate, bias_dtype)
    return *gradients, None if bias_dtype is None else d_bias, None, None, None, None


chunked_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _bias_shape(kept: Tensor, heads: int, dtype: torch.dtype | None) -> tuple[int, ...]:
    return (0,) if dtype is None else (1, heads, *kept.shape[1:])


class Chunk(NamedTuple):
    """Heads and rows that go through all steps together."""

    heads: slice
    rows: slice


def _chunks(heads: int, rows: int, query_length: int, key_length: int) -> list[Chunk]:
    """All rows of a few heads at a time, or some rows of one: so a head's bias is read, and its gradient summed, for many rows at once."""
    rows_at_once = min(rows, max(1, CHUNK_SCORES // (query_length * key_length)))
    heads_at_once = max(1, CHUNK_SCORES // (query_length * key_length * rows_at_once))
    return [
        Chunk(slice(head, min(head + heads_at_once, heads)), slice(row, min(row + rows_at_once, rows)))
        for head in range(0, heads, heads_at_once)
        for row in range(0, rows, rows_at_once)
    ]


def _split(chunks: list[Chunk], *tensors: Tensor | None) -> Iterator[tuple]:
    """Each chunk with its part of every tensor (heads x rows, ...), or None for one that is None."""
    sizes = [(part.heads.stop - part.heads.start) * (part.rows.stop - part.rows.start) for part in chunks]
    return zip(chunks, *(repeat(None) if tensor is None else tensor.split(sizes) for tensor in tensors), strict=False)


def _by_head(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads x d_kv) to a copy of shape (heads x rows, length, d_kv)."""
    return split_heads(states, heads).transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _shape_by_row(states: Tensor, heads: int) -> tuple[int, ...]:
    """(rows, length, heads x d_kv) for (heads x rows, length, d_kv)."""
    return len(states) // heads, states.shape[1], heads * states.shape[2]


def _write_product(result: Tensor, part: Chunk, left: Tensor, right: Tensor, heads: int) -> None:
    """The product of two (heads x rows, ...) tensors, into its place in (rows, length, heads x d_kv)."""
    place = split_heads(result, heads)[part.rows, part.heads]  # (rows, heads, length, d_kv)
    if place.shape[1] == 1:
        torch.bmm(left, right, out=place[:, 0])
    else:
        place.copy_(torch.bmm(left, right).unflatten(0, (-1, len(place))).transpose(0, 1))


def _of_rows(mask: Tensor, rows: slice) -> Tensor:
    """The mask of those rows: (1, rows or 1, query_length or 1, key_length)."""
    return (mask if len(mask) == 1 else mask[rows]).transpose(0, 1)


def _write_scores(scores: Tensor, q: Tensor, transposed_k: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Q K^T, of (heads x rows, length, d_kv) and its transpose, with bias and mask added, into (heads x rows, query_length, key_length)."""
    if bias is None:
        torch.bmm(q, transposed_k, out=scores)
        if mask is not None:
            scores.unflatten(0, (-1, mask.shape[1])).add_(mask)
        return
    by_head = scores.view(len(bias), -1, *scores.shape[1:])
    if mask is None:
        by_head.copy_(bias[:, None])
    else:  # expanded, because a sum of fewer rows would resize what it is written to
        torch.add(bias[:, None].expand_as(by_head), mask, out=by_head)
    scores.baddbmm_(q, transposed_k)  # the product adds itself to the bias: one pass less than the other way round


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
