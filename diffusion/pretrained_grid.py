"""The times and noise levels that the schedulers of diffusers visit, for runs of published checkpoints.

A run here is a falling list of times of a `Schedule`, which knows the level of each. The schedulers of diffusers place
their times in four manners, and some ask the network at another time than that of the level:

    ddim, pndm, ddpm          integers; ddim and pndm step from t to t - T // n, wherever the next time is
    euler, heun, ancestral    real times; sigma / alpha is interpolated between its integer times and not its logarithm
    DPM-Solver++, UniPC       n + 1 integers without the last; the time of a noise level is rounded
    lcm                       n of the times that the student was distilled at

`GridSchedule` is the schedule of one run in such a manner. Checked against diffusers 0.42.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from diffusion.schedule import SMALLEST_ALPHA_BAR, Schedule, ScheduleConfig, discrete_alpha_bar
from diffusion.spacing import discrete_timesteps, sigma_grid

INTEGER = ("ddim", "pndm", "ddpm")
SIGMA = ("euler", "euler_ancestral", "heun")
MULTISTEP = ("dpm_solver_multistep", "dpm_solver_sde")
LOG_SNR = (*MULTISTEP, "dpm_solver_singlestep", "unipc")
OF_TIMES = ("leading", "linspace", "trailing")  # spacings of times; the others space the noise level
STEP = 1e-6  # between times of the list where two levels belong to one time


@dataclass(frozen=True)
class PretrainedGrid:
    """What a scheduler_config.json says of its grid beside its spacing and offset; each sampler reads what its
    scheduler in diffusers reads.

    base: the spacing of times below a spacing of noise levels, from which euler and heun take the ends; they start with
        less noise than 1 unless it is "leading".
    log_linear: euler, levels evenly spaced in log sigma, whatever the times are (`interpolation_type`).
    sigma_min, sigma_max: euler and unipc, the ends of a spacing of noise levels; None for those of the schedule.
    clean: the last step goes to x_0; otherwise to the level of time 0 (`final_sigmas_type`).
    lambda_min: the DPM-Solvers, times with half the log SNR below this are left out (`lambda_min_clipped`).
    lu: the multistep DPM-Solvers with the spacing "exponential" ask the network at the nearest integer time of a level
        and not at the one below (`use_lu_lambdas`).
    original_steps: lcm, how many times the student was distilled at (`original_inference_steps`).
    Raises ValueError for values out of range.
    """

    base: Literal["leading", "linspace", "trailing"] = "linspace"
    log_linear: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    clean: bool = True
    lambda_min: float | None = None
    lu: bool = False
    original_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name}: value {value}; valid: a number above 0")
        if None not in (self.sigma_min, self.sigma_max) and self.sigma_min >= self.sigma_max:  # type: ignore[operator]
            raise ValueError(f"sigma_min: value {self.sigma_min} with sigma_max {self.sigma_max}; valid: below it")
        if self.original_steps < 1:
            raise ValueError(f"original_steps: value {self.original_steps}; valid: 1 or more")


@dataclass(frozen=True)
class Visits:
    """A run: falling times, the level sigma / alpha of each (None for that of the schedule), and the times that the
    network is asked at. end: (alpha, sigma) of the last step. stride: how far down each step goes, None for to the next
    time. start: the share of the first draw that is the first state."""

    times: list
    sigmas: list[float] | None = None
    asked: list | None = None
    end: tuple[float, float] = (1.0, 0.0)
    stride: int | None = None
    start: float = 1.0


class GridSchedule(Schedule):
    """The schedule of one run, whose times and levels are those of diffusers. Raises ValueError where diffusers has
    none."""

    def __init__(self, config: ScheduleConfig, grid: PretrainedGrid, sampler: str, n: int, spacing: str,
                 offset: int) -> None:
        super().__init__(config)
        if not 1 <= n <= self.steps:
            raise ValueError(f"n: value {n}; valid: 1 .. {self.steps}, the steps of the schedule")
        visits = visits_of(self, grid, sampler, n, spacing, offset)
        self.times, self.stride, self.start = visits.times, visits.stride, visits.start
        self.asked = dict(zip(visits.times, visits.asked or visits.times))
        self.levels = dict(zip(visits.times, map(level_of_sigma, visits.sigmas))) if visits.sigmas else {}
        self.end = visits.end

    @property
    def ends_in_noise(self) -> bool:
        """True when the run visits a time without signal."""
        return any(self.alpha_sigma(t)[0] == 0.0 for t in self.times)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """(alpha_t, sigma_t): of this run where it visits t."""
        return self.levels[t] if t in self.levels else super().alpha_sigma(t)

    def arrival(self, t: float, s: float | None, clean_end: bool = True) -> tuple[float, float]:
        """(alpha, sigma) where the step from t ends."""
        if self.stride is not None:
            s = t - self.stride if t >= self.stride else None
        elif s is None and clean_end:
            return self.end
        return super().arrival(t, s, clean_end)

    def departure(self, t: float, s: float) -> tuple[float, float]:
        """(alpha, sigma) that a step from t to s counts from once the network has been called at s too."""
        return super().departure(t if self.stride is None else s + self.stride, s)


def has_grid(sampler: str, spacing: str) -> bool:
    """Whether diffusers has this sampler with this spacing."""
    return sampler in ("euler", "heun", *LOG_SNR) or (spacing in OF_TIMES and sampler in (*INTEGER, *SIGMA, "lcm"))


def level_of_sigma(sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of variance 1 with this sigma / alpha."""
    alpha = 1.0 / math.sqrt(1.0 + sigma**2)
    return alpha, sigma * alpha


def last_level(table: np.ndarray, grid: PretrainedGrid) -> tuple[float, float]:
    """(alpha, sigma) at the end of a run."""
    return level_of_sigma(0.0 if grid.clean else float(table[0]))


def visits_of(schedule: Schedule, grid: PretrainedGrid, sampler: str, n: int, spacing: str, offset: int) -> Visits:
    """The run of a sampler over n steps."""
    if sampler in INTEGER:
        return Visits(discrete_timesteps(n, spacing, schedule.steps, offset),
                      stride=None if sampler == "ddpm" else schedule.steps // n)
    if sampler == "lcm":
        return Visits(distilled_timesteps(n, schedule.steps, grid.original_steps))
    table = sigma_table(schedule.config)
    if sampler in SIGMA:
        return sigma_visits(table, grid, sampler, n, spacing, offset)
    if spacing in OF_TIMES:
        return log_snr_visits(table, grid, sampler, n, spacing, offset)
    multistep = sampler in MULTISTEP
    levels = levels_between(table, grid if sampler == "unipc" else PretrainedGrid(), n, spacing)
    times = time_of_sigma(levels, table)
    nearest = spacing == "karras" or grid.lu and multistep
    asked = times.round() if nearest and not (multistep and schedule.config.kind == "cosine") else times
    return Visits(falling(times), levels.tolist(), asked.astype(int).tolist(), last_level(table, grid))


def sigma_table(config: ScheduleConfig) -> np.ndarray:
    """sigma / alpha of every time, (T,), in fp32 and with a level of pure noise replaced by one that is nearly so, both
    as there: the last bit decides which integer a time is cut to."""
    alpha_bar = discrete_alpha_bar(config, torch.float32)
    alpha_bar[alpha_bar == 0.0] = SMALLEST_ALPHA_BAR
    return (((1.0 - alpha_bar) / alpha_bar) ** 0.5).numpy()


def distilled_timesteps(n: int, steps: int, original: int) -> list[int]:
    """n of the `original` times at which a consistency model was distilled, evenly chosen, falling."""
    if original > steps or n > original:
        raise ValueError(f"n: value {n} of original_inference_steps {original}; valid: 1 .. {min(original, steps)}")
    times = (np.arange(original, 0, -1) * (steps // original) - 1)[np.linspace(0, original, n, False).astype(int)]
    return times.tolist()


def sigma_visits(table: np.ndarray, grid: PretrainedGrid, sampler: str, n: int, spacing: str, offset: int) -> Visits:
    """The run of a sampler of the variables of Karras et al.; `table` (T,) has sigma / alpha of every time."""
    base = spacing if spacing in OF_TIMES else grid.base
    if base == "linspace":
        times = np.linspace(0, len(table) - 1, n)[::-1]
    else:
        times = np.array(discrete_timesteps(n, base, len(table), offset), float)
    levels = np.interp(times, np.arange(len(table)), table)
    end = 0.0 if grid.clean or sampler != "euler" else table[0]
    if grid.log_linear and sampler == "euler":
        levels = np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), n + 1))
        levels, end = levels if spacing not in OF_TIMES else levels[:-1], table[0] if spacing in OF_TIMES else end
    if spacing not in OF_TIMES and sampler != "euler_ancestral":
        levels = levels_between(levels[::-1], grid if sampler == "euler" else PretrainedGrid(), n, spacing)
        times = time_of_sigma(levels, table)
    start = 1.0 if base == "leading" else level_of_sigma(float(levels.max()))[1]
    # these work with x_t / alpha_t and return it as it is
    return Visits(falling(times), levels.tolist(), times.tolist(), (1.0, float(end)), start=start)


def log_snr_visits(table: np.ndarray, grid: PretrainedGrid, sampler: str, n: int, spacing: str, offset: int) -> Visits:
    """The run of a solver in the log SNR over integer times; `table` (T,) has sigma / alpha of every time."""
    last = len(table)
    if grid.lambda_min is not None and sampler != "unipc":
        last -= int(np.searchsorted(-np.log(table[::-1]), grid.lambda_min))
    if spacing == "linspace" or sampler == "dpm_solver_singlestep":
        times = np.linspace(0, last - 1, n + 1).round()[:0:-1]
    elif spacing == "leading":
        times = np.arange(n, 0, -1) * (last // (n + 1)) + offset
    else:
        times = np.array([t for t in (round(last - i * len(table) / n) - 1 for i in range(n)) if t >= 0])
    if len(times) == 0 or (np.diff(times) >= 0).any():
        raise ValueError(f"n: value {n}; valid with spacing {spacing!r}: below {last}, so that no time repeats")
    times = times.astype(int)
    return Visits(times.tolist(), table[times].tolist(), end=last_level(table, grid))


def levels_between(rising: np.ndarray, grid: PretrainedGrid, n: int, spacing: str) -> np.ndarray:
    """n falling levels between the ends that the grid states, or else the ends of `rising`."""
    low, high = grid.sigma_min or float(rising[0]), grid.sigma_max or float(rising[-1])
    if low > high:
        raise ValueError(f"sigma_min: value {low:g} with sigma_max {high:g}; valid: below it")
    return np.array(sigma_grid(n, spacing, low, high))


def time_of_sigma(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The real times (n,) whose level is each of `sigmas` (n,), log sigma interpolated; within 0 .. T - 1."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table), dtype=float))


def falling(times: np.ndarray) -> list[float]:
    """The times with each that is not below the one before it moved a little below it."""
    result: list[float] = []
    for t in times.tolist():
        result.append(t if not result or t < result[-1] else result[-1] - STEP)
    return result
