"""Cross-entropy and its gradient on a GPU in one kernel: logits are read twice and overwritten once, in the format they come in.

PyTorch's operations make the probabilities in float32 and pass over them five times. `fused_loss` calls this on each chunk of logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a row that are read together


@triton.jit
def _loss_and_gradient(logits, labels, weights, losses, vocab_size, block: tl.constexpr):
    row = tl.program_id(0)
    label, weight = tl.load(labels + row), tl.load(weights + row)
    logits += tl.cast(row, tl.int64) * vocab_size
    of_label = tl.load(logits + label).to(tl.float32)  # before it is overwritten
    highest, total = -float("inf"), 0.0
    for first in tl.range(0, vocab_size, block):
        columns = first + tl.arange(0, block)
        values = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        new_highest = tl.maximum(highest, tl.max(values, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(values - new_highest), 0)
        highest = new_highest
    log_total = highest + tl.log(total)
    for first in tl.range(0, vocab_size, block):
        columns = first + tl.arange(0, block)
        values = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(values - log_total) - (columns == label).to(tl.float32)) * weight
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab_size)
    tl.store(losses + row, (log_total - of_label) * weight)


def loss_and_gradient_(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`src.fused_loss.loss_and_gradient_` for contiguous logits on a GPU: scalar float32."""
    losses = torch.empty_like(weights)
    _loss_and_gradient[(len(logits),)](logits, labels, weights, losses, logits.shape[1], BLOCK, num_warps=8)
    return losses.sum()
