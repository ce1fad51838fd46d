"""Guidance: the conditional prediction pushed away from a worse one.

    guided = uncond + w (cond - uncond)        Ho & Salimans 2022, with w = 1 + their w; w = 1 is off

This is the only place that builds the doubled batch [uncond, cond]. The network stays behind callables that the
caller binds: `conditional(x_t, t)` sees B images with their condition, `doubled(x_t, t)` sees 2B images and was bound
to the B unconditional conditions followed by the B conditional ones.

Axes: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.denoise import Denoise
from diffusion.prediction import prediction_from_x_0, x_0_from_prediction
from diffusion.schedule import Schedule

GuidanceMethod = Literal["cfg", "apg", "cfg_zero_star"]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # x_t, t -> (uncond, cond)


@dataclass(frozen=True)
class GuidanceConfig:
    """How the two predictions are combined.

    scale: w. 1 calls the conditional network alone and returns its prediction bit for bit.
    interval: guide only where low < sigma_t / alpha_t <= high (Kynkaanniemi et al. 2024); elsewhere the
        unconditional half is not computed. None guides everywhere.
    rescale: phi of Lin et al. 2023, eq. 15-16; 0 is off, 0.7 is theirs.
    method: "cfg" (above), "apg" (Sadat et al. 2024) or "cfg_zero_star" (Fan et al. 2025).
    apg_parallel: share kept of the part of the push that only scales the prediction; 1 with no norm is plain guidance.
    apg_norm: largest norm of the push of one image, 0 is no limit. apg_momentum: of the push, negative in the paper.
    zero_init: share of the time range, at the noise end, where a flow model is taken to predict 0 (Fan et al. 2025);
        the network is not called there.
    threshold: percentile of |x_0| per image to clip at, 0 is off (Saharia et al. 2022, section 2.3, with 0.995).
    threshold_limit: the value that percentile is brought down to: 1 for pixels, about 4 for unit-scale latents.
    """

    scale: float = 7.5
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    method: GuidanceMethod = "cfg"
    apg_parallel: float = 0.0
    apg_norm: float = 0.0
    apg_momentum: float = -0.5
    zero_init: float = 0.0
    threshold: float = 0.0
    threshold_limit: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0.0:
            raise ValueError(f"scale: value {self.scale}; valid: a number >= 0, 1 for no guidance")
        if self.interval is not None and not 0.0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval: value {self.interval}; valid: (low, high) with 0 <= low < high")
        if self.method not in get_args(GuidanceMethod):
            raise ValueError(f"method: value {self.method!r}; valid: {', '.join(get_args(GuidanceMethod))}")
        for name in ("rescale", "zero_init", "threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: value {getattr(self, name)}; valid: 0 .. 1, 0 is off")
        if not -1.0 < self.apg_momentum < 1.0:
            raise ValueError(f"apg_momentum: value {self.apg_momentum}; valid: between -1 and 1")
        if self.apg_norm < 0.0:
            raise ValueError(f"apg_norm: value {self.apg_norm}; valid: a number >= 0, 0 for no limit")
        if self.threshold_limit <= 0.0:
            raise ValueError(f"threshold_limit: value {self.threshold_limit}; valid: a positive number")

    def scale_at(self, alpha: float, sigma: float) -> float:
        """The scale at one noise level: 1 outside the interval."""
        noisiness = sigma / alpha if alpha > 0.0 else math.inf
        low, high = self.interval or (-math.inf, math.inf)
        return self.scale if low < noisiness <= high else 1.0


def classifier_free_guidance(
    conditional: Denoise, doubled: Denoise, config: GuidanceConfig, schedule: Schedule, prediction_type: str
) -> Denoise:
    """A `denoise(x_t, t)` that guides. At scale 1 it is `conditional` itself: nothing is doubled, nothing changes.

    Build a new one for each image or batch: "apg" carries momentum from step to step.
    """

    def pair(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        uncond, cond = doubled(torch.cat([x_t, x_t]), t).chunk(2)  # (2B, C, H, W), then (B, C, H, W) each
        return uncond, cond

    return guided_denoiser(conditional, pair, config, schedule, prediction_type)


def autoguidance(
    main: Denoise, weak: Denoise, config: GuidanceConfig, schedule: Schedule, prediction_type: str
) -> Denoise:
    """A `denoise(x_t, t)` pushed away from a weaker version of the same network (smaller, or trained for less time),
    both with the condition: better images without losing variety. Karras et al. 2024, "Guiding a Diffusion Model
    with a Bad Version of Itself". At scale 1 it is `main` itself."""

    def pair(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return weak(x_t, t), main(x_t, t)

    return guided_denoiser(main, pair, config, schedule, prediction_type)


def guided_denoiser(
    conditional: Denoise, pair: Pair, config: GuidanceConfig, schedule: Schedule, prediction_type: str
) -> Denoise:
    """`conditional` itself where guidance is off, else a `GuidedDenoiser`."""
    if config.zero_init > 0.0 and prediction_type != "flow":
        raise ValueError(f"zero_init: value {config.zero_init} with prediction_type {prediction_type!r}; valid: 0, a "
                         "prediction of 0 means something else there")
    if config.scale == 1.0 and config.threshold == 0.0 and config.zero_init == 0.0:
        return conditional
    return GuidedDenoiser(conditional, pair, config, schedule, prediction_type)


class GuidedDenoiser:
    """The guided `denoise`. A time above the last one asked for starts a new image and clears the momentum."""

    def __init__(
        self, conditional: Denoise, pair: Pair, config: GuidanceConfig, schedule: Schedule, prediction_type: str
    ) -> None:
        self.conditional, self.pair, self.config = conditional, pair, config
        self.schedule, self.prediction_type = schedule, prediction_type
        self.time = math.inf
        self.push: Tensor | None = None

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """Guided prediction (B, C, H, W), or the conditional one outside the interval."""
        config = self.config
        if t > self.time:
            self.push = None
        self.time = t
        if t > (1.0 - config.zero_init) * self.schedule.last:
            return torch.zeros_like(x_t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        if config.scale_at(alpha, sigma) == 1.0:
            result = self.conditional(x_t, t)
        else:
            uncond, cond = (p.to(x_t.dtype) for p in self.pair(x_t, t))
            result = self.combined(uncond, cond, x_t, alpha, sigma)
            if config.rescale > 0.0:
                result = rescaled(result, cond, config.rescale)
        if config.threshold > 0.0:
            x_0 = x_0_from_prediction(result.to(x_t.dtype), x_t, alpha, sigma, self.prediction_type)
            x_0 = thresholded(x_0, config.threshold, config.threshold_limit)
            result = prediction_from_x_0(x_0, x_t, alpha, sigma, self.prediction_type)
        return result

    def combined(self, uncond: Tensor, cond: Tensor, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """The two predictions (B, C, H, W) as one, by the configured method."""
        config = self.config
        if config.method == "cfg_zero_star":
            # Fan et al. 2025: the unconditional prediction scaled to fit the conditional one best
            return guided_prediction(fitted(uncond, cond), cond, config.scale)
        if config.method == "apg":
            kind = self.prediction_type
            good = x_0_from_prediction(cond, x_t, alpha, sigma, kind)
            bad = x_0_from_prediction(uncond, x_t, alpha, sigma, kind)
            # Sadat et al. 2024, algorithm 1
            push = good - bad
            self.push = push if self.push is None else push + config.apg_momentum * self.push
            push = projected(limited(self.push, config.apg_norm), good, config.apg_parallel)
            return prediction_from_x_0(good + (config.scale - 1.0) * push, x_t, alpha, sigma, kind)
        return guided_prediction(uncond, cond, config.scale)


def guided_prediction(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + w (cond - uncond), (B, C, H, W)."""
    return uncond + scale * (cond - uncond)


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """`guided` brought part of the way back to the per-image spread of `cond`, against over-exposure."""
    axes = tuple(range(1, guided.ndim))
    # Lin et al. 2023, eq. 15 and 16
    matched = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return phi * matched + (1.0 - phi) * guided


def fitted(uncond: Tensor, cond: Tensor) -> Tensor:
    """s uncond with the per-image s that minimises |s uncond - cond|: s = <cond, uncond> / |uncond|^2."""
    axes = tuple(range(1, cond.ndim))
    s = (cond * uncond).sum(axes, keepdim=True) / (uncond.square().sum(axes, keepdim=True) + 1e-8)
    return s * uncond


def limited(push: Tensor, norm: float) -> Tensor:
    """`push` with the norm of each image at most `norm`; 0 is no limit. Sadat et al. 2024."""
    if norm == 0.0:
        return push
    length = push.square().sum(tuple(range(1, push.ndim)), keepdim=True).sqrt()  # (B, 1, 1, 1)
    return push * (norm / length).clamp(max=1.0)


def projected(push: Tensor, onto: Tensor, parallel: float) -> Tensor:
    """`push` with its component along `onto` multiplied by `parallel`, per image. That component saturates colours,
    the rest carries the content. Sadat et al. 2024."""
    axes = tuple(range(1, push.ndim))
    along = (push * onto).sum(axes, keepdim=True) / (onto.square().sum(axes, keepdim=True) + 1e-24) * onto
    return push + (parallel - 1.0) * along


def thresholded(x_0: Tensor, percentile: float, limit: float) -> Tensor:
    """x_0 clipped per image at the percentile s of |x_0| and scaled by limit / s, where s > limit; where s is smaller,
    clipped at the limit. Saharia et al. 2022 (Imagen), section 2.3, "dynamic thresholding"."""
    s = torch.quantile(x_0.flatten(1).abs(), percentile, dim=1).clamp(min=limit)  # (B,)
    s = s.reshape(-1, *[1] * (x_0.ndim - 1))  # (B, 1, 1, 1)
    return x_0.clamp(-s, s) * (limit / s)
