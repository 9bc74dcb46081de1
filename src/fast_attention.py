"""The fastest attention for the device: our kernel on a newer GPU, chunks on a CPU, else the framework's or the plain formula."""

import torch
from torch import Tensor, nn

from src.attention import SegmentMask, additive, merge_heads, plain_attention, split_heads
from src.chunked_attention import chunked_attention
from src.dropout import BITS
from src.gpu_kernels import HAS_TRITON, has_gpu_kernels

if HAS_TRITON:
    from src.triton_attention import HEAD_WIDTHS, packed_attention


def prepared_mask(mask: Tensor | SegmentMask | None, dtype: torch.dtype, d_kv: int) -> Tensor | SegmentMask | None:
    """A mask as `attention` reads it fastest, made once for all layers: segments where the GPU kernel takes them, else numbers to add."""
    if not isinstance(mask, SegmentMask):
        return additive(mask, dtype)
    has_kernel = has_gpu_kernels(mask.key_segments.device, dtype) and d_kv in HEAD_WIDTHS
    return mask if has_kernel else additive(mask.matrix(), dtype)


def prepared_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias as `attention` reads it fastest, made once for all layers: as narrow as the scores, and so are its gradients.

    Not in float16 on a GPU, where the sum of what a gradient scaler has multiplied would overflow.
    """
    return bias if bias.is_cuda and dtype == torch.float16 else bias.to(dtype)


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
    if query.device.type == "cpu" and (rate == 0 or query.dtype in BITS):
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
        return chunked_attention(query, key, value, bias, mask, heads, rate, keep)[0]
    q, k, v = (split_heads(states, heads) for states in (query, key, value))
    if query.device.type == "cpu":
        return merge_heads(plain_attention(q, k, v, bias, mask, rate))
    terms = [term.to(q.dtype) for term in (bias, mask) if term is not None]
    added = sum(terms).expand(len(q), heads, q.shape[2], k.shape[2]) if terms else None
    return merge_heads(nn.functional.scaled_dot_product_attention(q, k, v, added, rate, scale=1.0))
