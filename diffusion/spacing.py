"""Which times a sampler visits: grids over the time itself and over the noise level sigma / alpha."""

import math
from typing import Literal, get_args

Spacing = Literal["leading", "linspace", "trailing", "karras", "exponential", "beta"]


def discrete_timesteps(n: int, spacing: str, steps: int, offset: int = 0) -> list[int]:
    """`n` falling integers out of 0 .. steps-1. Lin et al. 2023, table 2. Raises ValueError for an impossible grid."""
    if not 1 <= n <= steps:
        raise ValueError(f"n: value {n}; valid: 1 .. {steps}, the steps of the schedule")
    if spacing == "leading":
        times = [i * (steps // n) + offset for i in range(n)]
        if not 0 <= offset or times[-1] >= steps:
            raise ValueError(f"offset: value {offset} leads to t = {times[-1]}; valid: times within 0 .. {steps - 1}")
        return times[::-1]
    if spacing == "linspace":
        # Python's round() and numpy's both go to even on a tie, as the published grids do. One step starts at 0 there.
        return [round(i * (steps - 1) / (n - 1)) for i in range(n)][::-1] if n > 1 else [0]
    if spacing == "trailing":
        return [round(steps - i * (steps / n)) - 1 for i in range(n)]
    raise ValueError(f"spacing: value {spacing!r}; valid: {', '.join(get_args(Spacing))}")


def flow_timesteps(n: int, spacing: str, steps: int, shift: float = 1.0) -> list[float]:
    """`n` falling times in (0, 1], starting at 1, shifted towards noise by `shift`."""
    if n < 1:
        raise ValueError(f"n: value {n}; valid: 1 or more")
    if spacing == "trailing":
        times = [1.0 - i / n for i in range(n)]  # the step to 0 is as long as the others
    elif spacing == "linspace":
        last = 1.0 / steps  # ends where discretised training ended
        times = [1.0 + i / (n - 1) * (last - 1.0) for i in range(n)] if n > 1 else [1.0]
    else:
        raise ValueError(f"spacing: value {spacing!r}; valid for a flow: trailing, linspace")
    return [shifted_time(t, shift) for t in times]


def shifted_time(t, shift: float):
    """Flow time (number or tensor) at which sigma / alpha is `shift` times that of t. Esser et al. 2024, eq. 23."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def sigma_grid(n: int, spacing: str, smallest: float, largest: float, rho: float = 7.0) -> list[float]:
    """`n` falling noise levels sigma / alpha from `largest` to `smallest`."""
    if n < 1:
        raise ValueError(f"n: value {n}; valid: 1 or more")
    u = [i / (n - 1) if n > 1 else 0.0 for i in range(n)]
    if spacing == "karras":
        # Karras et al. 2022, eq. 5
        a, b = largest ** (1.0 / rho), smallest ** (1.0 / rho)
        return [(a + ui * (b - a)) ** rho for ui in u]
    if spacing == "exponential":
        a, b = math.log(largest), math.log(smallest)
        return [math.exp(a + ui * (b - a)) for ui in u]
    if spacing == "beta":
        from scipy.special import betaincinv  # late: only this grid waits for it

        # Lee et al. 2024 (Beta Sampling is All You Need): quantiles of Beta(0.6, 0.6) crowd both ends
        return [smallest + float(betaincinv(0.6, 0.6, 1.0 - ui)) * (largest - smallest) for ui in u]
    raise ValueError(f"spacing: value {spacing!r}; valid: karras, exponential, beta")
