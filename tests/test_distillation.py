"""Consistency functions: the boundary, the truth of a mixture as the minimum of the loss, and a network that learns
it."""
import math

import pytest
import torch
from exact_mixture import GAUSSIAN, MIXTURE, Exact
from torch import nn

from diffusion.distillation import (
    consistency_function,
    consistency_loss,
    earlier_times,
    huber,
    is_end,
    levels,
    next_point,
)
from diffusion.noise import PerImageNoise
from diffusion.prediction import check_prediction_type, prediction_from_x_0
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule, ScheduleConfig, per_image

VP, NOISE = Schedule(ScheduleConfig()), Schedule(ScheduleConfig(kind="cosine", zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))
CASES = [(VP, kind) for kind in ("epsilon", "sample", "v_prediction", "flow")] + [
    (NOISE, "v_prediction"), (NOISE, "sample"), (FLOW, "flow"), (FLOW, "sample"), (FLOW, "v_prediction")]
NAMES = ["discrete " + kind for _, kind in CASES[:4]] + ["from noise v", "from noise x_0", "flow", "flow x_0", "flow v"]
cases = pytest.mark.parametrize(("schedule", "kind"), CASES, ids=NAMES)


def exact_end(schedule: Schedule, x: torch.Tensor, t: torch.Tensor, data) -> torch.Tensor:
    """The true end of the path of each x (B, 1, 1, 1) at its time, fp64."""
    return data.carried(x.double(), wide(schedule, t), (1.0, 0.0))


def wide(schedule: Schedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma), (B, 1, 1, 1, 1) fp64 each, to stand beside the components of a mixture."""
    alpha, sigma = levels(schedule, t)
    return alpha.double()[..., None], sigma.double()[..., None]


def truth(schedule: Schedule, kind: str, data):
    """A denoiser whose consistency function is the true one."""
    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (level.double() for level in levels(schedule, t))
        zero = prediction_from_x_0(torch.zeros_like(x), x, alpha, sigma, kind)
        skip = consistency_function(zero, x, alpha, sigma, kind) / x  # the share of x_t
        x_0 = (exact_end(schedule, x, t, data) - skip * x) / (1.0 - skip)
        return prediction_from_x_0(x_0, x.double(), alpha, sigma, kind)
    return denoise


def times_and_points(schedule: Schedule, count: int = 32):
    """Times (B,) all over the schedule, none next to the ends, and x_t (B, 1, 1, 1) fp64."""
    u = torch.linspace(0.05, 0.95, count)
    t = u if schedule.is_flow else (u * schedule.steps).long()
    return t, torch.linspace(-2.0, 2.1, count, dtype=torch.float64).reshape(-1, 1, 1, 1)


@cases
def test_the_boundary_condition_holds_exactly(schedule, kind):
    """f(x, end) = x to the bit, whatever the network says."""
    random = torch.Generator().manual_seed(0)
    x, prediction = (torch.randn(4, 2, 3, 3, generator=random) for _ in range(2))
    end = torch.zeros(4) if schedule.is_flow else torch.full((4,), -1)
    assert is_end(schedule, end).all()
    assert torch.equal(consistency_function(prediction, x, *levels(schedule, end), kind), x)
    assert torch.equal(consistency_function(prediction, x, 1.0, 0.0, kind), x)


@cases
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
def test_the_loss_is_zero_at_the_truth_and_nowhere_else(schedule, kind, data):
    """Both points lie on the same path, which is known in closed form."""
    check_prediction_type(schedule, kind)
    t, x_t = times_and_points(schedule)
    for gap in (1.0, 0.5, 0.1):
        r = earlier_times(schedule, t, gap)
        x_r = data.carried(x_t, wide(schedule, t), wide(schedule, r))
        right = truth(schedule, kind, data)
        assert consistency_loss(right, x_t, t, x_r, r, schedule, kind).max() < 2e-5

        def mean(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # what ordinary training reaches
            alpha, sigma = wide(schedule, t)
            return prediction_from_x_0(data.x_0(x, alpha, sigma), x, alpha[..., 0], sigma[..., 0], kind)

        assert consistency_loss(mean, x_t, t, x_r, r, schedule, kind).mean() > 0.01


def test_one_step_along_the_path_has_the_order_of_ddim():
    """The error of a point shrinks with the square of the gap, as that of one step of a first-order method does."""
    t, x_t = torch.full((41,), 0.6), torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    prediction = Exact(FLOW, MIXTURE, "flow")(x_t, 0.6)
    found = []
    for gap in (0.08, 0.04, 0.02):
        r = earlier_times(FLOW, t.double(), gap)
        there = FLOW.alpha_sigma(r[0].item())
        x_r = next_point(prediction, x_t, FLOW.alpha_sigma(0.6), there, "flow")
        found.append((x_r - MIXTURE.carried(x_t, FLOW.alpha_sigma(0.6), there)).abs().max().item())
    assert 1.8 < math.log2(found[0] / found[1]) < 2.2 and 1.8 < math.log2(found[1] / found[2]) < 2.2


def test_earlier_times_are_earlier_and_end():
    t = torch.arange(1000)
    for gap in (1.0, 0.5, 0.01, 1e-6):
        r = earlier_times(VP, t, gap)
        assert (r < t).all() and (r >= -1).all() and r[0] == -1
    assert (earlier_times(VP, t, 1.0) == -1).all() and earlier_times(VP, torch.tensor([999]), 0.5).item() == 499
    t = torch.linspace(0.0005, 1.0, 50)
    assert (earlier_times(FLOW, t, 0.1) < t).all() and earlier_times(FLOW, t, 0.1)[0] == 0
    assert (earlier_times(FLOW, t, 1.0) == 0).all()


def test_no_gradient_reaches_what_is_right():
    """The gradient is that of the point with more noise alone, and finite where the two agree."""
    weight = torch.tensor(0.3, requires_grad=True)
    seen = []

    def student(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return weight * x

    t, x_t = times_and_points(FLOW, 4)
    consistency_loss(student, x_t, t, 0.9 * x_t, earlier_times(FLOW, t, 0.2), FLOW, "flow").sum().backward()
    assert seen == [False, True] and weight.grad is not None and weight.grad.isfinite()
    same = torch.zeros(2, 3, requires_grad=True)
    for offset in (0.0, 0.1):
        huber(same, torch.zeros(2, 3), offset).sum().backward()
    assert torch.equal(same.grad, torch.zeros(2, 3))


class Small(nn.Module):
    """A network of one number and its time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x, t = x.reshape(-1, 1), t.reshape(-1, 1).float() * (0.001 if t.dtype == torch.int64 else 1.0)
        waves = [torch.sin(math.pi * k * t) for k in (0.5, 1, 2, 4)]
        return self.layers(torch.cat([x, t, x * t, x * (1 - t), (3 * x).tanh(), *waves], dim=1)).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("schedule", "kind"), [(FLOW, "flow"), (NOISE, "v_prediction"), (VP, "epsilon"),
                                                (NOISE, "sample")], ids=["flow", "v", "epsilon", "x_0"])
def test_a_small_network_comes_near_the_truth(schedule, kind):
    """After tuning along the paths of the exact network one call is far nearer to the true end than the mean is."""
    torch.manual_seed(0)
    random, net = torch.Generator().manual_seed(0), Small()
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    steps = 350
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps) + 1e-5
        u = torch.rand(256, generator=random)
        t = u if schedule.is_flow else (u * schedule.steps).long()
        if kind == "epsilon":
            t = t.clamp(max=700)  # nearer to pure noise x_0 is eps divided by almost nothing
        alpha, sigma = levels(schedule, t)
        which = torch.multinomial(MIXTURE.weight, 256, replacement=True, generator=random)
        x_0 = (MIXTURE.mean[which] + MIXTURE.std[which] * torch.randn(256, generator=random)).float()
        x_t = alpha * x_0.reshape(-1, 1, 1, 1) + sigma * torch.randn(256, 1, 1, 1, generator=random)
        mean = MIXTURE.x_0(x_t.double(), *wide(schedule, t)).float()
        r = earlier_times(schedule, t, 0.1)
        x_r = next_point(prediction_from_x_0(mean, x_t, alpha, sigma, kind), x_t, (alpha, sigma), levels(schedule, r),
                         kind)
        loss = consistency_loss(net, x_t, t, x_r, r, schedule, kind, offset=0.01).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    start = 700 if kind == "epsilon" else schedule.last
    t, points = torch.full((41,), start), torch.linspace(-1.5, 1.5, 41).reshape(-1, 1, 1, 1)
    exact = exact_end(schedule, points, t, MIXTURE)
    with torch.no_grad():
        found = consistency_function(net(points, t), points, *levels(schedule, t), kind)
    mean = MIXTURE.x_0(points.double(), *schedule.alpha_sigma(start))
    error, before = ((value - exact).square().mean().sqrt().item() for value in (found, mean))
    print(f"{kind}: {before:.3f} -> {error:.3f}")
    assert error < 0.35 * before


def test_the_sampler_draws_the_mixture_from_the_true_function():
    """Whatever the number of steps: mean and spread are those of the data."""
    right = truth(NOISE, "v_prediction", GAUSSIAN)

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return right(x, torch.full((len(x),), t)).to(x.dtype)

    for steps in (1, 3):
        noise = PerImageNoise(range(400), (1, 1, 1))
        x_0 = get_sampler("consistency")(denoise, noise(), NOISE.timesteps(steps), NOISE, "v_prediction", noise)
        assert abs(x_0.mean().item() - 0.4) < 0.1 and abs(x_0.std().item() - 0.5) < 0.07


def test_levels_are_those_of_the_schedule():
    t = torch.tensor([-1, 0, 500, 999])
    alpha, sigma = levels(NOISE, t)
    assert alpha[0] == 1 and sigma[0] == 0
    assert torch.equal(alpha[1:].flatten(), NOISE.alpha(t[1:])) and torch.equal(sigma[1:].flatten(), NOISE.sigma(t[1:]))
    assert per_image(t, alpha).shape == alpha.shape
