"""What decoding keeps between steps: standard K and V, slim K, slim X, and one encoder output for all layers.

A kind is written `self+cross`. Self-attention stores `kv`, `k` (K-cache) or `x` (X-cache); cross-attention stores `kv` for each
layer or `e`, the encoder output itself, once. `x+e` is the default: about 6x less memory than `kv` at source 512 and target 114
for T5-small, exact in every precision. It does more arithmetic a step, which costs time where the processor and not the memory is
the limit: on single texts, and on large batches with long outputs; see benchmarks/decoding.py.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from src.attention import position_bias, split_heads
from src.slim_attention import CacheError, StateWeights, attend_to_keys, attend_to_states

BLOCK = 32  # tokens
CACHE_KINDS = ("kv", "k", "x", "kv+e", "k+e", "x+e")
DEFAULT_CACHE_KIND = "x+e"


def parse_cache_kind(kind: str) -> tuple[str, str]:
    """`"x+e"` to ("x", "e"); one word leaves the cross-attention at `kv`."""
    if kind not in CACHE_KINDS:
        raise CacheError(f"cache_kind {kind!r} is unknown: choose one of {', '.join(CACHE_KINDS)}")
    own, _, cross = kind.partition("+")
    return own, cross or "kv"


class Buffer:
    """A tensor that grows along one axis by blocks of tokens, in place within a block.

    Attention reads whole blocks, with what is not written yet masked: a matrix product copies an operand that is only part of its
    memory, in every step. A new block copies what there is once in `BLOCK` steps.
    """

    def __init__(self, axis: int, capacity: int | None) -> None:
        self.axis, self.capacity, self.length = axis, capacity, 0
        self.data: Tensor | None = None

    def room_for(self, length: int) -> int:
        """Tokens that the tensor holds once it has grown to `length`, those not written yet included."""
        if self.data is not None and length <= self.data.shape[self.axis]:
            return self.data.shape[self.axis]
        room = -(-length // BLOCK) * BLOCK
        return room if self.capacity is None or self.capacity < length else min(room, self.capacity)

    def append(self, states: Tensor, keys: int | None = None) -> Tensor:
        """Add `states` at the end of the axis; returns a view of the first `keys` tokens, or of all that are written."""
        end = self.length + states.shape[self.axis]
        if self.data is None or end > self.data.shape[self.axis]:
            self._reserve(states, end)
        self.data.narrow(self.axis, self.length, end - self.length).copy_(states)
        self.length = end
        return self.view() if keys is None else self.data.narrow(self.axis, 0, keys)

    def _reserve(self, states: Tensor, needed: int) -> None:
        shape = list(states.shape)
        shape[self.axis] = self.room_for(needed)
        data = states.new_zeros(shape)  # zeros: what is masked is still multiplied, by a weight of 0
        if self.length:
            data.narrow(self.axis, 0, self.length).copy_(self.view())
        self.data = data

    def view(self) -> Tensor:
        return self.data.narrow(self.axis, 0, self.length)

    def select(self, rows: Tensor) -> None:
        """Put the given rows of the batch, as many as there are, in this order."""
        self.view().copy_(self.view().index_select(0, rows))


class KeyValueLayer:
    """Standard self-attention cache: K and V, (batch, heads, tokens, d_kv) each."""

    def __init__(self, capacity: int | None) -> None:
        self.key, self.value = Buffer(2, capacity), Buffer(2, capacity)

    def attend(self, attention: nn.Module, query: Tensor, states: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        keys = None if bias is None else bias.shape[-1]
        key = self.key.append(split_heads(attention.k(states), attention.num_heads), keys)
        value = self.value.append(split_heads(attention.v(states), attention.num_heads), keys)
        return attend(query, key, value, bias, mask)

    def buffers(self) -> list[Buffer]:
        return [self.key, self.value]


class KeyLayer:
    """K-cache: K alone; `weight` is W_KV by head."""

    def __init__(self, capacity: int | None, weight: Tensor) -> None:
        self.key, self.weight = Buffer(2, capacity), weight

    def attend(self, attention: nn.Module, query: Tensor, states: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        key = self.key.append(split_heads(attention.k(states), attention.num_heads), bias.shape[-1])
        return attend_to_keys(query, key, self.weight.to(query.dtype), masked(bias, mask, query.dtype))

    def buffers(self) -> list[Buffer]:
        return [self.key]


class StateLayer:
    """X-cache: the normed attention input, (batch, tokens, d_model)."""

    def __init__(self, capacity: int | None) -> None:
        self.states, self.weights = Buffer(1, capacity), None

    def attend(self, attention: nn.Module, query: Tensor, states: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        self.weights = self.weights or StateWeights.of(attention, query.dtype)
        states = self.states.append(states.to(query.dtype), bias.shape[-1])
        return attend_to_states(query, states, self.weights, masked(bias, mask, query.dtype))

    def buffers(self) -> list[Buffer]:
        return [self.states]


class CrossKeyValueLayer(KeyValueLayer):
    """Standard cross-attention cache: K and V of the encoder output, made once."""

    def attend(self, attention: nn.Module, query: Tensor, states: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.key.data is None:
            self.key.capacity = self.value.capacity = states.shape[1]
            return super().attend(attention, query, states, bias, mask)
        return attend(query, self.key.view(), self.value.view(), bias, mask)


class SharedEncoderLayer:
    """Cross-attention over the encoder output itself, which all layers share and none copies."""

    def __init__(self, shared: "SharedEncoderOutput") -> None:
        self.shared, self.weights = shared, None

    def attend(self, attention: nn.Module, query: Tensor, states: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        self.weights = self.weights or StateWeights.of(attention, query.dtype)
        return attend_to_states(query, self.shared.get(states, query.dtype), self.weights, masked(bias, mask, query.dtype))

    def buffers(self) -> list[Buffer]:
        return []


class SharedEncoderOutput:
    """The one encoder output of a cache, in the dtype that attention computes in."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.data: Tensor | None = None

    def get(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        if self.source is not states:
            self.source, self.data = states, states.to(dtype).contiguous()
        return self.data


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T + bias + mask) V, (batch, heads, length, d_kv), by the framework's fused kernel: saves a tenth of a step.

    Over X it is slower than the products one by one (`attend_to_states`): all heads are then rows of one, which one core works on.
    """
    return nn.functional.scaled_dot_product_attention(query, key, value, masked(bias, mask, query.dtype), scale=1.0)


def masked(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Learned bias and mask as one additive tensor."""
    bias, mask = (None if term is None else term.to(dtype) for term in (bias, mask))
    return bias if mask is None else mask if bias is None else bias + mask


class T5Cache(Cache):
    """The caches of all decoder layers, in the shape that `generate` expects of `past_key_values`.

    Args:
        num_layers: of the decoder.
        kind: one of `CACHE_KINDS`.
        capacity: decoder tokens that will not be exceeded, so that no room is left over; None: not known.
        key_weights: W_KV of each layer for `k`; None for a layer that shall use `x`.
    """

    def __init__(self, num_layers: int, kind: str = DEFAULT_CACHE_KIND, capacity: int | None = None, key_weights=None) -> None:
        own, cross = parse_cache_kind(kind)
        self.kind, self.encoder_output = kind, SharedEncoderOutput()
        if own == "k" and key_weights is None:
            raise CacheError("the k cache needs W_KV of each layer: build it with model.new_cache, which calibrates")
        layers = [self._own_layer(own, capacity, weight) for weight in key_weights or [None] * num_layers]
        self.cross_layers = [CrossKeyValueLayer(None) if cross == "kv" else SharedEncoderLayer(self.encoder_output) for _ in layers]
        self._by_distance: Tensor | None = None
        super().__init__(layers=layers)

    @staticmethod
    def _own_layer(own: str, capacity: int | None, weight: Tensor | None):
        if own == "kv":
            return KeyValueLayer(capacity)
        return StateLayer(capacity) if weight is None else KeyLayer(capacity, weight)

    is_compileable = False
    is_initialized = is_croppable = True  # `generate` asks, on some devices before a layer holds anything

    def of_layer(self, index: int) -> tuple:
        """(self-attention, cross-attention) part of a layer."""
        return self.layers[index], self.cross_layers[index]

    def buffers(self) -> list[Buffer]:
        return [buffer for layer in (*self.layers, *self.cross_layers) for buffer in layer.buffers()]

    def num_bytes(self) -> int:
        """Bytes that the cached tensors occupy, reserved room and the shared encoder output included."""
        tensors = [buffer.data for buffer in self.buffers()] + [self.encoder_output.data]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].buffers()[0].length

    def position_bias(self, table: nn.Embedding, start: int, length: int, max_distance: int) -> Tensor:
        """The decoder's bias (1, heads, length, keys).

        A step of one token reads a slice of what is kept for all steps, over the keys that the buffers have room for: the lowest number
        of the dtype stands where none is written yet.
        """
        if length > 1:
            return position_bias(table, start, length, start + length, False, max_distance)
        room = self.layers[0].buffers()[0].room_for(start + 1)
        if self._by_distance is None or self._by_distance.shape[-1] < 2 * room:
            past = position_bias(table, room - 1, 1, room, False, max_distance)
            self._by_distance = torch.cat([past, torch.full_like(past, torch.finfo(past.dtype).min)], dim=-1)
        first = self._by_distance.shape[-1] // 2 - start - 1
        return self._by_distance[..., first : first + room]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search. The beams of one source share its encoder output, so cross-attention stays as it is."""
        if not torch.equal(beam_idx.cpu(), torch.arange(len(beam_idx))):
            for layer in self.layers:
                for buffer in layer.buffers():
                    buffer.select(beam_idx.to(buffer.data.device))

    def crop(self, max_length: int) -> None:
        """Forget the tokens from `max_length` on, or that many at the end where it is 0 or negative: guesses that were not accepted."""
        for layer in self.layers:
            for buffer in layer.buffers():
                buffer.length = min(buffer.length, max_length if max_length > 0 else buffer.length + max_length)

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.length, buffer.data = 0, None
        for layer in (*self.layers, *self.cross_layers):
            if hasattr(layer, "weights"):
                layer.weights = None
        self._by_distance = None
        self.encoder_output.source = self.encoder_output.data = None
