"""Editing as a use of sampling: start from an image, keep part of one, walk between noises, go back to the noise.

Functions over the same callables as the samplers. Images here are whatever the network denoises: latents, as a rule.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.denoise import Denoise
from diffusion.prediction import (
    check_prediction_type,
    epsilon_from_prediction,
    prediction_from_x_0,
    x_0_from_prediction,
)
from diffusion.samplers.common import checked, ddim_step, initial_state
from diffusion.schedule import Schedule


def image_to_image_start(
    x_0: Tensor, eps: Tensor, timesteps: Sequence[float], strength: float, schedule: Schedule
) -> tuple[Tensor, Sequence[float]]:
    """(x_t, remaining times) to hand to a sampler: the image noised to a later start. Meng et al. 2022 (SDEdit).

    x_0, eps: (B, C, H, W). strength: share of the times that are kept, in (0, 1]; 1 forgets the image, up to what
    the last level of the schedule leaves of it. Raises ValueError when no time is left.
    """
    remaining = remaining_times(timesteps, strength)
    return schedule.noised(x_0, eps, remaining[0]), remaining


def remaining_times(timesteps: Sequence[float], strength: float) -> Sequence[float]:
    """The last `strength` of the times, in (0, 1]. Raises ValueError when none is left."""
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength: value {strength}; valid: above 0, at most 1")
    kept = int(len(timesteps) * strength)
    if kept == 0:
        raise ValueError(f"strength: value {strength} of {len(timesteps)} steps leaves none; "
                         f"valid: at least {1 / len(timesteps):.3g}")
    return timesteps[len(timesteps) - kept:]


def invertible_times(timesteps: Sequence[float], schedule: Schedule) -> list[float]:
    """The times that still hold something of the image, for `ddim_inversion`: from pure noise no way leads back."""
    return [t for t in timesteps if schedule.alpha_sigma(t)[0] > 0.0]


class MixedNoise:
    """Noise on the great circle between two sources, for images between two others; each call is the next draw.

    first, second: callables that draw (B, C, H, W). weights (B,): 0 is the first, 1 the second.
    """

    def __init__(self, first: Callable[[], Tensor], second: Callable[[], Tensor], weights: Sequence[float]) -> None:
        self.first, self.second, self.weights = first, second, weights

    def __call__(self) -> Tensor:
        pairs = zip(self.first().split(1), self.second().split(1), self.weights, strict=True)
        return torch.cat([slerp(a, b, weight) for a, b, weight in pairs])  # (B, C, H, W)


class InpaintingDenoiser:
    """A `denoise` that keeps part of an image. Every sampler can use it.

    Where `keep` is 1 the network is shown the kept image noised to the present level, always with the same eps, and
    its answer is replaced by the true one; so the sampler's x_0 is the kept image there, at every step and at the
    end (Lugmayr et al. 2022, eq. 8). The border fits because the network sees both sides; `ddpm` with `repeats` above
    1 makes the painted part agree better with the kept one.

    denoise: the network, guided or not. x_0, eps: the kept image and noise for it, (B, C, H, W) each; eps should be
    the sampler's x_T, so that the first state agrees. keep: 1 to keep, 0 to paint, between to mix, broadcasting
    against x_0, usually (B, 1, H, W).
    """

    def __init__(
        self, denoise: Denoise, x_0: Tensor, eps: Tensor, keep: Tensor, schedule: Schedule, prediction_type: str
    ) -> None:
        check_prediction_type(schedule, prediction_type)
        fits = keep.ndim == x_0.ndim and all(k in (1, n) for k, n in zip(keep.shape, x_0.shape))
        if x_0.shape != eps.shape or not fits:
            raise ValueError(f"x_0 {tuple(x_0.shape)}, eps {tuple(eps.shape)} and keep {tuple(keep.shape)} do not fit; "
                             "valid: (B, C, H, W), the same, and (B, 1, H, W)")
        self.denoise, self.x_0, self.eps, self.keep = denoise, x_0, eps, keep
        self.schedule, self.prediction_type = schedule, prediction_type

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """Prediction (B, C, H, W) whose x_0 is the kept image where it is kept."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        shown = torch.lerp(x_t, alpha * self.x_0 + sigma * self.eps, self.keep)
        prediction = self.denoise(shown, t).to(x_t.dtype)
        x_0 = x_0_from_prediction(prediction, shown, alpha, sigma, self.prediction_type)
        x_0 = torch.lerp(x_0, self.x_0, self.keep)
        return prediction_from_x_0(x_0, x_t, alpha, sigma, self.prediction_type)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Point at share `weight` of the great circle from a to b, per image (B, C, H, W). Shoemake 1985.

    Noise of many dimensions lies near a sphere; a straight mix of two noises would leave it and denoise to a flat
    image. Nearly parallel images fall back to the straight mix.
    """
    axes = tuple(range(1, a.ndim))
    lengths = a.square().sum(axes, keepdim=True).sqrt() * b.square().sum(axes, keepdim=True).sqrt()
    cosine = ((a * b).sum(axes, keepdim=True) / lengths).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)  # (B, 1, 1, 1)
    curved = (torch.sin((1.0 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return torch.where(cosine.abs() > 0.9995, torch.lerp(a, b, weight), curved)


def ddim_inversion(
    denoise: Denoise,
    x_0: Tensor,
    timesteps: Sequence[float],
    schedule: Schedule,
    prediction_type: str,
    refinements: int = 0,
) -> Tensor:
    """The x_T (B, C, H, W) from which `ddim` over the same falling `timesteps` leads back to x_0.

    Each DDIM step x_s = ddim_step(x_t, eps(x_t, t)) is solved for x_t, where eps is first taken at x_s in place of the
    unknown x_t (Song et al. 2021, section 4.3). Each refinement takes the prediction again at the x_t just found, a
    fixed-point iteration (Pan et al. 2023) that makes the way back exact where it converges; it costs one more network
    call a step.
    """
    check_prediction_type(schedule, prediction_type)
    denoise = checked(denoise)
    x, here = initial_state(x_0), (1.0, 0.0)
    for t in reversed(timesteps):
        there = schedule.alpha_sigma(t)
        eps = epsilon_from_prediction(denoise(x, t), x, *there, prediction_type)
        guess = ddim_step(x, eps, here, there)
        for _ in range(refinements):
            guess = ddim_origin(x, guess, denoise(guess, t), here, there, prediction_type)
        x, here = guess, there
    return x


def ddim_origin(x_s: Tensor, guess: Tensor, prediction: Tensor, level_s: tuple[float, float],
                level_t: tuple[float, float], prediction_type: str) -> Tensor:
    """The x_t from which a DDIM step with this prediction, made at `guess`, leads to x_s.

    The step is solved for x_t with the prediction itself held, v or flow velocity: near pure noise eps is almost x_t,
    and a step with eps held hardly shrinks the error of a guess.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = level_s, level_t
    if prediction_type == "flow":
        return x_s + (sigma_t - sigma_s) * prediction
    cosine = alpha_s * alpha_t + sigma_s * sigma_t
    if prediction_type == "v_prediction" and cosine > 0.0:
        # with x_0 = alpha_t x_t - sigma_t v and eps = sigma_t x_t + alpha_t v the step is a rotation of (x_t, v)
        return (x_s + (alpha_s * sigma_t - sigma_s * alpha_t) * prediction) / cosine
    return ddim_step(x_s, epsilon_from_prediction(prediction, guess, *level_t, prediction_type), level_s, level_t)
