"""Conversions between prediction types: each undoes the other, and recovers the pair that made x_t."""

from itertools import product
from typing import get_args

import pytest
import torch

from diffusion.prediction import (
    PredictionType,
    check_prediction_type,
    epsilon_from_prediction,
    prediction_from_x_0,
    target,
    velocity_from_prediction,
    x_0_from_prediction,
)
from diffusion.schedule import Schedule, ScheduleConfig

TYPES = get_args(PredictionType)
LEVELS = [(0.8, 0.6), (0.6, 0.8), (0.3, 0.7), (1.0, 2.0), (0.05, 0.99)]  # variance preserving, flow, exploding


@pytest.fixture(scope="module")
def pair():
    return torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind,level", list(product(TYPES, LEVELS)))
def test_conversions_recover_the_pair(pair, kind, level):
    (x_0, eps), (alpha, sigma) = pair, level
    x_t = alpha * x_0 + sigma * eps
    prediction = target(x_0, eps, alpha, sigma, kind)
    torch.testing.assert_close(x_0_from_prediction(prediction, x_t, alpha, sigma, kind), x_0)
    torch.testing.assert_close(epsilon_from_prediction(prediction, x_t, alpha, sigma, kind), eps)
    torch.testing.assert_close(velocity_from_prediction(prediction, x_t, alpha, sigma, kind), eps - x_0)
    torch.testing.assert_close(prediction_from_x_0(x_0, x_t, alpha, sigma, kind), prediction)


@pytest.mark.parametrize("kind", TYPES)
def test_conversions_are_consistent_for_a_wrong_prediction(pair, kind):
    """x_t = alpha x_0 + sigma eps holds for whatever the network says, and x_0 -> prediction -> x_0 is the identity."""
    x_t, prediction = pair
    x_0 = x_0_from_prediction(prediction, x_t, 0.3, 0.7, kind)
    eps = epsilon_from_prediction(prediction, x_t, 0.3, 0.7, kind)
    torch.testing.assert_close(0.3 * x_0 + 0.7 * eps, x_t)
    torch.testing.assert_close(prediction_from_x_0(x_0, x_t, 0.3, 0.7, kind), prediction)


def test_levels_may_differ_in_a_batch(pair):
    x_0, eps = pair
    alpha, sigma = (torch.tensor(v, dtype=torch.float64).reshape(2, 1, 1, 1) for v in ([0.8, 0.6], [0.6, 0.8]))
    v = target(x_0, eps, alpha, sigma, "v_prediction")
    torch.testing.assert_close(x_0_from_prediction(v, alpha * x_0 + sigma * eps, alpha, sigma, "v_prediction"), x_0)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow"])
def test_pure_noise_is_safe(pair, kind):
    x_0, eps = pair
    prediction = target(x_0, eps, 0.0, 1.0, kind)
    torch.testing.assert_close(x_0_from_prediction(prediction, eps, 0.0, 1.0, kind), x_0)
    torch.testing.assert_close(epsilon_from_prediction(prediction, eps, 0.0, 1.0, kind), eps)


def test_epsilon_is_refused_where_the_schedule_ends_in_noise():
    for config in (ScheduleConfig(zero_terminal_snr=True), ScheduleConfig(kind="flow")):
        with pytest.raises(ValueError, match="SNR 0"):
            check_prediction_type(Schedule(config), "epsilon")
        for kind in ("sample", "v_prediction", "flow"):
            check_prediction_type(Schedule(config), kind)
    check_prediction_type(Schedule(ScheduleConfig()), "epsilon")


def test_unknown_type_is_refused(pair):
    for call in (
        lambda: check_prediction_type(Schedule(ScheduleConfig()), "noise"),
        lambda: target(*pair, 0.6, 0.8, "noise"),
        lambda: x_0_from_prediction(*pair, 0.6, 0.8, "noise"),
        lambda: epsilon_from_prediction(*pair, 0.6, 0.8, "noise"),
    ):
        with pytest.raises(ValueError, match="epsilon, sample, v_prediction, flow"):
            call()
