"""Guidance: off means bitwise off, the pair is combined as published, and the interval saves the calls it promises."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import DDIMScheduler

from diffusion.guidance import (
    GuidanceConfig,
    autoguidance,
    classifier_free_guidance,
    fitted,
    limited,
    projected,
    rescaled,
    thresholded,
)
from diffusion.prediction import prediction_from_x_0, x_0_from_prediction
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())
FLOW = Schedule(ScheduleConfig(kind="flow"))
TYPES = ("epsilon", "sample", "v_prediction", "flow")
UNCOND, COND = torch.zeros(2), torch.tensor([0.5, -1.0])


class Network:
    """A network whose output depends on x, t and a condition per image; counts the images it has seen."""

    def __init__(self):
        self.images = 0

    def bind(self, condition):
        def denoise(x, t):
            assert x.shape[0] == condition.shape[0] and isinstance(t, (int, float))
            self.images += x.shape[0]
            return torch.tanh(x * 0.7 + condition[:, None, None, None] + t / 500.0)

        return denoise


@pytest.fixture
def network():
    return Network()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def guidance(network, kind="epsilon", schedule=SCHEDULE, **options):
    return classifier_free_guidance(
        network.bind(COND), network.bind(torch.cat([UNCOND, COND])), GuidanceConfig(**options), schedule, kind)


def predictions(x, t):
    """(uncond, cond) of the network at time t."""
    network = Network()
    return network.bind(UNCOND)(x, t), network.bind(COND)(x, t)


def test_scale_one_is_the_conditional_network_bit_for_bit(network, x):
    conditional = network.bind(COND)
    off = GuidanceConfig(scale=1.0)
    assert classifier_free_guidance(conditional, network.bind(COND), off, SCHEDULE, "epsilon") is conditional
    assert autoguidance(conditional, network.bind(COND), off, SCHEDULE, "epsilon") is conditional
    times = SCHEDULE.timesteps(5)
    unguided = get_sampler("ddim")(guidance(network, scale=1.0), x, times, SCHEDULE, "epsilon")
    assert network.images == 5 * 2  # never doubled
    assert torch.equal(unguided, get_sampler("ddim")(conditional, x, times, SCHEDULE, "epsilon"))


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_guided_prediction_is_the_published_combination(network, x, scale):
    uncond, cond = predictions(x, 300)
    found = guidance(network, scale=scale)(x, 300)
    torch.testing.assert_close(found, uncond + scale * (cond - uncond))


def test_rescale_matches_diffusers_and_restores_the_spread(network, x):
    uncond, cond = predictions(x, 300)
    guided = uncond + 6.0 * (cond - uncond)
    expected = rescale_noise_cfg(guided, cond, guidance_rescale=0.7)
    found = guidance(network, scale=6.0, rescale=0.7)(x, 300)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rescaled(guided, cond, 1.0).std((1, 2, 3)), cond.std((1, 2, 3)))


def test_interval_skips_the_unconditional_half(network, x):
    times = SCHEDULE.timesteps(20)
    levels = [SCHEDULE.sigma(t) / SCHEDULE.alpha(t) for t in times]
    inside = sum(0.5 < level <= 4.0 for level in levels)
    assert 0 < inside < 20
    get_sampler("ddim")(guidance(network, scale=5.0, interval=(0.5, 4.0)), x, times, SCHEDULE, "epsilon")
    assert network.images == 2 * (20 + inside)


def test_interval_is_exact_outside_and_inside(network, x):
    denoise = guidance(network, scale=5.0, interval=(0.5, 4.0))
    for t in (0, 200, 999):
        inside = 0.5 < SCHEDULE.sigma(t) / SCHEDULE.alpha(t) <= 4.0
        other = guidance(network, scale=5.0) if inside else network.bind(COND)
        assert torch.equal(denoise(x, t), other(x, t))


def test_interval_may_reach_pure_noise(network, x):
    zero = Schedule(ScheduleConfig(zero_terminal_snr=True))
    guidance(network, "v_prediction", zero, scale=5.0, interval=(0.5, math.inf))(x, 999)
    assert network.images == 4


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("momentum,norm,parallel", [(0.0, 0.0, 1.0), (-0.5, 1.5, 0.0), (0.3, 100.0, 0.4)])
def test_apg_matches_diffusers(network, x, kind, momentum, norm, parallel):
    """Three steps, because of the momentum; on x_0 for every prediction type, as in the paper."""
    denoise = guidance(network, kind, scale=6.0, method="apg", apg_momentum=momentum, apg_norm=norm,
                       apg_parallel=parallel)
    for run in range(2):  # a new run starts without momentum
        buffer = MomentumBuffer(momentum)
        for t in (900, 500, 100):
            alpha, sigma = SCHEDULE.alpha_sigma(t)
            bad, good = (x_0_from_prediction(p, x, alpha, sigma, kind) for p in predictions(x, t))
            x_0 = normalized_guidance(good, bad, 6.0 - 1.0, buffer, parallel, norm, use_original_formulation=True)
            expected = prediction_from_x_0(x_0, x, alpha, sigma, kind)
            torch.testing.assert_close(denoise(x, t), expected, rtol=1e-4, atol=1e-4)


def test_apg_without_its_parts_is_plain_guidance(network, x):
    plain = guidance(network, scale=4.0)
    apg = guidance(network, scale=4.0, method="apg", apg_parallel=1.0, apg_norm=0.0, apg_momentum=0.0)
    torch.testing.assert_close(apg(x, 400), plain(x, 400), rtol=1e-4, atol=1e-5)


def test_projection_and_limit(x):
    onto = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    orthogonal = projected(x, onto, 0.0)
    torch.testing.assert_close((orthogonal * onto).sum((1, 2, 3)), torch.zeros(2), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(projected(onto, onto, 0.25), 0.25 * onto)
    assert torch.equal(limited(x, 0.0), x)
    torch.testing.assert_close(limited(x, 2.0).square().sum((1, 2, 3)).sqrt(), torch.full((2,), 2.0))
    assert torch.equal(limited(x, 1000.0), x)


def test_cfg_zero_star_matches_diffusers(network, x):
    uncond, cond = predictions(x, 300)
    scaled = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).reshape(2, 1, 1, 1) * uncond
    found = guidance(network, scale=4.0, method="cfg_zero_star")(x, 300)
    torch.testing.assert_close(found, scaled + 4.0 * (cond - scaled))
    # the scaled one is as near to cond as a multiple of uncond can be
    torch.testing.assert_close(((cond - fitted(uncond, cond)) * uncond).sum((1, 2, 3)), torch.zeros(2), rtol=0.0,
                               atol=1e-4)


def test_zero_init_leaves_the_first_steps_alone(network, x):
    denoise = guidance(network, "flow", FLOW, scale=4.0, method="cfg_zero_star", zero_init=0.1)
    times = FLOW.timesteps(20)
    silent = sum(t > 0.9 for t in times)
    trace = []
    get_sampler("flow_euler")(denoise, x, times, FLOW, "flow", trace=trace)
    assert silent == 2 and network.images == 4 * (20 - silent)
    assert torch.equal(trace[1], x)  # nothing has moved
    with pytest.raises(ValueError, match="zero_init"):
        guidance(network, "epsilon", zero_init=0.1)


def test_threshold_matches_diffusers(x):
    for limit in (1.0, 2.5):
        scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
        expected = limit * scheduler._threshold_sample(3.0 * x / limit)
        torch.testing.assert_close(thresholded(3.0 * x, 0.9, limit), expected)
    small = 0.1 * x
    assert torch.equal(thresholded(small, 0.9, 1.0), small)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_threshold_bounds_x_0(network, x, kind, scale):
    denoise = guidance(network, kind, scale=scale, threshold=0.9, threshold_limit=0.5)
    trace = []
    get_sampler("ddim")(denoise, x, SCHEDULE.timesteps(6), SCHEDULE, kind, trace=trace)
    for x_0 in trace:
        assert x_0.abs().max() <= 0.5 + 1e-3
    assert network.images == 6 * 2 * (1 if scale == 1.0 else 2)


def test_autoguidance(network, x):
    weak, main = network.bind(UNCOND), network.bind(COND)
    t = 500
    denoise = autoguidance(main, weak, GuidanceConfig(scale=2.5, interval=(0.5, 4.0)), SCHEDULE, "epsilon")
    torch.testing.assert_close(denoise(x, t), weak(x, t) + 2.5 * (main(x, t) - weak(x, t)))
    network.images = 0
    get_sampler("ddim")(denoise, x, [999, 500], SCHEDULE, "epsilon")  # 999 lies outside the interval
    assert network.images == 2 * (1 + 2)


def test_half_precision_networks_are_combined_in_the_precision_of_the_state(x):
    uncond, cond = (p.bfloat16() for p in predictions(x, 300))
    denoise = classifier_free_guidance(lambda x, t: cond, lambda x, t: torch.cat([uncond, cond]),
                                       GuidanceConfig(scale=7.5), SCHEDULE, "epsilon")
    expected = uncond.float() + 7.5 * (cond.float() - uncond.float())
    assert torch.equal(denoise(x, 300), expected)


@pytest.mark.parametrize("options", [
    {"scale": -1.0}, {"scale": math.nan}, {"interval": (2.0, 1.0)}, {"rescale": 1.5}, {"method": "best"},
    {"apg_momentum": 1.0}, {"apg_norm": -1.0}, {"zero_init": -0.1}, {"threshold": 2.0}, {"threshold_limit": 0.0}])
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match="valid"):
        GuidanceConfig(**options)
