"""Data whose exact network and exact solution are known: numbers from a Gaussian or from a mixture of two.

The network that training would reach is E[x_0 | x_t] in closed form, and the probability-flow ODE moves every point
along its quantile, so that the exact end of every path is known too.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.prediction import prediction_from_x_0
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Mixture:
    """Weights, means and spreads (K,) fp64."""

    weight: Tensor
    mean: Tensor
    std: Tensor

    def x_0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x_t = x]."""
        variance = alpha**2 * self.std**2 + sigma**2  # (K,) of x_t in each component
        away = x[..., None] - alpha * self.mean
        share = torch.softmax(self.weight.log() - 0.5 * variance.log() - 0.5 * away**2 / variance, -1)
        return (share * (self.mean + alpha * self.std**2 / variance * away)).sum(-1)

    def cdf(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """P[x_t <= x]."""
        spread = (alpha**2 * self.std**2 + sigma**2).sqrt()
        return (self.weight * torch.special.ndtr((x[..., None] - alpha * self.mean) / spread)).sum(-1)

    def quantile(self, p: Tensor, alpha: float, sigma: float) -> Tensor:
        """The inverse of `cdf`, by bisection."""
        low, high = torch.full_like(p, -20.0), torch.full_like(p, 20.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha, sigma) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def carried(self, x: Tensor, first: tuple[float, float], last: tuple[float, float]) -> Tensor:
        """Where the probability-flow ODE takes x from one level (alpha, sigma) to another."""
        return self.quantile(self.cdf(x, *first), *last)


MIXTURE = Mixture(*torch.tensor([[0.3, 0.7], [-1.0, 0.8], [0.3, 0.5]], dtype=torch.float64))
GAUSSIAN = Mixture(*torch.tensor([[1.0], [0.4], [0.5]], dtype=torch.float64))


class Exact:
    """The exact network of a mixture, at a time with all its fp64 digits."""

    def __init__(self, schedule: Schedule, data: Mixture = MIXTURE, kind: str = "sample") -> None:
        self.schedule, self.data, self.kind = schedule, data, kind

    def __call__(self, x: Tensor, t: float) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return prediction_from_x_0(self.data.x_0(x, alpha, sigma), x, alpha, sigma, self.kind)


def starts() -> Tensor:
    """41 points (41, 1, 1, 1) fp64 to begin at."""
    return torch.linspace(-2.0, 2.0, 41, dtype=torch.float64).reshape(41, 1, 1, 1)


def distance(found: Tensor, schedule: Schedule, times: list, data: Mixture = MIXTURE) -> float:
    """Largest distance of `found`, reached over `times` from `starts`, from the exact solution. The last jump, from the
    last time to x_0, is made by both: it is the same for every number of steps and no part of the solver."""
    last = schedule.alpha_sigma(times[-1])
    exact = data.x_0(data.carried(starts(), schedule.alpha_sigma(times[0]), last), *last)
    return (found - exact).abs().max().item()


def error(name: str, schedule: Schedule, times: list, data: Mixture = MIXTURE, kind: str = "sample",
          **options) -> float:
    """The distance of one of our samplers."""
    found = get_sampler(name)(Exact(schedule, data, kind), starts(), times, schedule, kind, **options)
    return distance(found, schedule, times, data)


def slope(counts, errors) -> float:
    """Order of convergence: minus the slope of a straight line through log error over log number of steps."""
    x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (counts, errors))
    return -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
