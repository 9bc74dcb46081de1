"""The blocks of a T5 stack, under stock `transformers` parameter names, so that checkpoints interchange.

The residual stream stays float32 whatever the weights are: 16-bit sums over many layers lose accuracy, and in float16 they
overflow. Projections are called as modules and their weights are never inspected, so adapters and 4-bit layers work as they are.
"""

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from src.attention import SegmentMask, additive, at_least_float32, merge_heads, plain_attention, split_heads
from src.dropout import dropout, relu_dropout
from src.fast_attention import attention
from src.norm import rms_norm

FLOAT16_HEADROOM = 64.0  # a power of two: scaling by it is exact


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What products are computed in: autocast's dtype where it is on, else that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class T5LayerNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) in float32, returned in the dtype that the next projection wants."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(at_least_float32(hidden_states), self.weight, self.epsilon, compute_dtype(self.weight))


class T5FeedForward(nn.Module):
    """wo(act(wi x)) of v1.0, or wo(act(wi_0 x) * wi_1 x) of v1.1 (arXiv 2002.05202)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        for name in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout_rate, self.is_gated, self.is_relu = config.dropout_rate, config.is_gated_act, config.feed_forward_proj == "relu"
        self.act = ACT2FN[config.dense_act_fn]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.is_relu:
            inner = relu_dropout(self.wi(hidden_states), self.dropout_rate, self.training)  # (batch, length, d_ff)
        else:
            gate = self.act(self.wi_0(hidden_states) if self.is_gated else self.wi(hidden_states))
            inner = dropout(gate * self.wi_1(hidden_states) if self.is_gated else gate, self.dropout_rate, self.training)
        if inner.dtype != torch.float16:
            return self.wo(inner)
        # The sum over d_ff is what overflows float16 in T5, so it is taken on inputs that are 64 times smaller.
        return self.wo(inner / FLOAT16_HEADROOM).float() * FLOAT16_HEADROOM


class T5Attention(nn.Module):
    """Self-attention, or attention over another sequence; the bias comes from the stack."""

    kernel = "auto"  # or "plain": the reference, src.attention.plain_attention

    def __init__(self, config: T5Config, layer_index: int, has_relative_attention_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.layer_index, self.dropout_rate = config.num_heads, layer_index, config.dropout_rate
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | SegmentMask | None = None,
        encoder_states: Tensor | None = None,
        cache=None,
    ) -> Tensor:
        """Attend from `hidden_states` (batch, length, d_model) to itself, or to `encoder_states`.

        With a cache the layer's part of it decides what is stored and how the scores come about (src.kv_cache).
        """
        states = hidden_states if encoder_states is None else encoder_states
        query = self.q(hidden_states)  # (batch, length, heads x d_kv)
        if cache is not None:
            return self.o(merge_heads(cache.attend(self, split_heads(query, self.num_heads), states, bias, mask)))
        key, value, rate = self.k(states), self.v(states), self.dropout_rate if self.training else 0.0
        if self.kernel == "plain":
            mask = additive(mask.matrix(), query.dtype) if isinstance(mask, SegmentMask) else mask
            by_head = (split_heads(part, self.num_heads) for part in (query, key, value))
            return self.o(merge_heads(plain_attention(*by_head, bias, mask, rate)))
        return self.o(attention(query, key, value, bias, mask, self.num_heads, rate))


class T5Sublayer(nn.Module):
    """Pre-norm residual: x + dropout(f(norm(x))). The inner module is registered under its stock name."""

    def __init__(self, config: T5Config, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)
        self.layer_norm = T5LayerNorm(config)
        self.name, self.dropout_rate = name, config.dropout_rate

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        branch = getattr(self, self.name)(self.layer_norm(hidden_states), **kwargs)
        return hidden_states + dropout(branch, self.dropout_rate, self.training)


class T5Block(GradientCheckpointingLayer):
    """Self-attention, cross-attention in a decoder, feed-forward."""

    def __init__(self, config: T5Config, layer_index: int) -> None:
        super().__init__()
        attention = T5Attention(config, layer_index, has_relative_attention_bias=layer_index == 0)
        self.layer = nn.ModuleList([T5Sublayer(config, "SelfAttention", attention)])
        if config.is_decoder:
            self.layer.append(T5Sublayer(config, "EncDecAttention", T5Attention(config, layer_index)))
        self.layer.append(T5Sublayer(config, "DenseReluDense", T5FeedForward(config)))

    def forward(self, hidden_states: Tensor, bias=None, mask=None, encoder_states=None, encoder_mask=None, cache=None) -> Tensor:
        own, *cross, feed_forward = self.layer
        own_cache, cross_cache = (None, None) if cache is None else cache.of_layer(own.SelfAttention.layer_index)
        hidden_states = own(hidden_states, bias=bias, mask=mask, cache=own_cache)
        if encoder_states is not None:
            hidden_states = cross[0](hidden_states, mask=encoder_mask, encoder_states=encoder_states, cache=cross_cache)
        return feed_forward(hidden_states)
