"""The promises that every sampler makes, whatever its formula."""

import inspect
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.denoise import time_tensor
from diffusion.guidance import GuidanceConfig, classifier_free_guidance
from diffusion.noise import PerImageNoise
from diffusion.prediction import prediction_from_x_0
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

VP = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))
MEAN, STD = 0.4, 0.5
PAIRS = [(name, s) for name in SAMPLERS for s in ((FLOW,) if name.startswith("flow") else (VP, ZERO, FLOW))]
IDS = [f"{name}-{'zero' if s is ZERO else s.config.kind}" for name, s in PAIRS]
# calls of the network for n times
CALLS = {"heun": lambda n: 2 * n - 1, "flow_heun": lambda n: 2 * n - 1, "pndm": lambda n: n + 1}


def exact_denoiser(schedule: Schedule, kind: str):
    """The network that training would reach on x_0 ~ N(MEAN, STD^2), as each type of prediction."""
    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        x_0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return prediction_from_x_0(x_0, x, alpha, sigma, kind)

    return denoise


def schedule_of(name: str) -> Schedule:
    return FLOW if name.startswith("flow") else VP


def first_noise(count: int = 4) -> tuple[Tensor, PerImageNoise]:
    noise = PerImageNoise(range(count), (3, 4, 4))
    return noise(), noise


@pytest.mark.parametrize("name,schedule", PAIRS, ids=IDS)
def test_prediction_types_agree(name, schedule):
    """Predictions that say the same give the same image, whatever their type; also from pure noise."""
    results = []
    for kind in ("sample", "v_prediction", "flow") + (() if schedule.ends_in_noise else ("epsilon",)):
        x_T, noise = first_noise()
        denoise = exact_denoiser(schedule, kind)
        results.append(get_sampler(name)(denoise, x_T.double(), schedule.timesteps(6), schedule, kind, noise))
        assert torch.isfinite(results[-1]).all()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name,schedule", PAIRS, ids=IDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_calls_and_trace(name, schedule, n):
    """The number of network calls is the promised one, and the trace holds one x_0 a step and ends in the result."""
    x_T, noise = first_noise()
    trace: list[Tensor] = []
    calls = []

    def denoise(x, t):
        assert x.dtype == torch.float32 and type(t) is (float if schedule.is_flow else int)
        seen = time_tensor(t, x)
        assert seen.shape == (4,) and seen.dtype == (torch.float32 if schedule.is_flow else torch.int64)
        calls.append(t)
        return exact_denoiser(schedule, "v_prediction")(x, t).bfloat16()

    times = iter(schedule.timesteps(n))  # as a progress bar hands them over
    x_0 = get_sampler(name)(denoise, x_T.half(), times, schedule, "v_prediction", noise, trace=trace)
    assert x_0.dtype == torch.float32 and x_0.shape == x_T.shape
    # from pure noise the first step has one call
    expected = n if schedule.ends_in_noise and name == "pndm" or n == 1 else CALLS.get(name, lambda n: n)(n)
    expected -= name == "heun" and schedule.ends_in_noise and n > 1
    assert len(calls) == expected
    assert len(trace) == n and all(p.shape == x_T.shape for p in trace)
    torch.testing.assert_close(trace[-1], x_0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_neighbours(name):
    schedule = schedule_of(name)

    def sample(seeds):
        noise = PerImageNoise(seeds, (3, 4, 4))
        denoise = exact_denoiser(schedule, "v_prediction")
        return get_sampler(name)(denoise, noise(), schedule.timesteps(5), schedule, "v_prediction", noise)

    batch = sample([7, 8, 9])
    assert torch.equal(batch[1:2], sample([8]))
    assert torch.equal(batch[[2, 0]], sample([9, 7]))
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_from_pure_noise_is_the_mean(name):
    schedule = FLOW if name.startswith("flow") else ZERO
    x_T, noise = first_noise()
    denoise = exact_denoiser(schedule, "v_prediction")
    x_0 = get_sampler(name)(denoise, x_T, [schedule.last], schedule, "v_prediction", noise)
    torch.testing.assert_close(x_0, torch.full_like(x_0, MEAN))


class NoReading(TorchDispatchMode):
    """Fails when a value is read from a tensor, which on an accelerator makes the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} reads a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_read_back_from_the_device(name):
    schedule = schedule_of(name)
    x_T, noise = first_noise()
    config = GuidanceConfig(scale=3.0, interval=(0.1, 5.0), rescale=0.5, method="apg", threshold=0.99)
    denoise = classifier_free_guidance(lambda x, t: 0.1 * x, lambda x, t: 0.1 * x, config, schedule, "v_prediction")
    with NoReading():
        get_sampler(name)(denoise, x_T, schedule.timesteps(6), schedule, "v_prediction", noise)
    with pytest.raises(AssertionError, match="reads a value"), NoReading():
        x_T.sum().item()


def test_euler_is_ddim_and_ancestral_is_ddpm():
    for schedule in (VP, ZERO, FLOW):
        results = {}
        for name in ("euler", "ddim", "euler_ancestral", "ddpm", "dpm_solver_sde", "dpm_solver_multistep"):
            x_T, noise = first_noise()
            denoise = exact_denoiser(schedule, "v_prediction")
            options = {"order": 1} if name.startswith("dpm") else {}
            results[name] = get_sampler(name)(
                denoise, x_T.double(), schedule.timesteps(8), schedule, "v_prediction", noise, **options)
        for same in (("euler", "ddim", "dpm_solver_multistep"), ("euler_ancestral", "ddpm", "dpm_solver_sde")):
            for name in same[1:]:
                torch.testing.assert_close(results[name], results[same[0]])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_what_eta_leaves_for_epsilon_is_exact_near_pure_noise(eta):
    """Against rational arithmetic, with x_0 = 0 and draws of 0; 1 - c^2 / sigma_s^2 would have no right digit here."""
    for t, s in ((1.0 - 2.0**-30, 0.5), (1.0 - 2.0**-40, 0.75), (1.0, 0.25), (0.75, 0.75 - 2.0**-40)):
        seen, x_T = [], torch.ones(1, 1, 1, 1, dtype=torch.float64)

        def denoise(x: Tensor, t: float, seen: list = seen) -> Tensor:
            seen.append(x)
            return torch.zeros_like(x)

        get_sampler("ddim")(denoise, x_T, [t, s], FLOW, "sample", lambda: 0 * x_T, eta=eta)
        a, sigma_s, sigma_t = Fraction(1.0 - t) / Fraction(1.0 - s), Fraction(s), Fraction(t)
        variance = Fraction(eta) ** 2 * (sigma_t**2 - a**2 * sigma_s**2) * sigma_s**2 / sigma_t**2
        expected = math.sqrt(sigma_s**2 - variance) / t  # of eps = x_T / sigma_t
        assert seen[1].item() == pytest.approx(expected, rel=1e-13, abs=0.0)


def test_lcm_starts_at_the_boundary():
    """f(x, t) goes to x as t goes to 0, at the same rate for a flow as for a discrete schedule."""
    x = first_noise()[0]
    for schedule, t in ((VP, 1), (FLOW, 0.001)):
        f = get_sampler("lcm")(lambda x, t: torch.zeros_like(x), x, [t], schedule, "sample", lambda: x)
        torch.testing.assert_close(f, 0.25 / (0.25 + 100.0) * x)


def test_per_image_noise():
    noise = PerImageNoise([5, 6], (2, 3, 3))
    first, second = noise(), noise()
    assert first.shape == (2, 2, 3, 3) and first.dtype == torch.float32 and not torch.equal(first, second)
    alone = PerImageNoise([6], (2, 3, 3))
    assert torch.equal(alone()[0], first[1]) and torch.equal(alone()[0], second[1])


def test_registry():
    with pytest.raises(ValueError, match="ddpm, ddim"):
        get_sampler("magic")
    first = ["denoise", "x_T", "timesteps", "schedule", "prediction_type", "noise", "trace"]
    for sampler in SAMPLERS.values():
        parameters = list(inspect.signature(sampler.function).parameters.values())
        assert [p.name for p in parameters[:7]] == first
        assert all(p.default is not inspect.Parameter.empty for p in parameters[5:])


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_values_are_refused(name):
    x_T, noise = first_noise()
    schedule, sampler = schedule_of(name), get_sampler(name)
    times = schedule.timesteps(4)

    def call(denoise=lambda x, t: x, times=times, schedule=schedule, kind="v_prediction", noise=noise, **options):
        return sampler(denoise, x_T, times, schedule, kind, noise, **options)

    call()
    for options in ({"times": times[::-1]}, {"times": []}, {"kind": "noise"}, {"denoise": lambda x, t: x[:, :1]},
                    {"schedule": ZERO, "kind": "epsilon"}, {"times": [5000]}):
        with pytest.raises(ValueError, match="valid"):
            call(**options)
    for key, value in (("eta", 2.0), ("order", 4), ("variance", "medium"), ("repeats", 0)):
        if key in sampler.options:
            with pytest.raises(ValueError, match="valid"):
                call(**{key: value})
    if name in ("ddpm", "euler_ancestral", "dpm_solver_sde", "consistency", "lcm"):
        with pytest.raises(ValueError, match="noise"):
            call(noise=None)
    if name.startswith("flow"):
        with pytest.raises(ValueError, match="straight paths"):
            call(schedule=VP, times=[999])
