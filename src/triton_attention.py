"""Attention of packed rows on a GPU: T5's learned bias and segment ids in one kernel, no score ever stored.

A learned bias rules out the framework's flash kernels, and its memory-efficient one wants bias and mask as one tensor of
(batch, heads, query_length, key_length), made, read, and differentiated in every layer. The kernels here (`src.triton_kernels`) read
both as they are. `src.attention.plain_attention` is the reference that a test holds this equal to.
"""

import torch
import triton
from torch import Tensor

from src.triton_kernels import backward_bias, backward_keys, backward_queries, forward

HEAD_WIDTHS = (16, 32, 64, 128)  # a tile holds whole heads, and its sides are powers of two
BLOCK = 64  # queries and keys of a tile
BIAS_PROGRAMS = 1024  # that share the work of the bias' gradient: several for each multiprocessor


# Operators of their own, so that a compiler takes them as they are.
@torch.library.custom_op("market_news_t5::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, query_segments: Tensor, key_segments: Tensor, causal: bool, heads: int,
    rate: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """softmax(Q K^T + bias) V between positions of one segment.

    Args:
        query: (batch, query_length, heads x d_kv), d_kv one of `HEAD_WIDTHS`.
        key, value: (batch, key_length, heads x d_kv).
        bias: learned, (1, heads, query_length, key_length), or None.
        query_segments, key_segments: integers (batch, query_length) and (batch, key_length), not negative; 0 meets 0.
        causal: queries and keys are the same positions, and a query does not see later keys.
        rate: dropout rate of the attention weights.

    Returns:
        The output, like `query`, zero where a query meets no key; log2 of the softmax's sums, float32 (batch, heads,
        query_length); and the seed that dropout drew, int64 (1,): both are for the backward pass.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = torch.empty_like(query)
    normaliser = query.new_empty((len(query), heads, query.shape[1]), dtype=torch.float32)
    seed = torch.randint(2**31 - 1, (1,), device=query.device) if rate else query.new_zeros(1, dtype=torch.int64)
    inputs = _kernel_inputs(query, key, value, bias, query_segments, key_segments)
    grid = (triton.cdiv(query.shape[1], BLOCK), len(query) * heads)
    forward[grid](
        *inputs, output, normaliser, query.shape[1], key.shape[1], heads, seed, rate, query.shape[2] // heads, bias is not None,
        causal, rate > 0, _even(query, key), BLOCK, triton.next_power_of_2(key.shape[1]), num_stages=3,
    )  # fmt: skip
    return output, normaliser, seed


@packed_attention.register_fake
def _(query, key, value, bias, query_segments, key_segments, causal, heads, rate):
    normaliser = query.new_empty((query.shape[0], heads, query.shape[1]), dtype=torch.float32)
    return query.new_empty(query.shape), normaliser, query.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("market_news_t5::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, query_segments: Tensor, key_segments: Tensor,
    output: Tensor, normaliser: Tensor, seed: Tensor, causal: bool, heads: int, rate: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, and of the bias (empty where there is none)."""
    gradient, query, key, value = (part.contiguous() for part in (gradient.to(query.dtype), query, key, value))
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    rows, query_length, key_length, d_kv = len(query), query.shape[1], key.shape[1], query.shape[2] // heads
    delta = torch.empty_like(normaliser)  # sum of output x its gradient: (batch, heads, query_length)
    inputs = (*_kernel_inputs(query, key, value, bias, query_segments, key_segments), gradient, normaliser, delta)
    lengths, draws = (query_length, key_length, heads), (seed, rate, d_kv)
    options = (bias is not None, causal, rate > 0, _even(query, key), BLOCK)
    blocks = triton.cdiv(query_length, BLOCK), triton.cdiv(key_length, BLOCK)
    powers = triton.next_power_of_2(query_length), triton.next_power_of_2(key_length)
    backward_queries[blocks[0], rows * heads](*inputs, output, d_query, *lengths, *draws, *options, powers[1], num_stages=1)
    backward_keys[blocks[1], rows * heads](*inputs, d_key, d_value, *lengths, *draws, *options, powers[0], num_stages=3)
    if bias is None:
        return d_query, d_key, d_value, query.new_empty(0, dtype=torch.float32)
    shares = min(rows, triton.cdiv(BIAS_PROGRAMS, blocks[0] * blocks[1] * heads))
    parts = query.new_empty((shares, heads, query_length, key_length), dtype=torch.float32)
    grid = (*blocks, heads * shares)
    backward_bias[grid](*inputs, parts, rows, shares, *lengths, *draws, *options[1:], num_stages=1)
    return d_query, d_key, d_value, parts.sum(0, keepdim=True).to(bias.dtype)


@packed_attention_backward.register_fake
def _(gradient, query, key, value, bias, query_segments, key_segments, output, normaliser, seed, causal, heads, rate):
    d_bias = query.new_empty(0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    return *(part.new_empty(part.shape) for part in (query, key, value)), d_bias


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, bias, query_segments, key_segments, causal, heads, rate = inputs
    ctx.set_materialize_grads(False)  # none ever comes for what is only kept for the backward pass
    ctx.save_for_backward(query, key, value, bias, query_segments, key_segments, *output)
    ctx.options = causal, heads, rate


def _backward(ctx, gradient, *_):
    query, key, value, bias, *rest = ctx.saved_tensors
    *gradients, d_bias = packed_attention_backward(gradient, query, key, value, bias, *rest, *ctx.options)
    return *gradients, None if bias is None else d_bias, None, None, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _even(query: Tensor, key: Tensor) -> bool:
    """Whether tiles end where rows do, so that none needs a check."""
    return query.shape[1] % BLOCK == 0 and key.shape[1] % BLOCK == 0


def _kernel_inputs(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *segments: Tensor) -> tuple[Tensor, ...]:
    """What every kernel reads first; where there is no bias, something stands in its place that is never read."""
    return query, key, value, query if bias is None else bias.to(query.dtype).contiguous(), *(ids.contiguous() for ids in segments)
