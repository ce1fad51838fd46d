"""Ancestral sampling of the diffusion Markov chain. Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models".

The chain from s to t > s multiplies by a = alpha_t / alpha_s and adds noise of variance b = sigma_t^2 - a^2 sigma_s^2.
Bayes' rule for Gaussians gives its reversal when x_0 is known (their eq. 6-7, here for any s < t and any alpha, sigma):

    mean = a sigma_s^2 / sigma_t^2 x_t + alpha_s b / sigma_t^2 x_0        variance = b sigma_s^2 / sigma_t^2

and the network's x_0 stands in for the true one. At alpha_t = 0 everything stays finite: mean = alpha_s x_0.
"""

import math
from typing import Annotated, Literal

from torch import Tensor

from diffusion.prediction import check_prediction_type, x_0_from_prediction
from diffusion.samplers.common import Denoise, Noise, Times, initial_state, require_noise, time_pairs
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule


def ddpm(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    variance: Annotated[Literal["small", "large"], Option(
        "Noise of a step: that of the reversal when x_0 is known, or all that the chain adds there.")] = "small",
    noisy_end: Annotated[bool, Option("The last step adds noise too unless it is at time 0, as in diffusers.")] = False,
    repeats: Annotated[int, Option(
        "Times that each step but the last is taken, so that inpainting settles to what is kept.", 1, 100)] = 1,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`.

    variance: "small" is the variance of the reversal above (exact if x_0 is a point), "large" is b itself (exact if
    x_0 is standard normal); Ho et al. 2020, section 3.2. The last step adds no noise
    unless `noisy_end`.
    repeats: times that each step but the last is taken, going back up the chain in between, at that many times the
    cost. With `editing.InpaintingDenoiser` that lets the painted part settle to what is kept (Lugmayr et al. 2022,
    "RePaint", algorithm 1); a plain network gains nothing from it.
    """
    check_prediction_type(schedule, prediction_type)
    draw = require_noise(noise, "ddpm")
    x = initial_state(x_T)
    for t, s in time_pairs(timesteps):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.arrival(t, s)
        a = alpha_t / alpha_s
        b = sigma_t**2 - a**2 * sigma_s**2
        for repeat in range(1 if s is None else repeats):
            if repeat > 0:
                x = a * x + math.sqrt(b) * draw()  # from s back to t
            x_0 = x_0_from_prediction(denoise(x, t), x, alpha_t, sigma_t, prediction_type)
            # Ho et al. 2020, eq. 7
            x = (a * sigma_s**2 / sigma_t**2) * x + (alpha_s * b / sigma_t**2) * x_0
            if s is not None or (noisy_end and t > 0):
                x = x + math.sqrt(b if variance == "large" else b * sigma_s**2 / sigma_t**2) * draw()
        if trace is not None:
            trace.append(x_0)
    return x
