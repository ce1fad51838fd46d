"""The comparison of few-step methods: its data, its losses and its scores against closed forms of one Gaussian."""
import math

import pytest
import torch

from benchmarks import few_steps, plane
from benchmarks.few_steps import drawn_by, halves, matching_loss, mean_flow_loss, shortcut_loss, two_halves
from benchmarks.plane import Net, Plane, five, path_of, sliced_wasserstein

MEAN, STD = torch.tensor([[0.5, -0.3]], dtype=torch.float64), 0.4
GAUSSIAN = Plane(torch.ones(1, dtype=torch.float64), MEAN, STD)


def carried(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Where the path through x (B, 2) at t (B,) is at r (B,): each point keeps its number of standard deviations."""
    t, r = t[:, None], r[:, None]
    spread_t, spread_r = (((1 - s) * STD).square() + s.square() for s in (t, r))
    return (1 - r) * MEAN + (spread_r / spread_t).sqrt() * (x - (1 - t) * MEAN)


def exact(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The mean velocity (B, 2) of these paths; at r = t the velocity."""
    if torch.equal(t, r):
        return velocity(x, t)
    return (x - carried(x, t, r)) / (t - r)[:, None]


velocity = GAUSSIAN.velocity


def points(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return (torch.randn(count, 2, generator=random, dtype=torch.float64),
            torch.linspace(0.25, 1.0, count, dtype=torch.float64))


def test_the_velocity_is_the_slope_of_the_path_and_its_end_is_known():
    x, t = points()
    h = 1e-5
    slope = (carried(x, t, t + h) - carried(x, t, t - h)) / (2 * h)
    assert torch.allclose(velocity(x, t), slope, atol=1e-8)
    one = torch.ones_like(t)
    assert torch.allclose(GAUSSIAN.ends(x), carried(x, one, 0 * one), atol=1e-4)


def test_the_paths_of_the_mixture_end_in_its_distribution():
    data, random = five(), torch.Generator().manual_seed(0)
    ends = data.ends(torch.randn(2000, 2, generator=random), steps=100)
    fresh = [data.samples(2000, random) for _ in range(2)]
    assert sliced_wasserstein(ends, fresh[0]) < 2.5 * sliced_wasserstein(*fresh)


def test_mean_flow_has_its_minimum_at_the_mean_velocity():
    x, t = points()
    r = 0.3 * t
    assert mean_flow_loss(exact, x, t, r, velocity(x, t)) < 1e-12

    def wrong(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return 1.05 * exact(x, t, r)

    assert mean_flow_loss(wrong, x, t, r, velocity(x, t)) > 1e-2


def test_two_halves_of_an_exact_step_are_the_step():
    x, t = points()
    half = torch.full_like(t, 0.125)
    assert torch.allclose(two_halves(exact, x, t, half), exact(x, t, t - 0.25), atol=1e-10)
    t, half = halves(torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    steps = t[:len(half)] / (2 * half)
    assert len(half) == 16 and torch.equal(steps, steps.round()) and (steps >= 1).all() and (t <= 1).all()


def test_the_loss_of_shortcuts_is_zero_at_the_truth():
    x, t = points()
    t[:3] = torch.tensor([0.5, 0.75, 1.0])

    def net(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.cat([exact(x[i:i + 1], t[i:i + 1], r[i:i + 1]) for i in range(len(x))])

    half = torch.tensor([0.25, 0.125, 0.5], dtype=torch.float64)
    assert shortcut_loss(net, x, t, half, velocity(x, t)) < 1e-12
    assert shortcut_loss(lambda *at: 1.05 * net(*at), x, t, half, velocity(x, t)) > 1e-4


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_flow_map_that_is_exact_ends_where_paths_end(calls):
    x = points()[0]
    one = torch.ones(len(x), dtype=torch.float64)
    found = drawn_by(exact, x, calls, True, torch.Generator())
    assert torch.allclose(found, carried(x, one, 0 * one), atol=1e-6)


def test_distribution_matching_rests_at_the_truth_and_leads_to_it():
    """With the same network on both sides nothing moves; samples of a shifted Gaussian move back by its shift."""
    other = Plane(GAUSSIAN.weight, MEAN + torch.tensor([[1.0, 0.0]]), STD)

    def fake(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return other.velocity(x, t)

    random = torch.Generator().manual_seed(0)
    for network, moves in ((velocity, False), (fake, True)):
        x = other.samples(64, random).requires_grad_(True)
        matching_loss(x, network, velocity, random).backward()
        assert x.grad is not None
        if moves:
            assert (x.grad[:, 0] > 0).all() and x.grad[:, 1].abs().max() < 1e-4
        else:
            assert x.grad.abs().max() < 1e-5


def test_the_distance_of_a_shifted_set_is_known():
    """A shift by c moves the projection on a line by its cosine: the mean of the squares is half of |c|^2."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(x, x.flip(0)) == 0
    assert math.isclose(sliced_wasserstein(x, x + torch.tensor([0.3, 0.4])), 0.5 / math.sqrt(2), rel_tol=1e-5)


def test_what_a_network_knows_of_intervals_begins_without_effect():
    torch.manual_seed(0)
    net, (x, t) = Net(), points()
    x, t = x.float(), t.float()
    assert torch.equal(net(x, t, 0.5 * t), net(x, t))
    path, end = path_of(lambda x, t: torch.ones_like(x), x, 4)
    assert len(path) == 4 and torch.equal(path[0], x) and torch.allclose(end, x - 1)


def test_every_method_is_compared(monkeypatch):
    monkeypatch.setattr(plane, "SCORED", 256)
    monkeypatch.setattr(few_steps, "SCORED", 256)
    found = few_steps.round_of(five(), 0, 14)
    assert set(few_steps.METHODS) < set(found) and all(len(row) == 5 for row in found.values())
    assert all(torch.tensor(found[name]).isfinite().all() for name in few_steps.METHODS)
    text = few_steps.table([found, found])
    assert len(text.splitlines()) == 2 + len(found) and "MeanFlow" in text
