"""Multistep sampling of a latent consistency model, as published ones are sampled. Luo et al. 2023 (LCM).

The walk is that of `consistency`. The boundary condition f(x, 0) = x is built in through f = c_skip x_t + c_out x_0
with (Luo et al. 2023)

    c_skip = d^2 / (d^2 + (k t)^2)        c_out = k t / sqrt(d^2 + (k t)^2)        d = 0.5, k = 10

Made for a distilled network; an ordinary one gives blurred images, since its x_0 is an average.
"""

from typing import Annotated

from torch import Tensor

from diffusion.prediction import check_prediction_type, x_0_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, require_noise
from diffusion.samplers.consistency import walk
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule


def lcm(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    sigma_data: Annotated[float, Option(
        "d of the boundary condition: how far from the start x_t itself still counts.", 0.001, 100.0)] = 0.5,
    timestep_scaling: Annotated[float, Option(
        "k of the boundary condition: how fast it gives way to the predicted x_0 with time.", 0.001, 1000.0)] = 10.0,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. sigma_data, timestep_scaling: d and k above; k counts in
    times of 0 .. T for a flow too."""
    check_prediction_type(schedule, prediction_type)

    def end_of_path(prediction: Tensor, x: Tensor, t: float) -> Tensor:
        x_0 = x_0_from_prediction(prediction, x, *schedule.alpha_sigma(t), prediction_type)
        scaled = timestep_scaling * t * (schedule.steps if schedule.is_flow else 1)
        norm = sigma_data**2 + scaled**2
        return (sigma_data**2 / norm) * x + (scaled / norm**0.5) * x_0

    return walk(denoise, x_T, timesteps, schedule, end_of_path, require_noise(noise, "lcm"), trace)
