"""The loss without logits against the plain one."""

import pytest
import torch

from src.fused_loss import linear_cross_entropy
from src.modeling_t5 import mean_loss


@pytest.mark.parametrize("num_items", [None, 40])
def test_fused_loss_is_the_plain_loss(monkeypatch, num_items):
    """Breaks when chunks, ignored labels or the divisor change the value or a gradient."""
    monkeypatch.setattr("src.fused_loss.CHUNK_BYTES", 70 * 4 * 50)
    monkeypatch.setattr("src.fused_loss.FLOAT_ROWS", 8)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (3, 40), generator=generator)
    labels[:, 25:] = -100
    expected, found = mean_loss(states @ weight.t(), labels, num_items), linear_cross_entropy(states, weight, labels, num_items)
    torch.testing.assert_close(found, expected)
    for plain, fused in zip(
        torch.autograd.grad(3 * expected, (states, weight)), torch.autograd.grad(3 * found, (states, weight)), strict=True
    ):
        torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(linear_cross_entropy(60 * states, weight, labels), mean_loss(60 * states @ weight.t(), labels, None))
    (frozen,) = torch.autograd.grad(3 * linear_cross_entropy(states, weight.detach(), labels, num_items), states)
    torch.testing.assert_close(frozen, torch.autograd.grad(3 * mean_loss(states @ weight.t(), labels, num_items), states)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_fused_loss_in_16_bits(monkeypatch, dtype, tolerance):
    """Breaks when float16 loses what is small in a large batch, or the gradient scaler's factor, which is more than it holds; and when
    a part of the products of bf16 goes to another's place."""
    monkeypatch.setattr("src.fused_loss.CPU_PIECES", 300)
    monkeypatch.setattr("src.fused_loss.CPU_ROWS", 70)
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(200, 16, generator=generator), torch.randn(800, 16, generator=generator)
    labels, scale, num_items = torch.randint(0, 800, (200,), generator=generator), 2.0**16, 50_000
    exact = [part.double().requires_grad_() for part in (states, weight)]
    expected = torch.autograd.grad(scale * mean_loss(exact[0] @ exact[1].t(), labels, num_items), exact)
    halves = states.to(dtype).requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(scale * linear_cross_entropy(*halves, labels, num_items), halves)
    for plain, fused in zip(expected, found, strict=True):
        assert (fused.double() - plain).norm() < tolerance * plain.norm()
