"""Cross-entropy of the language modelling head without logits of all positions in memory.

Positions whose label is ignored are left out, the rest go through the head in chunks, and the gradients of a chunk are taken while
its logits are there. Costs the same three products as the plain way; the plain way is `modeling_t5.mean_loss(lm_head(states), labels)`.
"""

import torch
from torch import Tensor

IGNORED_LABEL = -100
CHUNK_BYTES = 64 << 20  # logits that exist at once
FLOAT_ROWS = 64  # of them in float32 at once on a CPU: stays in the processor's cache; a GPU takes a whole chunk


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Sum of -log softmax(states W^T)[label] over labels that are not -100, divided by `num_items` or by their number.

    Args:
        states: (..., d_model), in the dtype that the products shall use.
        weight: (vocab_size, d_model).
        labels: (...) int64.

    Returns:
        scalar float32.
    """
    labels = labels.flatten()
    counted = labels != IGNORED_LABEL
    num_items = counted.sum() if num_items is None else num_items
    states = states.flatten(0, -2)
    if states.device.type != "cpu" or not bool(counted.all()):
        states, labels = states[counted], labels[counted]
    needs_gradient = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(states, weight, labels, 1.0 / float(num_items) if num_items else 0.0, needs_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, labels: Tensor, share: float, needs_gradient: bool) -> Tensor:
        small = weight.to(states.dtype)
        rows = max(FLOAT_ROWS, CHUNK_BYTES // (weight.shape[0] * states.element_size()))
        total = states.new_zeros((), dtype=torch.float32)
        d_states, d_weight = (torch.empty_like(states), None) if needs_gradient else (None, None)
        with torch.autocast(states.device.type, enabled=False):
            for first in range(0, len(states), rows):
                chunk = slice(first, first + rows)
                logits = states[chunk] @ small.t()  # (rows, vocab_size)
                total += _loss_and_gradient_(logits, labels[chunk], share)
                if needs_gradient:
                    d_states[chunk] = logits @ small  # `logits` now hold their gradient
                    part = (logits.t() @ states[chunk]).to(weight.dtype)
                    d_weight = part if d_weight is None else d_weight.add_(part)
        if needs_gradient:
            # Not `save_for_backward`: that would keep a second owner, and autograd copies a gradient that it does not own alone.
            ctx.gradients = d_states, torch.zeros_like(weight) if d_weight is None else d_weight
        return total * share

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("this loss gave its gradients away in an earlier backward pass: compute it again")
        (d_states, d_weight), ctx.gradients = ctx.gradients, None
        if gradient.device.type == "cpu" and float(gradient) == 1.0:
            return d_states, d_weight, None, None, None
        return d_states * gradient.to(d_states.dtype), d_weight * gradient.to(d_weight.dtype), None, None, None


def _loss_and_gradient_(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Summed loss of (rows, vocab_size) logits, which are overwritten with `share` x its gradient."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = FLOAT_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    for first in range(0, len(logits), step):
        rows = slice(first, first + step)
        exact, index = logits[rows].float(), labels[rows, None]
        probability = torch.softmax(exact, dim=-1)
        # log of the normaliser by way of the most likely token, whose probability cannot underflow
        normaliser = exact.amax(-1, keepdim=True) - probability.amax(-1, keepdim=True).log_()
        total += (normaliser - exact.gather(1, index)).sum()
        probability.scatter_add_(1, index, torch.full_like(index, -1, dtype=probability.dtype))
        logits[rows] = probability.mul_(share)
    return total
