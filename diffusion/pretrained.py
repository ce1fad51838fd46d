"""The scheduler_config.json of published checkpoints as our schedule, prediction type and sampling, and back.

What a checkpoint was trained with (schedule, prediction type) must be kept; how it is sampled (sampler, grid) is what
its authors chose. Every key that the class in diffusers reads is followed, with its default where the file leaves it
out, or refused by name; keys that the class does not read are ignored here as there. Checked against diffusers 0.42.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from diffusion.prediction import PredictionType
from diffusion.pretrained_grid import LOG_SNR, MULTISTEP, OF_TIMES, PretrainedGrid
from diffusion.samplers import Value
from diffusion.sampling import SamplingConfig
from diffusion.schedule import ScheduleConfig, ScheduleKind
from diffusion.spacing import Spacing

Json = Mapping[str, Any]
Process = tuple[ScheduleConfig, PredictionType, SamplingConfig]

SCHEDULERS = {
    "DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral", "HeunDiscreteScheduler": "heun", "LCMScheduler": "lcm",
    "DPMSolverMultistepScheduler": "dpm_solver_multistep", "DPMSolverSinglestepScheduler": "dpm_solver_singlestep",
    "UniPCMultistepScheduler": "unipc",
}
NAMES = {sampler: name for name, sampler in SCHEDULERS.items()} | {
    "dpm_solver_sde": "DPMSolverMultistepScheduler"}  # with another algorithm_type
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
LEADING = ("ddim", "pndm", "ddpm", "lcm")  # their default spacing is leading, that of the others linspace
SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
ALGORITHMS = {"dpmsolver++": "dpm_solver_multistep", "deis": "dpm_solver_multistep",
              "sde-dpmsolver++": "dpm_solver_sde"}
OTHERS_SOLVERS = ("midpoint", "heun", "logrho", "bh1", "bh2")  # a scheduler takes the names of another's as its default

# The keys that a scheduler reads beside those of the schedule.
OF_GRID = {"timestep_spacing", "steps_offset"}
OF_MULTISTEP = {*OF_GRID, *SIGMAS, "solver_order", "solver_type", "lower_order_final", "final_sigmas_type",
                "thresholding", "use_flow_sigmas", "rescale_betas_zero_snr"}
READ = {
    "ddim": {*OF_GRID, "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"},
    "pndm": {*OF_GRID, "set_alpha_to_one", "skip_prk_steps"},
    "ddpm": {*OF_GRID, "variance_type", "thresholding", "rescale_betas_zero_snr"},
    "euler": {*OF_GRID, *SIGMAS, "interpolation_type", "sigma_min", "sigma_max", "timestep_type", "final_sigmas_type",
              "rescale_betas_zero_snr"},
    "euler_ancestral": {*OF_GRID, "rescale_betas_zero_snr"},
    "heun": {*OF_GRID, *SIGMAS},
    "lcm": {*OF_GRID, "original_inference_steps", "thresholding", "timestep_scaling", "rescale_betas_zero_snr"},
    "dpm_solver_multistep": {*OF_MULTISTEP, "algorithm_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped",
                             "variance_type"},
    "dpm_solver_singlestep": {*OF_MULTISTEP, "algorithm_type", "lambda_min_clipped",
                              "variance_type"} - {*OF_GRID, "rescale_betas_zero_snr"},
    "unipc": {*OF_MULTISTEP, "predict_x0", "disable_corrector", "solver_p", "sigma_min", "sigma_max"},
}
READ["dpm_solver_sde"] = READ["dpm_solver_multistep"]
OF_SCHEDULE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}

FIXED: dict[str, tuple] = {  # keys that must have one of these values
    "thresholding": (False,), "use_flow_sigmas": (False,), "predict_x0": (True,), "solver_p": (None,),
}
WHOLE = {"num_train_timesteps", "steps_offset", "solver_order", "original_inference_steps"}
NUMBERS = {"beta_start", "beta_end", "sigma_min", "sigma_max", "timestep_scaling", "lambda_min_clipped"}
SWITCHES = {*SIGMAS, "set_alpha_to_one", "skip_prk_steps", "lower_order_final", "euler_at_final", "use_lu_lambdas",
            "rescale_betas_zero_snr"}
OPTIONAL = {*SIGMAS, "sigma_min", "sigma_max", "use_lu_lambdas", "lambda_min_clipped"}  # may be null


def process_of_scheduler(config: Json, sampler: str | None = None) -> Process:
    """(schedule, prediction type, sampling) of a scheduler_config.json; raises ValueError naming what is not supported.

    sampler: takes the place of a scheduler that is none of ours or has settings that are not supported, and reads of
    the file what its class in diffusers reads (their `from_config`). Clipping of x_0 (`clip_sample`) is left out and
    the offset of "leading" times is 1, whatever the file says, because the Stable Diffusion pipeline of diffusers sets
    both so.
    """
    own = own_sampler(config)
    try:
        if own is None:
            raise ValueError(f"scheduler: _class_name {config.get('_class_name')!r} is not supported; valid: "
                             f"{', '.join(SCHEDULERS)}, or another sampler in its place: --sampler {', '.join(NAMES)}")
        return process_with_sampler(config, own)
    except ValueError:
        if sampler is None or sampler == own:
            raise
    return process_with_sampler({**config, "algorithm_type": "dpmsolver++"}, sampler)


def own_sampler(config: Json) -> str | None:
    """The sampler that a scheduler_config.json names; None if it is none of ours."""
    own = SCHEDULERS.get(str(config.get("_class_name")))
    sde = own == "dpm_solver_multistep" and config.get("algorithm_type") == "sde-dpmsolver++"
    return "dpm_solver_sde" if sde else own


def process_with_sampler(config: Json, sampler: str) -> Process:
    """`process_of_scheduler` with this sampler."""
    own = SCHEDULERS.get(str(config.get("_class_name")), sampler)
    kept = {"_class_name", *OF_SCHEDULE} | READ.get(sampler, set()) | READ[own] & {"rescale_betas_zero_snr"}
    config = {key: value for key, value in config.items() if key in kept}
    check_types(config)
    for key, valid in FIXED.items():
        if key in config and config[key] not in valid:
            raise unsupported(key, config[key], valid)
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise unsupported("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
    schedule = schedule_of_scheduler(config)
    steps = min(50, schedule.steps, config.get("original_inference_steps", 50))
    if sampler in READ:
        sampling = sampling_of_scheduler(config, sampler, steps)
    else:  # one that diffusers does not have
        sampling = SamplingConfig(sampler=sampler, steps=steps)
    return schedule, cast(PredictionType, prediction_type), sampling


def check_types(config: Json) -> None:
    """Raises ValueError for a key whose value has another type than diffusers declares."""
    for key, value in config.items():
        if value is None and key in OPTIONAL:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if key in WHOLE and not (number and isinstance(value, int)):
            raise unsupported(key, value, ("a whole number",))
        if key in NUMBERS and not number:
            raise unsupported(key, value, ("a number",))
        if key in SWITCHES and not isinstance(value, bool):
            raise unsupported(key, value, ("true", "false"))


def schedule_of_scheduler(config: Json) -> ScheduleConfig:
    """The noise schedule. Defaults are those of the class in the file."""
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and (not isinstance(betas, (list, tuple)) or len(betas) != steps
                              or not all(isinstance(beta, (int, float)) for beta in betas)):
        raise unsupported("trained_betas", betas, (None, f"one for each of {steps} steps"))
    name = config.get("_class_name")
    kind = config.get("beta_schedule", "scaled_linear" if name == "LCMScheduler" else "linear")
    kinds = {key: ours for key, ours in KINDS.items() if key != "sigmoid" or name == "DDPMScheduler"}
    if not isinstance(kind, str) or kind not in kinds:
        raise unsupported("beta_schedule", kind, kinds)
    ends = (0.00085, 0.012) if name in ("LCMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
                                        "KDPM2AncestralDiscreteScheduler") else (0.0001, 0.02)
    try:
        return ScheduleConfig(
            kind=cast(ScheduleKind, kinds[kind] if betas is None else "betas"), steps=steps,
            betas=None if betas is None else tuple(betas), beta_start=config.get("beta_start", ends[0]),
            beta_end=config.get("beta_end", ends[1]), zero_terminal_snr=config.get("rescale_betas_zero_snr", False))
    except ValueError as error:
        raise ValueError(f"scheduler: {error}") from None


def sampling_of_scheduler(config: Json, sampler: str, steps: int) -> SamplingConfig:
    """Sampler, options and grid; 50 steps and guidance 7.5, which no file says, are the defaults of diffusers."""
    base = config.get("timestep_spacing", "leading" if sampler in LEADING else "linspace")
    if not isinstance(base, str) or base not in OF_TIMES:
        raise unsupported("timestep_spacing", base, OF_TIMES)
    chosen = [key for key in (*SIGMAS, "use_lu_lambdas") if config.get(key)]
    if len(chosen) > 1:
        raise ValueError(f"scheduler: {' and '.join(chosen)} are true; valid: one of them")
    lu = chosen == ["use_lu_lambdas"]
    spacing = ("exponential" if lu else SIGMAS[chosen[0]]) if chosen else base
    final = config.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise unsupported("final_sigmas_type", final, ("zero", "sigma_min"))
    if final == "sigma_min" and sampler == "unipc" and chosen:
        raise unsupported("final_sigmas_type", final, (f"zero with {chosen[0]} (the last step has no length)",))
    lowest = config.get("lambda_min_clipped")
    try:
        grid = PretrainedGrid(
            base=cast(Any, base), log_linear=is_log_linear(config), sigma_min=config.get("sigma_min"),
            sigma_max=config.get("sigma_max"), clean=final == "zero", lu=lu,
            lambda_min=lowest if lowest is not None and math.isfinite(lowest) else None,
            original_steps=config.get("original_inference_steps", 50))
        options = options_of_scheduler(config, sampler)
        return SamplingConfig(sampler, steps, cast(Spacing, spacing), options, offset=1, grid=grid)
    except ValueError as error:
        raise error if str(error).startswith("scheduler") else ValueError(f"scheduler: {error}") from None


def is_log_linear(config: Json) -> bool:
    """Whether the levels of Euler are spaced evenly in their logarithm."""
    kind, timesteps = config.get("interpolation_type", "linear"), config.get("timestep_type", "discrete")
    if kind not in ("linear", "log_linear"):
        raise unsupported("interpolation_type", kind, ("linear", "log_linear"))
    if timesteps != "discrete" and (timesteps != "continuous" or config.get("prediction_type") == "v_prediction"):
        raise unsupported("timestep_type", timesteps, ("discrete",))
    return kind == "log_linear"


def options_of_scheduler(config: Json, sampler: str) -> dict[str, Value]:
    """The options of the sampler that a scheduler_config.json states, or that diffusers has where it states none."""
    if sampler in LOG_SNR:
        return solver_options(config, sampler)
    if sampler == "pndm":
        if not config.get("skip_prk_steps", False):
            raise unsupported("skip_prk_steps", False, (True,))
        return {"clean_end": config.get("set_alpha_to_one", False), "extrapolate": "prediction"}
    if sampler == "ddim":
        return {"clean_end": config.get("set_alpha_to_one", True)}
    if sampler == "ddpm":
        variance = config.get("variance_type", "fixed_small")
        if variance not in VARIANCES:
            raise unsupported("variance_type", variance, VARIANCES)
        return {"variance": VARIANCES[variance], "noisy_end": VARIANCES[variance] == "large"}
    return {"timestep_scaling": config.get("timestep_scaling", 10.0)} if sampler == "lcm" else {}


def solver_options(config: Json, sampler: str) -> dict[str, Value]:
    """`options_of_scheduler` of the solvers in the log SNR."""
    found: dict[str, Value] = {"order": config.get("solver_order", 2)}
    if found["order"] not in (1, 2, 3):
        raise unsupported("solver_order", found["order"], (1, 2, 3))
    found["lower_order_final"] = config.get("lower_order_final", sampler != "dpm_solver_singlestep")
    kind = config.get("solver_type", "bh2" if sampler == "unipc" else "midpoint")
    if kind not in OTHERS_SOLVERS:
        raise unsupported("solver_type", kind, OTHERS_SOLVERS)
    if config.get("variance_type") is not None:
        raise unsupported("variance_type", config["variance_type"], (None,))
    if sampler == "unipc":
        if not found["lower_order_final"] and config.get("final_sigmas_type", "zero") == "zero":
            raise unsupported("lower_order_final", False, (True, "false with final_sigmas_type sigma_min"))
        return {**found, "form": "bh1" if kind == "bh1" else "bh2", "uncorrected": uncorrected_steps(config)}
    valid = {name: ours for name, ours in ALGORITHMS.items() if sampler in MULTISTEP or ours not in MULTISTEP[1:]}
    if config.get("algorithm_type", "dpmsolver++") not in valid:
        raise unsupported("algorithm_type", config["algorithm_type"], valid)
    found["solver_type"] = "heun" if kind == "heun" else "midpoint"
    if sampler in MULTISTEP:
        found |= {"euler_at_final": config.get("euler_at_final", False), "third_order": "published"}
    return found


def uncorrected_steps(config: Json) -> int:
    """How many steps from the first UniPC does not correct. Raises ValueError for steps in between."""
    steps = config.get("disable_corrector", [])
    whole = isinstance(steps, list) and all(type(step) is int for step in steps)
    if not whole or sorted(steps) != [*range(len(steps))]:
        raise unsupported("disable_corrector", steps, ("[]", "[0, 1, ...] up to a step",))
    return len(steps)


def scheduler_of_process(schedule: ScheduleConfig, prediction_type: str, sampling: SamplingConfig) -> dict[str, Any]:
    """A scheduler_config.json from which `process_of_scheduler` gives the same; ValueError where there is none."""
    kinds = {kind: name for name, kind in KINDS.items() if name != "sigmoid" or sampling.sampler == "ddpm"}
    if sampling.sampler not in NAMES:
        raise unsupported("sampler", sampling.sampler, NAMES)
    if schedule.kind not in (*kinds, "betas") or schedule.shift != 1.0:
        raise ValueError(f"schedule: kind {schedule.kind!r} with shift {schedule.shift}; valid for diffusers: "
                         f"{', '.join(kinds)}, betas, with shift 1")
    read, grid = READ[sampling.sampler], sampling.grid or PretrainedGrid()
    if sampling.spacing == "leading" and sampling.offset != 1:
        raise ValueError(f"offset: value {sampling.offset}; valid for diffusers: 1")
    config: dict[str, Any] = {
        "beta_start": schedule.beta_start, "beta_end": schedule.beta_end,
        "beta_schedule": kinds.get(schedule.kind, "linear"),
        "trained_betas": None if schedule.betas is None else list(schedule.betas),
        "num_train_timesteps": schedule.steps,
        "prediction_type": prediction_type, "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": sampling.spacing if sampling.spacing in OF_TIMES else grid.base, "steps_offset": 1,
        "interpolation_type": "log_linear" if grid.log_linear else "linear", "sigma_min": grid.sigma_min,
        "sigma_max": grid.sigma_max, "final_sigmas_type": "zero" if grid.clean else "sigma_min",
        "use_lu_lambdas": grid.lu and sampling.spacing == "exponential",
        "original_inference_steps": grid.original_steps, "skip_prk_steps": True,
        **{key: name == sampling.spacing and not grid.lu for key, name in SIGMAS.items()},
        **({} if grid.lambda_min is None else {"lambda_min_clipped": grid.lambda_min}),
        **keys_of_options(sampling, prediction_type),
    }
    if schedule.zero_terminal_snr and "rescale_betas_zero_snr" not in read:
        raise unsupported("rescale_betas_zero_snr", True, (f"false with {NAMES[sampling.sampler]}",))
    kept = {key: value for key, value in config.items() if key in read | OF_SCHEDULE}
    clips = {"clip_sample": False} if sampling.sampler in ("ddim", "ddpm", "lcm", "heun") else {}
    return {"_class_name": NAMES[sampling.sampler], **kept, **clips}


def keys_of_options(sampling: SamplingConfig, prediction_type: str) -> dict[str, Any]:
    """The keys of a scheduler_config.json that hold the options of a sampler. Raises ValueError for an option that has
    none and is not at the value that diffusers has."""
    options = sampling.complete_options
    theirs: dict[str, Value] = {"eta": 1.0 if sampling.sampler == "euler_ancestral" else 0.0, "repeats": 1,
                                "sigma_data": 0.5}
    if options.get("variance") == "large":
        theirs["noisy_end"] = True
    if options.get("order") == 3:
        theirs["third_order"] = "published"
    if prediction_type != "epsilon":
        theirs["extrapolate"] = "prediction"
    for name, value in theirs.items():
        if options.get(name, value) != value:
            raise ValueError(f"options.{name}: value {options[name]} of {sampling.sampler} has no counterpart in "
                             f"diffusers; valid: {value}")
    names = {"order": "solver_order", "clean_end": "set_alpha_to_one", "form": "solver_type",
             **{name: name for name in ("timestep_scaling", "lower_order_final", "euler_at_final", "solver_type")}}
    found: dict[str, Any] = {names[option]: value for option, value in options.items() if option in names}
    if "variance" in options:
        found["variance_type"] = f"fixed_{options['variance']}"
    if "uncorrected" in options:
        found["disable_corrector"] = list(range(cast(int, options["uncorrected"])))
    if sampling.sampler in MULTISTEP:
        found["algorithm_type"] = "sde-dpmsolver++" if sampling.sampler == "dpm_solver_sde" else "dpmsolver++"
    return found


def unsupported(key: str, value: Any, valid: Any) -> ValueError:
    """The error for a value that has no counterpart."""
    return ValueError(f"scheduler: {key} {value!r} is not supported; valid: {', '.join(map(str, valid))}")
