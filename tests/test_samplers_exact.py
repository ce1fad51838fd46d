"""Samplers on processes whose solution is known: how fast deterministic ones converge, what stochastic ones draw.

The orders are printed: python -m pytest tests/test_samplers_exact.py -s
"""

import math

import pytest
import torch
from exact_mixture import GAUSSIAN, MIXTURE, Exact, error, slope
from torch import Tensor

from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

VP = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))
STOCHASTIC = ("ddpm", "euler_ancestral", "dpm_solver_sde", "consistency", "lcm")


def smooth_times(schedule: Schedule, n: int) -> list[float]:
    """Times between two fixed levels, even in the variable in which the schedule is smooth."""
    return [0.98 - 0.96 * i / (n - 1) for i in range(n)] if schedule.is_flow else schedule.timesteps(n, "exponential")


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


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name,options,schedule,low,high", ORDERS,
                         ids=[f"{n}-{o.get('order', '')}-{s.config.kind}" for n, o, s, _, _ in ORDERS])
def test_order_of_convergence(name, options, schedule, low, high, data):
    counts = (25, 49, 97)  # 3 k + 1, so that no group of a singlestep method is cut short
    errors = [error(name, schedule, smooth_times(schedule, n), data, **options) for n in counts]
    found = slope([n - 1 for n in counts], errors)
    print(f"{name} {options} {schedule.config.kind} {'gaussian' if data is GAUSSIAN else 'mixture'}: errors "
          f"{', '.join(f'{e:.1e}' for e in errors)}, order {found:.2f}")
    # on a Gaussian the errors of neighbouring orders partly cancel at these counts
    slack = 0.5 if data is GAUSSIAN else 0.0
    assert low - slack <= found <= high + slack


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
        def spy(x: Tensor, t: float, inputs=inputs) -> Tensor:
            inputs.append(x)
            return Exact(schedule)(x, t)

        x_T = torch.randn(4, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        get_sampler(sampler)(spy, x_T, times[:3], schedule, "sample", **(options if sampler == name else {}))
    torch.testing.assert_close(seen[name][1], seen["ddim"][1])
    if options.get("order") == 1:  # nor is that step corrected: the one after it starts at the same state
        torch.testing.assert_close(seen[name][2], seen["ddim"][2])


def test_every_deterministic_sampler_is_covered():
    assert {name for name, *_ in ORDERS} == set(SAMPLERS) - set(STOCHASTIC)


def gaussian_denoiser(schedule: Schedule, mean: Tensor, covariance: Tensor):
    """E[x_0 | x_t] for x_0 ~ N(mean, covariance) over C channels, x (B, C, 1, 1)."""
    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (mean + (x[:, :, 0, 0] - alpha * mean) @ gain.T)[:, :, None, None]

    return denoise


ANCESTRAL = pytest.mark.parametrize("name,options", [
    ("ddpm", {}), ("ddpm", {"variance": "large"}), ("ddim", {"eta": 0.5}), ("ddim", {"eta": 1.0}),
    ("euler_ancestral", {}), ("dpm_solver_sde", {"order": 1}), ("dpm_solver_sde", {"order": 2}),
    ("dpm_solver_sde", {"order": 3})])


def moments(sample, schedule: Schedule, times: list, last_draw: bool = False) -> tuple[float, float]:
    """How far mean and spread of what a sampler draws are from the exact ones, without drawing anything.

    The exact network of a Gaussian is linear, so x_0 = m + sum of g_k z_k over all the noise that was drawn. Image k
    of a batch gets z_k = 1 and the others 0, the last one gets none. The first state is drawn from its exact
    distribution; the jump from the last time to x_0 is exact as well. last_draw: noise is drawn after it too.
    """
    mean, std = GAUSSIAN.mean.item(), GAUSSIAN.std.item()
    (alpha_T, sigma_T), (alpha, sigma) = schedule.alpha_sigma(times[0]), schedule.alpha_sigma(times[-1])
    count = len(times) + 1 + last_draw
    draws = torch.eye(count, dtype=torch.float64)[:, :, None, None, None].unbind(1)  # (count, 1, 1, 1) each
    x_T = alpha_T * mean + math.hypot(alpha_T * std, sigma_T) * draws[0]
    later = iter(draws[1:])
    x_0 = sample(Exact(schedule, GAUSSIAN), x_T, lambda: next(later)).flatten()
    spread = (x_0[:-1] - x_0[-1]).square().sum().sqrt().item()
    return abs(x_0[-1].item() - mean), abs(spread - alpha * std**2 / math.hypot(alpha * std, sigma))


@ANCESTRAL
def test_the_bias_of_stochastic_samplers_vanishes(name, options):
    biases = []
    for n in (26, 51, 101):
        times = VP.timesteps(n, "exponential")
        biases.append(moments(lambda denoise, x_T, noise: get_sampler(name)(
            denoise, x_T, times, VP, "sample", noise, **options), VP, times))
    found = slope((25, 50, 100), [spread for _, spread in biases])
    print(f"{name} {options}: errors of the mean {', '.join(f'{e:.0e}' for e, _ in biases)}, of the spread "
          f"{', '.join(f'{e:.1e}' for _, e in biases)}, order {found:.2f}")
    # order 3 has the weights of order 3, but with noise in every step the spread gains less
    assert found > {1: 0.85, 2: 1.85, 3: 2.1}[options.get("order", 1)] and biases[-1][1] < 0.02
    assert max(mean for mean, _ in biases) < 1e-12


@ANCESTRAL
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

    def to_the_start(x: Tensor, t: float) -> Tensor:
        alpha, sigma = VP.alpha_sigma(t)
        return x * std / math.sqrt(alpha**2 * std**2 + sigma**2)

    for name, n in (("lcm", 1), ("lcm", 4), ("consistency", 1), ("consistency", 4)):
        x_0 = get_sampler(name)(to_the_start, noise(), VP.timesteps(n), VP, "sample", noise)
        assert abs(x_0.mean().item()) < 4.0 * std / count**0.5
        assert abs(x_0.std().item() - std) < 4.0 * std / (2 * count) ** 0.5 + 0.004


CONSISTENCY = ("lcm", "consistency")  # the mean is no consistency model


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in CONSISTENCY])
def test_more_steps_draw_the_mixture(name):
    """The mixture itself, from 50 steps: its distribution function at 9 points."""
    schedule = FLOW if name.startswith("flow") else VP
    count, random = 4_000, torch.Generator().manual_seed(3)

    def noise() -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=random, dtype=torch.float64)

    x_0 = get_sampler(name)(Exact(schedule), noise(), schedule.timesteps(50), schedule, "sample", noise)
    points = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)
    found = (x_0.flatten()[None] <= points[:, None]).double().mean(1)
    assert (found - MIXTURE.cdf(points, 1.0, 0.0)).abs().max() < 4.0 * 0.5 / count**0.5 + 0.02
