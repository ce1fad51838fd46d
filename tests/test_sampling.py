"""One sampling run from its settings."""

import pytest
import torch

from diffusion.guidance import GuidanceConfig
from diffusion.noise import PerImageNoise
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.sampling import SamplingConfig, sample_latents
from diffusion.schedule import Schedule, ScheduleConfig

VP = Schedule(ScheduleConfig())
FLOW = Schedule(ScheduleConfig(kind="flow"))


def conditional(x, t):
    return torch.tanh(x + 0.5)


def doubled(x, t):
    uncond, cond = x.chunk(2)
    return torch.cat([torch.tanh(uncond), torch.tanh(cond + 0.5)])


def sample(config, seeds=(1, 2), schedule=VP, **options):
    noise = PerImageNoise(seeds, (3, 4, 4))
    return sample_latents(conditional, doubled, noise, schedule, "v_prediction", config, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_from_its_settings(name):
    schedule = FLOW if name.startswith("flow") else VP
    config = SamplingConfig(sampler=name, steps=5, guidance=GuidanceConfig(scale=3.0))
    walked = []

    def progress(times):
        for t in times:
            walked.append(t)
            yield t

    both = sample(config, schedule=schedule, progress=progress)
    assert both.shape == (2, 3, 4, 4) and torch.isfinite(both).all()
    assert walked == schedule.timesteps(5)
    torch.testing.assert_close(sample(config, (2,), schedule), both[1:])


def test_settings_reach_the_sampler():
    noise = PerImageNoise((1, 2), (3, 4, 4))
    times = VP.timesteps(6, "leading", offset=1)
    guidance = GuidanceConfig(scale=1.0)
    expected = get_sampler("unipc")(conditional, noise(), times, VP, "v_prediction", order=3)
    found = sample(SamplingConfig("unipc", 6, "leading", order=3, offset=1, guidance=guidance))
    assert torch.equal(found, expected)
    still, moved = (sample(SamplingConfig("ddim", 6, eta=eta, guidance=guidance)) for eta in (0.0, 1.0))
    assert not torch.allclose(still, moved)


@pytest.mark.parametrize("options", [
    {"sampler": "magic"}, {"steps": 0}, {"eta": 1.5}, {"order": 4}, {"offset": -1}])
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match="valid"):
        SamplingConfig(**options)
    with pytest.raises(ValueError, match="valid"):
        sample(SamplingConfig(steps=1001))
