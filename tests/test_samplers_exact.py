"""Samplers on processes whose solution is known: how fast deterministic ones converge, what stochastic ones draw.

The data are one number from a mixture of two Gaussians. The exact network is then E[x_0 | x_t] in closed form, and the
probability-flow ODE moves every point along its quantile, so that its exact end is known too.
"""

import math

import pytest
import torch
from torch import Tensor

from diffusion.denoise import TimedDenoiser
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

VP = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))
STOCHASTIC = ("ddpm", "euler_ancestral", "dpm_solver_sde", "lcm")
WEIGHT, MEAN, STD = torch.tensor([[0.3, 0.7], [-1.0, 0.8], [0.3, 0.5]], dtype=torch.float64)


class ExactMixture(TimedDenoiser):
    """E[x_0 | x_t] of the mixture; goes through `at` so that the time keeps its fp64 digits."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def at(self, t: float):
        return lambda x, _: mixture_x_0(x, *self.schedule.alpha_sigma(t))


def mixture_x_0(x: Tensor, alpha: float, sigma: float) -> Tensor:
    variance = alpha**2 * STD**2 + sigma**2  # (2,) of x_t in each component
    away = x[..., None] - alpha * MEAN
    share = torch.softmax(WEIGHT.log() - 0.5 * variance.log() - 0.5 * away**2 / variance, -1)
    return (share * (MEAN + alpha * STD**2 / variance * away)).sum(-1)


def mixture_cdf(x: Tensor, alpha: float, sigma: float) -> Tensor:
    spread = (alpha**2 * STD**2 + sigma**2).sqrt()
    return (WEIGHT * torch.special.ndtr((x[..., None] - alpha * MEAN) / spread)).sum(-1)


def mixture_quantile(p: Tensor, alpha: float, sigma: float) -> Tensor:
    low, high = torch.full_like(p, -20.0), torch.full_like(p, 20.0)
    for _ in range(70):
        middle = (low + high) / 2
        below = mixture_cdf(middle, alpha, sigma) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def smooth_times(schedule: Schedule, n: int) -> list[float]:
    """Times between two fixed levels, even in the variable in which the schedule is smooth."""
    return [0.98 - 0.96 * i / (n - 1) for i in range(n)] if schedule.is_flow else schedule.timesteps(n, "exponential")


def error(name: str, schedule: Schedule, times: list, **options) -> float:
    """Largest distance from the exact solution over 41 starting points. The last jump, from the last time to x_0, is
    made by both: it is the same for every n and no part of the solver."""
    x_T = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64).reshape(41, 1, 1, 1)
    first, last = schedule.alpha_sigma(times[0]), schedule.alpha_sigma(times[-1])
    exact = mixture_x_0(mixture_quantile(mixture_cdf(x_T, *first), *last), *last)
    found = get_sampler(name)(ExactMixture(schedule), x_T, times, schedule, "sample", **options)
    return (found - exact).abs().max().item()


# name, options, schedule, band of the order of convergence
ORDERS = [
    ("ddim", {}, VP, 0.8, 1.2),
    ("euler", {}, VP, 0.8, 1.2),
    ("heun", {}, VP, 1.85, 2.2),
    ("pndm", {}, VP, 1.85, 2.4),
    ("dpm_solver_multistep", {"order": 1}, VP, 0.8, 1.2),
    ("dpm_solver_multistep", {"order": 2}, VP, 1.85, 2.3),
    ("dpm_solver_multistep", {"order": 3}, VP, 2.85, 3.6),
    ("dpm_solver_singlestep", {"order": 2}, VP, 1.75, 2.2),
    ("dpm_solver_singlestep", {"order": 3}, VP, 2.6, 3.3),
    ("unipc", {"order": 1}, VP, 1.75, 2.2),  # the corrector adds one order
    ("unipc", {"order": 2}, VP, 2.45, 3.3),
    ("unipc", {"order": 3}, VP, 3.75, 4.6),
    ("flow_euler", {}, FLOW, 0.8, 1.2),
    ("flow_heun", {}, FLOW, 1.75, 2.3),
    ("dpm_solver_multistep", {"order": 2}, FLOW, 1.6, 2.6),
]


@pytest.mark.parametrize("name,options,schedule,low,high", ORDERS,
                         ids=[f"{n}-{o.get('order', '')}-{s.config.kind}" for n, o, s, _, _ in ORDERS])
def test_order_of_convergence(name, options, schedule, low, high):
    counts = (25, 49, 97)  # 3 k + 1, so that no group of a singlestep method is cut short
    errors = [error(name, schedule, smooth_times(schedule, n), **options) for n in counts]
    x = torch.log(torch.tensor(counts, dtype=torch.float64) - 1.0)
    y = torch.log(torch.tensor(errors, dtype=torch.float64))
    slope = -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    print(f"{name} {options} {schedule.config.kind}: errors {', '.join(f'{e:.1e}' for e in errors)}, order {slope:.2f}")
    assert low <= slope <= high


@pytest.mark.parametrize("schedule", [FLOW, ZERO], ids=["flow", "zero"])
@pytest.mark.parametrize("name,options", [
    ("heun", {}), ("pndm", {}), ("dpm_solver_multistep", {"order": 2}), ("dpm_solver_multistep", {"order": 3}),
    ("dpm_solver_singlestep", {"order": 2}), ("dpm_solver_singlestep", {"order": 3}), ("unipc", {"order": 1}),
    ("unipc", {"order": 2}), ("unipc", {"order": 3})])
def test_higher_orders_pay_from_pure_noise(name, options, schedule):
    """Where alpha = 0 at the start, the log SNR is infinite and every method takes its first step as DDIM does."""
    times = schedule.timesteps(40)[:-1]
    assert error(name, schedule, times, **options) < 0.5 * error("ddim", schedule, times)
    seen: dict[str, list[Tensor]] = {name: [], "ddim": []}
    for sampler, inputs in seen.items():
        def spy(x: Tensor, t: Tensor, inputs=inputs) -> Tensor:
            inputs.append(x)
            return ExactMixture(schedule)(x, t)

        x_T = torch.randn(4, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        get_sampler(sampler)(spy, x_T, times[:3], schedule, "sample", **(options if sampler == name else {}))
    torch.testing.assert_close(seen[name][1], seen["ddim"][1])
    if options.get("order") == 1:  # nor is that step corrected: the one after it starts at the same state
        torch.testing.assert_close(seen[name][2], seen["ddim"][2])


def test_every_deterministic_sampler_is_covered():
    assert {name for name, *_ in ORDERS} == set(SAMPLERS) - set(STOCHASTIC)


def gaussian_denoiser(schedule: Schedule, mean: Tensor, covariance: Tensor):
    """E[x_0 | x_t] for x_0 ~ N(mean, covariance) over C channels, x (B, C, 1, 1)."""
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t[0].item())
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (mean + (x[:, :, 0, 0] - alpha * mean) @ gain.T)[:, :, None, None]

    return denoise


@pytest.mark.parametrize("name,options", [
    ("ddpm", {}), ("ddpm", {"variance": "large"}), ("ddim", {"eta": 0.5}), ("ddim", {"eta": 1.0}),
    ("euler_ancestral", {}), ("dpm_solver_sde", {"order": 1}), ("dpm_solver_sde", {"order": 2}),
    ("dpm_solver_sde", {"order": 3})])
def test_stochastic_samplers_reach_the_distribution(name, options):
    """Mean and covariance of 20 000 draws, within four standard errors and the bias that the steps leave."""
    mean, covariance = torch.tensor([0.4, -0.3]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    count, random = 20_000, torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(count, 2, 1, 1, generator=random)

    times = VP.timesteps(150)
    x_0 = get_sampler(name)(gaussian_denoiser(VP, mean, covariance), noise(), times, VP, "sample", noise, **options)
    x_0 = x_0[:, :, 0, 0]
    variance = covariance.diagonal()
    assert ((x_0.mean(0) - mean).abs() < 4.0 * (variance / count).sqrt() + 0.01).all()
    expected_error = ((covariance**2 + torch.outer(variance, variance)) / count).sqrt()
    assert ((torch.cov(x_0.T) - covariance).abs() < 4.0 * expected_error + 0.015).all()


def test_consistency_sampling_draws_the_distribution():
    """With the exact map from any point to its start, every further call keeps the distribution it has."""
    count, random, std = 20_000, torch.Generator().manual_seed(2), 0.7

    def noise() -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=random)

    def to_the_start(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = VP.alpha_sigma(t[0].item())
        return x * std / math.sqrt(alpha**2 * std**2 + sigma**2)

    for n in (1, 4):
        x_0 = get_sampler("lcm")(to_the_start, noise(), VP.timesteps(n), VP, "sample", noise)
        assert abs(x_0.mean().item()) < 4.0 * std / count**0.5
        assert abs(x_0.std().item() - std) < 4.0 * std / (2 * count) ** 0.5 + 0.004


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])  # the mean is no consistency model
def test_more_steps_draw_the_mixture(name):
    """The mixture itself, from 50 steps: its distribution function at 9 points."""
    schedule = FLOW if name.startswith("flow") else VP
    count, random = 4_000, torch.Generator().manual_seed(3)

    def noise() -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=random, dtype=torch.float64)

    x_0 = get_sampler(name)(ExactMixture(schedule), noise(), schedule.timesteps(50), schedule, "sample", noise)
    points = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)
    found = (x_0.flatten()[None] <= points[:, None]).double().mean(1)
    assert (found - mixture_cdf(points, 1.0, 0.0)).abs().max() < 4.0 * 0.5 / count**0.5 + 0.02
