"""Shortcut models: a network that knows how far a step goes. Frans et al. 2024, arXiv 2410.12557.

A step of `ddim` from time t to time s follows the straight line of the network's prediction at t, and a long one misses
the path, which is bent. A shortcut model has the length of the step, d = t - s, as an input, and its prediction
p(x_t, t, d) leads to where the path is at s (their section 3). With the x_0 and eps that a prediction implies,
whatever its type, a jump is

    J(x_t, t, s) = alpha_s x_0 + sigma_s eps

Training has two terms (their eq. 5). Short jumps follow what the path is made of, the guided prediction of a teacher,
and a long one equals two of half its length, into which no gradient flows:

    d <= gap:    p(x_t, t, d) = the teacher's prediction at x_t
    d > gap:     J(x_t, t, s) = sg J(J(x_t, t, m), m, s)        m half way between t and s

The second is solved for the prediction. The jump from x_t to x_s has the x_0 and eps of

    x_t = alpha_t x_0 + sigma_t eps        x_0 = (sigma_t x_s - sigma_s x_t) / (alpha_s sigma_t - alpha_t sigma_s)
    x_s = alpha_s x_0 + sigma_s eps        eps = (alpha_s x_t - alpha_t x_s) / (alpha_s sigma_t - alpha_t sigma_s)

whose denominator is above 0, since x_s has less noise. For straight paths, alpha = 1 - t and sigma = t, this is the
mean of the two velocities, as in their eq. 4. What is compared is v = alpha eps - sigma x_0, so that the loss is the
same function of the lines for every prediction type and weighs all times alike.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.distillation import END, Levels, huber, levels, next_point
from diffusion.prediction import epsilon_from_prediction, target, x_0_from_prediction
from diffusion.schedule import Schedule
from diffusion.spacing import shifted_time

DenoiseJump = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t (B, C, H, W), t (B,), length of the jump (B,)


@dataclass(frozen=True)
class Jumps:
    """Jumps of a batch, (B,) each: from ``t`` to ``end``; a jump that is ``doubled`` equals two, which meet at
    ``middle``, and another one follows the teacher."""

    t: Tensor
    middle: Tensor
    end: Tensor
    doubled: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Jumps":
        """The same change made to every field, such as some rows or another device."""
        return Jumps(*(change(values) for values in (self.t, self.middle, self.end, self.doubled)))


def draw_jumps(t: Tensor, share: float, pieces: int, schedule: Schedule, random: torch.Generator) -> Jumps:
    """Jumps for a batch of times t (B,): those of a ``share`` of it are moved to where a sampler of 1, 2, 4, .. steps
    is, and jump as far as it does. 1 / pieces is the length up to which jumps follow the teacher, a power of two.

    All lengths are as frequent. The other jumps have any length up to 1 / pieces.
    """
    rank = torch.randperm(len(t), generator=random)
    doubled = rank < round(share * len(t))
    count = 2 ** (rank % (pieces.bit_length() - 1))  # steps of the sampler, 1 to pieces / 2
    place = (torch.rand(len(t), generator=random, dtype=torch.float64) * count).floor()
    short = torch.rand(len(t), generator=random, dtype=torch.float64) / pieces

    def at(place: Tensor) -> Tensor:
        return time_of_share(place / count, schedule).to(t.dtype)

    near = (t - short * (1.0 if schedule.is_flow else schedule.steps)).to(t.dtype).clamp(
        min=0 if schedule.is_flow else END)
    return Jumps(torch.where(doubled, at(place + 1), t), torch.where(doubled, at(place + 0.5), t),
                 torch.where(doubled, at(place), near), doubled)


def time_of_share(share: Tensor, schedule: Schedule) -> Tensor:
    """The times (B,), after these shares (B,) of a run backwards, 0 being the end, that a sampler with "trailing"
    spacing visits."""
    if schedule.is_flow:
        return shifted_time(share, schedule.config.shift)
    return (share * schedule.steps).round() - 1


def length(t: Tensor, end: Tensor, schedule: Schedule) -> Tensor:
    """How far it is from times t (B,) to other ones, fp32 (B,), as a share of all times."""
    return (t - end).float() / (1.0 if schedule.is_flow else schedule.steps)


def jump_lengths(schedule: Schedule, sampler: str, times: Sequence[float]) -> dict[float, float]:
    """How far the steps of a run go, from each of its times: to the next one for `ddim`, to the end of the path for
    `consistency`. A sampler that takes its prediction for a direction is not named, and for it all lengths are 0."""
    end, unit = (0.0, 1.0) if schedule.is_flow else (END, schedule.steps)
    ends = {"ddim": [*times[1:], end], "consistency": [end] * len(times)}.get(sampler, [])
    return {t: (t - s) / unit for t, s in zip(times, ends)}


def prediction_of_jump(x_t: Tensor, x_s: Tensor, here: Levels, there: Levels, prediction_type: str) -> Tensor:
    """The prediction (B, C, H, W) that leads from x_t at the level ``here`` to x_s at the level ``there``; the inverse
    of `next_point`."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = here, there
    scale = 1.0 / (alpha_s * sigma_t - alpha_t * sigma_s)
    x_0, eps = (sigma_t * x_s - sigma_s * x_t) * scale, (alpha_s * x_t - alpha_t * x_s) * scale
    return target(x_0, eps, alpha_t, sigma_t, prediction_type)


@torch.no_grad()
def two_jumps(student: DenoiseJump, x_t: Tensor, jumps: Jumps, schedule: Schedule, prediction_type: str) -> Tensor:
    """The prediction (B, C, H, W) at x_t of the one jump that leads to where two jumps lead."""
    x = x_t
    for t, s in ((jumps.t, jumps.middle), (jumps.middle, jumps.end)):
        prediction = student(x, t, length(t, s, schedule)).to(x.dtype)
        x = next_point(prediction, x, levels(schedule, t), levels(schedule, s), prediction_type)
    return prediction_of_jump(x_t, x, levels(schedule, jumps.t), levels(schedule, jumps.end), prediction_type)


def jump_distance(found: Tensor, wanted: Tensor, x_t: Tensor, here: Levels, prediction_type: str,
                  offset: float = 0.0) -> Tensor:
    """The distance (B,) of two predictions (B, C, H, W) at x_t, measured in v; ``offset`` as in `huber`."""
    def v(prediction: Tensor) -> Tensor:
        if prediction_type == "v_prediction":
            return prediction
        x_0 = x_0_from_prediction(prediction, x_t, *here, prediction_type)
        return target(x_0, epsilon_from_prediction(prediction, x_t, *here, prediction_type), *here, "v_prediction")

    return huber(v(found), v(wanted), offset)


__all__ = ["DenoiseJump", "Jumps", "draw_jumps", "jump_distance", "jump_lengths", "length", "prediction_of_jump",
           "two_jumps"]
