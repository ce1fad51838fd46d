"""Pseudo linear multistep sampling (PLMS), the default of Stable Diffusion 1.x. Liu, Ren, Lin & Zhao 2022, "Pseudo
Numerical Methods for Diffusion Models on Manifolds".

Classical Adams-Bashforth extrapolates the slope of an ODE from its last values. Here the extrapolated quantity is eps
(their eq. 12), and the straight step is replaced by the DDIM step (their transfer part), which stays near the data:

    eps' = (55 eps_i - 59 eps_{i-1} + 37 eps_{i-2} - 9 eps_{i-3}) / 24        x_next = ddim_step(x, eps')

The weights assume evenly spaced times. The first steps have less history and use the lower orders; the very first is
Heun's, so n times cost n + 1 network calls. The variant that starts with Runge-Kutta steps is not implemented: it costs
nine more calls and published models skip it.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from diffusion.prediction import check_prediction_type, epsilon_from_prediction, x_0_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, ddim_step, initial_state, time_pairs
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule

# Adams-Bashforth weights by length of the history, newest first
ADAMS_BASHFORTH = (
    (1.0,),
    (3.0 / 2.0, -1.0 / 2.0),
    (23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0),
    (55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0),
)


def pndm(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    clean_end: Annotated[bool, Option("False ends at the noise level of time 0, as Stable Diffusion was published, "
                                      "and not at x_0.")] = True,
    extrapolate: Annotated[Literal["epsilon", "prediction"], Option(
        "What is extrapolated: the noise, or as in diffusers the prediction, which for v is another direction at each "
        "time.")] = "epsilon",
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. n + 1 network calls for n times."""
    check_prediction_type(schedule, prediction_type)
    x = initial_state(x_T)
    history: list[Tensor] = []  # of what is extrapolated, newest first
    kind = "epsilon" if extrapolate == "epsilon" else prediction_type  # what the history holds
    for t, s in time_pairs(timesteps):
        here, there = schedule.alpha_sigma(t), schedule.arrival(t, s, clean_end)
        prediction = denoise(x, t)
        eps = epsilon_from_prediction(prediction, x, *here, prediction_type)
        slope = eps if extrapolate == "epsilon" else prediction
        first = not history
        history = [slope, *history[:3]]
        if first:
            x_0 = x_0_from_prediction(prediction, x, *here, prediction_type)
            end = there[0] * x_0 + there[1] * eps
            if s is not None and here[0] > 0.0:
                slope_end = denoise(end, s)
                if extrapolate == "epsilon":
                    slope_end = epsilon_from_prediction(slope_end, end, *there, prediction_type)
                start = schedule.departure(t, s)
                mean = epsilon_from_prediction(0.5 * (slope + slope_end), x, *start, kind)
                end = ddim_step(x, mean, start, schedule.alpha_sigma(s))
        else:
            # Liu et al. 2022, eq. 12
            combined = torch.zeros_like(slope)
            for weight, past in zip(ADAMS_BASHFORTH[len(history) - 1], history):
                combined = combined + weight * past
            combined = epsilon_from_prediction(combined, x, *here, kind)
            x_0 = (x - here[1] * combined) / here[0]
            end = ddim_step(x, combined, here, there)
        if trace is not None:
            trace.append(x_0)
        x = end
    return x
