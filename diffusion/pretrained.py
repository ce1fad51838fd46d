"""The scheduler_config.json of published checkpoints as our schedule, prediction type and sampling, and back.

What a checkpoint was trained with (schedule, prediction type) must be kept; how it is sampled (sampler, spacing) is
what its authors chose. Values that have no counterpart here are refused by name.
"""

from collections.abc import Mapping
from typing import Any, cast

from diffusion.prediction import PredictionType
from diffusion.samplers import Value, get_sampler
from diffusion.sampling import SamplingConfig
from diffusion.schedule import ScheduleConfig, ScheduleKind
from diffusion.spacing import Spacing

SCHEDULERS = {
    "DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral", "HeunDiscreteScheduler": "heun", "LCMScheduler": "lcm",
    "DPMSolverMultistepScheduler": "dpm_solver_multistep", "DPMSolverSinglestepScheduler": "dpm_solver_singlestep",
    "UniPCMultistepScheduler": "unipc",
}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
LEADING = ("ddim", "pndm", "ddpm", "lcm")  # their default spacing is leading, that of the others linspace
SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
OPTIONS = {  # the options that a scheduler_config.json has a key for; eta and repeats are no part of one
    "order": "solver_order", "clean_end": "set_alpha_to_one", "variance": "variance_type",
    "timestep_scaling": "timestep_scaling",
}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
FIXED: dict[str, tuple] = {
    "thresholding": (False,), "use_flow_sigmas": (False,), "use_lu_lambdas": (False, None),
    "algorithm_type": ("dpmsolver++",), "solver_type": ("midpoint", "bh2"), "predict_x0": (True,),
    "final_sigmas_type": ("zero",),
}


def process_of_scheduler(config: Mapping[str, Any]) -> tuple[ScheduleConfig, PredictionType, SamplingConfig]:
    """(schedule, prediction type, sampling) of a scheduler_config.json; raises ValueError naming what is not supported.

    Clipping of x_0 (`clip_sample`) is left out: latents are never clipped.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise unsupported("_class_name", name, SCHEDULERS)
    sampler = SCHEDULERS[name]
    for key, valid in FIXED.items():
        if key in config and config[key] not in valid:
            raise unsupported(key, config[key], valid)
    if sampler == "pndm" and not config.get("skip_prk_steps", False):
        raise unsupported("skip_prk_steps", False, (True,))
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and (not isinstance(betas, (list, tuple)) or len(betas) != steps
                              or not all(isinstance(beta, (int, float)) for beta in betas)):
        raise unsupported("trained_betas", betas, (None, f"one for each of {steps} steps"))
    kind = config.get("beta_schedule", "scaled_linear" if sampler == "lcm" else "linear")
    if kind not in KINDS:
        raise unsupported("beta_schedule", kind, KINDS)
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise unsupported("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
    ends = (0.00085, 0.012) if sampler in ("lcm", "heun") else (0.0001, 0.02)
    schedule = ScheduleConfig(
        kind=cast(ScheduleKind, KINDS[kind] if betas is None else "betas"),
        steps=steps, betas=None if betas is None else tuple(betas),
        beta_start=config.get("beta_start", ends[0]), beta_end=config.get("beta_end", ends[1]),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
    )
    return schedule, cast(PredictionType, prediction_type), sampling_of_scheduler(config, sampler)


def sampling_of_scheduler(config: Mapping[str, Any], sampler: str) -> SamplingConfig:
    """Sampler, spacing and end; 50 steps and guidance 7.5, which no file says, are the defaults of diffusers."""
    spacing = config.get("timestep_spacing", "leading" if sampler in LEADING else "linspace")
    if spacing not in ("leading", "linspace", "trailing"):
        raise unsupported("timestep_spacing", spacing, ("leading", "linspace", "trailing"))
    spacing = next((name for key, name in SIGMAS.items() if config.get(key)), spacing)
    return SamplingConfig(
        sampler=sampler, steps=min(50, config.get("num_train_timesteps", 1000)), spacing=cast(Spacing, spacing),
        offset=config.get("steps_offset", 0), options=options_of_scheduler(config, sampler),
    )


def options_of_scheduler(config: Mapping[str, Any], sampler: str) -> dict[str, Value]:
    """The options of the sampler that a scheduler_config.json states, or that diffusers has where it states none."""
    found: dict[str, Value] = {}
    for option in get_sampler(sampler).options:
        if option in OPTIONS and OPTIONS[option] in config:
            found[option] = config[OPTIONS[option]]
    if sampler == "pndm":
        found.setdefault("clean_end", False)  # `set_alpha_to_one` of PNDMScheduler, unlike that of DDIMScheduler
    if "variance" in found:
        if found["variance"] not in VARIANCES:
            raise unsupported(OPTIONS["variance"], found["variance"], VARIANCES)
        found["variance"] = VARIANCES[str(found["variance"])]
    return found


def scheduler_of_process(schedule: ScheduleConfig, prediction_type: str, sampling: SamplingConfig) -> dict[str, Any]:
    """A scheduler_config.json from which `process_of_scheduler` gives the same; ValueError where there is none."""
    names = {sampler: name for name, sampler in SCHEDULERS.items()}
    kinds = {kind: name for name, kind in KINDS.items()}
    if sampling.sampler not in names:
        raise unsupported("sampler", sampling.sampler, names)
    if schedule.kind not in (*kinds, "betas") or schedule.shift != 1.0:
        raise ValueError(f"schedule: kind {schedule.kind!r} with shift {schedule.shift}; valid for diffusers: "
                         f"{', '.join(kinds)}, betas, with shift 1")
    config: dict[str, Any] = {
        "_class_name": names[sampling.sampler], "beta_start": schedule.beta_start, "beta_end": schedule.beta_end,
        "beta_schedule": kinds.get(schedule.kind, "linear"),
        "trained_betas": None if schedule.betas is None else list(schedule.betas),
        "num_train_timesteps": schedule.steps,
        "prediction_type": prediction_type, "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    sigmas = {name: key for key, name in SIGMAS.items()}
    config |= {sigmas[sampling.spacing]: True} if sampling.spacing in sigmas else {"timestep_spacing": sampling.spacing}
    config["steps_offset"] = sampling.offset
    config |= scheduler_options(sampling)
    if sampling.sampler in ("ddim", "ddpm", "lcm"):
        config["clip_sample"] = False
    if sampling.sampler == "pndm":
        config["skip_prk_steps"] = True
    return config


def scheduler_options(sampling: SamplingConfig) -> dict[str, Any]:
    """The keys of a scheduler_config.json that hold the options of a sampler. Raises ValueError for an option without
    one that is not at its default."""
    for option in sampling.options:
        if option not in OPTIONS:
            default = get_sampler(sampling.sampler).options[option].default
            raise ValueError(f"options.{option}: value {sampling.options[option]} of {sampling.sampler} has no "
                             f"counterpart in diffusers; valid: {default}")
    found = {OPTIONS[option]: value for option, value in sampling.complete_options.items() if option in OPTIONS}
    if "variance_type" in found:
        found["variance_type"] = {"small": "fixed_small", "large": "fixed_large"}[str(found["variance_type"])]
    return found


def unsupported(key: str, value: Any, valid: Any) -> ValueError:
    """The error for a value that has no counterpart."""
    return ValueError(f"scheduler: {key} {value!r} is not supported; valid: {', '.join(map(str, valid))}")
