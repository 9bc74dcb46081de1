"""T5 attention as mathematics: relative position buckets, masks, and the plain reference every faster path is held to.

T5 (arXiv 1910.10683, section 2.1) adds a learned bias to unscaled attention scores. The bias depends on distance alone and is
shared by all layers of a stack, so it is computed once a stack and needs no reset inside packed rows. `plain_attention`
trades speed for being read: it keeps every score.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class SegmentError(ValueError):
    """Segment ids that do not fit the tokens they describe."""


def relative_position_bucket(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each key-minus-query distance: exact up close, logarithmic further out, one bucket from `max_distance` on.

    Args:
        distance: integer tensor of any shape, key position minus query position.
        bidirectional: encoder: half of the buckets for keys after the query. Decoder: such keys fall into bucket 0.
        num_buckets: buckets in all.
        max_distance: distance from which on all share the last bucket.

    Returns:
        int64 tensor of the same shape in [0, num_buckets).

    With 8 buckets and max_distance 16:

        distance       -20 -16 -8 -4 -3 -2 -1  0  1  2  3  4  8 16 20
        bidirectional    3   3  3  2  2  2  1  0  5  6  6  6  7  7  7
        decoder          7   7  6  4  3  2  1  0  0  0  0  0  0  0  0
    """
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        offset = torch.zeros_like(distance, dtype=torch.long)
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    scale = (num_buckets - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    return offset + torch.where(distance < exact, distance.long(), far.clamp(max=num_buckets - 1))


def position_bias(
    table: nn.Embedding, query_start: int, query_length: int, key_length: int, bidirectional: bool, max_distance: int
) -> Tensor:
    """Learned bias of every (query, key) pair, looked up once per distance.

    Args:
        table: embedding (num_buckets, num_heads).
        query_start: position of the first query; keys start at 0.

    Returns:
        (1, num_heads, query_length, key_length) in the dtype of the table.
    """
    last = query_start + query_length - 1
    distance = torch.arange(-last, key_length - query_start, device=table.weight.device)  # every key - query there is
    bucket = relative_position_bucket(distance, bidirectional, table.num_embeddings, max_distance)
    by_distance = table(bucket).t().contiguous()  # (num_heads, query_length + key_length - 1)
    # Query i reads the window that starts at distance -(query_start + i): the windows shift left by one, hence the flip.
    return by_distance.unfold(1, key_length, 1).flip(1).unsqueeze(0)


def segment_mask(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """True where query and key belong to the same example.

    `[1, 1, 2]` against `[1, 2, 2]` gives `[[1, 0, 0], [1, 0, 0], [0, 1, 1]]`. Padding (0) sees padding only.

    Args:
        query_segments: (batch, query_length) integers.
        key_segments: (batch, key_length) integers.

    Returns:
        bool (batch, 1, query_length, key_length).
    """
    if query_segments.shape[0] != key_segments.shape[0]:
        raise SegmentError(
            f"segment ids of {query_segments.shape[0]} and {key_segments.shape[0]} rows: encoder and decoder rows must be the same"
        )
    return (query_segments[:, :, None] == key_segments[:, None, :]).unsqueeze(1)


class SegmentMask(NamedTuple):
    """Which query sees which key in packed rows, told by ids: those of its segment and, where `causal`, none after it."""

    query_segments: Tensor  # integers (batch, query_length)
    key_segments: Tensor  # integers (batch, key_length)
    causal: bool = False

    def matrix(self) -> Tensor:
        """True where the query sees the key: bool (batch, 1, query_length, key_length)."""
        mask = segment_mask(self.query_segments, self.key_segments)
        return mask & causal_mask(*mask.shape[-2:], mask.device) if self.causal else mask


def causal_mask(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """True where the key is not after the query; queries are the last `query_length` of the keys. (1, 1, query_length, key_length)."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)[None, None]


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where `mask` is True and half the dtype's lowest number elsewhere, to be added to scores; None where nothing is masked.

    Half, because in float16 a score below -16 added to the lowest number is -inf, and a query that sees no key would come out as NaN.
    """
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):  # elsewhere the question would cost a synchronisation
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min / 2)


def at_least_float32(states: Tensor) -> Tensor:
    """16-bit tensors as float32, wider ones as they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, dropout_rate: float = 0.0
) -> Tensor:
    """softmax(Q K^T + bias) V with T5's unscaled scores; the readable reference.

    Args:
        query: (batch, heads, query_length, d_kv).
        key, value: (batch, heads, key_length, d_kv).
        bias: learned, broadcastable to (batch, heads, query_length, key_length), or None.
        mask: additive, broadcastable to the same, or None.
        dropout_rate: share of the attention weights set to zero (the rest scaled up).

    Returns:
        (batch, heads, query_length, d_kv).
    """
    scores = query @ key.mT  # (batch, heads, query_length, key_length)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(at_least_float32(scores), dim=-1).to(value.dtype)
    return nn.functional.dropout(weights, dropout_rate) @ value


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(batch, length, heads x d_kv) to (batch, heads, length, d_kv)."""
    return states.view(*states.shape[:2], num_heads, -1).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """(batch, heads, length, d_kv) to (batch, length, heads x d_kv)."""
    return states.transpose(1, 2).flatten(2)
