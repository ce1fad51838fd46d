"""Published scheduler configurations: the noise levels and times of diffusers, and back."""

import pytest
import torch

from diffusion.pretrained import process_of_scheduler, scheduler_of_process
from diffusion.samplers.ddim import ddim
from diffusion.sampling import SamplingConfig
from diffusion.schedule import Schedule, ScheduleConfig

diffusers = pytest.importorskip("diffusers")

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = [
    ("DDIMScheduler", {}), ("DDIMScheduler", {**STABLE, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}),
    ("DDIMScheduler", {**STABLE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                       "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {**STABLE, "skip_prk_steps": True, "steps_offset": 1}),
    ("DDPMScheduler", {"num_train_timesteps": 200, "timestep_spacing": "linspace"}),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.01, 0.3, 0.2] * 5, "num_train_timesteps": 20}),
    ("LCMScheduler", {}), ("HeunDiscreteScheduler", {}), ("EulerDiscreteScheduler", STABLE),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {**STABLE, "solver_order": 3, "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {**STABLE, "timestep_spacing": "trailing", "prediction_type": "sample"}),
]


@pytest.mark.parametrize("name, options", CASES)
def test_levels_and_settings_equal_diffusers(name, options):
    """Also where their file leaves a key out: their class then has a default, and so have we."""
    theirs = getattr(diffusers, name)(**options)
    whole = dict(theirs.config)
    schedule, prediction_type, sampling = process_of_scheduler({**whole, "_class_name": name})
    assert (schedule, prediction_type, sampling) == process_of_scheduler({**options, "_class_name": name})
    alpha_bar = theirs.alphas_cumprod.double()
    torch.testing.assert_close(Schedule(schedule).alpha_bar, alpha_bar, atol=1e-5, rtol=0)
    assert prediction_type == whole["prediction_type"] and sampling.guidance.scale == 7.5
    assert sampling.steps == min(50, schedule.steps)
    if sampling.sampler in ("ddim", "ddpm", "pndm"):
        theirs.register_to_config(steps_offset=1)  # as their Stable Diffusion pipeline does
        theirs.set_timesteps(10)
        times = list(dict.fromkeys(theirs.timesteps.tolist()))  # PNDM visits one twice
        assert Schedule(schedule).timesteps(10, sampling.spacing, sampling.offset) == times


def test_an_end_that_is_not_clean_is_the_level_of_time_0():
    """With the exact network of x_0 = 0 everything is the noise: sigma_0 of it is left, instead of nothing."""
    schedule, x_T = Schedule(ScheduleConfig()), torch.ones(1, 1, 2, 2)

    def denoise(x_t, t):
        return x_t / schedule.sigma(t)

    times = schedule.timesteps(10, "leading", 1)
    last = ddim(denoise, x_T, times, schedule, "epsilon", clean_end=False)
    torch.testing.assert_close(last, x_T * schedule.sigma(0) / schedule.sigma(times[0]))
    assert ddim(denoise, x_T, times, schedule, "epsilon").abs().max() < 1e-5


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "KarrasVeScheduler"}, "scheduler: _class_name 'KarrasVeScheduler' is not supported; valid: DDIM"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported; valid: linear, scaled_linear, squared"),
    ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is not supported; valid: epsilon"),
    ({"timestep_spacing": "magic"}, "timestep_spacing 'magic' is not supported; valid: leading, linspace, trailing"),
])
def test_what_has_no_counterpart_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        process_of_scheduler({"_class_name": "DDIMScheduler", **change})


def test_options_of_a_sampler_are_read_and_written():
    for name, key, value, options in (
            ("DDPMScheduler", "variance_type", "fixed_large", {"variance": "large"}),
            ("LCMScheduler", "timestep_scaling", 5.0, {"timestep_scaling": 5.0}),
            ("DPMSolverSinglestepScheduler", "solver_order", 3, {"order": 3}),
            ("DDIMScheduler", "set_alpha_to_one", False, {"clean_end": False})):
        process = process_of_scheduler({"_class_name": name, key: value})
        assert options.items() <= process[2].options.items()
        written = scheduler_of_process(*process)
        assert written[key] == value and process_of_scheduler(written) == process
    with pytest.raises(ValueError, match="variance_type 'learned' is not supported; valid: fixed_small"):
        process_of_scheduler({"_class_name": "DDPMScheduler", "variance_type": "learned"})
    with pytest.raises(ValueError, match="options.eta: value 0.5 of ddim has no counterpart in diffusers; valid: 0.0"):
        scheduler_of_process(ScheduleConfig(), "epsilon", SamplingConfig(options={"eta": 0.5}))


def test_what_diffusers_lacks_is_not_written():
    with pytest.raises(ValueError, match="kind 'flow' with shift 1.0; valid for diffusers"):
        scheduler_of_process(ScheduleConfig(kind="flow"), "flow", SamplingConfig())
    with pytest.raises(ValueError, match="kind 'cosine' with shift 2.0"):
        scheduler_of_process(ScheduleConfig(kind="cosine", shift=2.0), "epsilon", SamplingConfig())
    with pytest.raises(ValueError, match="sampler 'flow_euler' is not supported; valid: ddim"):
        scheduler_of_process(ScheduleConfig(), "epsilon", SamplingConfig(sampler="flow_euler"))
    with pytest.raises(ValueError, match="offset: value 2; valid for diffusers: 1"):
        scheduler_of_process(ScheduleConfig(), "epsilon", SamplingConfig(spacing="leading", offset=2))
    third = SamplingConfig(sampler="dpm_solver_multistep", options={"order": 3})
    with pytest.raises(ValueError, match="options.third_order: value exact of dpm_solver_multistep has no counterpart"):
        scheduler_of_process(ScheduleConfig(), "epsilon", third)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr True is not supported; valid: false with Heun"):
        scheduler_of_process(ScheduleConfig(zero_terminal_snr=True), "v_prediction", SamplingConfig(sampler="heun"))
