"""Editing: the start has the right noise level, what is kept is kept, and inversion goes back."""

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler

from diffusion.editing import InpaintingDenoiser, ddim_inversion, image_to_image_start, slerp
from diffusion.noise import PerImageNoise
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

VP = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))


def network(x, t):
    """A smooth bounded function of x and t that stands for a trained network."""
    return torch.tanh(0.5 * x + math.sin(t / 300.0))


@pytest.fixture(scope="module")
def pair():
    return torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strength,kept", [(1.0, 10), (0.75, 7), (0.5, 5), (0.1, 1)])
def test_image_to_image_start(pair, strength, kept):
    x_0, eps = pair
    times = VP.timesteps(10)
    x_t, remaining = image_to_image_start(x_0, eps, times, strength, VP)
    assert remaining == times[-kept:]
    alpha, sigma = VP.alpha_sigma(remaining[0])
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * eps)
    for bad in (0.0, 1.1, 0.05):
        with pytest.raises(ValueError, match="valid"):
            image_to_image_start(x_0, eps, times, bad, VP)


def test_less_strength_stays_closer(pair):
    x_0, eps = pair
    distances = []
    for strength in (0.2, 0.5, 1.0):
        x_t, times = image_to_image_start(x_0, eps, VP.timesteps(20), strength, VP)
        distances.append((get_sampler("ddim")(network, x_t, times, VP, "sample") - x_0).norm())
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting_keeps_and_paints(pair, name):
    x_0, _ = pair
    schedule, kind = (FLOW, "flow") if name.startswith("flow") else (ZERO, "v_prediction")
    noise = PerImageNoise([3, 4], (3, 4, 4))
    x_T = noise()
    keep = torch.zeros(2, 1, 4, 4)
    keep[:, :, :2] = 1.0
    shown = []

    def spy(x, t):
        shown.append((x, t))
        return network(x, t)

    denoise = InpaintingDenoiser(spy, x_0, x_T, keep, schedule, kind)
    result = get_sampler(name)(denoise, x_T, schedule.timesteps(8), schedule, kind, noise)
    away = 0.05 if name == "consistency" else 1e-4  # its f leaves a share of the noise of the last time
    torch.testing.assert_close(result[:, :, :2], x_0[:, :, :2], rtol=0.0, atol=away)
    assert (result[:, :, 2:] - x_0[:, :, 2:]).abs().mean() > 0.1
    for x, t in shown:  # the network sees the kept part at the level of its time
        torch.testing.assert_close(x[:, :, :2], schedule.noised(x_0, x_T, t)[:, :, :2])
    free = InpaintingDenoiser(network, x_0, x_T, torch.zeros(2, 1, 4, 4), schedule, kind)
    t = schedule.timesteps(8)[3]
    torch.testing.assert_close(free(x_T, t), network(x_T, t), rtol=1e-4, atol=1e-5)


def test_inpainting_hands_the_time_on(pair):
    """The network inside it is called with the very times of the sampler."""
    seen = []

    def spy(x, t):
        assert isinstance(t, int)
        seen.append(t)
        return network(x, t)

    times = VP.timesteps(4)
    denoise = InpaintingDenoiser(spy, *pair, torch.ones(2, 1, 4, 4), VP, "epsilon")
    get_sampler("ddim")(denoise, pair[1], times, VP, "epsilon")
    assert seen == times


def test_repeats_settle_what_is_painted():
    """Two modes, (1, 1) and (-1, -1); the first number is kept near 1, so the second has to be painted near 1."""
    def mixture_x_0(x, t):
        alpha, sigma = VP.alpha_sigma(t)
        means, variance = torch.tensor([1.0, -1.0]), 0.09 * alpha**2 + sigma**2
        away = x - alpha * means  # (B, 2, 1, 2): numbers, modes
        share = torch.softmax(-0.5 * away.square().sum(1, keepdim=True) / variance, -1)
        return (share * (means + 0.09 * alpha / variance * away)).sum(-1, keepdim=True)

    wrong = []
    for repeats in (1, 10):
        random = torch.Generator().manual_seed(0)
        x_T, keep = torch.randn(400, 2, 1, 1, generator=random), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
        denoise = InpaintingDenoiser(mixture_x_0, torch.full_like(x_T, 0.6), x_T, keep, VP, "sample")
        x_0 = get_sampler("ddpm")(denoise, x_T, VP.timesteps(30), VP, "sample",
                                  lambda: torch.randn(x_T.shape, generator=random), repeats=repeats)
        wrong.append((x_0[:, 1] < 0.0).float().mean().item())
    assert wrong[1] < 0.15 < 0.2 < wrong[0]


def test_slerp(pair):
    a, b = pair
    for weight, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(slerp(a, b, weight), end)
    unit = [v / v.square().sum((1, 2, 3), keepdim=True).sqrt() for v in pair]
    for weight in (0.25, 0.5, 0.8):
        point = slerp(*unit, weight)
        torch.testing.assert_close(point.square().sum((1, 2, 3)), torch.ones(2))  # on the sphere
        whole, part = (torch.acos((unit[0] * p).sum((1, 2, 3))) for p in (unit[1], point))
        torch.testing.assert_close(part, weight * whole)  # at that share of the angle
    torch.testing.assert_close(slerp(a, a, 0.3), a)


@pytest.mark.parametrize("schedule,kind", [
    (VP, "epsilon"), (VP, "v_prediction"), (ZERO, "v_prediction"), (FLOW, "flow")])
def test_inversion_goes_back(pair, schedule, kind):
    x_0 = 0.5 * pair[0].double()
    times = schedule.timesteps(20)

    def gentle(x, t):
        return 0.2 * network(x, t)

    errors = []
    for refinements in (0, 2, 40):
        x_T = ddim_inversion(gentle, x_0, times, schedule, kind, refinements)
        errors.append((get_sampler("ddim")(gentle, x_T, times, schedule, kind) - x_0).abs().max())
    if schedule is VP:
        assert errors[2] < 1e-4 < errors[0]  # what is left comes from the fixed points of the noisiest steps
        assert errors[1] < errors[0]
    else:
        assert torch.isfinite(x_T).all()  # alpha = 0 at the last time: x_0 is gone from x_T, nothing to go back to


@pytest.mark.parametrize("n", [4, 10, 25])
def test_inversion_matches_diffusers(pair, n):
    scheduler = DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing")
    scheduler.alphas_cumprod = VP.alpha_bar
    scheduler.set_timesteps(n)
    x = pair[0].double()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item()), t, x).prev_sample
    torch.testing.assert_close(ddim_inversion(network, pair[0].double(), VP.timesteps(n), VP, "epsilon"), x,
                               rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused(pair):
    x_0, eps = pair
    for bad in (lambda: InpaintingDenoiser(network, x_0, eps[:1], torch.ones(2, 1, 4, 4), VP, "epsilon"),
                lambda: InpaintingDenoiser(network, x_0, eps, torch.ones(2, 1, 4, 1, 4), VP, "epsilon")):
        with pytest.raises(ValueError, match="do not fit"):
            bad()
