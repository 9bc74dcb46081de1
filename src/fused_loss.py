"""Cross-entropy of the language modelling head without logits of all positions in memory.

Positions go through the head in chunks, and the gradients of a chunk are taken while its logits are there. Those whose label is ignored
are left out on a CPU, and elsewhere multiplied by 0, for choosing them would wait for the device. Costs the same three products as the
plain way, two where the head is frozen; the plain way is `modeling_t5.mean_loss(lm_head(states), labels)`.
"""

import torch
from torch import Tensor

from src.attention import at_least_float32
from src.gpu_kernels import HAS_TRITON, has_gpu_kernels
from src.packing import IGNORED

if HAS_TRITON:
    from src import triton_loss

CHUNK_BYTES = 64 << 20  # logits that exist at once
CPU_PIECES, CPU_ROWS = 4096, 304  # of the vocabulary and of a chunk, in one bf16 product on a CPU: a whole one takes half as long again
FLOAT_ROWS = 16  # of them in float32 at once on a CPU: stays in the processor's cache; a GPU takes a whole chunk
SMALLEST_PROBABILITY = 1e-30  # of a label, whose logarithm is its loss; below, where float32 ends, the loss is taken from the logits


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Sum of -log softmax(states W^T)[label] over labels that are not -100, divided by `num_items` or by their number.

    Args:
        states: (..., d_model), in the dtype that the products shall use.
        weight: (vocab_size, d_model).
        labels: (...) int64.

    Returns:
        scalar float32, or float64 of states in float64.
    """
    labels, states = labels.flatten(), states.flatten(0, -2)
    counted = labels != IGNORED
    if num_items is None:
        num_items = counted.sum()
    elif not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, device=states.device)
    share = (num_items > 0) / num_items.clamp(min=1).to(at_least_float32(states[:0]).dtype)
    if states.device.type == "cpu" and not bool(counted.all()):  # elsewhere the question would cost a synchronisation
        states, labels, counted = states[counted], labels[counted], counted[counted]
    needs_gradient = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(states, weight, labels, counted, share, needs_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, share: Tensor, needs_gradient: bool) -> Tensor:
        small = weight.to(states.dtype)
        rows = max(FLOAT_ROWS, CHUNK_BYTES // (weight.shape[0] * states.element_size()))
        total = at_least_float32(states.new_zeros(()))
        needs_weight = needs_gradient and ctx.needs_input_grad[1]  # which alone is true without gradients, too
        d_states, d_weight = (torch.empty_like(states), None) if needs_gradient else (None, None)
        # A small share of a small probability would vanish in float16, so there the share is taken at the end.
        inner, outer = (1.0, share) if states.dtype == torch.float16 else (share, 1.0)
        labels, label_weights = labels.clamp(min=0), counted * inner
        with torch.autocast(states.device.type, enabled=False):
            for first in range(0, len(states), rows):
                chunk = slice(first, first + rows)
                logits = _logits(states[chunk], small)  # (rows, vocab_size)
                total += loss_and_gradient_(logits, labels[chunk], label_weights[chunk])
                if needs_gradient:
                    _write_product(d_states[chunk], logits, small)  # `logits` now hold their gradient
                if needs_weight:
                    part = logits.t() @ states[chunk]
                    d_weight = part if d_weight is None else at_least_float32(d_weight).add_(part)
        if needs_gradient:
            if needs_weight:
                d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
            # Not `save_for_backward`: that would keep a second owner, and autograd copies a gradient that it does not own alone.
            ctx.gradients, ctx.share = (d_states, d_weight), outer
        return total * outer

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss gave its gradients away in an earlier backward pass: compute it again, or with output_logits=True"
            )
        (d_states, d_weight), ctx.gradients = ctx.gradients, None
        gradient = gradient * ctx.share
        if gradient.device.type != "cpu" or float(gradient) != 1.0:
            # In float32, because a gradient scaler's factor can be more than float16 holds.
            scaled = (None if part is None else (at_least_float32(part) * gradient).to(part.dtype) for part in (d_states, d_weight))
            d_states, d_weight = scaled
        return d_states, d_weight, None, None, None, None


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """states W^T: (rows, vocab_size)."""
    logits = states.new_empty((len(states), len(weight)))
    pieces_at_once = CPU_PIECES if _is_better_in_parts(states) else len(weight)
    for pieces, place in zip(weight.split(pieces_at_once), logits.split(pieces_at_once, dim=1), strict=True):
        torch.mm(states, pieces.t(), out=place)
    return logits


def _write_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """left right, into `result`."""
    rows = CPU_ROWS if _is_better_in_parts(result) else max(1, len(result))
    for place, part in zip(result.split(rows), left.split(rows), strict=True):
        torch.mm(part, right, out=place)


def _is_better_in_parts(states: Tensor) -> bool:
    return states.device.type == "cpu" and states.dtype == torch.bfloat16


def loss_and_gradient_(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label] x weight over rows; `logits` (rows, vocab_size) are overwritten with its gradient.

    Labels, (rows,), lie in the vocabulary also where the weight, (rows,) float32, is 0.
    """
    if has_gpu_kernels(logits.device, logits.dtype):
        return triton_loss.loss_and_gradient_(logits, labels, weights)
    total = at_least_float32(logits.new_zeros(()))
    step = FLOAT_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    for first in range(0, len(logits), step):
        rows = slice(first, first + step)
        probability, index, scale = torch.softmax(logits[rows], -1, dtype=total.dtype), labels[rows, None], weights[rows, None]
        likelihood = probability.gather(1, index)
        if logits.device.type == "cpu" and bool((likelihood > SMALLEST_PROBABILITY).all()):
            losses = likelihood.log_()
        else:
            losses = torch.log_softmax(logits[rows], -1, dtype=total.dtype).gather(1, index)
        total -= (losses * scale).sum()
        probability.scatter_add_(1, index, torch.full_like(index, -1, dtype=total.dtype))
        logits[rows] = probability.mul_(scale)
    return total
