"""Root mean square norm in float32, returning what the next projection reads: on a CPU with its own backward, which is faster there."""

import torch
from torch import Tensor, nn


def _normed(states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y = w x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467, eq. 4) for float32 x, in the given dtype, and the 1 / sqrt, (..., 1)."""
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    scale = torch.rsqrt(norm.square_().div_(states.shape[-1]).add_(epsilon))
    return torch.mul(states, scale).mul_(weight).to(dtype), scale


class _RmsNorm(torch.autograd.Function):
    """`_normed` with its backward."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        result, scale = _normed(states, weight, epsilon, dtype)
        ctx.save_for_backward(states, weight, scale)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, weight, scale = ctx.saved_tensors
        rows, gradient, scale = states.flatten(0, -2), gradient.to(states.dtype).flatten(0, -2), scale.view(-1)
        product = gradient * rows  # (tokens, d_model)
        d_weight = product.t() @ scale
        along = (product @ weight.to(states.dtype)).mul_(scale.pow(3)).div_(states.shape[-1])  # (tokens,)
        d_states = torch.mul(gradient, weight).mul_(scale[:, None]).sub_(torch.mul(rows, along[:, None], out=product))
        return d_states.view_as(states), d_weight.to(weight.dtype), None, None


def rms_norm(states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Norm over the last dimension of float32 `states`, multiplied by `weight`, as `dtype`."""
    if torch.compiler.is_compiling():  # a compiler fuses the formula with what stands around it
        return (states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon) * weight).to(dtype)
    if states.device.type != "cpu":  # one kernel each way, where the steps below would be eighteen
        return nn.functional.rms_norm(states, weight.shape, weight.to(states.dtype), epsilon).to(dtype)
    if not torch.is_grad_enabled():  # a step of decoding is so short that preparing for a backward shows
        return _normed(states, weight, epsilon, dtype)[0]
    return _RmsNorm.apply(states, weight, epsilon, dtype)
