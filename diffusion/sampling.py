"""One sampling run from its settings: grid of times, guidance and sampler put together.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.guidance import Denoise, GuidanceConfig, classifier_free_guidance
from diffusion.noise import PerImageNoise
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule
from diffusion.spacing import Spacing


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are drawn when nothing else is asked for: sampler, its steps and their spacing, guidance.

    eta: of ddim, 0 is deterministic; other samplers do not read it.
    order: of the dpm_solver samplers and unipc, 1 to 3; other samplers do not read it.
    offset: added to the times of "leading" spacing; 1 for published Stable Diffusion 1.x weights.
    clean_end: of ddim and pndm. False ends at the level of time 0, which leaves a trace of noise, instead of x_0;
        published Stable Diffusion weights ask for it (`set_alpha_to_one: false`).
    """

    sampler: str = "ddim"
    steps: int = 25
    spacing: Spacing = "trailing"
    eta: float = 0.0
    order: int = 2
    offset: int = 0
    clean_end: bool = True
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        get_sampler(self.sampler)
        if not 1 <= self.steps <= 10_000:
            raise ValueError(f"steps: value {self.steps}; valid: 1 .. 10000")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: value {self.eta}; valid: 0 .. 1")
        if self.order not in (1, 2, 3):
            raise ValueError(f"order: value {self.order}; valid: 1, 2, 3")
        if self.offset < 0:
            raise ValueError(f"offset: value {self.offset}; valid: 0 or more")


def sample_latents(conditional: Denoise, doubled: Denoise, noise: PerImageNoise, schedule: Schedule,
                   prediction_type: str, config: SamplingConfig,
                   progress: Callable[[list], Iterable] = iter) -> Tensor:
    """x_0 (B, C, H, W) for the seeds behind ``noise``; its first draw is x_T, later ones feed stochastic samplers.

    conditional, doubled: as in `classifier_free_guidance`. progress: wraps the list of times, for a progress bar.
    Raises ValueError when the schedule has fewer times than steps are asked for.
    """
    denoise = classifier_free_guidance(conditional, doubled, config.guidance, schedule, prediction_type)
    times = progress(schedule.timesteps(config.steps, config.spacing, config.offset))
    sampler = get_sampler(config.sampler)
    return sampler(denoise, noise(), times, schedule, prediction_type, noise, **options_of(config))


def options_of(config: SamplingConfig) -> dict[str, Any]:
    """The settings that the configured sampler reads."""
    if config.sampler == "ddim":
        return {"eta": config.eta, "clean_end": config.clean_end}
    if config.sampler == "pndm":
        return {"clean_end": config.clean_end}
    if config.sampler.startswith("dpm_solver") or config.sampler == "unipc":
        return {"order": config.order}
    return {}


def check_sampling(schedule: Schedule, prediction_type: str, config: SamplingConfig) -> None:
    """Raises the ValueError that sampling with these settings would, by doing it once on a latent of four zeros."""
    sample_latents(_zeros, _zeros, PerImageNoise([0], (1, 2, 2)), schedule, prediction_type, config)


def _zeros(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x_t)
