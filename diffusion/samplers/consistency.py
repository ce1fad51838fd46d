"""Multistep sampling of a consistency model. Song et al. 2023, algorithm 1.

A consistency function f maps any point of a path straight to its end, so one call gives an image. More calls improve
it: the result is noised to the next level and mapped again,

    x_s = alpha_s f(x_t, t) + sigma_s z

For a network that was tuned to it (`distillation.py`); an ordinary one gives blurred images, since its x_0 is an
average. `lcm` walks in the same way with an f of its own.
"""

from collections.abc import Callable

from torch import Tensor

from diffusion.distillation import consistency_function
from diffusion.prediction import check_prediction_type
from diffusion.samplers.common import Denoise, Noise, Times, initial_state, require_noise, time_pairs
from diffusion.schedule import Schedule

EndOfPath = Callable[[Tensor, Tensor, float], Tensor]  # prediction, x_t, t -> f(x_t, t)


def consistency(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`."""
    check_prediction_type(schedule, prediction_type)

    def end_of_path(prediction: Tensor, x: Tensor, t: float) -> Tensor:
        return consistency_function(prediction, x, *schedule.alpha_sigma(t), prediction_type)

    return walk(denoise, x_T, timesteps, schedule, end_of_path, require_noise(noise, "consistency"), trace)


def walk(denoise: Denoise, x_T: Tensor, timesteps: Times, schedule: Schedule, end_of_path: EndOfPath, draw: Noise,
         trace: list | None = None) -> Tensor:
    """x_0 (B, C, H, W) by mapping to the end and noising again, time by time; what samplers of this kind share."""
    x = initial_state(x_T)
    for t, s in time_pairs(timesteps):
        start = end_of_path(denoise(x, t), x, t)
        if trace is not None:
            trace.append(start)
        if s is None:
            return start
        alpha, sigma = schedule.arrival(t, s)
        x = alpha * start + sigma * draw()
    raise AssertionError("time_pairs ends with None")
