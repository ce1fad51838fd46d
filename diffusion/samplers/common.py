"""What every sampler shares: how it calls the network and how it walks the grid of times.

A sampler is a function

    sampler(denoise, x_T, timesteps, schedule, prediction_type, noise=None, *, trace=None, **options) -> x_0

that carries x_T (B, C, H, W) along falling times to x_0, in fp32 or wider.

    denoise          denoise(x_t, t), t a number, returns a prediction of `prediction_type`, shaped like x_t
    timesteps        falling times of `schedule`, any iterable (wrap it to show progress); a sampler does not know
                     how many there are, so its options are per step
    noise            returns a fresh draw (B, C, H, W) at each call; deterministic samplers ignore it
    trace            a list that receives the predicted x_0 of every step, or None
    options          what this sampler alone reads, declared in its signature (`options.py`)

Coefficients are Python floats and nothing is read back from the device. Gradients follow the caller's mode.

Letters in all sampler files: t the present time, s the next one (None for the end, x_0 itself), lambda half the log
SNR, log(alpha / sigma), which rises from noise to image, h the step in lambda.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from diffusion.denoise import Denoise

Noise = Callable[[], Tensor]
Times = Iterable[float]

__all__ = ["Denoise", "Noise", "Times", "checked", "ddim_step", "half_log_snr", "initial_state",
           "require_noise", "time_pairs", "time_pairs_left"]


def checked(denoise: Denoise) -> Denoise:
    """`denoise`, whose prediction at x (B, C, H, W) is in the dtype of x. It raises ValueError for a prediction of
    another shape."""
    def prediction(x: Tensor, t: float) -> Tensor:
        found = denoise(x, t)
        if found.shape != x.shape:
            raise ValueError(f"denoise returned {tuple(found.shape)} for x_t {tuple(x.shape)}; valid: the same shape")
        return found.to(x.dtype)
    return prediction


def initial_state(x_T: Tensor) -> Tensor:
    """x_T in fp32, or in fp64 if it came so; half precision would lose the small steps."""
    return x_T.to(torch.promote_types(x_T.dtype, torch.float32))


def time_pairs(timesteps: Times) -> Iterator[tuple[float, float | None]]:
    """Pairs (t, s) of a time and the next one, None after the last. Raises ValueError if the times do not fall."""
    return ((t, s) for t, s, _ in time_pairs_left(timesteps, 1))


def time_pairs_left(timesteps: Times, ahead: int = 2) -> Iterator[tuple[float, float | None, int]]:
    """As `time_pairs`, with the number of steps left, this one included, at most ahead + 1. Only `ahead` times are
    taken before they are used, so that a progress bar around the times keeps its meaning."""
    times = iter(timesteps)
    window = deque(islice(times, ahead + 1))
    if not window:
        raise ValueError("timesteps: empty; valid: at least one time")
    while window:
        left = len(window)
        t, s = window[0], window[1] if left > 1 else None
        if s is not None and s >= t:
            raise ValueError(f"timesteps: {s} follows {t}; valid: strictly falling times")
        yield t, s, left
        window.popleft()
        window.extend(islice(times, 1))


def half_log_snr(alpha: float, sigma: float) -> float:
    """lambda = log(alpha / sigma); -inf at pure noise, inf without noise."""
    if alpha == 0.0:
        return -math.inf
    return math.inf if sigma == 0.0 else math.log(alpha) - math.log(sigma)


def ddim_step(x: Tensor, eps: Tensor, level_t: tuple[float, float], level_s: tuple[float, float]) -> Tensor:
    """x carried from level t to level s along a straight line of constant eps: alpha_s x_0 + sigma_s eps with
    x_0 = (x - sigma_t eps) / alpha_t. Song et al. 2021, eq. 13. Needs alpha_t > 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level_t, level_s
    return (alpha_s / alpha_t) * x + (sigma_s - alpha_s * sigma_t / alpha_t) * eps


def require_noise(noise: Noise | None, name: str) -> Noise:
    """`noise`, or ValueError for a stochastic sampler that got none."""
    if noise is None:
        raise ValueError(f"noise: value None; valid: a callable drawing (B, C, H, W), {name} adds noise at every step")
    return noise
