"""UniPC: a predictor and a corrector of any order from one network call a step. Zhao et al. 2023 (arXiv 2302.04867).

As in `dpm_solver.py` the step is x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) D0 + corrections. UniPC writes
the corrections as a weighted sum of differences between D0 and other predictions:

    alpha_s (1 - exp(-h)) * sum_k rho_k (x_0(lambda_k) - D0) / r_k        r_k = (lambda_k - lambda_t) / h

with the rho that make polynomials exact: R rho = b, R_jk = r_k^(j-1), b_j = j! phi_{j+1}(-h) (-h)^j / B(h), and their
B_2(h) = exp(-h) - 1, or B_1(h) = -h in place of both, which matters only where one difference takes rho = 1/2. The
predictor uses earlier predictions (r_k < 0). When the network has been called at the new point (r = 1), the corrector
redoes the step that led there with that prediction included: one order more, no extra call.
"""

import math
from typing import Annotated, Literal

import numpy as np
from torch import Tensor

from diffusion.prediction import check_prediction_type, x_0_from_prediction
from diffusion.samplers.common import (
    Denoise,
    Noise,
    Times,
    half_log_snr,
    initial_state,
    time_pairs_left,
)
from diffusion.samplers.dpm_solver import Level, LowerOrderFinal, Order, Point
from diffusion.samplers.options import Option
from diffusion.schedule import Schedule


def unipc(
    denoise: Denoise,
    x_T: Tensor,
    timesteps: Times,
    schedule: Schedule,
    prediction_type: str,
    noise: Noise | None = None,
    *,
    trace: list | None = None,
    order: Order = 2,
    lower_order_final: LowerOrderFinal = True,
    form: Annotated[Literal["bh1", "bh2"], Option("Their B(h): h, or exp(h) - 1.")] = "bh2",
    uncorrected: Annotated[int, Option("How many steps from the first are not corrected.", 0, 10_000)] = 0,
) -> Tensor:
    """x_0 (B, C, H, W); arguments as in `samplers.common`. UniPC-1 to 3, one network call a step."""
    check_prediction_type(schedule, prediction_type)
    x = initial_state(x_T)
    before, before_level = x, (1.0, 0.0)  # state and level that the last step started from
    history: list[Point] = []  # newest first; of the last step until the corrector has run
    for i, (t, s, left) in enumerate(time_pairs_left(timesteps)):
        here, there = schedule.alpha_sigma(t), schedule.arrival(t, s)
        x_0 = x_0_from_prediction(denoise(x, t), x, *here, prediction_type)
        if trace is not None:
            trace.append(x_0)
        if i > uncorrected and math.isfinite(history[0][0]):
            x = update(before, history, before_level, here, form, corrected=x_0)
        # A prediction at lambda = -inf (pure noise) has no place on a polynomial.
        history = [(half_log_snr(*here), x_0), *(p for p in history if math.isfinite(p[0]))]
        highest = 1 if there[1] == 0.0 else left if lower_order_final else order  # the step to x_0 has no second order
        history = history[: min(order, highest)]
        before, before_level = x, here
        x = update(x, history, here, there, form)
    return x


def update(x: Tensor, history: list[Point], here: Level, there: Level, form: str,
           corrected: Tensor | None = None) -> Tensor:
    """State at level `there` from x at level `here`: the predictor, or with the prediction at `there` the corrector."""
    alpha_s, sigma_s = there
    lambda_t, D0 = history[0]
    h = half_log_snr(*there) - lambda_t
    ratios = [(point - lambda_t) / h for point, _ in history[1:]]
    differences = [(x_0 - D0) / r for r, (_, x_0) in zip(ratios, history[1:])]
    if corrected is not None:
        ratios.append(1.0)
        differences.append(corrected - D0)
    w_0 = -math.expm1(-h)
    x_s = (sigma_s / here[1]) * x + alpha_s * w_0 * D0
    B = w_0 if form == "bh2" else h  # -B(-h) of the paper
    for rho, difference in zip(polynomial_rho(ratios, h, B), differences):
        x_s = x_s + (alpha_s * B * rho) * difference
    return x_s


def polynomial_rho(ratios: list[float], h: float, B: float) -> list[float]:
    """Weights rho of the differences at these ratios. One difference takes 1/2, the limit for small h, as the
    authors do for it; that needs no solve."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    b, phi, factorial = [], -math.expm1(-h) / h - 1.0, 1
    for j in range(1, len(ratios) + 1):
        b.append(-phi * factorial / B)
        factorial *= j + 1
        phi = -phi / h - 1.0 / factorial
    return np.linalg.solve(np.vander(ratios, increasing=True).T, b).tolist()
