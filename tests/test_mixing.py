"""Predictions of several prompts mixed at every step: against densities whose mixture is known, and in a system."""
from dataclasses import replace

import pytest
import torch

from diffusion.guidance import GuidanceConfig
from diffusion.mixing import mixed, mixed_pair
from diffusion.noise import PerImageNoise
from diffusion.prediction import prediction_from_x_0
from diffusion.sampling import RunSettings, SamplingConfig, sample_latents, times_of_run
from diffusion.schedule import Schedule, ScheduleConfig
from pipeline.loading import load_run
from sampling.draw import Sources, latents_of_requests
from sampling.request import Mixed, Request

SCHEDULE = Schedule(ScheduleConfig())
KINDS = ("epsilon", "v_prediction", "sample", "flow")
MEANS = (torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 1.0]), torch.tensor([0.3, -2.0]))  # own and two further prompts
WIDTH = 0.7  # standard deviation of each density


def gaussian(means: torch.Tensor, kind: str):
    """The exact denoiser of N(mean, WIDTH^2), with a mean (B, 2) for each image (B, 1, 1, 2)."""
    def denoise(x_t, t):
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        gain = alpha * WIDTH**2 / (alpha**2 * WIDTH**2 + sigma**2)
        mean = means[:, None, None]
        x_0 = mean + gain * (x_t - alpha * mean)
        return prediction_from_x_0(x_0, x_t, alpha, sigma, kind)
    return denoise


def drawn(denoisers, kind: str, count: int, mix=None, scale: float = 1.0) -> torch.Tensor:
    config = SamplingConfig(steps=8, guidance=GuidanceConfig(scale=scale))
    run = RunSettings(mix=mix)
    return sample_latents(denoisers, PerImageNoise(range(count), (1, 1, 2)), times_of_run(SCHEDULE, config, run),
                          SCHEDULE, kind, config, run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_mixture_of_gaussians_is_the_gaussian_of_their_geometric_mean(kind, scale):
    """With one width prod p_k^w_k is the Gaussian of the mean sum w_k mean_k, at every noise level; weights above 1 and
    several further prompts too. Three images of other weights, and guidance over them."""
    weights = torch.tensor([[0.0, 0.25, 1.5], [0.0, 0.5, 0.0]])  # (K, B)
    own, *further = (mean.expand(3, 2) for mean in MEANS)
    mean = own + sum(w[:, None] * (one - own) for w, one in zip(weights, further))
    uncond = torch.zeros(3, 2)
    rows = torch.cat([*further, own])
    found = drawn((gaussian(rows, kind), gaussian(torch.cat([uncond, rows]), kind)), kind, 3, weights, scale)
    known = drawn((gaussian(mean, kind), gaussian(torch.cat([uncond, mean]), kind)), kind, 3, scale=scale)
    torch.testing.assert_close(found, known, atol=2e-4, rtol=2e-4)


def test_the_evidence_for_the_further_prompt_rises_with_its_weight():
    """Densities of different widths, mixed on a grid: the mean of log p_1 / p_0 under p_0^(1 - w) p_1^w."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    p_0, p_1 = (torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
        torch.distributions.Normal(torch.tensor(means, dtype=torch.float64), width)).log_prob(x)
        for means, width in (((-2.0, 1.0), 1.0), ((0.0, 3.0), 0.8)))
    evidence = [float((((1 - w) * p_0 + w * p_1).softmax(dim=0) * (p_1 - p_0)).sum()) for w in torch.linspace(0, 2, 21)]
    assert evidence == sorted(evidence) and evidence[0] < 0 < evidence[10]


def test_rows_are_bound_in_the_order_that_is_said():
    weights = torch.tensor([[0.25, 1.0]])

    def rows(x_t, t):
        return torch.arange(len(x_t), dtype=torch.float32)[:, None, None, None].expand_as(x_t)

    x = torch.zeros(2, 1, 1, 1)
    assert mixed(rows, weights)(x, 0.5).flatten().tolist() == [2 - 0.5, 1.0]  # further 0 and 1, own 2 and 3
    assert mixed_pair(rows, weights)(torch.cat([x, x]), 0.5).flatten().tolist() == [0.0, 1.0, 4 - 0.5, 3.0]


@pytest.fixture(scope="module")
def system(tiny_run):
    return load_run(tiny_run, moderation=None)


def latents(system, *requests: Request) -> torch.Tensor:
    return latents_of_requests(system, list(requests), Sources())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_ends_of_a_mixture_are_the_prompts(system, scale):
    config = SamplingConfig(steps=3, guidance=GuidanceConfig(scale=scale))
    plain, other = (Request(text, 5, config, negative="blue") for text in ("a red star", "a blue moon"))
    ends = [latents(system, Request("a red star", 5, config, negative="blue", mixed=(Mixed("a blue moon", weight),)))
            for weight in (0.0, 1.0, 0.5)]
    torch.testing.assert_close(ends[0], latents(system, plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ends[1], latents(system, other), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ends[2], ends[0], atol=1e-4) and not torch.allclose(ends[2], ends[1], atol=1e-4)


def test_images_of_a_batch_have_weights_and_prompts_of_their_own(system):
    config = SamplingConfig(steps=3)
    asked = [Request("a red star", 1, config, mixed=(Mixed("a blue moon", 0.3),)),
             Request("two green circles", 2, config, mixed=(Mixed("a [red|blue] square", 1.7),))]
    together = latents(system, *asked)
    for place, request in enumerate(asked):
        torch.testing.assert_close(together[place:place + 1], latents(system, request), atol=1e-5, rtol=1e-5)
    assert asked[0].kind == asked[1].kind != Request("a", 1, config).kind


def test_a_weaker_network_is_pushed_away_from_with_the_same_mixture(system, tiny_run):
    guided = load_run(tiny_run, moderation=None)
    guided.guide = system
    request = Request("a red star", 1, SamplingConfig(steps=3), mixed=(Mixed("a blue moon", 0.5),))
    unguided = replace(request, config=SamplingConfig(steps=3, guidance=GuidanceConfig(scale=1.0)))
    torch.testing.assert_close(latents(guided, request), latents(system, unguided), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [-0.1, 2.1, float("nan")])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(ValueError, match="valid: 0 to 2"):
        Mixed("a", weight)
    with pytest.raises(ValueError, match="mixed: 5 prompts; valid: up to 4"):
        Request("a", 0, SamplingConfig(), mixed=(Mixed("b", 0.5),) * 5)
