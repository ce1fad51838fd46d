"""Heun's second-order method on the probability-flow ODE. Karras et al. 2022, algorithm 1.

In the variables of `euler.py`, dx'/ds = eps(x', s). Heun takes an Euler step, evaluates eps at its end, and repeats
the step with the mean of the two. Without the change of variables that is the DDIM step with the mean eps. Two network
calls a step; the last step, to s = 0, is Euler, because eps there is not defined.

From pure noise (alpha = 0) s is infinite and the mean of two slopes means nothing: that step is Euler too.
"""

from torch import Tensor

from diffusion.prediction import check_prediction_type, epsilon_from_prediction, x_0_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, ddim_step, initial_state, time_pairs
from diffusion.schedule import Schedule


def heun(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. 2 n - 1 network calls for n times."""
    check_prediction_type(schedule, prediction_type)
    x = initial_state(x_T)
    for t, s in time_pairs(timesteps):
        here, there = schedule.alpha_sigma(t), schedule.arrival(t, s)
        prediction = denoise(x, t)
        x_0 = x_0_from_prediction(prediction, x, *here, prediction_type)
        eps = epsilon_from_prediction(prediction, x, *here, prediction_type)
        if trace is not None:
            trace.append(x_0)
        end = there[0] * x_0 + there[1] * eps
        if s is not None and here[0] > 0.0:
            # Karras et al. 2022, algorithm 1, lines 6-8
            eps_end = epsilon_from_prediction(denoise(end, s), end, *there, prediction_type)
            end = ddim_step(x, 0.5 * (eps + eps_end), here, there)
        x = end
    return x
