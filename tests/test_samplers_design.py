"""Where samplers differ from diffusers by design (docs/samplers.md): who is right, on processes whose answer is known.

Here diffusers runs as it comes, on its own grid and its own tables, with the exact network of a mixture or a Gaussian.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from exact_mixture import Exact, distance, error, slope, starts
from test_samplers_exact import moments

from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

VP = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def theirs(scheduler, x, kind="epsilon", denoise=None, **step_options):
    """x_0 of a diffusers scheduler over the times it has chosen, from x."""
    denoise = denoise or Exact(VP, kind=kind)
    for t in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(x, t), t.item())
        x = scheduler.step(prediction, t, x, **step_options).prev_sample
    return x


def test_ddim_steps_to_the_next_time_of_its_grid():
    """On "linspace" diffusers steps to t - T // n, short of the next time that it tells the network. Neither is wrong
    in the limit: both are of first order, and on this mixture diffusers is the nearer one by 10 to 30 %."""
    counts, ours, found = (25, 50, 100), [], []
    for n in counts:
        scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample=False, **BETAS)
        scheduler.set_timesteps(n)
        times = VP.timesteps(n, "linspace")
        assert scheduler.timesteps.tolist() == times
        ours.append(error("ddim", VP, times, kind="epsilon"))
        found.append(distance(theirs(scheduler, starts()), VP, times))
    print(f"ddim on linspace: errors ours {ours}, diffusers {found}")
    assert all(0.7 < slope(counts, errors) < 1.3 for errors in (ours, found))
    assert all(0.6 < b / a < 1.1 for a, b in zip(ours, found))


@pytest.mark.parametrize("n", [10, 25, 50])
def test_pndm_extrapolates_what_belongs_together(n):
    """diffusers extrapolates the raw v, whose alpha and sigma are those of other times; with eps it is as near."""
    found = []
    for kind in ("v_prediction", "epsilon"):
        scheduler = PNDMScheduler(timestep_spacing="leading", skip_prk_steps=True, set_alpha_to_one=True,
                                  prediction_type=kind, **BETAS)
        scheduler.set_timesteps(n)
        found.append(distance(theirs(scheduler, starts(), kind), VP, VP.timesteps(n, "leading")))
    ours = error("pndm", VP, VP.timesteps(n, "leading"), kind="v_prediction")
    assert ours < 0.5 * found[0] and ours == pytest.approx(found[1], rel=0.05)


def in_lambda_units(n, x, data_denoise, noise=None, **options):
    """x_0 of diffusers' DPM-Solver++ over our "exponential" grid with our levels, which is what its formulas see."""
    times = VP.timesteps(n, "exponential")
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", **BETAS, **options)
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.tensor([*(VP.sigma(t) / VP.alpha(t) for t in times), 0.0], dtype=torch.float64)
    scheduler.timesteps = torch.tensor(times, dtype=torch.float64)
    for t in scheduler.timesteps:
        draw = {} if noise is None else {"variance_noise": noise() if t != scheduler.timesteps[-1] else 0 * x}
        x = scheduler.step(data_denoise(x, t.item()), t, x, **draw).prev_sample
    return x


def test_third_order_is_of_third_order():
    """DPM-Solver++(3M) with the exact weight of the curvature, and with the half of it that the authors' code has."""
    counts, ours, found = (25, 49, 97), [], []
    for n in counts:
        times = VP.timesteps(n, "exponential")
        ours.append(error("dpm_solver_multistep", VP, times, order=3))
        found.append(distance(in_lambda_units(n, starts(), Exact(VP), solver_order=3), VP, times))
    orders = [slope([n - 1 for n in counts], errors) for errors in (ours, found)]
    print(f"3M: ours {orders[0]:.2f}, diffusers {orders[1]:.2f}")
    assert orders[0] > 2.85 and orders[1] < 2.6 and ours[-1] < 0.5 * found[-1]


def test_third_order_of_the_sde_reaches_the_spread():
    """w_2 / 2 - 1 does not vanish with the step."""
    ours, found = [], []
    for n in (26, 51, 101):
        times = VP.timesteps(n, "exponential")
        ours.append(moments(lambda denoise, x_T, noise: get_sampler("dpm_solver_sde")(
            denoise, x_T, times, VP, "sample", noise, order=3), VP, times)[1])
        found.append(moments(lambda denoise, x_T, noise: in_lambda_units(
            n, x_T, denoise, noise, solver_order=3, algorithm_type="sde-dpmsolver++"), VP, times)[1])
    print(f"SDE 3M, errors of the spread: ours {ours}, diffusers {found}")
    assert all(a < b for a, b in zip(ours, found)) and ours[-1] < 0.5 * found[-1]


def test_ddpm_ends_without_noise(monkeypatch):
    """diffusers adds the noise of a step of T / n times to the image when the last time is not 0 ("trailing")."""
    found = []
    for large in (False, True):
        times = VP.timesteps(25, "trailing")

        def theirs_from(denoise, x_T, noise):
            scheduler = DDPMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="sample",
                                      variance_type="fixed_large", **BETAS)
            scheduler.set_timesteps(25)
            monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: noise())
            return theirs(scheduler, x_T, denoise=denoise)

        def ours_from(denoise, x_T, noise):
            return get_sampler("ddpm")(denoise, x_T, times, VP, "sample", noise, variance="large")

        found.append(moments(theirs_from if large else ours_from, VP, times, last_draw=large)[1])
    assert found[0] < 0.5 * found[1]


def test_eta_one_from_pure_noise_is_a_number():
    """What is left for eps is 0 there. diffusers computes it as 1 - alpha_bar - variance, by rounding below 0."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="sample", **BETAS)
    scheduler.alphas_cumprod = ZERO.alpha_bar
    broken = []
    for n in range(2, 60):
        scheduler.set_timesteps(n)
        x = scheduler.step(torch.zeros(1, dtype=torch.float64), scheduler.timesteps[0],
                           torch.ones(1, dtype=torch.float64), eta=1.0, variance_noise=torch.zeros(1)).prev_sample
        broken.append(bool(x.isnan()))
        times = ZERO.timesteps(n)[:2]
        ours = get_sampler("ddim")(lambda x, t: torch.zeros_like(x), torch.ones(1, 1, 1, 1), times, ZERO, "sample",
                                   lambda: torch.zeros(1, 1, 1, 1), eta=1.0)
        assert torch.equal(ours, torch.zeros(1, 1, 1, 1))
    assert any(broken)


def test_pure_noise_is_the_limit_of_almost_pure_noise():
    """diffusers replaces alpha_bar = 0 by 2^-24; the smaller what stands there, the nearer it comes to us."""
    times, x_T = ZERO.timesteps(10), starts()
    exact = get_sampler("euler")(Exact(ZERO), x_T, times, ZERO, "sample")
    away = []
    for bits in (24, 32, 40):
        scheduler = EulerDiscreteScheduler(prediction_type="sample", **BETAS)
        scheduler.set_timesteps(timesteps=times)
        largest = (2.0**bits - 1.0) ** 0.5
        sigmas = [largest, *(ZERO.sigma(t) / ZERO.alpha(t) for t in times[1:]), 0.0]
        scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        found = theirs(scheduler, x_T * (1.0 + largest**2) ** 0.5, denoise=Exact(ZERO))
        away.append((found - exact).abs().max().item())
    print(f"start at alpha_bar 2^-24, 2^-32, 2^-40: {away}")
    assert away[0] > 1e-4 and away[1] < away[0] / 10 and away[2] < away[1] / 10
