"""Slim attention (arXiv 2503.05840): the products of attention rearranged so that K or V is never stored.

Two ways to store one tensor in place of two: the attention input X itself (exact in every precision, and several layers of
cross-attention share one X), or K with V = K W_KV, W_KV = W_K^-1 W_V, which is as good as W_K is well conditioned and so has to
be proved on real activations, layer by layer. The price is arithmetic: scores and context have d_model columns where they had
d_kv, num_heads times the products on 1/2 to 1/(2 x layers) of the memory traffic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Share of V that K W_KV may be off by, in root mean square. In 16 bit some two to five times what rounding V itself costs; in float32 far
# more than that, since no W_K of a trained model is so well conditioned, and still a tenth of what 16 bit costs anyhow.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}


class CacheError(ValueError):
    """A cache that does not exist or cannot be used this way."""


def effective_weight(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    """What a projection multiplies by, (out, in), with its adapters and quantisation: the image of the unit vectors.

    Raises:
        CacheError: it adds something, too, such as the bias of an adapter.
    """
    if type(projection) is nn.Linear:
        return projection.weight.detach().to(dtype)
    unit = torch.eye(projection.in_features, device=next(projection.parameters()).device, dtype=dtype)
    if bool(projection(torch.zeros_like(unit[:1])).any()):
        raise CacheError("an adapter adds a bias to k or v, which slim caches leave out: use cache_kind='kv'")
    return projection(unit).detach().to(dtype).t()


def per_head(weight: Tensor, num_heads: int) -> Tensor:
    """(heads x d_kv, width) to (heads, d_kv, width)."""
    return weight.unflatten(0, (num_heads, -1))


def key_to_value(key_weight: Tensor, value_weight: Tensor) -> Tensor:
    """W_KV with V = K W_KV (arXiv 2503.05840, section 2), solved in float64: (inner, inner).

    `nn.Linear` weights are (out, in), so K = X W_k^T and V = X W_v^T, and W_KV solves W_k^T W_KV = W_v^T.

    Raises:
        ValueError: W_K is not square or is singular.
    """
    if key_weight.shape[0] != key_weight.shape[1]:
        raise ValueError(f"W_K is {tuple(key_weight.shape)}, not square: use the x cache where heads x d_kv is not d_model")
    return torch.linalg.solve(key_weight.double().t(), value_weight.double().t())


@dataclass(frozen=True)
class StateWeights:
    """W_K and W_V of one layer as the X-cache needs them."""

    key: Tensor  # (heads, d_kv, d_model)
    value: Tensor  # (heads, d_model, d_kv)

    @classmethod
    def of(cls, attention: nn.Module, dtype: torch.dtype) -> "StateWeights":
        key, value = (per_head(effective_weight(p, dtype), attention.num_heads) for p in (attention.k, attention.v))
        return cls(key, value.mT)  # views: a copy of W_V would cost a short text what the slim cache saves


def attend_to_states(query: Tensor, states: Tensor, weights: StateWeights, bias: Tensor | None) -> Tensor:
    """(softmax(q W_K^T X^T + bias) X) W_V: attention over the inputs of K and V.

    Args:
        query: (batch, heads, length, d_kv).
        states: X, (batch, keys, d_model).
        bias: additive, broadcastable to (batch, heads, length, keys), or None.

    Returns:
        (batch, heads, length, d_kv).
    """
    by_length = query.shape[:3]
    wide = by_head(query, weights.key)  # (batch, heads, length, d_model)
    scores = torch.bmm(wide.flatten(1, 2), states.mT).view(*by_length, -1)  # (batch, heads, length, keys)
    if bias is not None:
        scores += bias
    attention = torch.softmax(scores, dim=-1).flatten(1, 2)  # (batch, heads x length, keys)
    context = torch.bmm(attention, states).view(*by_length, -1)  # (batch, heads, length, d_model)
    return by_head(context, weights.value)


def by_head(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head's part (batch, heads, length, a) by its own matrix (heads, a, b): (batch, heads, length, b)."""
    batch, heads, length, width = states.shape
    rows = states.transpose(0, 1).reshape(heads, batch * length, width)  # one product of all rows for each head
    return torch.bmm(rows, weight).view(heads, batch, length, -1).transpose(0, 1)


def attend_to_keys(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(softmax(q K^T + bias) K) W_KV: attention with V = K W_KV never formed.

    Args:
        query: (batch, heads, length, d_kv).
        key: (batch, heads, keys, d_kv).
        weight: W_KV by head of the output, (heads, heads x d_kv, d_kv).
        bias: additive, broadcastable to (batch, heads, length, keys), or None.

    Returns:
        (batch, heads, length, d_kv).
    """
    batch, heads, length, _ = query.shape
    scores = query @ key.mT  # (batch, heads, length, keys)
    attention = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    context = attention.reshape(batch, 1, heads * length, -1) @ key  # (batch, key's heads, heads x length, d_kv)
    context = context.unflatten(2, (heads, length)).permute(0, 2, 3, 1, 4).flatten(3)  # (batch, heads, length, heads x d_kv)
    return by_head(context, weight)


def key_cache_weight(attention: nn.Module, states: Tensor) -> tuple[Tensor | None, float]:
    """W_KV of one layer in the dtype of `states`, or None where its error on these real activations is too large.

    Args:
        states: normed attention inputs of real text, (tokens, d_model).

    Returns:
        ((heads, heads x d_kv, d_kv) or None, root mean square error as a share of V).
    """
    dtype, heads = states.dtype, attention.num_heads
    key_weight, value_weight = (effective_weight(p, dtype) for p in (attention.k, attention.v))
    try:
        weight = key_to_value(key_weight, value_weight).to(dtype)
    except (ValueError, RuntimeError):  # not square, or singular
        return None, float("inf")
    expected = states.double() @ value_weight.double().t()
    found = (states @ key_weight.t()) @ weight
    error = float((found.double() - expected).norm() / expected.norm())
    accepted = error <= TOLERANCE.get(dtype, 0.0)
    return (weight.unflatten(1, (heads, -1)).transpose(0, 1).contiguous() if accepted else None), error
