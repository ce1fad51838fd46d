"""Every sampler against diffusers: same first noise, same network, same later draws, at most 1e-5 apart.

diffusers keeps its tables in fp32; where a table can be replaced it gets ours in fp64, so that the step rule is what
is compared and not the rounding of a product of a thousand factors. Every scheduler walks our grid of times
(`test_schedule.py` compares the grids). Where the two differ by design, the test says how and takes the difference out;
`test_samplers_design.py` shows who is right. The largest relative difference of every sampler over all its cases is
printed at the end: python -m pytest tests/test_samplers_parity.py -s
"""

from fractions import Fraction
from typing import get_args

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusion.denoise import time_tensor
from diffusion.prediction import epsilon_from_prediction
from diffusion.samplers import dpm_solver, get_sampler
from diffusion.schedule import Schedule, ScheduleConfig, Spacing

TYPES = ("epsilon", "sample", "v_prediction")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))
TOLERANCE = 1e-5

FOUND: dict[str, tuple[float, int]] = {}  # sampler: largest difference, number of cases

over_types = pytest.mark.parametrize("kind", TYPES)
over_spacings = pytest.mark.parametrize("spacing", ("leading", "linspace", "trailing"))
over_all_spacings = pytest.mark.parametrize("spacing", get_args(Spacing))  # the last three are fractions of a time
over_steps = pytest.mark.parametrize("n", (4, 10, 25, 50))


def network(x, t):
    """A smooth bounded function of x and t that stands for a trained network; t as rounded as it gets there."""
    phase = time_tensor(t, x).to(x.dtype).reshape(-1, 1, 1, 1) / 300.0
    return torch.tanh(0.8 * x + torch.sin(phase)) + 0.3 * torch.cos(2.0 * x - phase)


def draws(seed, count=60):
    """(count, 2, 3, 4, 4) fp64: x_T and the later noises."""
    return torch.randn(count, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def noise():
    return draws(0)


@pytest.fixture(scope="module", autouse=True)
def differences():
    yield
    for name, (largest, cases) in FOUND.items():
        print(f"{name}: {cases} cases, largest relative difference {largest:.1e}")


def assert_same(theirs, name, times, kind, noise, schedule=SCHEDULE, **options):
    """Our sampler from noise[0], drawing noise[1], noise[2], ..., ends where theirs did."""
    later = iter(noise[1:])
    ours = get_sampler(name)(network, noise[0], times, schedule, kind, lambda: next(later), **options)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    order = f", order {options['order']}" if "order" in options else ""
    largest, cases = FOUND.get(name + order, (0.0, 0))
    FOUND[name + order] = max(largest, difference), cases + 1
    assert torch.isfinite(ours).all() and difference <= TOLERANCE


def feed(monkeypatch, module, noise):
    """Makes a diffusers scheduler draw noise[1], noise[2], ..."""
    later = iter(noise[1:])
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *args, **kwargs: next(later))


# (schedule, prediction type, spacing): also from pure noise, where epsilon is refused and the others are exact
PROCESSES = [(SCHEDULE, kind, spacing) for kind in TYPES for spacing in ("leading", "linspace", "trailing")]
PROCESSES += [(ZERO, kind, "trailing") for kind in TYPES[1:]]
over_processes = pytest.mark.parametrize("schedule,kind,spacing", PROCESSES, ids=[
    f"{'zero' if schedule is ZERO else 'plain'}-{kind}-{spacing}" for schedule, kind, spacing in PROCESSES])


@over_processes
@over_steps
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(schedule, kind, spacing, n, variance, noise, monkeypatch):
    scheduler = DDPMScheduler(prediction_type=kind, timestep_spacing=spacing, clip_sample=False,
                              variance_type=f"fixed_{variance}", **BETAS)
    scheduler.alphas_cumprod, times = schedule.alpha_bar, schedule.timesteps(n, spacing)
    scheduler.set_timesteps(n)
    feed(monkeypatch, "scheduling_ddpm", noise)
    x = noise[0]
    for t in scheduler.timesteps:
        step = scheduler.step(network(x, t.item()), t, x)
        # by design: after the last step we return x_0 itself, diffusers adds noise again unless that step is t = 0
        x = step.pred_original_sample if t == scheduler.timesteps[-1] else step.prev_sample
    assert_same(x, "ddpm", times, kind, noise, schedule, variance=variance)


@over_processes
@over_steps
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(schedule, kind, spacing, n, eta, noise):
    # by design: what eta leaves for eps is a sum of squares here; diffusers takes the root of 1 - alpha_bar - variance,
    # which is 0 at eta 1 from pure noise, and by rounding below it: NaN
    eta = min(eta, 1.0 - 1e-9) if schedule is ZERO else eta
    scheduler = DDIMScheduler(prediction_type=kind, timestep_spacing=spacing, clip_sample=False, **BETAS)
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.set_timesteps(n)
    x, times = noise[0], scheduler.timesteps.tolist()
    for i, t in enumerate(times):
        # by design: diffusers always steps to t - T // n, which on "linspace" is not the next time of its own grid.
        # Telling it this count of steps makes that difference the true one.
        scheduler.num_inference_steps = Fraction(1000, t - times[i + 1]) if i + 1 < n else 1
        x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=noise[i + 1]).prev_sample
    assert_same(x, "ddim", times, kind, noise, schedule, eta=eta)


@over_types
@over_spacings
@over_steps
def test_pndm(kind, spacing, n, noise):
    # by design: we extrapolate eps whatever the network predicts. diffusers extrapolates the raw output, so it gets
    # eps here; for v it would mix v of different times. It knows no "sample".
    scheduler = PNDMScheduler(timestep_spacing=spacing, skip_prk_steps=True, set_alpha_to_one=True, **BETAS)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar
    scheduler.set_timesteps(n)
    times = SCHEDULE.timesteps(n, spacing)
    assert scheduler.timesteps.tolist() == times[:2] + times[1:]
    x = noise[0]
    for i, t in enumerate(times[:2] + times[1:]):
        # by design: as for DDIM, the next time is that of the grid and not t - T // n; the second call repeats a step
        stop = max(i, 1)
        gap = times[0] - times[1] if i == 1 else t - times[stop] if stop < n else 1000
        scheduler.num_inference_steps = Fraction(1000, gap)
        eps = epsilon_from_prediction(network(x, t), x, *SCHEDULE.alpha_sigma(t), kind)
        x = scheduler.step(eps, t, x).prev_sample
    assert_same(x, "pndm", times, kind, noise)


def in_sigma_units(scheduler, times, noise, kind, schedule=SCHEDULE):
    """x_0 from a diffusers scheduler that keeps x_t / alpha_t, in fp64: our sigma for every time, once more for each of
    its repeats, then 0."""
    scheduler.set_timesteps(timesteps=[int(t) for t in times])  # whatever else it prepares
    visits = [times[0], *(t for t in times[1:] for _ in range(2))] if "Heun" in type(scheduler).__name__ else times
    scheduler.timesteps = torch.tensor(visits, dtype=torch.float64)
    sigmas = [schedule.sigma(t) / schedule.alpha(t) for t in visits]
    scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    x = noise[0] / schedule.alpha(times[0])
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        prediction = network(scaled, t.item())
        x = scheduler.step(prediction.to(torch.float64), t, x).prev_sample
    return x


@over_types
@over_all_spacings
@over_steps
def test_euler(kind, spacing, n, noise):
    # by design: on "linspace" diffusers visits fractions of a time, we visit integers; both walk ours here
    times = SCHEDULE.timesteps(n, spacing)
    theirs = in_sigma_units(EulerDiscreteScheduler(prediction_type=kind, **BETAS), times, noise, kind)
    assert_same(theirs, "euler", times, kind, noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])  # diffusers has no "sample" here
@over_all_spacings
@over_steps
def test_euler_ancestral(kind, spacing, n, noise, monkeypatch):
    times = SCHEDULE.timesteps(n, spacing)
    scheduler = EulerAncestralDiscreteScheduler(prediction_type=kind, **BETAS)
    monkeypatch.setattr(scheduler, "set_timesteps", lambda timesteps: setattr(
        scheduler, "timesteps", torch.tensor(timesteps, dtype=torch.float32)))  # it takes no list of times
    feed(monkeypatch, "scheduling_euler_ancestral_discrete", noise)
    assert_same(in_sigma_units(scheduler, times, noise, kind), "euler_ancestral", times, kind, noise)


@over_types
@over_all_spacings
@over_steps
def test_heun(kind, spacing, n, noise):
    times = SCHEDULE.timesteps(n, spacing)
    theirs = in_sigma_units(HeunDiscreteScheduler(prediction_type=kind, **BETAS), times, noise, kind)
    assert_same(theirs, "heun", times, kind, noise)


def in_lambda_units(scheduler, times, noise, schedule=SCHEDULE, **step_options):
    """x_0 from a diffusers scheduler that works in the log SNR, with our sigma / alpha in fp64 (sigma for a flow)."""
    scheduler.set_timesteps(len(times))
    flow = schedule.is_flow
    sigmas = [schedule.sigma(t) if flow else schedule.sigma(t) / schedule.alpha(t) for t in times]
    scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    scheduler.timesteps = torch.tensor(times, dtype=torch.float64)
    x = noise[0]
    for i, t in enumerate(scheduler.timesteps):
        if "variance_noise" in step_options:
            step_options["variance_noise"] = noise[i + 1]
        x = scheduler.step(network(x, t.item()), t, x, **step_options).prev_sample
    return x


def published_curvature(monkeypatch, stochastic):
    """Gives D2 in our third-order multistep update the weight it has in diffusers: see `multistep_update`."""
    def weights(u, exact=dpm_solver.polynomial_weights):
        w_0, w_1, w_2 = exact(u)
        return w_0, w_1, w_2 / 2.0 - (1.0 if stochastic else 0.0)

    monkeypatch.setattr(dpm_solver, "polynomial_weights", weights)


@over_types
@over_all_spacings
@over_steps
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["dpm_solver_multistep", "dpm_solver_sde"])
def test_dpm_solver_multistep(kind, spacing, n, order, name, noise, monkeypatch):
    stochastic = name == "dpm_solver_sde"
    if order == 3:  # by design: our third order is of third order
        published_curvature(monkeypatch, stochastic)
    times = SCHEDULE.timesteps(n, spacing)
    scheduler = DPMSolverMultistepScheduler(prediction_type=kind, solver_order=order, **BETAS,
                                            algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++")
    theirs = in_lambda_units(scheduler, times, noise, variance_noise=None) if stochastic else in_lambda_units(
        scheduler, times, noise)
    assert_same(theirs, name, times, kind, noise, order=order)


@pytest.mark.parametrize("n", [1, 2, 3, 13, 14, 15, 16])
def test_dpm_solver_multistep_comes_down_in_order(n, noise, monkeypatch):
    """Over the last two steps of runs shorter than 15, over the last one of longer runs."""
    published_curvature(monkeypatch, stochastic=False)
    times = SCHEDULE.timesteps(n)
    theirs = in_lambda_units(DPMSolverMultistepScheduler(solver_order=3, **BETAS), times, noise)
    assert_same(theirs, "dpm_solver_multistep", times, "epsilon", noise, order=3)


@over_types
@over_all_spacings
@over_steps
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_singlestep(kind, spacing, n, order, noise):
    times = SCHEDULE.timesteps(n, spacing)
    scheduler = DPMSolverSinglestepScheduler(prediction_type=kind, solver_order=order, lower_order_final=True, **BETAS)
    theirs = in_lambda_units(scheduler, times, noise)
    assert_same(theirs, "dpm_solver_singlestep", times, kind, noise, order=order)


@over_types
@over_all_spacings
@over_steps
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(kind, spacing, n, order, noise):
    times = SCHEDULE.timesteps(n, spacing)
    scheduler = UniPCMultistepScheduler(prediction_type=kind, solver_order=order, **BETAS)
    assert_same(in_lambda_units(scheduler, times, noise), "unipc", times, kind, noise, order=order)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["dpm_solver_multistep", "unipc"])
@over_steps
def test_log_snr_solvers_on_a_flow(order, name, n, noise, monkeypatch):
    if order == 3:
        published_curvature(monkeypatch, stochastic=False)
    # by design: we start at t = 1, where diffusers is not defined; both start below it here
    times = [0.98 * t for t in FLOW.timesteps(n)]
    peer = DPMSolverMultistepScheduler if name == "dpm_solver_multistep" else UniPCMultistepScheduler
    scheduler = peer(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order)
    assert_same(in_lambda_units(scheduler, times, noise, FLOW), name, times, "flow", noise, FLOW, order=order)


@over_processes
@over_steps
def test_lcm(schedule, kind, spacing, n, noise, monkeypatch):
    times = schedule.timesteps(n, spacing)
    scheduler = LCMScheduler(prediction_type=kind, clip_sample=False, **BETAS)
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.set_timesteps(timesteps=times)
    feed(monkeypatch, "scheduling_lcm", noise)
    x = noise[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item()), t, x).prev_sample
    assert_same(x, "lcm", times, kind, noise, schedule)


@pytest.mark.parametrize("name,peer", [
    ("flow_euler", FlowMatchEulerDiscreteScheduler), ("flow_heun", FlowMatchHeunDiscreteScheduler)])
@pytest.mark.parametrize("spacing", ("linspace", "trailing"))
@pytest.mark.parametrize("shift", (1.0, 3.0))
@over_steps
def test_flow(name, peer, spacing, shift, n, noise):
    schedule = Schedule(ScheduleConfig(kind="flow", shift=shift))
    times = schedule.timesteps(n, spacing)
    scheduler = peer(shift=shift)
    scheduler.set_timesteps(n)
    # by design: diffusers shifts the ends of its grid twice, and its Heun has no other grid; both walk ours here
    visits = [times[0], *(t for t in times[1:] for _ in range(2))] if name == "flow_heun" else times
    scheduler.sigmas = torch.tensor([*visits, 0.0], dtype=torch.float64)
    scheduler.timesteps = 1000.0 * scheduler.sigmas[:-1]
    x = noise[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item() / 1000), t, x).prev_sample
    assert_same(x, name, times, "flow", noise, schedule)
