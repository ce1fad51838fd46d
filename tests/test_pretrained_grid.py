"""Every field that the schedulers of diffusers read: a run here ends where theirs does, within one level of 255.

The network of the quick tests is a smooth function, and what the Stable Diffusion pipeline of diffusers does to a
scheduler (offset 1, no clipping) is done here as well. The slow ones draw with small networks and that pipeline.
"""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from test_pretrained import published

from diffusion.denoise import time_tensor
from diffusion.guidance import GuidanceConfig
from diffusion.noise import PerImageNoise
from diffusion.pretrained import process_of_scheduler, scheduler_of_process
from diffusion.pretrained_grid import PretrainedGrid
from diffusion.sampling import Edit, RunSettings, SamplingConfig, sample_latents, times_of_run, visited_times
from diffusion.schedule import Schedule, ScheduleConfig
from pipeline.loading import load_pretrained
from pipeline.system import TextToImage, with_options

diffusers = pytest.importorskip("diffusers")

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN: list[dict] = [{}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"},
                     {"prediction_type": "v_prediction"}]
SPACED: list[dict] = [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "leading"},
                      {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}]
KINDS = SPACED + PLAIN
SAMPLE = {"prediction_type": "sample"}
ZERO: list[dict] = [{"rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                     "prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}]
SIGMAS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
LAST = {"final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES: dict[str, list[dict]] = {
    "DDIMScheduler": [*KINDS, SAMPLE, *ZERO[:1], {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"},
                      {"set_alpha_to_one": False}, {"clip_sample": True}, {"use_karras_sigmas": True},
                      {"trained_betas": [0.001 + 0.00002 * i for i in range(1000)]}, {"num_train_timesteps": 200}],
    "PNDMScheduler": [{**case, "skip_prk_steps": True} for case in (
        *KINDS, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing", "set_alpha_to_one": True})],
    "DDPMScheduler": [*KINDS, SAMPLE, *ZERO[:1], {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"},
                      {"beta_schedule": "sigmoid"}],
    "EulerDiscreteScheduler": [
        *KINDS, SAMPLE, *ZERO, *SIGMAS, *({**case, "timestep_spacing": "leading"} for case in SIGMAS),
        {"interpolation_type": "log_linear"}, {"interpolation_type": "log_linear", "use_karras_sigmas": True}, LAST,
        {**LAST, "use_karras_sigmas": True}, {"sigma_min": 0.1, "sigma_max": 5.0, "use_karras_sigmas": True},
        {"sigma_min": 0.01, "sigma_max": 20.0, "use_exponential_sigmas": True}, {"sigma_min": 0.1, "sigma_max": 5.0},
        {"timestep_type": "continuous"}, {"rescale_betas_zero_snr": True, "use_karras_sigmas": True}],
    "EulerAncestralDiscreteScheduler": [*KINDS, *ZERO],
    "HeunDiscreteScheduler": [*KINDS, SAMPLE, *SIGMAS, *({**case, "timestep_spacing": "leading"} for case in SIGMAS),
                              {"clip_sample": True}],
    "LCMScheduler": [*KINDS, SAMPLE, *ZERO[:1], {"original_inference_steps": 100}, {"timestep_scaling": 5.0},
                     {"set_alpha_to_one": False}],
    "DPMSolverMultistepScheduler": [
        *KINDS, SAMPLE, *ZERO, *SIGMAS, {"use_lu_lambdas": True}, {"solver_order": 1}, {"solver_order": 3},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, {"solver_type": "heun"},
        {"lambda_min_clipped": -3.0, "timestep_spacing": "trailing"},
        {"lambda_min_clipped": -3.0, "timestep_spacing": "leading"}, {"lower_order_final": False},
        {"euler_at_final": True}, LAST, {**LAST, "euler_at_final": True}, {**LAST, "lower_order_final": False},
        {**LAST, "lower_order_final": False, "solver_order": 3}, SDE, {**SDE, "solver_order": 3}, {**SDE, **LAST},
        {**SDE, "solver_type": "heun"}, {**LAST, "algorithm_type": "deis", "solver_type": "logrho"},
        {"solver_type": "bh2"}],
    "DPMSolverSinglestepScheduler": [
        *PLAIN, SAMPLE, *SIGMAS, {"solver_order": 1}, {"solver_order": 3}, {"solver_order": 3, "solver_type": "heun"},
        {"solver_type": "heun"}, {"lower_order_final": True}, {"lambda_min_clipped": -3.0}, LAST,
        {**LAST, "lower_order_final": True}, {**LAST, "solver_order": 3},
        {**LAST, "solver_order": 3, "lower_order_final": True}, {"timestep_spacing": "leading"}],
    "UniPCMultistepScheduler": [
        *KINDS, SAMPLE, *ZERO, *SIGMAS, {"solver_order": 1}, {"solver_order": 3}, {**LAST, "solver_type": "bh1"},
        {**LAST, "solver_type": "bh1", "solver_order": 3}, {"disable_corrector": [0]}, {"disable_corrector": [0, 1]},
        LAST, {**LAST, "lower_order_final": False}, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 5.0},
        {"sigma_min": 0.1}, {"solver_type": "midpoint"}],
}
ALL = [(name, fields) for name, cases in CASES.items() for fields in cases]
DRAWING = {"DDPMScheduler": "ddpm", "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
           "LCMScheduler": "lcm", "DPMSolverMultistepScheduler": "dpmsolver_multistep"}  # noise, in the module of ...


def network(x, t):
    """A smooth function of x and t, bounded, in place of a trained network; t as rounded as it gets there."""
    phase = time_tensor(t, x).to(x.dtype).reshape(-1, 1, 1, 1) / 300.0
    return torch.tanh(0.8 * x + torch.sin(phase)) + 0.3 * torch.cos(2.0 * x - phase)


def draws(count=60):
    return iter(torch.randn(count, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


def drawing(name: str, draw):
    """Within this block a scheduler of diffusers takes its later noise from `draw`."""
    if name not in DRAWING:
        return nullcontext()
    return mock.patch(f"diffusers.schedulers.scheduling_{DRAWING[name]}.randn_tensor", lambda *args, **kwargs: draw())


def theirs(name: str, fields: dict, n: int) -> torch.Tensor:
    """x_0 as the loop of diffusers' pipeline ends, (2, 3, 4, 4)."""
    given = {**STABLE, **fields}
    clips = {"clip_sample": False} if "clip_sample" in fields or name == "DDIMScheduler" else {}
    given |= {**clips, **({} if name == "DPMSolverSinglestepScheduler" else {"steps_offset": 1})}
    scheduler = getattr(diffusers, name).from_config(given)
    if name == "DDPMScheduler":
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(n)
    noise = draws()
    x = next(noise) * scheduler.init_noise_sigma
    with drawing(name, lambda: next(noise)):
        for t in scheduler.timesteps:
            prediction = network(scheduler.scale_model_input(x, t), t.item())
            x = scheduler.step(prediction, t, x).prev_sample
    return x


def ours(name: str, fields: dict, n: int) -> torch.Tensor:
    schedule, kind, sampling = process_of_scheduler({**STABLE, **fields, "_class_name": name})
    return drawn(schedule, kind, sampling, n)


def drawn(schedule: ScheduleConfig, kind: str, sampling: SamplingConfig, n: int) -> torch.Tensor:
    config = replace(sampling, steps=n, guidance=GuidanceConfig(scale=1.0))
    noise, run, table = draws(), RunSettings(), Schedule(schedule)
    times = times_of_run(table, config, run)
    return sample_latents((network, network), lambda: next(noise), times, table, kind, config, run)


def difference(x: torch.Tensor, expected: torch.Tensor) -> float:
    """In levels of 255, for values of -1 .. 1; larger values, which the smooth network may lead to, are scaled down."""
    return 127.5 * ((x - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def label(fields: dict) -> str:
    return ",".join(f"{key}={value if key != 'trained_betas' else '...'}" for key, value in fields.items()) or "plain"


@pytest.mark.parametrize("n", (7, 8, 20))
@pytest.mark.parametrize("name, fields", ALL, ids=[f"{name}-{label(fields)}" for name, fields in ALL])
def test_every_field_is_followed(name, fields, n):
    expected = theirs(name, fields, n)
    assert torch.isfinite(expected).all() and expected.std() > 0.02
    assert difference(ours(name, fields, n), expected) < 1.0


@pytest.mark.parametrize("name, fields", ALL, ids=[f"{name}-{label(fields)}" for name, fields in ALL])
def test_what_is_written_is_read_back_by_us_and_by_diffusers(name, fields):
    process = process_of_scheduler({**STABLE, **fields, "_class_name": name})
    written = scheduler_of_process(*process)
    assert process_of_scheduler(written) == process
    again = dict(getattr(diffusers, name).from_config(written).config)
    torch.testing.assert_close(drawn(*process_of_scheduler({**again, "_class_name": name}), 7),
                               drawn(*process, 7), rtol=0, atol=0)


@pytest.mark.parametrize("name, fields, message", [
    ("DDIMScheduler", {"thresholding": True}, "thresholding True is not supported; valid: False"),
    ("PNDMScheduler", {}, "skip_prk_steps False is not supported; valid: True"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type 'learned_range' is not supported; valid: fix"),
    ("DDPMScheduler", {"beta_schedule": "laplace"}, "beta_schedule 'laplace' is not supported; valid: linear"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type 'c"),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type 'cubic' is not supported; valid"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_b"),
    ("EulerDiscreteScheduler", {"sigma_min": -1.0}, "scheduler: sigma_min: value -1.0; valid: a number above 0"),
    ("EulerDiscreteScheduler", {"sigma_min": "low"}, "sigma_min 'low' is not supported; valid: a number"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver' is not supported"),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True is not supported; valid: False"),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type 'learned' is not supported; valid"),
    ("DPMSolverMultistepScheduler", {"solver_type": "rk4"}, "solver_type 'rk4' is not supported; valid: midpoint"),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order 4 is not supported; valid: 1, 2, 3"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "max"}, "final_sigmas_type 'max' is not supported; valid"),
    ("DPMSolverSinglestepScheduler", SDE, "algorithm_type 'sde-dpmsolver.*' is not supported; valid: dpmsolver"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0 False is not supported; valid: True"),
    ("UniPCMultistepScheduler", {"disable_corrector": [2]}, r"disable_corrector \[2\] is not supported; valid: \[\]"),
    ("UniPCMultistepScheduler", {"lower_order_final": False}, "lower_order_final False is not supported; valid: True"),
    ("UniPCMultistepScheduler", {**LAST, "use_karras_sigmas": True}, "final_sigmas_type 'sigma_min' is not supported"),
    ("DDIMScheduler", {"num_train_timesteps": "many"}, "num_train_timesteps 'many' is not supported; valid: a whole"),
    ("DDIMScheduler", {"beta_end": 2}, "scheduler: beta_start: value 0.00085 with beta_end 2; valid: 0 < beta_start"),
    ("DDIMScheduler", {"set_alpha_to_one": None}, "set_alpha_to_one None is not supported; valid: true, false"),
    ("DDIMScheduler", {"timestep_spacing": ["leading"]}, "timestep_spacing .* is not supported; valid: leading"),
])
def test_what_is_not_followed_is_refused_by_name(name, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        process_of_scheduler({**STABLE, **fields, "_class_name": name})
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_is_none_of_ours_leaves_the_process_to_another_sampler():
    for name in ("LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler", "TCDScheduler"):
        given = {**dict(getattr(diffusers, name)(**STABLE).config), "_class_name": name}
        with pytest.raises(ValueError, match=f"_class_name '{name}' is not supported; valid: DDIM.*--sampler"):
            process_of_scheduler(given)
        for sampler, peer in (("ddim", "DDIMScheduler"), ("unipc", "UniPCMultistepScheduler"),
                              ("dpm_solver_multistep", "DPMSolverMultistepScheduler")):
            process = process_of_scheduler(given, sampler)
            assert process[2].sampler == sampler
            other = {key: value for key, value in given.items() if key not in ("_class_name", "_use_default_values",
                                                                               "algorithm_type")}
            assert difference(drawn(*process, 8), theirs(peer, other, 8)) < 1.0
    # the settings that only its own sampler cannot follow stop that one alone
    refused = {**STABLE, "_class_name": "PNDMScheduler", "skip_prk_steps": False}
    assert process_of_scheduler(refused, "ddim")[2].sampler == "ddim"
    with pytest.raises(ValueError, match="skip_prk_steps False"):
        process_of_scheduler(refused, "pndm")
    own = {**STABLE, "_class_name": "EulerDiscreteScheduler"}
    assert process_of_scheduler(own, "ddim") == process_of_scheduler(own)


def test_the_last_part_of_a_run_starts_from_an_image():
    _, kind, sampling = process_of_scheduler({**STABLE, "_class_name": "DPMSolverMultistepScheduler",
                                              "use_karras_sigmas": True})
    config = replace(sampling, steps=40, guidance=GuidanceConfig(scale=1.0))
    table, edit = Schedule(ScheduleConfig()), Edit(torch.zeros(2, 3, 4, 4), 0.5)
    times, noise = times_of_run(table, config, RunSettings(edit=edit)), draws()
    assert times == visited_times(table, config)[20:] and sorted(times, reverse=True) == times
    x = sample_latents((network, network), lambda: next(noise), times, table, kind, config, RunSettings(edit=edit))
    assert torch.isfinite(x).all()


def test_a_grid_without_times_is_refused():
    for sampler, spacing, n in (("dpm_solver_multistep", "leading", 1000), ("lcm", "leading", 60),
                                ("ddim", "leading", 0), ("unipc", "linspace", 1000)):
        config = SamplingConfig(sampler=sampler, spacing=spacing, steps=max(n, 1), offset=1, grid=PretrainedGrid())
        with pytest.raises(ValueError, match="n: value|; valid"):
            visited_times(Schedule(ScheduleConfig()), replace(config, steps=n))
    for wrong in ({"sigma_min": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"original_steps": 0}):
        with pytest.raises(ValueError, match="valid: "):
            PretrainedGrid(**wrong)
    with pytest.raises(ValueError, match="sigma_min: value 30 with sigma_max 14.6146; valid: below it"):
        visited_times(Schedule(ScheduleConfig()), SamplingConfig(
            sampler="euler", spacing="karras", grid=PretrainedGrid(sigma_min=30.0)))


# ---- images of networks

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline of small random networks, and the system read from its folder."""
    parent = tmp_path_factory.mktemp("scheduled")
    pipeline = published(parent, "sd1")
    return pipeline, load_pretrained(parent / "pipeline")


def largest_difference(pair, name: str, fields: dict, n: int) -> float:
    """Between the images of both libraries with this scheduler_config.json, in levels of 255."""
    pipeline, system = pair
    scheduler = getattr(diffusers, name).from_config({**STABLE, **fields})
    # their pipeline corrects the configuration of the scheduler when it is built
    pipeline = diffusers.StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler},
                                                 requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = PerImageNoise([1], (4, 8, 8))
    first = noise()
    with drawing(name, noise):
        expected = 255 * pipeline("a red star", negative_prompt="dark", num_inference_steps=n, guidance_scale=3.0,
                                  latents=first, height=16, width=16, output_type="np").images
    schedule, kind, sampling = process_of_scheduler({"_class_name": name, **STABLE, **fields})
    system = TextToImage(replace(system.config, schedule=schedule, prediction_type=kind), system.tokenizer,
                         system.text_encoder, system.unet, system.autoencoder, masked=False)
    with torch.inference_mode():
        config = with_options(sampling, steps=n, scale=3.0)
        images = system.decode(system.latents(["a red star"], [1], config, "dark")).clamp(-1, 1)
    assert expected.std() > 5
    return float(np.abs((images.permute(0, 2, 3, 1).numpy() + 1) * 127.5 - expected).max())


@pytest.mark.parametrize("n", (8, 25))
@pytest.mark.parametrize("name, fields", [
    ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}), ("DDIMScheduler", {"steps_offset": 0}),
    ("PNDMScheduler", {"skip_prk_steps": True}), ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"})])
def test_images_of_files_that_leave_fields_out(pair, name, fields, n):
    """As files of 2022 do: neither steps_offset nor timestep_spacing."""
    assert largest_difference(pair, name, fields, n) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name, fields", ALL, ids=[f"{name}-{label(fields)}" for name, fields in ALL])
def test_images_of_every_field(pair, name, fields):
    assert largest_difference(pair, name, fields, 8) < 1.0
