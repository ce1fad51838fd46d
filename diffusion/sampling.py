"""One sampling run from its settings: grid of times, guidance and sampler put together.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusion.editing import InpaintingDenoiser, image_to_image_start, remaining_times
from diffusion.guidance import Denoise, GuidanceConfig, autoguidance, classifier_free_guidance
from diffusion.mixing import mixed, mixed_pair
from diffusion.noise import PerImageNoise
from diffusion.pretrained_grid import GridSchedule, PretrainedGrid, has_grid
from diffusion.samplers import Value, get_sampler
from diffusion.schedule import Schedule
from diffusion.spacing import Spacing
from diffusion.steering import Steer, SteeredDenoiser

# Older files hold these three beside `sampler`, for every sampler; one that did not read them has these defaults there.
OLDER_OPTIONS: dict[str, Value] = {"eta": 0.0, "order": 2, "clean_end": True}


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled where a call does not say otherwise: sampler, its options, steps, spacing and guidance.

    options: of the sampler, by name; docs/samplers.md lists them. Those that equal the sampler's defaults are omitted,
        so that `replace(config, sampler=...)` refuses only an option that was chosen and that the new one lacks.
    offset: added to the times of "leading" spacing; 1 for published Stable Diffusion 1.x weights.
    reuse: steps for which the deep features of the UNet are used once they are computed (Ma et al. 2024, "DeepCache");
        1 computes them anew at every step, more is faster and approximate.
    grid: how diffusers places the times and levels, for published checkpoints; None places them as `spacing.py` does.
    Raises ValueError for values that are not valid and for an option that the sampler does not have.
    """

    sampler: str = "ddim"
    steps: int = 25
    spacing: Spacing = "trailing"
    options: dict[str, Value] = field(default_factory=dict, hash=False)
    offset: int = 0
    reuse: int = 1
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    grid: PretrainedGrid | None = None

    def __post_init__(self) -> None:
        sampler = get_sampler(self.sampler)
        if not 1 <= self.steps <= 10_000:
            raise ValueError(f"steps: value {self.steps}; valid: 1 .. 10000")
        if not 1 <= self.reuse <= 100:
            raise ValueError(f"reuse: value {self.reuse}; valid: 1 .. 100, 1 for none")
        if self.offset < 0:
            raise ValueError(f"offset: value {self.offset}; valid: 0 or more")
        try:
            complete = sampler.complete(self.options)
        except ValueError as error:
            raise ValueError(f"options.{error}") from None
        chosen = {name: value for name, value in complete.items() if value != sampler.options[name].default}
        object.__setattr__(self, "options", chosen)

    @property
    def complete_options(self) -> dict[str, Value]:
        """Every option of the sampler with its value."""
        return get_sampler(self.sampler).complete(self.options)

    @staticmethod
    def upgrade(data: dict[str, Any]) -> dict[str, Any]:
        """The plain data of a configuration, of this version or of an older one, in the form of this version: a value
        that is not an older default becomes an option."""
        older = {name: data[name] for name, default in OLDER_OPTIONS.items() if name in data and data[name] != default}
        data = {name: value for name, value in data.items() if name not in OLDER_OPTIONS}
        options = data.get("options", {})
        return {**data, "options": {**older, **options}} if older and isinstance(options, dict) else data


def with_sampler(config: SamplingConfig, name: str) -> SamplingConfig:
    """`config` with another sampler, which takes over the options that it has too. Raises ValueError for a name that
    is not in the registry."""
    kept = {option: value for option, value in config.options.items() if option in get_sampler(name).options}
    return replace(config, sampler=name, options=kept)


@dataclass(frozen=True)
class Edit:
    """An image to start from: x_0 (B, C, H, W).

    strength: share of the steps that are taken, see `image_to_image_start`. keep: 1 where the image is kept and 0
    where it is painted, (B or 1, 1, H, W); painting at strength 1 starts from noise alone.
    """

    x_0: Tensor
    strength: float
    keep: Tensor | None = None


@dataclass(frozen=True)
class RunSettings:
    """What one run of a sampler may have beside its configuration.

    progress: wraps the list of times, for a progress bar. edit: the image to start from, None for noise alone. trace: a
    list that receives the predicted x_0 of every step. weak: a weaker network, pushed away from in place of the
    unconditional predictions, as in `autoguidance`. steer: moves every predicted x_0, see `diffusion/steering.py`.
    mix: weights (K, B) of further prompts that the denoisers are bound to as well, see `diffusion/mixing.py`.
    """

    progress: Callable[[list], Iterable] = iter
    edit: Edit | None = None
    trace: list | None = None
    weak: Denoise | None = None
    steer: Steer | None = None
    mix: Tensor | None = None

    def rows(self, count: int) -> int:
        """How many conditions ``count`` images have."""
        return count if self.mix is None else count * (len(self.mix) + 1)


def schedule_of_run(schedule: Schedule, config: SamplingConfig) -> Schedule:
    """`schedule`, or where the configuration has a grid of diffusers and diffusers has this sampler, a `GridSchedule`.
    Raises ValueError for a grid without times."""
    if config.grid is None or not has_grid(config.sampler, config.spacing):
        return schedule
    return GridSchedule(schedule.config, config.grid, config.sampler, config.steps, config.spacing, config.offset)


def asked_in_time(denoise: Denoise, schedule: Schedule) -> Denoise:
    """`denoise`, asked at the time that diffusers asks at, where the run has such a grid."""
    if not isinstance(schedule, GridSchedule):
        return denoise
    return lambda x_t, t: denoise(x_t, schedule.asked[t])


def network_times(schedule: Schedule, config: SamplingConfig, times: list) -> list:
    """The times that the network is asked at in a run over `times`."""
    schedule = schedule_of_run(schedule, config)
    return [schedule.asked[t] for t in times] if isinstance(schedule, GridSchedule) else times


def sample_latents(denoisers: tuple[Denoise, Denoise], noise: Callable[[], Tensor], times: list, schedule: Schedule,
                   prediction_type: str, config: SamplingConfig, run: RunSettings = RunSettings()) -> Tensor:
    """x_0 (B, C, H, W); the first draw of ``noise`` is x_T, later ones feed stochastic samplers.

    denoisers: conditional and doubled, as in `classifier_free_guidance`. times: from `times_of_run`.
    """
    schedule = schedule_of_run(schedule, config)
    conditional, doubled = (asked_in_time(denoise, schedule) for denoise in denoisers)
    edit, weak = run.edit, run.weak and asked_in_time(run.weak, schedule)
    if run.mix is not None:
        conditional, doubled = mixed(conditional, run.mix), mixed_pair(doubled, run.mix)
        weak = weak and mixed(weak, run.mix)
    if weak is not None:
        denoise = autoguidance(conditional, weak, config.guidance, schedule, prediction_type)
    else:
        denoise = classifier_free_guidance(conditional, doubled, config.guidance, schedule, prediction_type)
    if run.steer is not None:
        denoise = SteeredDenoiser(denoise, run.steer, schedule, prediction_type)
    x = noise()
    if edit is not None and edit.keep is not None:
        denoise = InpaintingDenoiser(denoise, edit.x_0, x, edit.keep, schedule, prediction_type)
    if edit is not None and not (edit.keep is not None and edit.strength == 1.0):
        x, _ = image_to_image_start(edit.x_0, x, times, 1.0, schedule)
    elif isinstance(schedule, GridSchedule):
        x = schedule.start * x
    return get_sampler(config.sampler)(denoise, x, run.progress(times), schedule, prediction_type, noise,
                                       trace=run.trace, **config.options)


def times_of_run(schedule: Schedule, config: SamplingConfig, run: RunSettings) -> list:
    """The falling times of a run. Raises ValueError when the schedule has fewer times than steps are asked for, and for
    a strength that leaves no step."""
    return visited_times(schedule, config, run.edit.strength if run.edit else 1.0)


def visited_times(schedule: Schedule, config: SamplingConfig, strength: float = 1.0) -> list:
    """The falling times of a run: the last `strength` of them when it starts from an image."""
    schedule = schedule_of_run(schedule, config)
    times = schedule.times if isinstance(schedule, GridSchedule) else schedule.timesteps(
        config.steps, config.spacing, config.offset)
    return list(remaining_times(times, strength))


def check_sampling(schedule: Schedule, prediction_type: str, config: SamplingConfig,
                   strength: float | None = None) -> None:
    """Raises the ValueError that sampling with these settings would, by doing it once on a latent of four zeros."""
    run = RunSettings(edit=None if strength is None else Edit(torch.zeros(1, 1, 2, 2), strength))
    sample_latents((_zeros, _zeros), PerImageNoise([0], (1, 2, 2)), times_of_run(schedule, config, run), schedule,
                   prediction_type, config, run)


def _zeros(x_t: Tensor, t: float) -> Tensor:
    return torch.zeros_like(x_t)
