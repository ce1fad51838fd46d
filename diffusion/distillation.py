"""Consistency tuning: a network of many steps becomes one of a few.

The probability-flow ODE carries every x_t to one x_0. The consistency function f(x_t, t) is that end, the same for all
points of a path (Song et al. 2023):

    f(x_t, t) = f(x_r, r) for every r < t on the path of x_t,        f(x, end) = x

A network of any prediction type has an f, made of the x_0 that its prediction implies. Before tuning it is only a mean
over all images that x_t may belong to. Tuning (Geng et al. 2024, "ECT", arXiv 2406.14548) starts from such a network
and makes f agree along paths: of two neighbouring points the one with less noise is right, and no gradient flows into
it,

    L = d( f(x_t, t), sg f(x_r, r) )        d(a, b) = sqrt(mean |a - b|^2 + c^2) - c

For r = end this is the usual loss of x_0; as the gap between t and r closes, the ends of the paths are learnt. A point
x_r on the path of x_t comes from one step along the ODE (`next_point`), whose direction is either that of the teacher,
guided, or that of the pair (x_0, eps) which x_t was mixed from, whose mean the teacher has learnt. The first has less
noise; the second does not inherit the error of the teacher's direction. Guidance enters either of them as
w (cond - uncond).

Axes: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor

from diffusion.denoise import DenoiseAtTimes
from diffusion.prediction import epsilon_from_prediction, x_0_from_prediction
from diffusion.schedule import Schedule

Levels = tuple[Tensor | float, Tensor | float]
SKIP = 0.05  # noise level sigma / alpha at which f is half x_t
END = -1  # the time behind the last one of a discrete schedule; for flow it is 0


def consistency_function(prediction: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float,
                         prediction_type: str) -> Tensor:
    """f(x_t, t) (B, C, H, W) of a prediction at the level (alpha, sigma): the x_0 that it implies, and near the end a
    mixture of it with x_t,

        f = s x_t + (1 - s) x_0        s = d^2 / (d^2 + (sigma / alpha)^2)        d = SKIP

    so that f(x, end) = x to the bit. Without it nothing would tie a network that predicts x_0 to x_t there, and any
    constant would be consistent. It is the same function whatever the network predicts.
    """
    x_0 = x_0_from_prediction(prediction, x_t, alpha, sigma, prediction_type)
    skip = (SKIP * alpha) ** 2 / ((SKIP * alpha) ** 2 + sigma**2)
    return skip * x_t + (1.0 - skip) * x_0


def levels(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), (B, 1, 1, 1) each, at times (B,), at which the end is 1 and 0."""
    at_end = is_end(schedule, t)
    known = t if schedule.is_flow else t.clamp(min=0)
    alpha = torch.where(at_end, torch.ones_like(t, dtype=torch.float32), schedule.alpha(known))
    sigma = torch.where(at_end, torch.zeros_like(t, dtype=torch.float32), schedule.sigma(known))
    return alpha[:, None, None, None], sigma[:, None, None, None]


def is_end(schedule: Schedule, t: Tensor) -> Tensor:
    """Where the times (B,) are the end, bool (B,)."""
    return t <= 0.0 if schedule.is_flow else t < 0


def earlier_times(schedule: Schedule, t: Tensor, gap: float) -> Tensor:
    """Times (B,) with less noise, by the share `gap` of the whole range, and at least one time of the schedule.

    So a path has 1 / gap pieces at most. With a gap relative to t there would be many more near the end, where f hardly
    changes, and the errors of all of them can add up.
    """
    if schedule.is_flow:
        r = t - gap
        return torch.where(r < 1.0 / schedule.steps, torch.zeros_like(r), r)
    return (t - max(1, round(gap * schedule.steps))).clamp(min=END)


def next_point(prediction: Tensor, x_t: Tensor, here: Levels, there: Levels, prediction_type: str) -> Tensor:
    """x_r (B, C, H, W): x_t carried from the level `here` to `there` along a straight path, as one step of `ddim`."""
    x_0 = x_0_from_prediction(prediction, x_t, *here, prediction_type)
    eps = epsilon_from_prediction(prediction, x_t, *here, prediction_type)
    return there[0] * x_0 + there[1] * eps


def consistency_loss(student: DenoiseAtTimes, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, schedule: Schedule,
                     prediction_type: str, offset: float = 0.0, target: DenoiseAtTimes | None = None) -> Tensor:
    """d(f(x_t, t), sg f(x_r, r)) of each image, (B,).

    x_t, x_r: two points of a path, (B, C, H, W) each, at times t and r (B,), where r may be the end. offset: c of the
    pseudo-Huber distance (Song and Dhariwal 2024, section 3.3); with 0 it is the root of the mean square. target: the
    network that is right, the student itself if there is none.
    """
    with torch.no_grad():
        known = r if schedule.is_flow else r.clamp(min=0)
        known = torch.where(is_end(schedule, r), t, known)  # any time that the network knows: it is not used
        prediction = (target or student)(x_r, known).to(x_r.dtype)
        wanted = consistency_function(prediction, x_r, *levels(schedule, r), prediction_type)  # x_r itself at the end
    found = consistency_function(student(x_t, t).to(x_t.dtype), x_t, *levels(schedule, t), prediction_type)
    return huber(found, wanted, offset)


def huber(a: Tensor, b: Tensor, offset: float) -> Tensor:
    """sqrt(mean |a - b|^2 + c^2) - c of each image, (B,), c = offset: quadratic below it and linear above."""
    square = (a - b).square().flatten(1).mean(1)
    if offset == 0.0:
        return torch.linalg.vector_norm((a - b).flatten(1), dim=1) / a[0].numel() ** 0.5  # its gradient at 0 is 0
    return (square + offset**2).sqrt() - offset


__all__ = ["consistency_function", "consistency_loss", "earlier_times", "huber", "is_end", "levels", "next_point"]
