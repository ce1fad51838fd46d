"""The images of docs/diffusion.md, docs/samplers.md, docs/guidance.md and docs/editing.md.

    python -m benchmarks.figures.diffusion [--out docs/images]

No network is trained: the data are mixtures of Gaussians, for which E[x_0 | x_t] is known in closed form, so what the
images show is the process and not the fit. Takes about 20 seconds on one core and needs matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from diffusion.editing import InpaintingDenoiser
from diffusion.guidance import GuidanceConfig, classifier_free_guidance
from diffusion.loss import loss_weight
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule, ScheduleConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

VP = Schedule(ScheduleConfig())
FLOW = Schedule(ScheduleConfig(kind="flow"))


class Mixture:
    """E[x_0 | x_t] for points (B, D, 1, 1) from Gaussians of these weights (K,), means (K, D) and one spread."""

    def __init__(self, schedule: Schedule, weights: Tensor, means: Tensor, spread: float) -> None:
        self.schedule, self.weights, self.means, self.spread = schedule, weights, means, spread

    def __call__(self, x: Tensor, t: float) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t)
        variance = alpha**2 * self.spread**2 + sigma**2
        away = x[:, None, :, 0, 0] - alpha * self.means.to(x)  # (B, K, D)
        share = torch.softmax(self.weights.to(x).log() - 0.5 * away.square().sum(-1) / variance, -1)  # (B, K)
        means = self.means.to(x) + alpha * self.spread**2 / variance * away
        return (share[..., None] * means).sum(1)[:, :, None, None]


def schedules(path: Path) -> None:
    """Log SNR of the kinds, the times that spacings visit, and loss weights."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
    for name, config in {
        "scaled_linear": ScheduleConfig(), "linear": ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
        "cosine": ScheduleConfig("cosine"), "sigmoid": ScheduleConfig("sigmoid", beta_start=1e-4, beta_end=0.02),
        "scaled_linear, zero terminal SNR": ScheduleConfig(zero_terminal_snr=True), "flow": ScheduleConfig("flow"),
    }.items():
        schedule = Schedule(config)
        times = [i / 1000 for i in range(1, 1000)] if schedule.is_flow else list(range(999))
        left.plot([i / 1000 for i in range(1, 1000)][:len(times)], [schedule.log_snr(t) for t in times], label=name)
    left.set(xlabel="t / T", ylabel="log SNR", ylim=(-12, 12))
    left.legend(fontsize=6)
    for row, spacing in enumerate(("leading", "linspace", "trailing", "karras", "exponential", "beta")):
        times = VP.timesteps(10, spacing)
        middle.plot(times, [row] * 10, "o", markersize=4)
        middle.text(1040, row, spacing, fontsize=7, va="center")
    middle.set(xlabel="t, 10 steps", yticks=[], xlim=(-30, 1360))
    t = torch.arange(1000)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    for weighting in ("none", "min_snr", "soft_min_snr", "p2"):
        weight = loss_weight(alpha, sigma, "epsilon", weighting) * VP.snr(t)
        right.loglog(VP.snr(t), weight, label=weighting)
    right.set(xlabel="SNR", ylabel="weight of the error of x_0\n(epsilon prediction)", ylim=(1e-3, 1e3))
    right.legend(fontsize=7)
    save(figure, path)


def samplers(path: Path) -> None:
    """Distance to the exact solution against network calls, and paths of an ODE and an SDE sampler."""
    network = Mixture(VP, torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]), 0.3)
    x_T = torch.linspace(-2.0, 2.0, 81, dtype=torch.float64).reshape(-1, 1, 1, 1)
    exact = get_sampler("unipc")(network, x_T, VP.timesteps(800, "exponential"), VP, "sample", order=3)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1.6, 1, 1))
    for name, options, calls in (
        ("ddim", {}, lambda n: n), ("heun", {}, lambda n: 2 * n - 1), ("pndm", {}, lambda n: n + 1),
        ("dpm_solver_singlestep", {"order": 2}, lambda n: n), ("dpm_solver_multistep", {"order": 2}, lambda n: n),
        ("dpm_solver_multistep", {"order": 3}, lambda n: n), ("unipc", {"order": 2}, lambda n: n),
        ("unipc", {"order": 3}, lambda n: n),
    ):
        counts = [5, 8, 12, 18, 27, 40, 60, 90]
        errors = [(get_sampler(name)(network, x_T, VP.timesteps(n, "exponential"), VP, "sample", **options) - exact)
                  .abs().mean().item() for n in counts]
        left.loglog([calls(n) for n in counts], errors, "o-", markersize=3, label=f"{name} {options.get('order', '')}")
    left.set(xlabel="network calls", ylabel="mean distance to the exact x_0")
    left.legend(fontsize=6)
    for axis, name in ((middle, "ddim"), (right, "ddpm")):
        states: list[Tensor] = []

        def spy(x: Tensor, t: float, states: list[Tensor] = states) -> Tensor:
            states.append(x)
            return network(x, t)

        random, start = torch.Generator().manual_seed(0), torch.linspace(-1.8, 1.8, 13).reshape(-1, 1, 1, 1)
        end = get_sampler(name)(spy, start, VP.timesteps(100), VP, "sample",
                                lambda: torch.randn(start.shape, generator=random))
        axis.plot(torch.stack([*states, end]).flatten(1), linewidth=0.8)
        axis.set(title=f"{name}, 100 steps", xlabel="step", ylabel="x")
    save(figure, path)


CLASS = torch.tensor([[1.2, 0.6], [1.4, 1.1], [0.9, 1.3]])
REST = torch.tensor([[-1.0, 0.8], [-0.8, -1.0], [0.9, -0.9], [0.3, 0.5]])


def guidance(path: Path) -> None:
    """Points of one class of a plane of Gaussians, under different guidance."""
    everything = torch.cat([CLASS, REST])
    cond = Mixture(FLOW, torch.ones(3) / 3, CLASS, 0.15)
    uncond = Mixture(FLOW, torch.ones(7) / 7, everything, 0.15)

    def doubled(x: Tensor, t: float) -> Tensor:
        a, b = x.chunk(2)
        return torch.cat([uncond(a, t), cond(b, t)])

    figure, axes = plt.subplots(1, 5, figsize=(13, 2.9), sharex=True, sharey=True)
    settings = {"w = 1": {"scale": 1.0}, "w = 4": {"scale": 4.0}, "w = 4 for 0.3 < sigma/alpha < 3":
                {"scale": 4.0, "interval": (0.3, 3.0)}, "w = 4, apg": {"scale": 4.0, "method": "apg"},
                "w = 4, cfg_zero_star": {"scale": 4.0, "method": "cfg_zero_star"}}
    for axis, (title, options) in zip(axes, settings.items()):
        x_T = torch.randn(600, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        denoise = classifier_free_guidance(cond, doubled, GuidanceConfig(**options), FLOW, "sample")
        points = get_sampler("flow_heun")(denoise, x_T, FLOW.timesteps(40), FLOW, "sample")[:, :, 0, 0]
        axis.plot(*REST.T, "x", color="tab:red", markersize=5)
        axis.plot(*points.T, ".", markersize=2)
        axis.plot(*CLASS.T, "k+", markersize=6)
        axis.set(title=title, xlim=(-2, 3), ylim=(-2, 3))
        axis.title.set_fontsize(8)
    save(figure, path)


def editing(path: Path) -> None:
    """The second number of a pair painted beside a kept first one, against the exact conditional."""
    mean, spread, kept = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), 0.3, 0.6
    network = Mixture(FLOW, torch.tensor([0.5, 0.5]), mean, spread)
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), sharey=True)
    grid = torch.linspace(-2.2, 2.2, 200)
    share = torch.softmax(-0.5 * (kept - mean[:, 0]) ** 2 / spread**2, 0)
    bumps = torch.exp(-0.5 * (grid[:, None] - mean[:, 1]) ** 2 / spread**2) / (spread * 2.5066)
    density = (share * bumps).sum(1)
    for axis, (name, options) in zip(axes, (("flow_euler", {}), ("ddpm", {}), ("ddpm", {"repeats": 10}))):
        random = torch.Generator().manual_seed(0)
        x_T = torch.randn(4000, 2, 1, 1, generator=random)
        x_0 = torch.full((4000, 2, 1, 1), kept)
        keep = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
        denoise = InpaintingDenoiser(network, x_0, x_T, keep, FLOW, "sample")
        x = get_sampler(name)(denoise, x_T, FLOW.timesteps(50), FLOW, "sample",
                              lambda: torch.randn(x_T.shape, generator=random), **options)
        axis.hist(x[:, 1].flatten(), bins=60, range=(-2.2, 2.2), density=True, alpha=0.5, label="painted")
        axis.plot(grid, density, "k", label="exact, given the kept number")
        title = ", ".join([name, *(f"{k} {v}" for k, v in options.items()), "50 steps"])
        axis.set(title=title, xlabel="painted number")
        axis.legend(fontsize=7)
        wrong = (x[:, 1] < 0).float().mean()
        print(f"editing, {name} {options}: {wrong:.1%} painted in the wrong mode, exact {share[1]:.2%}")
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="docs/images", help="folder to write to")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    for draw, name in ((schedules, "schedules"), (samplers, "samplers"), (guidance, "guidance"), (editing, "editing")):
        draw(out / f"{name}.png")


if __name__ == "__main__":
    main()
