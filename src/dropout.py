"""Dropout whose random numbers and masks cost little on a CPU.

The framework's Bernoulli samples and boolean masks were a quarter of a training step. Here an element is dropped by comparing 16
random bits with a threshold and clearing its own, all in vectorised integer arithmetic; the rate is exact to 1/65536. It works on
a CPU, for floats of 16 and 32 bits and under a compiler for any; other dtypes and devices use the framework's dropout.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 1 << 16  # values of 16 random bits
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}  # the integer as wide as a float


def is_fast(states: Tensor) -> bool:
    """Whether `keep_bits` can clear elements of this tensor in place of the framework's dropout."""
    return not torch.compiler.is_compiling() and states.device.type == "cpu" and states.dtype in BITS


def takes_mask(states: Tensor) -> bool:
    """Whether a compiler is to multiply this tensor by `keep_mask`."""
    return torch.compiler.is_compiling() and states.device.type == "cpu"


def random_seed() -> Tensor:
    return torch.randint(2**62, ())


def drop_bits(shape: Sequence[int], rate: float, seed: Tensor | None = None) -> Tensor:
    """int16 tensor, 1 with probability `rate` and 0 otherwise.

    The bits come from a generator seeded by `seed`, or by torch's global one, so `torch.manual_seed` decides them.
    """
    count = math.prod(shape)
    generator = np.random.SFC64(int(random_seed() if seed is None else seed))
    words = torch.from_numpy(generator.random_raw((count + 3) // 4).view(np.int16))
    return words[:count].view(shape).lt_(round(rate * STEPS) - STEPS // 2)


def keep_bits(shape: Sequence[int], rate: float, seed: Tensor | None = None) -> Tensor:
    """int16 tensor, 0 with probability `rate` and all ones (-1) otherwise; so are the wider integers it is cast to."""
    return drop_bits(shape, rate, seed).sub_(1)


# An operator of its own, because a compiler would make random numbers one at a time. The seed tells two masks of one shape apart.
@torch.library.custom_op("market_news_t5::keep_mask", mutates_args=())
def keep_mask(shape: Sequence[int], rate: float, seed: Tensor) -> Tensor:
    """bfloat16 tensor on the CPU, 0 with probability `rate` and 1 otherwise."""
    one = int(torch.ones((), dtype=torch.bfloat16).view(torch.int16))
    return keep_bits(shape, rate, seed).bitwise_and_(one).view(torch.bfloat16)


@keep_mask.register_fake
def _(shape, rate, seed):
    return torch.empty(shape, dtype=torch.bfloat16)


class _MaskedRelu(torch.autograd.Function):
    """relu(x) x keep x scale for a compiler, with the backward pass of `_ReluDropout`."""

    @staticmethod
    def forward(ctx, states: Tensor, keep: Tensor, scale: float) -> Tensor:
        result = (torch.relu(states) * keep * scale).to(states.dtype)
        ctx.save_for_backward(result)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        # The scale where the result is positive, else 0; of a comparison the compiler would keep the outcome, and storing bools is slow.
        passes = (ctx.saved_tensors[0] * 2.0**127).clamp(max=ctx.scale)
        return gradient * passes, None, None


class _Dropout(torch.autograd.Function):
    """x, some elements cleared, the rest scaled up; the mask is kept in 16 bits an element."""

    @staticmethod
    def forward(ctx, states: Tensor, rate: float) -> Tensor:
        keep = keep_bits(states.shape, rate)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - rate)
        return clear(states, keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return clear(gradient, ctx.saved_tensors[0]).mul_(ctx.scale), None


class _ReluDropout(torch.autograd.Function):
    """Dropout of relu(x), in place: what is positive in the result is what a gradient passes, so no mask is kept."""

    @staticmethod
    def forward(ctx, states: Tensor, rate: float) -> Tensor:
        ctx.mark_dirty(states)
        ctx.scale = 1 / (1 - rate)
        states.relu_()
        bits = BITS[states.dtype]
        states.view(bits).bitwise_and_(keep_bits(states.shape, rate).to(bits))
        states.mul_(ctx.scale)
        ctx.save_for_backward(states)
        return states

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.aten.threshold_backward(gradient, ctx.saved_tensors[0], 0).mul_(ctx.scale), None


def clear(states: Tensor, keep: Tensor) -> Tensor:
    """`states` with the elements cleared whose `keep` is 0."""
    bits = BITS[states.dtype]
    return states.contiguous().view(bits).bitwise_and(keep.to(bits)).view(states.dtype)


def dropout(states: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout (arXiv 1207.0580) with the fastest sampler for this dtype and device."""
    if not training or rate == 0:
        return states
    if takes_mask(states):
        return (states * keep_mask(states.shape, rate, random_seed()) * (1 / (1 - rate))).to(states.dtype)
    return _Dropout.apply(states, rate) if is_fast(states) else nn.functional.dropout(states, rate)


def relu_dropout(states: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout of relu(states), overwriting `states` where that is faster."""
    if training and rate > 0 and takes_mask(states):
        return _MaskedRelu.apply(states, keep_mask(states.shape, rate, random_seed()), 1 / (1 - rate))
    if training and rate > 0 and is_fast(states) and states.requires_grad:
        return _ReluDropout.apply(states, rate)
    return dropout(torch.relu_(states) if not states.is_leaf else torch.relu(states), rate, training)
