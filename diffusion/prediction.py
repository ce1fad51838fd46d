"""Conversions between what a network may predict: epsilon, x_0 ("sample"), v and flow velocity.

All four are linear in each other given x_t = alpha x_0 + sigma eps, so any of them determines the others:

    v    = alpha eps - sigma x_0        (Salimans & Ho 2022, section 4 and appendix D)
    flow = eps - x_0                    (Lipman et al. 2023; Liu et al. 2023, for alpha = 1 - t, sigma = t)

The formulas hold for any alpha and sigma, variance preserving or not. A function is named after what it returns.
alpha and sigma are floats or tensors that broadcast against x_t (B, C, H, W).
"""

from typing import Literal, get_args

from torch import Tensor

from diffusion.schedule import Schedule

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]
Level = float | Tensor


def check_prediction_type(schedule: Schedule, prediction_type: str) -> None:
    """Raises ValueError for an unknown type, and for epsilon where x_t can be pure noise (it would divide by 0)."""
    if prediction_type not in get_args(PredictionType):
        raise ValueError(f"prediction_type: value {prediction_type!r}; valid: {', '.join(get_args(PredictionType))}")
    if prediction_type == "epsilon" and schedule.ends_in_noise:
        raise ValueError("prediction_type: value 'epsilon' cannot recover x_0 from a schedule that ends at SNR 0; "
                         "valid: sample, v_prediction, flow")


def x_0_from_prediction(prediction: Tensor, x_t: Tensor, alpha: Level, sigma: Level, prediction_type: str) -> Tensor:
    """The clean x_0 that a prediction implies, shaped like x_t."""
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2  # 1 when variance is preserved
        return (alpha / norm) * x_t - (sigma / norm) * prediction
    if prediction_type == "flow":
        return (x_t - sigma * prediction) / (alpha + sigma)
    raise unknown(prediction_type)


def epsilon_from_prediction(
    prediction: Tensor, x_t: Tensor, alpha: Level, sigma: Level, prediction_type: str
) -> Tensor:
    """The noise that a prediction implies, shaped like x_t."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "sample":
        return (x_t - alpha * prediction) / sigma
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2
        return (sigma / norm) * x_t + (alpha / norm) * prediction
    if prediction_type == "flow":
        return (x_t + alpha * prediction) / (alpha + sigma)
    raise unknown(prediction_type)


def velocity_from_prediction(
    prediction: Tensor, x_t: Tensor, alpha: Level, sigma: Level, prediction_type: str
) -> Tensor:
    """The flow velocity eps - x_0 that a prediction implies, shaped like x_t."""
    if prediction_type == "flow":
        return prediction
    eps = epsilon_from_prediction(prediction, x_t, alpha, sigma, prediction_type)
    return eps - x_0_from_prediction(prediction, x_t, alpha, sigma, prediction_type)


def target(x_0: Tensor, eps: Tensor, alpha: Level, sigma: Level, prediction_type: str) -> Tensor:
    """What the network should have predicted for this pair, shaped like x_0."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x_0
    if prediction_type == "flow":
        return eps - x_0
    raise unknown(prediction_type)


def prediction_from_x_0(x_0: Tensor, x_t: Tensor, alpha: Level, sigma: Level, prediction_type: str) -> Tensor:
    """The prediction that implies this x_0 at x_t, the inverse of `x_0_from_prediction`; sigma must not be 0."""
    if prediction_type == "sample":
        return x_0
    eps = (x_t - alpha * x_0) / sigma
    return target(x_0, eps, alpha, sigma, prediction_type)


def unknown(prediction_type: str) -> ValueError:
    """The error for a prediction type that does not exist."""
    return ValueError(f"prediction_type: value {prediction_type!r}; valid: {', '.join(get_args(PredictionType))}")
