"""Ways to make a few calls out of many, on data in the plane whose network and whose paths are known.

    python -m benchmarks.few_steps [--evaluations 800] [--seeds 3]

The data are a mixture of Gaussians, x_t = (1 - t) x_0 + t eps and a velocity v = eps - x_0, so that E[v | x_t], the
teacher, is known in closed form, and the end of every path up to the error of a Runge-Kutta method. A perceptron
imitates the teacher. Every method starts from its weights, has the same network, batch, optimizer and number of
gradient evaluations, one of which is a forward and backward pass of a batch through one network, and differs in its
loss alone:

    consistency    f(x_t, t) = f(x_r, r) along paths (`diffusion/distillation.py`; arXiv 2406.14548)
    MeanFlow       the mean velocity u(x_t, r, t) from its identity u = v - (t - r) du/dt (arXiv 2505.13447)
    shortcut       one step of length 2 d equals two of length d (arXiv 2410.12557; as in the paper, with the square of
                   the error and steps from 1/64 up, which differs from `diffusion/shortcut.py`)
    DMD2           samples noised again have the score of noised data; a second network learns the score of the samples
                   (arXiv 2405.14867), without and with an adversary on that network's features
    whole paths    regression on the ends of the teacher's paths from points all along them (arXiv 2101.02388)

The first three follow either the teacher's velocity or that of the pair (x_0, eps), whose mean the teacher's is.
Scores: the sliced Wasserstein distance of samples to fresh data, and the root mean square distance of one call to
the true end of its path. Prints a table; about 3 minutes of one core.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plane import (
    BATCH,
    RATE,
    SCORED,
    WIDTH,
    Judge,
    MeanVelocity,
    Net,
    Plane,
    Velocity,
    drawn,
    five,
    learn,
    mixed,
    path_of,
    sliced_wasserstein,
    velocity_loss,
)
from diffusion.distillation import consistency_function, consistency_loss, earlier_times, levels, next_point
from diffusion.schedule import Schedule, ScheduleConfig
from eval.suite import rows_table

GAP = 0.1  # of the two points that are compared, as in configs/shapes_student.yaml
PATH = 20  # steps of the teacher along a path
GRID = 64  # shortest step of a shortcut model
UNEQUAL = 0.25  # share of a batch of MeanFlow and shortcut models that learns more than the velocity, as in the papers
FAKE_STEPS = 5  # evaluations of the second network for one of the generator, as in DMD2
ADVERSARY = 0.01  # weight of the adversary in the loss of the generator
CALLS = (1, 2, 4)
FLOW = Schedule(ScheduleConfig(kind="flow"))


def as_image(x: Tensor) -> Tensor:
    """(B, 2) as (B, 2, 1, 1)."""
    return x[:, :, None, None]


def tuning_loss(net: Velocity, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Consistency tuning as the stage ``student`` does it, with the direction ``velocity`` (B, 2)."""
    r = earlier_times(FLOW, t, GAP)
    x_r = next_point(as_image(velocity), as_image(x_t), levels(FLOW, t), levels(FLOW, r), "flow")
    return consistency_loss(lambda x, t: as_image(net(x.flatten(1), t)), as_image(x_t), t, x_r, r, FLOW, "flow",
                            offset=0.01).mean()


def mean_flow_loss(net: MeanVelocity, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor) -> Tensor:
    """u = v - (t - r) du/dt along the path, whose derivative of (x, t, r) is (v, 1, 0); the weights of the paper."""
    u, slope = torch.func.jvp(net, (x_t, t, r), (velocity, torch.ones_like(t), torch.zeros_like(r)))
    square = (u - (velocity - (t - r)[:, None] * slope).detach()).square().sum(1)
    return (square / (square.detach() + 1e-3)).mean()


def interval(t: Tensor, random: torch.Generator) -> Tensor:
    """r (B,): below t in a share of the batch, else t."""
    r = t * torch.rand(len(t), generator=random)
    return torch.where(torch.arange(len(t)) < UNEQUAL * len(t), r, t)


def shortcut_loss(net: MeanVelocity, x_t: Tensor, t: Tensor, half: Tensor, velocity: Tensor) -> Tensor:
    """The first of the batch, one for each of ``half`` (S,): a step equals two of half its length. The others: the
    velocity."""
    share = len(half)
    with torch.no_grad():
        wanted = two_halves(net, x_t[:share], t[:share], half)
    r = torch.cat([t[:share] - 2 * half, t[share:]])
    return (net(x_t, t, r) - torch.cat([wanted, velocity[share:]])).square().mean()


def two_halves(net: MeanVelocity, x: Tensor, t: Tensor, half: Tensor) -> Tensor:
    """The mean velocity (B, 2) of two steps of length ``half`` (B,)."""
    one = net(x, t, t - half)
    return (one + net(x - half[:, None] * one, t - half, t - 2 * half)) / 2


def halves(t: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(times (B,), of which a share is moved to multiples of its steps; half the length of these steps (S,))."""
    share = round(UNEQUAL * len(t))
    half = 2.0 ** -torch.randint(1, GRID.bit_length(), (share,), generator=random)
    return torch.cat([(t[:share] / (2 * half)).ceil() * 2 * half, t[share:]]), half


def matching_loss(x: Tensor, fake: Velocity, real: Velocity, random: torch.Generator) -> Tensor:
    """Distribution matching: the gradient with respect to samples x (B, 2) is the difference of what the two networks
    make of x noised again, over the distance of x from what the real one makes of it."""
    t = 0.02 + 0.96 * torch.rand(len(x), generator=random)
    with torch.no_grad():
        x_t = mixed(x, torch.randn(x.shape, generator=random), t)
        made = x_t - t[:, None] * real(x_t, t)
        away = t[:, None] * (real(x_t, t) - fake(x_t, t))  # E[x_0] of the fake network less that of the real one
        away = away / (x - made).abs().mean(1, keepdim=True).clamp(min=1e-3)
    return (away * x).sum(1).mean()


@dataclass(frozen=True)
class Task:
    """What every method begins with: data, whose exact velocity is the ``teacher``, and a network that imitates it.
    ``follow``: the velocity is the teacher's, or that of the pair."""

    data: Plane
    start: Net
    budget: int
    random: torch.Generator
    follow: str = "teacher"

    def student(self) -> Net:
        """A network to be trained."""
        return copy.deepcopy(self.start)

    @property
    def teacher(self) -> Velocity:
        """The exact velocity."""
        return self.data.velocity

    @torch.no_grad()
    def direction(self, x_0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, 2) and the velocity there."""
        x_t = mixed(x_0, eps, t)
        return x_t, self.teacher(x_t, t) if self.follow == "teacher" else eps - x_0


def by_consistency(task: Task) -> Net:
    """Consistency tuning."""
    net = task.student()

    def loss_at(step: int) -> Tensor:
        x_0, eps, t = drawn(task.data, task.random)
        return tuning_loss(net, *with_time(task, x_0, eps, t))

    learn(net, task.budget, loss_at)
    return net


def with_time(task: Task, x_0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (B, 2), t (B,) and the velocity (B, 2)."""
    x_t, velocity = task.direction(x_0, eps, t)
    return x_t, t, velocity


def by_mean_flow(task: Task) -> Net:
    """MeanFlow."""
    net = task.student()

    def loss_at(step: int) -> Tensor:
        x_t, t, velocity = with_time(task, *drawn(task.data, task.random))
        return mean_flow_loss(net, x_t, t, interval(t, task.random), velocity)

    learn(net, task.budget, loss_at)
    return net


def by_shortcuts(task: Task) -> Net:
    """A shortcut model."""
    net = task.student()

    def loss_at(step: int) -> Tensor:
        x_0, eps, t = drawn(task.data, task.random)
        t, half = halves(t, task.random)
        x_t, velocity = task.direction(x_0, eps, t)
        return shortcut_loss(net, x_t, t, half, velocity)

    learn(net, task.budget, loss_at)
    return net


def by_whole_paths(task: Task) -> Net:
    """Regression on the ends of the teacher's paths, of which a batch gives as many batches as it has points."""
    net, kept = task.student(), {}

    def loss_at(step: int) -> Tensor:
        if step % PATH == 0:
            points, ends = path_of(task.teacher, torch.randn(BATCH, 2, generator=task.random), PATH)
            kept["order"] = torch.randperm(PATH * BATCH, generator=task.random)
            kept["x"], kept["end"] = points.flatten(0, 1), ends.repeat(PATH, 1)
        rows = kept["order"][step % PATH * BATCH:][:BATCH]
        t = 1 - (rows // BATCH) / PATH
        return (end_of_path(net, kept["x"][rows], t) - kept["end"][rows]).square().mean()

    learn(net, task.budget, loss_at)
    return net


def end_of_path(net: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """f(x, t) (B, 2)."""
    return consistency_function(as_image(net(x, t)), as_image(x), *levels(FLOW, t), "flow").flatten(1)


def by_distribution(task: Task, adversary: bool) -> Net:
    """DMD2. Most gradient evaluations are of the second network, which learns to denoise what the generator makes;
    with an ``adversary`` a layer on its features also learns which noised samples are data."""
    generator, fake = task.student(), task.student()
    judge = nn.Linear(WIDTH, 1)
    own, other = (torch.optim.Adam(parameters, lr=RATE) for parameters in (
        generator.parameters(), [*fake.parameters(), *judge.parameters()]))

    def made() -> Tensor:
        """Samples (B, 2) of the generator, from the time where its own last step would leave them."""
        x_t, t = torch.randn(BATCH, 2, generator=task.random), 1.0
        with torch.no_grad():
            for s in (0.75, 0.5, 0.25)[:int(torch.randint(0, 4, (1,), generator=task.random))]:
                x_0 = end_of_path(generator, x_t, torch.full((BATCH,), t))
                x_t, t = mixed(x_0, torch.randn(BATCH, 2, generator=task.random), torch.full((BATCH,), s)), s
        return end_of_path(generator, x_t, torch.full((BATCH,), t))

    def logits(x: Tensor) -> Tensor:
        t = torch.rand(len(x), generator=task.random)
        x_t = mixed(x, torch.randn(x.shape, generator=task.random), t)
        return judge(fake.features(x_t, t, t))

    for step in range(task.budget):
        turn = step % (FAKE_STEPS + 1) == FAKE_STEPS
        optimizer = own if turn else other
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / task.budget)
        own.zero_grad()
        other.zero_grad()
        if turn:
            x = made()
            loss = matching_loss(x, fake, task.teacher, task.random)
            loss = loss + ADVERSARY * F.softplus(-logits(x)).mean() if adversary else loss
        else:
            x = made().detach()
            _, eps, t = drawn(task.data, task.random)
            loss = (fake(mixed(x, eps, t), t) - (eps - x)).square().mean()
            if adversary:
                real = task.data.samples(BATCH, task.random)
                loss = loss + ADVERSARY * (F.softplus(logits(x)) + F.softplus(-logits(real))).mean()
        loss.backward()
        optimizer.step()
    return generator


METHODS: dict[str, tuple[Callable[[Task], Net], str, bool]] = {  # method, what it follows, whether its steps have ends
    "consistency, teacher's direction": (by_consistency, "teacher", False),
    "consistency, data's direction": (by_consistency, "data", False),
    "MeanFlow, teacher's direction": (by_mean_flow, "teacher", True),
    "MeanFlow, data's direction": (by_mean_flow, "data", True),
    "shortcut, teacher's direction": (by_shortcuts, "teacher", True),
    "shortcut, data's direction": (by_shortcuts, "data", True),
    "DMD2 without its adversary": (partial(by_distribution, adversary=False), "teacher", False),
    "DMD2": (partial(by_distribution, adversary=True), "teacher", False),
    "whole paths": (by_whole_paths, "teacher", False),
}


@torch.no_grad()
def drawn_by(net: MeanVelocity, x: Tensor, calls: int, maps: bool, random: torch.Generator) -> Tensor:
    """Samples (B, 2) from noise x (B, 2): along the mean velocities of equal intervals if the network ``maps`` from
    time to time, else to the end and noised again."""
    for n in range(calls):
        t, r = torch.full((len(x),), 1 - n / calls), torch.full((len(x),), 1 - (n + 1) / calls)
        if maps:
            x = x - net(x, t, r) / calls
        else:
            x = end_of_path(lambda x, t: net(x, t, t), x, t)
            x = mixed(x, torch.randn(x.shape, generator=random), r) if n < calls - 1 else x
    return x


def round_of(data: Plane, seed: int, budget: int) -> dict[str, list[float]]:
    """Scores at 1, 2 and 4 calls, the error of one call and seconds, of every method and what it is compared with."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    judge, start = Judge.of(data, random), Net()
    learn(start, 2 * budget, lambda step: velocity_loss(start, data, random))

    def euler(velocity: Velocity, steps: int) -> Tensor:
        return path_of(velocity, judge.noise, steps)[1]

    nan = float("nan")
    found = {"other data": [*3 * [sliced_wasserstein(data.samples(SCORED, random), judge.fresh)], nan, nan],
             "the true ends": [*3 * [sliced_wasserstein(judge.ends, judge.fresh)], 0.0, nan],
             "teacher, 20 steps": [*judge.scores([euler(data.velocity, PATH)] * len(CALLS)), nan],
             "its imitation, 20 steps": [*judge.scores([euler(start, PATH)] * len(CALLS)), nan],
             "teacher, as many steps": [*judge.scores([euler(data.velocity, n) for n in CALLS]), nan]}
    for name, (method, follow, maps) in METHODS.items():
        began = time.process_time()
        net = method(Task(data, start, budget, torch.Generator().manual_seed(seed + 1), follow))
        seconds = time.process_time() - began
        found[name] = [*judge.scores([drawn_by(net, judge.noise, n, maps, random) for n in CALLS]), seconds]
    return found


def table(rounds: list[dict[str, list[float]]]) -> str:
    """Means of the rounds, and their range in brackets."""
    def cell(values: Tensor, digits: int) -> str:
        if values.isnan().any():
            return ""
        return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

    header = ("method", *(f"distance, {n} call{'s' * (n > 1)}" for n in CALLS), "error of one call", "seconds")
    return rows_table(header, (
        (name, *(cell(torch.tensor([found[name][k] for found in rounds]), 3 if k < 4 else 1) for k in range(5)))
        for name in rounds[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluations", type=int, default=800, help="gradient evaluations of a method (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rounds = [round_of(five(), seed, options.evaluations) for seed in range(options.seeds)]
    print(f"{options.seeds} seeds, {options.evaluations} gradient evaluations of {BATCH}\n{table(rounds)}")


if __name__ == "__main__":
    main()
