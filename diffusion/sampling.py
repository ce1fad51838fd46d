"""One sampling run from its settings: grid of times, guidance and sampler put together.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.editing import InpaintingDenoiser, image_to_image_start, remaining_times
from diffusion.guidance import Denoise, GuidanceConfig, autoguidance, classifier_free_guidance
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


@dataclass(frozen=True)
class Edit:
    """A picture to start from: x_0 (B, C, H, W).

    strength: share of the steps that are taken, see `image_to_image_start`. keep: 1 where the picture is kept and 0
    where it is painted, (B or 1, 1, H, W); painting at strength 1 starts from noise alone.
    """

    x_0: Tensor
    strength: float
    keep: Tensor | None = None


def sample_latents(conditional: Denoise, doubled: Denoise, noise: Callable[[], Tensor], schedule: Schedule,
                   prediction_type: str, config: SamplingConfig, progress: Callable[[list], Iterable] = iter,
                   edit: Edit | None = None, trace: list | None = None, weak: Denoise | None = None) -> Tensor:
    """x_0 (B, C, H, W); the first draw of ``noise`` is x_T, later ones feed stochastic samplers.

    conditional, doubled: as in `classifier_free_guidance`. weak: pushed away from in place of the unconditional half of
    `doubled`, as in `autoguidance`. progress: wraps the list of times, for a progress bar. trace: a list that receives
    the predicted x_0 of every step. Raises ValueError when the schedule has fewer times
    than steps are asked for, and for a strength that leaves no step.
    """
    if weak is not None:
        denoise = autoguidance(conditional, weak, config.guidance, schedule, prediction_type)
    else:
        denoise = classifier_free_guidance(conditional, doubled, config.guidance, schedule, prediction_type)
    times = visited_times(schedule, config, edit.strength if edit else 1.0)
    x = noise()
    if edit is not None and edit.keep is not None:
        denoise = InpaintingDenoiser(denoise, edit.x_0, x, edit.keep, schedule, prediction_type)
    if edit is not None and not (edit.keep is not None and edit.strength == 1.0):
        x, _ = image_to_image_start(edit.x_0, x, times, 1.0, schedule)
    sampler = get_sampler(config.sampler)
    return sampler(denoise, x, progress(times), schedule, prediction_type, noise, trace=trace, **options_of(config))


def visited_times(schedule: Schedule, config: SamplingConfig, strength: float = 1.0) -> list:
    """The falling times of a run: the last `strength` of them when it starts from a picture."""
    return list(remaining_times(schedule.timesteps(config.steps, config.spacing, config.offset), strength))


def options_of(config: SamplingConfig) -> dict[str, Any]:
    """The settings that the configured sampler reads."""
    if config.sampler == "ddim":
        return {"eta": config.eta, "clean_end": config.clean_end}
    if config.sampler == "pndm":
        return {"clean_end": config.clean_end}
    if config.sampler.startswith("dpm_solver") or config.sampler == "unipc":
        return {"order": config.order}
    return {}


def check_sampling(schedule: Schedule, prediction_type: str, config: SamplingConfig,
                   strength: float | None = None) -> None:
    """Raises the ValueError that sampling with these settings would, by doing it once on a latent of four zeros."""
    edit = None if strength is None else Edit(torch.zeros(1, 1, 2, 2), strength)
    sample_latents(_zeros, _zeros, PerImageNoise([0], (1, 2, 2)), schedule, prediction_type, config, edit=edit)


def _zeros(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x_t)
