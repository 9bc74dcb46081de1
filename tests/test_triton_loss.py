"""The GPU kernel of the loss against float64: compiled where there is a GPU, else in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch

from src.triton_loss import BLOCK, loss_and_gradient_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("vocab_size", [300, 2 * BLOCK + 70])
def test_loss_and_gradient_are_those_of_float64(vocab_size):
    """Breaks when the running sum is not rescaled, the last block reads beyond its row, or a weight is left out."""
    generator = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(5, vocab_size, generator=generator)).half()
    logits[1, -1], logits[2, 0] = 40, 40  # the highest comes last, and first
    labels, weights = torch.randint(vocab_size, (5,), generator=generator), torch.tensor([0.5, 1, 2, 0, 0.25])
    exact = logits.double().requires_grad_()
    expected = (torch.nn.functional.cross_entropy(exact, labels, reduction="none") * weights).sum()
    expected.backward()
    found = logits.to(DEVICE)
    loss = loss_and_gradient_(found, labels.to(DEVICE), weights.to(DEVICE))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found.double().cpu(), exact.grad, rtol=1e-3, atol=1e-6)
