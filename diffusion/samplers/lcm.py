"""Multistep sampling of a consistency model. Song et al. 2023, algorithm 1; Luo et al. 2023 (LCM).

A consistency model maps any point of a trajectory straight to its start, so one call gives an image. More calls
improve it: noise the result to the next level and map again,

    x_s = alpha_s f(x_t, t) + sigma_s z

The boundary condition f(x, 0) = x is built in through f = c_skip x_t + c_out x_0 with (Luo et al. 2023)

    c_skip = d^2 / (d^2 + (k t)^2)        c_out = k t / sqrt(d^2 + (k t)^2)        d = 0.5, k = 10

Made for a distilled network; an ordinary one gives blurred images, since its x_0 is an average.
"""

from typing import Annotated

from torch import Tensor

from diffusion.prediction import check_prediction_type, x_0_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, initial_state, require_noise, time_pairs
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
    draw = require_noise(noise, "lcm")
    x = initial_state(x_T)
    for t, s in time_pairs(timesteps):
        here, there = schedule.alpha_sigma(t), schedule.arrival(t, s)
        x_0 = x_0_from_prediction(denoise(x, t), x, *here, prediction_type)
        scaled = timestep_scaling * t * (schedule.steps if schedule.is_flow else 1)
        norm = sigma_data**2 + scaled**2
        start = (sigma_data**2 / norm) * x + (scaled / norm**0.5) * x_0
        if trace is not None:
            trace.append(start)
        x = start if s is None else there[0] * start + there[1] * draw()
    return x
