"""Euler's method in the variables of Karras et al. 2022, plain and ancestral.

With x' = x_t / alpha_t and the noise level s = sigma_t / alpha_t the probability-flow ODE is dx'/ds = eps(x', s)
(their eq. 1). One Euler step from s to s_next gives x' + (s_next - s) eps = x_0 + s_next eps, and multiplying by the
next alpha turns that into

    x_next = alpha_next x_0 + sigma_next eps

which is DDIM. The ancestral form (k-diffusion) steps down to s_down and adds noise s_up, with

    s_up^2 = s_next^2 (s^2 - s_next^2) / s^2        s_down^2 = s_next^2 - s_up^2

and alpha_next s_up is the standard deviation of the DDPM step: DDIM with eta = 1. So the two names are kept because
people look for them, and the code is shared because the method is. What differs elsewhere is the grid of times.
"""

from typing import Annotated

from torch import Tensor

from diffusion.samplers.common import Denoise, Noise, Times
from diffusion.samplers.ddim import ddim
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule


def euler(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. First order, one network call a step."""
    return ddim(denoise, x_T, timesteps, schedule, prediction_type, trace=trace)


def euler_ancestral(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    eta: Annotated[float, Option("Share of fresh noise: 0 is `euler`, 1 is the original.", 0.0, 1.0)] = 1.0,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. One network call a step."""
    return ddim(denoise, x_T, timesteps, schedule, prediction_type, noise, trace=trace, eta=eta)
