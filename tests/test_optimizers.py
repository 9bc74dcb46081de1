"""Optimizers: their steps by hand, their groups, their names."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from src.config import TrainingSettings
from src.optimizers import OptimizerError, RMSScaledOptimizer, build_optimizer, orthogonalise
from tests import tiny_run

SETTINGS = TrainingSettings(max_steps=1, learning_rate=0.1)
RECIPES = ("adamw", "adamw_rms_scaled", "muon", "adafactor_t5")


def tiny_model():
    return tiny_run.model_with(dropout_rate=0.0)


def test_first_step_is_relative_to_the_parameter():
    """Adam's first step has size 1 in each entry, so the parameter moves by lr x its RMS: the point of the recipe."""
    for size in (0.01, 10.0):
        parameter = nn.Parameter(torch.full((4, 3), size))
        parameter.grad = torch.tensor([[1.0, -2.0, 3.0]]).repeat(4, 1)
        RMSScaledOptimizer([{"params": [parameter]}], lr=0.1).step()
        expected = size * (1 - 0.1 * torch.tensor([[1.0, -1.0, 1.0]]).repeat(4, 1))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_steps_follow_adam():
    """Against torch's AdamW on a parameter that starts with an RMS of 1 and grows: steps relative to its size of the moment would
    grow with it, and did, exponentially."""
    ours, theirs = nn.Parameter(torch.tensor([1.0, -1.0])), nn.Parameter(torch.tensor([1.0, -1.0]))
    mine = RMSScaledOptimizer([{"params": [ours], "weight_decay": 0.1}], lr=0.2)
    reference = torch.optim.AdamW([theirs], lr=0.2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for gradient in ([-1.0, 2.0], [-0.5, 1.0], [-2.0, 0.1]):
        ours.grad, theirs.grad = torch.tensor(gradient), torch.tensor(gradient)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_a_parameter_at_zero_moves():
    """Without a floor under the RMS a zero offset would stay zero for ever."""
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    RMSScaledOptimizer([{"params": [parameter]}], lr=0.1).step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    """Muon's direction; a wrong coefficient lets it collapse or explode and training still runs, badly."""
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, *shape, generator=generator)).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_weight_decay_is_for_projections_alone():
    """Decaying embeddings, norms or position biases pulls apart what the model needs to keep."""
    model = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    optimizer = build_optimizer(model, replace(SETTINGS, weight_decay=0.5))
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]}
    kept = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    assert kept == {name for name in names if "layer_norm" in name or "relative_attention_bias" in name or name == "shared.weight"}


def test_all_but_projections_learn_at_their_share_of_the_rate():
    """At the full rate the first hundred steps undo embeddings that begin with what counting knows."""
    model = tiny_model()
    optimizer = build_optimizer(model, replace(SETTINGS, optimizer="muon", other_rate=0.25))
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        slower = "layer_norm" in name or "relative_attention_bias" in name or name == "shared.weight"
        assert rates[id(parameter)] == SETTINGS.learning_rate * (0.25 if slower else 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe):
    """A recipe that is selectable must work: the loss of one batch falls."""
    model, batch = tiny_model(), tiny_run.source().epoch(0)[0]
    optimizer = build_optimizer(model, replace(SETTINGS, optimizer=recipe, learning_rate=3e-3 if recipe == "adamw" else 0.03))
    losses = []
    for _ in range(25):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(map(math.isfinite, losses))


def test_every_trainable_parameter_is_in_exactly_one_group():
    """A forgotten parameter stays as it was drawn."""
    for recipe in RECIPES:
        model = tiny_model()
        model.shared.weight.requires_grad = False
        optimizer = build_optimizer(model, replace(SETTINGS, optimizer=recipe))
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_nothing_to_train():
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(OptimizerError, match="no trainable parameter: unfreeze"):
        build_optimizer(frozen, SETTINGS)
