"""Euler and Heun on straight paths: flow matching. Lipman et al. 2023; Liu et al. 2023 (rectified flow).

With alpha_t = 1 - t and sigma_t = t the path from noise to image has velocity dx/dt = eps - x_0, which is what a flow
model predicts. Euler is x_s = x_t + (s - t) velocity; Heun repeats that with the mean of the velocities at both ends.
A path that is straight is followed exactly by one step, which is what training for straightness buys. Euler here equals
`euler.py`; Heun differs from `heun.py` because it averages the velocity in t and not eps in sigma / alpha.
"""

from torch import Tensor

from diffusion.prediction import check_prediction_type, velocity_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, initial_state, time_pairs
from diffusion.schedule import Schedule


def flow_euler(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`, with a flow schedule. One network call a step."""
    return flow(denoise, x_T, timesteps, schedule, prediction_type, trace, second_order=False)


def flow_heun(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`, with a flow schedule. 2 n - 1 network calls for n times: the
    last step, to t = 0, is Euler."""
    return flow(denoise, x_T, timesteps, schedule, prediction_type, trace, second_order=True)


def flow(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    trace: list | None,
    second_order: bool,
) -> Tensor:
    """The loop of both."""
    check_prediction_type(schedule, prediction_type)
    if not schedule.is_flow:
        raise ValueError(f"schedule: kind {schedule.config.kind!r} has no straight paths; valid for flow_euler and "
                         "flow_heun: flow (euler and heun take any)")
    x = initial_state(x_T)
    for t, s in time_pairs(timesteps):
        velocity = velocity_from_prediction(denoise(x, t), x, *schedule.alpha_sigma(t), prediction_type)
        if trace is not None:
            trace.append(x - t * velocity)
        if second_order and s is not None:
            end = x + (s - t) * velocity
            velocity_end = velocity_from_prediction(denoise(end, s), end, *schedule.alpha_sigma(s), prediction_type)
            velocity = 0.5 * (velocity + velocity_end)
        x = x + ((0.0 if s is None else s) - t) * velocity
    return x
