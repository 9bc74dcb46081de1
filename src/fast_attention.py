"""The fastest attention for the device, and the one for CPUs: the plain formula in chunks that stay in the processor's cache.

A learned bias rules out the framework's fused CPU kernels, and the plain formula moves every score through main memory a dozen
times. Here a few rows at a time go through all steps before the next rows do; only the attention weights are kept, with the
dropout mask in their sign. `src.attention.plain_attention` is the reference that a test holds this equal to.
"""

import importlib.util

import torch
from torch import Tensor, nn

from src.attention import SegmentMask, additive, merge_heads, plain_attention, split_heads
from src.dropout import SIXTEEN_BIT, clear, keep_bits

HAS_TRITON = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from src.triton_attention import HEAD_WIDTHS, packed_attention

OLDEST_GPU = (8, 0)  # Ampere: the kernel was not tried on what came before
CHUNK_SCORES = 2 << 20  # scores that go through all steps at once: 4 MB in 16 bit
SIGN_BIT = -(1 << 15)  # of a 16-bit float seen as an integer


def prepared_mask(mask: Tensor | SegmentMask | None, dtype: torch.dtype, d_kv: int) -> Tensor | SegmentMask | None:
    """A mask as `attention` reads it fastest, made once for all layers: segments where the GPU kernel takes them, else numbers to add."""
    if not isinstance(mask, SegmentMask):
        return additive(mask, dtype)
    has_kernel = HAS_TRITON and mask.key_segments.is_cuda and torch.cuda.get_device_capability() >= OLDEST_GPU
    return mask if has_kernel and dtype in SIXTEEN_BIT and d_kv in HEAD_WIDTHS else additive(mask.matrix(), dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | SegmentMask | None, heads: int, rate: float = 0.0
) -> Tensor:
    """softmax(Q K^T + bias + mask) V with the fastest way for the device.

    Args:
        query: (batch, query_length, heads x d_kv).
        key, value: (batch, key_length, heads x d_kv).
        bias: learned, (1, heads, query_length, key_length), or None.
        mask: what `prepared_mask` made: additive, (batch or 1, 1, query_length or 1, key_length), or segments, or None.
        heads: number of heads.
        rate: dropout rate of the attention weights.

    Returns:
        (batch, query_length, heads x d_kv).
    """
    if isinstance(mask, SegmentMask):
        return packed_attention(query, key, value, bias, *mask, heads, rate)[0]
    if query.device.type == "cpu" and (rate == 0 or query.dtype in SIXTEEN_BIT):
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
        return chunked_attention(query, key, value, bias, mask, heads, rate, keep)[0]
    q, k, v = (split_heads(states, heads) for states in (query, key, value))
    if query.device.type == "cpu":
        return merge_heads(plain_attention(q, k, v, bias, mask, rate))
    terms = [term.to(q.dtype) for term in (bias, mask) if term is not None]
    added = sum(terms).expand(len(q), heads, q.shape[2], k.shape[2]) if terms else None
    return merge_heads(nn.functional.scaled_dot_product_attention(q, k, v, added, rate, scale=1.0))


# Operators of their own, because a compiler that looked inside would unroll the chunks of every layer.
@torch.library.custom_op("market_news_t5::chunked_attention", mutates_args=())
def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int, rate: float, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """(attention output like `query`, attention weights (rows x heads, query_length, key_length) or, unless they are kept, nothing)."""
    output = torch.empty_like(query)
    rows_kept = len(query) * heads if keep_weights else 0
    kept = query.new_empty((rows_kept, query.shape[1], key.shape[1]))
    bias = None if bias is None else bias.to(query.dtype)
    for rows in _chunks(query, key, heads):
        q, k, v = (_by_head(states[rows], heads) for states in (query, key, value))
        scores = _scores(q, k, bias, mask if mask is None or len(mask) == 1 else mask[rows], heads)
        weights = kept[rows.start * heads : rows.stop * heads] if keep_weights else torch.empty_like(scores)
        torch.softmax(scores, -1, out=weights)
        dropped = _drop_(weights, rate) if rate else weights
        context = torch.bmm(dropped, v)
        output[rows] = _by_row(context.mul_(1 / (1 - rate)) if rate else context, heads)
    return output, kept


@chunked_attention.register_fake
def _(query, key, value, bias, mask, heads, rate, keep_weights):
    rows_kept = len(query) * heads if keep_weights else 0
    return torch.empty_like(query), query.new_empty((rows_kept, query.shape[1], key.shape[1]))


@torch.library.custom_op("market_news_t5::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, heads: int, rate: float, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the bias (empty where there is none)."""
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    d_bias = query.new_zeros(_bias_shape(query, key, heads, bias_dtype), dtype=bias_dtype)
    for rows in _chunks(query, key, heads):
        q, k, v = (_by_head(states[rows], heads) for states in (query, key, value))
        d_output = _by_head(gradient[rows].to(query.dtype), heads)
        d_weights, d_v, weights = _through_values(d_output, kept[rows.start * heads : rows.stop * heads], v, rate)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_query[rows], d_key[rows] = _by_row(torch.bmm(d_scores, k), heads), _by_row(torch.bmm(d_scores.mT, q), heads)
        d_value[rows] = _by_row(d_v, heads)
        if bias_dtype is not None:
            for one in d_scores.unflatten(0, (-1, heads)):
                d_bias[0].add_(one)
    return d_query, d_key, d_value, d_bias


@chunked_attention_backward.register_fake
def _(gradient, query, key, value, kept, heads, rate, bias_dtype):
    d_bias = query.new_empty(_bias_shape(query, key, heads, bias_dtype), dtype=bias_dtype)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), d_bias


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, bias, _, heads, rate, _ = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.options = heads, rate, None if bias is None else bias.dtype


def _backward(ctx, gradient, _):
    *gradients, d_bias = chunked_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return *gradients, d_bias if ctx.options[-1] is not None else None, None, None, None, None


chunked_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _bias_shape(query: Tensor, key: Tensor, heads: int, dtype: torch.dtype | None) -> tuple[int, ...]:
    return (0,) if dtype is None else (1, heads, query.shape[1], key.shape[1])


def _chunks(query: Tensor, key: Tensor, heads: int) -> list[slice]:
    """The rows of each chunk."""
    step = max(1, CHUNK_SCORES // (heads * query.shape[1] * key.shape[1]))
    return [slice(first, min(first + step, len(query))) for first in range(0, len(query), step)]


def _by_head(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads x d_kv) to contiguous (rows x heads, length, d_kv)."""
    return split_heads(states, heads).flatten(0, 1).contiguous()


def _by_row(states: Tensor, heads: int) -> Tensor:
    """(rows x heads, length, d_kv) to (rows, length, heads x d_kv)."""
    return merge_heads(states.unflatten(0, (-1, heads)))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int) -> Tensor:
    """Q K^T with bias and mask added, (rows x heads, query_length, key_length)."""
    scores = torch.bmm(q, k.mT)
    by_row = scores.unflatten(0, (-1, heads))
    for term in (bias, mask):
        if term is not None:
            by_row += term
    return scores


def _drop_(weights: Tensor, rate: float) -> Tensor:
    """The weights with zeros where dropped; there, `weights` themselves get their sign bit set."""
    keep = keep_bits(weights.shape, rate)
    dropped = clear(weights, keep)
    weights.view(torch.int16).bitwise_or_(~keep & SIGN_BIT)
    return dropped


def _through_values(d_output: Tensor, weights: Tensor, v: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weights and of V, and the weights without their sign; `weights` are what `_drop_` left."""
    if rate == 0:
        return torch.bmm(d_output, v.mT), torch.bmm(weights.mT, d_output), weights
    d_output = d_output * (1 / (1 - rate))
    keep = ~(weights.view(torch.int16) >> 15)  # the shift copies the sign: all ones where dropped
    weights = weights.abs()
    return clear(torch.bmm(d_output, v.mT), keep), torch.bmm(clear(weights, keep).mT, d_output), weights
