"""Noise schedules against their published formulas and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusion.schedule import Schedule, ScheduleConfig, betas
from files.config import from_dict, to_dict

DISCRETE = ("linear", "scaled_linear", "cosine", "sigmoid")
DIFFUSERS_NAME = {"cosine": "squaredcos_cap_v2"}


def peer(kind, **options):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=DIFFUSERS_NAME.get(kind, kind), **options)


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("zero", [False, True])
def test_alpha_bar_matches_diffusers(kind, zero):
    ours = Schedule(ScheduleConfig(kind=kind, zero_terminal_snr=zero)).alpha_bar
    # theirs is a product of 1000 fp32 factors: good to about 1e-6 of the value at the clean end
    theirs = peer(kind, rescale_betas_zero_snr=zero).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("zero", [False, True])
def test_any_betas(zero):
    """Given one by one; those of a known kind give that kind to the bit."""
    numbers = (0.001, 0.3, 0.02, 0.02, 0.5)
    given = Schedule(ScheduleConfig(kind="betas", steps=5, betas=numbers, zero_terminal_snr=zero))
    theirs = DDPMScheduler(num_train_timesteps=5, trained_betas=numbers, rescale_betas_zero_snr=zero).alphas_cumprod
    torch.testing.assert_close(given.alpha_bar.float(), theirs, rtol=1e-5, atol=1e-7)
    if not zero:
        assert [given.alpha(t) ** 2 for t in range(5)] == pytest.approx(
            [math.prod(1 - beta for beta in numbers[:t + 1]) for t in range(5)], rel=1e-14)
    linear = ScheduleConfig(kind="linear", zero_terminal_snr=zero)
    again = ScheduleConfig(kind="betas", betas=tuple(betas(linear).tolist()), zero_terminal_snr=zero)
    assert torch.equal(Schedule(again).alpha_bar, Schedule(linear).alpha_bar)
    assert from_dict(ScheduleConfig, to_dict(again)) == again


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_variance_is_preserved_and_snr_falls(kind, zero, shift):
    schedule = Schedule(ScheduleConfig(kind=kind, zero_terminal_snr=zero, shift=shift))
    levels = [schedule.alpha_sigma(t) for t in range(1000)]
    assert all(abs(a * a + s * s - 1.0) < 1e-12 for a, s in levels)
    snr = [schedule.snr(t) for t in range(1000)]
    assert all(a > b for a, b in zip(snr, snr[1:]))
    assert (snr[-1] == 0.0) == zero


def test_zero_terminal_snr_keeps_the_clean_end():
    plain, zero = (Schedule(ScheduleConfig(zero_terminal_snr=z)) for z in (False, True))
    assert zero.alpha(999) == 0.0 and zero.sigma(999) == 1.0 and zero.snr(999) == 0.0
    assert zero.log_snr(999) == -math.inf
    assert zero.alpha(0) == pytest.approx(plain.alpha(0), rel=1e-12)


def test_shift_divides_the_snr_by_its_square():
    for kind in (*DISCRETE, "flow"):
        plain, shifted = Schedule(ScheduleConfig(kind=kind)), Schedule(ScheduleConfig(kind=kind, shift=3.0))
        for t, u in zip(plain.timesteps(10), shifted.timesteps(10)):
            if kind == "flow" and t == 1.0:
                continue  # SNR 0 on both sides
            assert shifted.snr(u) == pytest.approx(plain.snr(t) / 9.0, rel=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 4, 7, 10, 25, 50, 333, 1000])
def test_timesteps_match_diffusers(spacing, n):
    schedule = Schedule(ScheduleConfig())
    theirs = DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(n)
    assert schedule.timesteps(n, spacing) == theirs.timesteps.tolist()
    if spacing == "leading" and n < 1000:
        theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        theirs.set_timesteps(n)
        assert schedule.timesteps(n, spacing, offset=1) == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("n", [4, 10, 25])
def test_sigma_spacings_match_diffusers(spacing, n):
    schedule = Schedule(ScheduleConfig())
    theirs = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **{f"use_{spacing}_sigmas": True})
    # on linspace their grid goes from the largest sigma to the smallest, as the papers do
    theirs.set_timesteps(n)
    times = schedule.timesteps(n, spacing)
    levels = [schedule.sigma(t) / schedule.alpha(t) for t in times]
    assert levels == pytest.approx(theirs.sigmas[:-1].tolist(), rel=5e-5)
    assert times == pytest.approx(theirs.timesteps.tolist(), abs=2e-2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_match_diffusers(shift):
    schedule = Schedule(ScheduleConfig(kind="flow", shift=shift))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    assert schedule.timesteps(10, "trailing") == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-6)
    if shift == 1.0:  # diffusers shifts the ends of this grid twice
        theirs.set_timesteps(10)
        assert schedule.timesteps(10, "linspace") == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-6)


@pytest.mark.parametrize("size", [64, 128, 512])
def test_a_shift_by_the_side_is_the_dynamic_shift_of_diffusers(size):
    """exp(mu) is the shift; Esser et al. 2024, eq. 23: the square root of the ratio of pixels."""
    shift = size / 64
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    theirs.set_timesteps(sigmas=[1 - i / 10 for i in range(10)], mu=math.log(shift))
    times = Schedule(ScheduleConfig(kind="flow", shift=shift)).timesteps(10)
    assert times == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", [*DISCRETE, "flow"])
def test_time_of_log_snr_inverts_log_snr(kind):
    schedule = Schedule(ScheduleConfig(kind=kind))
    for fraction in (0.001, 0.1234, 0.5, 0.87654, 0.999):
        t = fraction * schedule.last
        assert schedule.time_of_log_snr(schedule.log_snr(t)) == pytest.approx(t, rel=1e-9)
        assert math.log(schedule.snr(t)) == pytest.approx(schedule.log_snr(t), abs=1e-9)


@pytest.mark.parametrize("kind", [*DISCRETE, "flow"])
def test_tensor_and_number_agree(kind):
    schedule = Schedule(ScheduleConfig(kind=kind))
    t = torch.tensor([0.1, 0.5, 1.0]) if kind == "flow" else torch.tensor([0, 500, 999])
    x_0, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("alpha", "sigma", "snr"):
        numbers = [getattr(schedule, name)(value.item()) for value in t]
        assert getattr(schedule, name)(t).tolist() == pytest.approx(numbers, rel=1e-5, abs=1e-12)
    one_by_one = torch.stack([schedule.noised(x_0[i], eps[i], t[i].item()) for i in range(3)])
    torch.testing.assert_close(schedule.noised(x_0, eps, t), one_by_one, rtol=1e-5, atol=1e-6)


def test_network_time():
    t = torch.tensor([0, 999])
    assert torch.equal(Schedule(ScheduleConfig()).network_time(t), t)
    torch.testing.assert_close(Schedule(ScheduleConfig(kind="flow")).network_time(torch.tensor([0.25, 1.0])),
                               torch.tensor([250.0, 1000.0]))


@pytest.mark.parametrize("build", [
    lambda: ScheduleConfig(kind="quadratic"),
    lambda: ScheduleConfig(steps=1),
    lambda: ScheduleConfig(beta_start=0.02, beta_end=0.01),
    lambda: ScheduleConfig(shift=0.0),
    lambda: ScheduleConfig(kind="betas"),
    lambda: ScheduleConfig(betas=(0.1, 0.2)),
    lambda: ScheduleConfig(kind="betas", betas=(0.1, 0.2)),
    lambda: ScheduleConfig(kind="betas", steps=2, betas=(0.1, 1.0)),
    lambda: ScheduleConfig(kind="betas", steps=2, betas=(0.1, math.nan)),
    lambda: ScheduleConfig(kind="flow", zero_terminal_snr=True),
    lambda: Schedule(ScheduleConfig()).timesteps(1001),
    lambda: Schedule(ScheduleConfig()).timesteps(0),
    lambda: Schedule(ScheduleConfig()).timesteps(10, "quadratic"),
    lambda: Schedule(ScheduleConfig()).timesteps(1000, "leading", offset=1),
    lambda: Schedule(ScheduleConfig(kind="flow")).timesteps(10, "leading"),
    lambda: Schedule(ScheduleConfig(zero_terminal_snr=True)).timesteps(10, "karras"),
    lambda: Schedule(ScheduleConfig()).alpha(1000),
    lambda: Schedule(ScheduleConfig()).alpha(torch.tensor([0.5])),
])
def test_bad_values_are_refused(build):
    with pytest.raises(ValueError, match="valid"):
        build()
