"""Data in the plane whose network and paths are known, a perceptron that learns it, and how samples are scored.

x_t = (1 - t) x_0 + t eps with the velocity eps - x_0. Axis letters: B points of a batch, K components, W width,
N samples.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH, WIDTH, RATE = 256, 128, 1e-3
SCORED = 8192  # samples
FIRST = 0.001  # least time of a training step, where x - x_0 still has digits in fp32
Velocity = Callable[[Tensor, Tensor], Tensor]  # x (B, 2), t (B,) -> (B, 2)
MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, 2), t (B,), r (B,) -> (B, 2)


@dataclass(frozen=True)
class Plane:
    """A mixture of round Gaussians in the plane: weights (K,), means (K, 2), one standard deviation."""

    weight: Tensor
    mean: Tensor
    std: float

    def samples(self, count: int, random: torch.Generator) -> Tensor:
        """Samples (count, 2)."""
        which = torch.multinomial(self.weight, count, replacement=True, generator=random)
        return (self.mean[which] + self.std * torch.randn(count, 2, generator=random)).float()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - x_0 | x_t = x] (B, 2) at times (B,) above 0: what a network that has learnt everything predicts."""
        time, alpha = t.double()[:, None], 1.0 - t.double()[:, None]  # (B, 1)
        variance = (alpha * self.std).square() + time.square()
        away = x.double()[:, None] - alpha[..., None] * self.mean  # (B, K, 2)
        share = torch.softmax(self.weight.log() - away.square().sum(-1) / (2 * variance), dim=1)  # (B, K)
        x_0 = (share[..., None] * (self.mean + (alpha * self.std**2 / variance)[..., None] * away)).sum(1)
        return ((x.double() - x_0) / time).to(x.dtype)

    def ends(self, x: Tensor, steps: int = 200) -> Tensor:
        """The ends (B, 2) of the paths that begin at pure noise x (B, 2), fp64: classical Runge-Kutta to t = 0.002, and
        one step of Euler."""
        x, h = x.double(), (1.0 - 0.002) / steps

        def slope(x: Tensor, t: float) -> Tensor:
            return self.velocity(x, torch.full((len(x),), t, dtype=torch.float64))

        for n in range(steps):
            t = 1.0 - n * h
            k_1 = slope(x, t)
            k_2 = slope(x - h / 2 * k_1, t - h / 2)
            k_3 = slope(x - h / 2 * k_2, t - h / 2)
            k_4 = slope(x - h * k_3, t - h)
            x = x - h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        return x - 0.002 * slope(x, 0.002)


def five() -> Plane:
    """Five Gaussians, four of them on a circle, of unequal weight."""
    angle = torch.arange(4, dtype=torch.float64) * torch.pi / 2
    mean = torch.cat([torch.zeros(1, 2, dtype=torch.float64), 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)])
    weight = torch.tensor([3, 1, 2, 1, 2], dtype=torch.float64)
    return Plane(weight / weight.sum(), mean, 0.25)


class Net(nn.Module):
    """The mean velocity (B, 2) over [r, t] of the path through x (B, 2) at t (B,): at r = t the velocity. What it knows
    of t - r begins without effect. ``features`` are the activations (B, W) below the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.interval = nn.Linear(2 + 8, WIDTH), nn.Linear(8, WIDTH, bias=False)
        self.middle = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.last = nn.Linear(WIDTH, 2)
        nn.init.zeros_(self.interval.weight)

    def features(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The activations (B, W) below the last layer."""
        return self.middle(self.first(torch.cat([x, waves(t)], dim=1)) + self.interval(waves(t - r)))

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        return self.last(self.features(x, t, t if r is None else r))


def waves(t: Tensor) -> Tensor:
    """Times (B,) as (B, 8)."""
    angle = t[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0]) * torch.pi
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def mixed(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t (B, 2)."""
    return (1 - t[:, None]) * x_0 + t[:, None] * eps


def drawn(data: Plane, random: torch.Generator, count: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Data x_0 and noise eps (B, 2), and times (B,)."""
    t = FIRST + (1 - FIRST) * torch.rand(count, generator=random)
    return data.samples(count, random), torch.randn(count, 2, generator=random), t


def velocity_loss(net: MeanVelocity, data: Plane, random: torch.Generator) -> Tensor:
    """The loss of the network that all methods start from: it imitates the exact one."""
    x_0, eps, t = drawn(data, random)
    x_t = mixed(x_0, eps, t)
    return (net(x_t, t, t) - data.velocity(x_t, t)).square().mean()


def learn(net: nn.Module, budget: int, loss_at: Callable[[int], Tensor]) -> None:
    """``budget`` gradient evaluations of a loss, with a rate that falls to 0."""
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for step in range(budget):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / budget)
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()


@torch.no_grad()
def path_of(teacher: Velocity, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """All points (steps, B, 2) of paths from x (B, 2) by Euler's method but their ends, and the ends (B, 2)."""
    points = []
    for n in range(steps):
        points.append(x)
        x = x - teacher(x, torch.full((len(x),), 1 - n / steps)) / steps
    return torch.stack(points), x


def sliced_wasserstein(one: Tensor, other: Tensor, directions: int = 64) -> float:
    """The root of the mean over directions of the squared Wasserstein distance of the projections of two sets of equal
    size (N, 2)."""
    angle = torch.arange(directions, dtype=torch.float64) * torch.pi / directions
    lines = torch.stack([angle.cos(), angle.sin()])  # (2, directions)
    found, wanted = ((x.double() @ lines).sort(dim=0).values for x in (one, other))
    return (found - wanted).square().mean().sqrt().item()


@dataclass(frozen=True)
class Judge:
    """Noise to begin at, the true ends of its paths, and fresh data, all (N, 2)."""

    noise: Tensor
    ends: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, data: Plane, random: torch.Generator) -> "Judge":
        noise = torch.randn(SCORED, 2, generator=random)
        return cls(noise, data.ends(noise), data.samples(SCORED, random))

    def scores(self, samples: list[Tensor]) -> list[float]:
        """The distance of each set of samples to fresh data, and that of the first to the true ends."""
        error = (samples[0].double() - self.ends).square().sum(1).mean().sqrt().item()
        return [*(sliced_wasserstein(x, self.fresh) for x in samples), error]
