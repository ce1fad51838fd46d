"""Denoising diffusion implicit models. Song, Meng & Ermon 2021.

The marginals x_t = alpha_t x_0 + sigma_t eps do not say how x_s and x_t are joined. DDIM keeps the predicted noise
instead of drawing a new one, or any mixture of the two with standard deviation c (their eq. 12 and 16):

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z        c = eta sqrt(variance of the DDPM step)

eta = 0 is deterministic, a first-order solver of the probability-flow ODE; eta = 1 is DDPM. With a = alpha_t / alpha_s
and b = sigma_t^2 - a^2 sigma_s^2 that variance is b sigma_s^2 / sigma_t^2 (`ddpm.py`), and what is left for eps

    sigma_s^2 - c^2 = (1 - eta^2) sigma_s^2 + (eta a sigma_s^2 / sigma_t)^2

is a sum of squares: computed so, it cannot fall below 0 by rounding, and keeps its digits near pure noise (a = 0).
"""

import math
from typing import Annotated

from torch import Tensor

from diffusion.prediction import check_prediction_type, epsilon_from_prediction, x_0_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, initial_state, require_noise, time_pairs
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule


def ddim(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    eta: Annotated[float, Option("Share of fresh noise: 0 is deterministic, 1 is `ddpm`.", 0.0, 1.0)] = 0.0,
    clean_end: Annotated[bool, Option("False ends at the noise level of time 0, as Stable Diffusion was published, "
                                      "and not at x_0.")] = True,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. An eta above 0 needs `noise`."""
    check_prediction_type(schedule, prediction_type)
    draw = require_noise(noise, "ddim with eta > 0") if eta > 0.0 else None
    x = initial_state(x_T)
    for t, s in time_pairs(timesteps):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.arrival(t, s, clean_end)
        prediction = denoise(x, t)
        x_0 = x_0_from_prediction(prediction, x, alpha_t, sigma_t, prediction_type)
        eps = epsilon_from_prediction(prediction, x, alpha_t, sigma_t, prediction_type)
        if trace is not None:
            trace.append(x_0)
        # Song et al. 2021, eq. 12
        a = alpha_t / alpha_s
        x = alpha_s * x_0 + math.hypot(math.sqrt(1.0 - eta**2) * sigma_s, eta * a * sigma_s**2 / sigma_t) * eps
        if draw is not None and s is not None:
            # Song et al. 2021, eq. 16; b is the noise the chain adds between s and t
            b = sigma_t**2 - a**2 * sigma_s**2
            x = x + (eta * math.sqrt(b) * sigma_s / sigma_t) * draw()
    return x
