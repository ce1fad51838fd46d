"""Optimizers and learning rates."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from model.blocks import ScalarMLP
from training.muon import orthogonalize
from training.optim import OptimConfig, build_optimizer, learning_rate


def test_learning_rate_end_points():
    config = OptimConfig(learning_rate=0.1, warmup=10, schedule="cosine")
    assert learning_rate(0, 100, config) == pytest.approx(0.01)
    assert learning_rate(9, 100, config) == learning_rate(10, 100, config) == pytest.approx(0.1)
    assert learning_rate(55, 100, config) == pytest.approx(0.05)  # half of the cosine
    assert 0 < learning_rate(99, 100, config) < 1e-4
    wsd = replace(config, schedule="wsd", decay=0.3)
    assert learning_rate(10, 100, wsd) == learning_rate(70, 100, wsd) == pytest.approx(0.1)
    assert learning_rate(85, 100, wsd) == pytest.approx(0.05)
    assert learning_rate(99, 100, wsd) == pytest.approx(0.1 / 30)
    constant = replace(config, schedule="constant")
    assert {learning_rate(step, 100, constant) for step in range(10, 100)} == {0.1}
    assert learning_rate(0, 100, replace(config, warmup=0)) == pytest.approx(0.1)
    for schedule in (config, wsd):
        after = [learning_rate(step, 100, schedule) for step in range(10, 100)]
        assert after == sorted(after, reverse=True)


def test_weight_decay_acts_on_matrices_only():
    """Without a gradient signal one step multiplies a decayed weight by 1 - rate * decay and leaves the others."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5)).step()
    for name, parameter in model.named_parameters():
        expected = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_of_a_child_learn_at_their_share_of_the_rate(optimizer):
    """One step from zero moves them by that share of what their like elsewhere move; biases go at the full rate."""
    model = nn.ModuleDict({"text": nn.Linear(6, 6), "rest": nn.Linear(6, 6)})
    random = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    for layer in model.values():
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.weight.grad, layer.bias.grad = random.clone(), torch.ones(6)
    config = OptimConfig(optimizer=optimizer, slow=("text",))
    stepped = build_optimizer(model, config)
    for group in stepped.param_groups:
        group["lr"] = 0.1 * group["share"]
    stepped.step()
    torch.testing.assert_close(model["text"].weight, 0.25 * model["rest"].weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model["text"].bias, model["rest"].bias)
    assert model["rest"].weight.abs().max() > 0.01
    with pytest.raises(ValueError, match="optim.slow: txt; valid: text, rest"):
        build_optimizer(model, OptimConfig(slow=("txt",)))
    with pytest.raises(ValueError, match="slow_share: 0.0; valid"):
        OptimConfig(slow_share=0.0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_embeddings_of_a_child_learn_faster(optimizer):
    """One step from zero moves all of an input of a network by that factor of what biases elsewhere move."""
    model = nn.ModuleDict({"jump": ScalarMLP(6, 6), "rest": nn.Linear(6, 6)})
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
        parameter.grad = torch.ones_like(parameter)
    stepped = build_optimizer(model, OptimConfig(optimizer=optimizer, fast=("jump",), fast_share=4.0, weight_decay=0.0))
    for group in stepped.param_groups:
        group["lr"] = 0.1 * group["share"]
    stepped.step()
    for moved in model["jump"].parameters():  # matrices of such an input, too
        torch.testing.assert_close(moved, 4 * model["rest"].bias.expand_as(moved))
    assert sorted(len(group["params"]) for group in stepped.param_groups) == [1, 1, 4]
    with pytest.raises(ValueError, match="optim.fast: leap; valid: jump, rest"):
        build_optimizer(model, OptimConfig(fast=("leap",)))
    with pytest.raises(ValueError, match="fast_share: 0.5; valid: from 1 up"):
        OptimConfig(fast_share=0.5)


@pytest.mark.parametrize("rows, columns, smallest, tolerance", [
    (16, 144, 1.0, 0.02), (144, 16, 1.0, 0.02), (32, 32, 1e-6, 0.4), (32, 288, 1e-6, 0.4)])
def test_orthogonalized_matches_the_iteration_in_fp64(rows, columns, smallest, tolerance):
    """Also where singular values fall over six decades, as in gradients of few images: there the smallest are the
    bf16 rounding of the largest, and directions agree less; none may grow."""
    draw = torch.Generator().manual_seed(0)
    side = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(3, n, side, generator=draw, dtype=torch.float64))[0]
                   for n in (rows, columns))
    values = torch.logspace(0, math.log10(smallest), side, dtype=torch.float64)
    matrices = left * values @ right.mT
    wanted = values / values.norm()
    for _ in range(5):  # a polynomial of the singular values: Jordan et al. 2024
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    expected = left * wanted @ right.mT
    given = orthogonalize(matrices.float()).double()
    assert given.shape == matrices.shape
    assert (given - expected).norm() < tolerance * expected.norm()
    assert torch.linalg.svdvals(given).max() < 1.5
