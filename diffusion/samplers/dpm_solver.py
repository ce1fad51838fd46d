"""DPM-Solver++: exponential integrators in the log SNR. Lu et al. 2022, "DPM-Solver++" (arXiv 2211.01095).

In lambda = log(alpha / sigma) the probability-flow ODE has an exact solution around the predicted x_0 (prop. 4.1):

    x_s = (sigma_s / sigma_t) x_t + alpha_s * integral over the step of exp(lambda - lambda_s) x_0(lambda) d lambda

Write x_0 as a polynomial in the part of the step that is done, D0 + D1 tau + D2 tau^2 with tau from 0 to 1, where the
D come from differences of earlier predictions (multistep) or of predictions inside the step (singlestep). Then

    x_s = (sigma_s / sigma_t) x_t + alpha_s (w_0 D0 + w_1 D1 + w_2 D2)
    w_j = h * integral of exp(-h (1 - tau)) tau^j:        w_0 = 1 - exp(-h),  w_j = 1 - j w_{j-1} / h

The SDE has the same form with u = 2 h in place of h in the weights, a further factor exp(-h) on x_t, and noise of
variance sigma_s^2 (1 - exp(-2 h)) (their section 5). Order 2 takes w_0 / 2 for w_1, as the authors do ("midpoint").

From pure noise (lambda = -inf) h is infinite: w_0 = 1, the differences vanish, the step is first order and exact for a
constant x_0. The step to x_0 is first order as well.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from diffusion.prediction import check_prediction_type, x_0_from_prediction
from diffusion.samplers.common import (
    Denoise,
    Noise,
    Times,
    half_log_snr,
    initial_state,
    require_noise,
    time_pairs,
    time_pairs_left,
)
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule

Level = tuple[float, float]
Point = tuple[float, Tensor]  # (lambda, predicted x_0)
Order = Annotated[int, Option("Order of the method: the number of predictions that a step combines.", 1, 3)]
SolverType = Annotated[Literal["midpoint", "heun"], Option(
    "Weight of the slope where it is not fixed by the order: w_0 / 2, or the exact integral.")]
LowerOrderFinal = Annotated[bool, Option("Short runs come down to order 1 at their end.")]
EulerAtFinal = Annotated[bool, Option("The last step has order 1 wherever it ends; a step to x_0 always has.")]
ThirdOrder = Annotated[Literal["exact", "published"], Option(
    "Weight of the curvature in order 3: of the integral, or as in the authors' code.")]


@dataclass(frozen=True)
class Rule:
    """The options of the multistep forms."""

    order: int
    solver_type: str
    lower_order_final: bool
    euler_at_final: bool
    third_order: str
    stochastic: bool


def dpm_solver_multistep(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    order: Order = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: LowerOrderFinal = True,
    euler_at_final: EulerAtFinal = False,
    third_order: ThirdOrder = "exact",
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. DPM-Solver++(1M, 2M, 3M), one network call a step."""
    rule = Rule(order, solver_type, lower_order_final, euler_at_final, third_order, stochastic=False)
    return multistep(denoise, x_T, timesteps, schedule, prediction_type, None, trace, rule)


def dpm_solver_sde(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    order: Order = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: LowerOrderFinal = True,
    euler_at_final: EulerAtFinal = False,
    third_order: ThirdOrder = "exact",
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. SDE-DPM-Solver++(1M, 2M, 3M), one network call a step."""
    draw = require_noise(noise, "dpm_solver_sde")
    rule = Rule(order, solver_type, lower_order_final, euler_at_final, third_order, stochastic=True)
    return multistep(denoise, x_T, timesteps, schedule, prediction_type, draw, trace, rule)


def multistep(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    draw: Noise | None,
    trace: list | None,
    rule: Rule,
) -> Tensor:
    """The loop of both multistep forms; `draw` serves the SDE."""
    check_prediction_type(schedule, prediction_type)
    x = initial_state(x_T)
    history: list[Point] = []  # newest first
    for i, (t, s, left) in enumerate(time_pairs_left(timesteps)):
        here, there = schedule.alpha_sigma(t), schedule.arrival(t, s)
        x_0 = x_0_from_prediction(denoise(x, t), x, *here, prediction_type)
        if trace is not None:
            trace.append(x_0)
        history = [(half_log_snr(*here), x_0), *history[: rule.order - 1]]
        # Short runs are unstable in high order: come down to order 1 at the end, over two steps below 15 times.
        usable = min(len(history), left) if rule.lower_order_final and i + left < 15 else len(history)
        if s is None and (there[1] == 0.0 or rule.euler_at_final):
            usable = 1
        x = multistep_update(x, history[:usable], here, there, rule)
        if draw is not None and there[1] > 0.0:
            h = half_log_snr(*there) - history[0][0]
            x = x + there[1] * math.sqrt(-math.expm1(-2.0 * h)) * draw()
    return x


def multistep_update(x: Tensor, history: list[Point], here: Level, there: Level, rule: Rule) -> Tensor:
    """The deterministic part of a step from level `here` to level `there`, of the order of the history (1 to 3)."""
    alpha_s, sigma_s = there
    lambda_t, D0 = history[0]
    h = half_log_snr(*there) - lambda_t
    w_0, w_1, w_2 = polynomial_weights(2.0 * h if rule.stochastic else h)
    x_s = (sigma_s / here[1] * (math.exp(-h) if rule.stochastic else 1.0)) * x + alpha_s * w_0 * D0
    if len(history) == 1:
        return x_s
    h_0 = lambda_t - history[1][0]
    first = (h / h_0) * (D0 - history[1][1])  # slope over the step before
    if len(history) == 2:
        # Lu et al. 2022, algorithm 2
        return x_s + (alpha_s * (0.5 * w_0 if rule.solver_type == "midpoint" else w_1)) * first
    h_1 = history[1][0] - history[2][0]
    second = (h / h_1) * (history[1][1] - history[2][1])  # slope over the one before that
    # Newton's divided differences: the parabola through the three predictions, at tau = 0
    D1 = first + (h_0 / (h_0 + h_1)) * (first - second)
    D2 = (h / (h_0 + h_1)) * (first - second)
    if rule.third_order == "published":
        # The authors' code, and its ports, use w_2 / 2 here, which leaves a second-order method (and for the SDE
        # w_2 / 2 - 1 in diffusers, which does not vanish with the step). The integral above gives w_2.
        w_2 = 0.5 * w_2 - (1.0 if rule.stochastic else 0.0)
    return x_s + (alpha_s * w_1) * D1 + (alpha_s * w_2) * D2


def polynomial_weights(u: float) -> tuple[float, float, float]:
    """(w_0, w_1, w_2): exact weights of 1, tau and tau^2 under an exponential of length u > 0."""
    w_0 = -math.expm1(-u)
    w_1 = 1.0 - w_0 / u
    return w_0, w_1, 1.0 - 2.0 * w_1 / u


def dpm_solver_singlestep(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    order: Order = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: LowerOrderFinal = True,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. DPM-Solver++(2S, 3S), one network call a time.

    Times are taken in groups of `order`. Inside a group every step starts again from the first state and uses one
    prediction more, so only the last of a group has the full order. Order 3 holds where the third time lies at two
    thirds of the group in lambda, as on the "exponential" grid; elsewhere the method is of order 2.
    """
    check_prediction_type(schedule, prediction_type)
    x = initial_state(x_T)
    group: list[Point] = []  # since the start of the group, oldest first
    start, start_level = x, (1.0, 0.0)
    for t, s in time_pairs(timesteps):
        here, there = schedule.alpha_sigma(t), schedule.arrival(t, s)
        x_0 = x_0_from_prediction(denoise(x, t), x, *here, prediction_type)
        if trace is not None:
            trace.append(x_0)
        last = s is None and (there[1] == 0.0 or (lower_order_final and len(group) + 1 == order))
        if last or len(group) == order or (group and group[0][0] == -math.inf):
            group = []
        if not group:
            start, start_level = x, here
        group.append((half_log_snr(*here), x_0))
        x = singlestep_update(start, group, start_level, there, solver_type)
    return x


def singlestep_update(start: Tensor, group: list[Point], here: Level, there: Level, solver_type: str) -> Tensor:
    """State at level `there` from the state at the start of the group, of the order of the group (1 to 3)."""
    alpha_s, sigma_s = there
    lambda_t, D0 = group[0]
    h = half_log_snr(*there) - lambda_t
    w_0, w_1, w_2 = polynomial_weights(h)
    x_s = (sigma_s / here[1]) * start + alpha_s * w_0 * D0
    if len(group) == 1:
        return x_s
    lambda_r, x_0_r = group[-1]
    D1 = (h / (lambda_r - lambda_t)) * (x_0_r - D0)
    if solver_type == "midpoint" or len(group) == 2:
        # Lu et al. 2022, algorithm 1 for order 2; Lu et al. 2022 (DPM-Solver), algorithm 2 for order 3, for x_0
        return x_s + (alpha_s * (0.5 * w_0 if len(group) == 2 and solver_type == "midpoint" else w_1)) * D1
    # the parabola through the three predictions of the group
    r_0, r_1 = (lambda_r - lambda_t) / h, (group[1][0] - lambda_t) / h
    earlier = (group[1][1] - D0) / r_1
    slope, curvature = (r_0 * earlier - r_1 * D1) / (r_0 - r_1), (D1 - earlier) / (r_0 - r_1)
    return x_s + (alpha_s * w_1) * slope + (alpha_s * w_2) * curvature
