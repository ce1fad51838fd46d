"""One sampling run from its settings."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.guidance import GuidanceConfig
from diffusion.noise import PerImageNoise
from diffusion.pretrained_grid import PretrainedGrid
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.sampling import RunSettings, SamplingConfig, sample_latents, times_of_run, with_sampler
from diffusion.schedule import Schedule, ScheduleConfig
from files.config import ConfigError, from_dict, to_dict

VP = Schedule(ScheduleConfig())
FLOW = Schedule(ScheduleConfig(kind="flow"))


def conditional(x, t):
    return torch.tanh(x + 0.5)


def doubled(x, t):
    uncond, cond = x.chunk(2)
    return torch.cat([torch.tanh(uncond), torch.tanh(cond + 0.5)])


def sample(config, seeds=(1, 2), schedule=VP, **options):
    noise, run = PerImageNoise(seeds, (3, 4, 4)), RunSettings(**options)
    times = times_of_run(schedule, config, run)
    return sample_latents((conditional, doubled), noise, times, schedule, "v_prediction", config, run)


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
    found = sample(SamplingConfig("unipc", 6, "leading", {"order": 3}, offset=1, guidance=guidance))
    assert torch.equal(found, expected)
    still, moved = (sample(SamplingConfig("ddim", 6, options={"eta": eta}, guidance=guidance)) for eta in (0.0, 1.0))
    assert not torch.allclose(still, moved)


OLDER = {"steps": 5, "spacing": "trailing", "eta": 0.0, "order": 2, "offset": 0, "clean_end": True}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_option_that_the_sampler_does_not_have_is_refused(name):
    options = SAMPLERS[name].options
    for other in {option for sampler in SAMPLERS.values() for option in sampler.options} - options.keys():
        with pytest.raises(ValueError) as caught:
            SamplingConfig(name, options={other: 1})
        assert str(caught.value) == (f"options.{other}: the sampler {name} has no such option; valid: "
                                     f"{', '.join(options) or 'none'}")


@pytest.mark.parametrize("name", SAMPLERS)
def test_declared_options_are_what_the_function_takes(name):
    """Every keyword of its own is declared, with a sentence, and its default is valid."""
    sampler = SAMPLERS[name]
    parameters = inspect.signature(sampler.function).parameters
    keywords = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key != "trace"]
    assert list(sampler.options) == keywords
    for option in sampler.options.values():
        assert option.sentence.endswith(".") and option.checked(option.default) == option.default
        for wrong in (None, [1], "magic", math.nan, math.inf, -math.inf, True if option.kind is not bool else 1):
            with pytest.raises(ValueError, match=f"{option.name}: value .*; valid: "):
                option.checked(wrong)
    same = [other.options[key] for other in SAMPLERS.values() for key in keywords if key in other.options]
    assert all(option.kind is sampler.options[option.name].kind for option in same)  # one reader for --set


@pytest.mark.parametrize("name", SAMPLERS)
def test_files_of_older_versions_load(name):
    """They hold three options for every sampler; those that are at their defaults say nothing."""
    assert from_dict(SamplingConfig, {"sampler": name, **OLDER}) == SamplingConfig(name, 5)
    if "order" in SAMPLERS[name].options:
        given = {"sampler": name, **OLDER, "order": 3}
        assert from_dict(SamplingConfig, given) == SamplingConfig(name, 5, options={"order": 3})
    else:
        with pytest.raises(ValueError, match="sampling.options.order: the sampler .* has no such option"):
            from_dict(SamplingConfig, {"sampler": name, **OLDER, "order": 3}, "sampling")


def test_configurations_round_trip_and_a_new_sampler_takes_what_it_has():
    config = from_dict(SamplingConfig, {"options": {"eta": 1, "clean_end": False}})
    assert config.options == {"eta": 1.0, "clean_end": False} and isinstance(config.options["eta"], float)
    assert from_dict(SamplingConfig, to_dict(config)) == config and hash(config) == hash(replace(config))
    assert SamplingConfig(options={"eta": 0.0}) == SamplingConfig()  # a default is no choice
    assert with_sampler(config, "pndm").options == {"clean_end": False}
    assert with_sampler(SamplingConfig(), "euler_ancestral").complete_options == {"eta": 1.0}
    assert replace(SamplingConfig(), sampler="heun").complete_options == {}
    with pytest.raises(ValueError, match="options.eta: the sampler heun"):
        replace(config, sampler="heun")
    for wrong in ({"options": 3}, {"options": {"eta": [1]}}, {"options": None}):
        with pytest.raises(ConfigError, match="options"):
            from_dict(SamplingConfig, wrong)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_changes_the_result(name):
    values = {"eta": 0.5, "clean_end": False, "variance": "large", "repeats": 2, "order": 3, "sigma_data": 5.0,
              "timestep_scaling": 0.01, "noisy_end": True, "extrapolate": "prediction", "solver_type": "heun",
              "lower_order_final": False, "euler_at_final": True, "third_order": "published", "form": "bh1",
              "uncorrected": 2}
    beside = {"third_order": {"order": 3}, "noisy_end": {"variance": "large"},
              "euler_at_final": {"lower_order_final": False}}
    for option in SAMPLERS[name].options:
        schedule = FLOW if name.startswith("flow") else VP
        # these two act where the last step does not go to x_0
        grid = PretrainedGrid(clean=False) if option in ("lower_order_final", "euler_at_final") else None
        plain, changed = (sample(SamplingConfig(name, 8, options={**beside.get(option, {}), **options}, grid=grid),
                                 schedule=schedule) for options in ({}, {option: values[option]}))
        assert (plain - changed).abs().max() > 1e-5, option


@pytest.mark.parametrize("options", [
    {"sampler": "magic"}, {"steps": 0}, {"options": {"eta": 1.5}}, {"offset": -1},
    {"sampler": "unipc", "options": {"order": 4}}])
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match="valid"):
        SamplingConfig(**options)
    with pytest.raises(ValueError, match="valid"):
        sample(SamplingConfig(steps=1001))


def test_the_table_of_options_in_the_docs_is_what_is_declared():
    rows = []
    for name, sampler in SAMPLERS.items():
        for option in sampler.options.values():
            default = f"{option.default:g}" if option.kind is float else str(option.default)
            rows.append(f"| `{name}` | `{option.name}` | {option.valid} | {default.lower()} | {option.sentence} |")
    without = ", ".join(f"`{name}`" for name, sampler in SAMPLERS.items() if not sampler.options)
    text = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text(encoding="utf-8")
    table = text.partition("| sampler | option |")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == [*rows, f"| {without} | none | | | |"]
