"""Shortcut models: jumps along paths that are known in closed form, the same loss for every prediction type, and a
network that learns them."""
import pytest
import torch
from exact_mixture import GAUSSIAN, MIXTURE
from test_distillation import FLOW, NOISE, VP, Small, cases, wide
from torch import nn

from diffusion.distillation import levels, next_point
from diffusion.prediction import prediction_from_x_0
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule, ScheduleConfig
from diffusion.shortcut import (
    Jumps,
    draw_jumps,
    jump_distance,
    jump_lengths,
    length,
    prediction_of_jump,
    two_jumps,
)

SHIFTED = Schedule(ScheduleConfig(kind="flow", shift=3.0))
CALLS = (1, 2, 4, 8)


def jumps_of_a_sampler(schedule: Schedule, steps: int) -> Jumps:
    """All jumps of a sampler with this number of steps, and the times in the middle of them."""
    dtype = torch.float64 if schedule.is_flow else torch.int64
    end = 0.0 if schedule.is_flow else -1
    times = torch.tensor([*schedule.timesteps(2 * steps), end], dtype=dtype)
    return Jumps(times[0:-1:2], times[1::2], times[2::2], torch.ones(steps, dtype=torch.bool))


def points(count: int) -> torch.Tensor:
    """Points x_t (B, 1, 1, 1) fp64."""
    return torch.linspace(-1.5, 1.7, count, dtype=torch.float64).reshape(-1, 1, 1, 1)


def level(schedule: Schedule, t: torch.Tensor):
    """(alpha, sigma), (B, 1, 1, 1) fp64 each."""
    return tuple(part[..., 0] for part in wide(schedule, t))


def exact(schedule: Schedule, kind: str, data):
    """The network whose every jump ends on the true path."""
    def student(x: torch.Tensor, t: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
        s = (t.double() - jump.double() * (1 if schedule.is_flow else schedule.steps))
        s = s if schedule.is_flow else s.round().long()
        x_s = data.carried(x.double(), wide(schedule, t), wide(schedule, s))
        return prediction_of_jump(x.double(), x_s, level(schedule, t), level(schedule, s), kind)
    return student


def tangent(schedule: Schedule, kind: str, data):
    """The exact network of many steps, which does not know how far it goes."""
    def student(x: torch.Tensor, t: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
        alpha, sigma = wide(schedule, t)
        return prediction_from_x_0(data.x_0(x.double(), alpha, sigma), x.double(), alpha[..., 0], sigma[..., 0], kind)
    return student


@cases
def test_a_jump_and_its_prediction_are_inverse(schedule, kind):
    """Also from pure noise, and to the end, where there is none."""
    random = torch.Generator().manual_seed(0)
    for steps in CALLS:
        jumps = jumps_of_a_sampler(schedule, steps)
        here, there = level(schedule, jumps.t), level(schedule, jumps.end)
        x_t, x_s = (torch.randn(steps, 2, 3, 3, generator=random, dtype=torch.float64) for _ in range(2))
        if kind == "epsilon" or here[0].min() == 0:
            x_t, x_s = x_t / 8, x_s / 8
        prediction = prediction_of_jump(x_t, x_s, here, there, kind)
        assert torch.allclose(next_point(prediction, x_t, here, there, kind), x_s, atol=1e-6)


@cases
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
def test_two_true_jumps_are_one_and_two_straight_ones_are_not(schedule, kind, data):
    """With the path in closed form the target of the loss is the truth at every length, and the loss is 0 there."""
    for steps in CALLS:
        jumps, x_t = jumps_of_a_sampler(schedule, steps), points(steps)
        network, straight = exact(schedule, kind, data), tangent(schedule, kind, data)
        right = network(x_t, jumps.t, length(jumps.t, jumps.end, schedule))
        wanted = two_jumps(network, x_t, jumps, schedule, kind)
        here = level(schedule, jumps.t)
        assert jump_distance(wanted, right, x_t, here, kind).max() < 2e-5
        one = straight(x_t, jumps.t, length(jumps.t, jumps.end, schedule))
        assert jump_distance(two_jumps(straight, x_t, jumps, schedule, kind), one, x_t, here, kind).max() > 1e-3


def test_all_prediction_types_have_the_same_targets_and_losses():
    """The same lines, predicted in other words."""
    for schedule, kinds in ((VP, ("epsilon", "sample", "v_prediction", "flow")), (NOISE, ("sample", "v_prediction")),
                            (FLOW, ("flow", "sample", "v_prediction"))):
        jumps, x_t = jumps_of_a_sampler(schedule, 8), points(8)
        here, found = level(schedule, jumps.t), []
        for kind in kinds:
            straight = tangent(schedule, kind, MIXTURE)
            found.append(jump_distance(straight(x_t, jumps.t, jumps.t), two_jumps(straight, x_t, jumps, schedule, kind),
                                       x_t, here, kind, offset=0.03))
        assert found[0].min() > 1e-5
        for other in found[1:]:
            assert torch.allclose(found[0], other, rtol=1e-3, atol=1e-6)


def test_no_gradient_reaches_the_two_jumps():
    weight = torch.tensor(0.3, requires_grad=True)
    jumps = jumps_of_a_sampler(FLOW, 4)
    assert not two_jumps(lambda x, t, jump: weight * x, points(4), jumps, FLOW, "flow").requires_grad


@pytest.mark.parametrize("schedule", [NOISE, FLOW, SHIFTED], ids=["discrete", "flow", "shifted flow"])
def test_jumps_are_those_of_the_samplers(schedule):
    """The doubled share jumps as samplers of 1, 2 and 4 steps do, all alike often; the others at most an eighth."""
    random = torch.Generator().manual_seed(0)
    t = 0.1 + 0.9 * torch.rand(600, generator=random)
    t = t if schedule.is_flow else (t * 1000).long()
    jumps = draw_jumps(t, 0.5, 8, schedule, random)
    assert jumps.doubled.sum() == 300 and jumps.t.dtype == t.dtype
    known = []
    for steps in (1, 2, 4):
        rows = jumps_of_a_sampler(schedule, steps)
        known += [tuple(round(float(value), 5) for value in row) for row in zip(rows.t, rows.middle, rows.end)]
    drawn = [tuple(round(float(value), 5) for value in row) for row in zip(
        *(jumps.each(lambda values: values[jumps.doubled]).__dict__[name] for name in ("t", "middle", "end")))]
    assert set(drawn) == set(known)
    assert drawn.count(known[0]) == 100  # of one step
    short = jumps.each(lambda values: values[~jumps.doubled])
    assert torch.equal(short.t, t[~jumps.doubled])
    found = length(short.t, short.end, schedule)
    assert found.min() >= 0 and found.max() <= 0.1251 and found.max() > 0.11


def test_lengths_of_a_run_are_those_of_its_sampler():
    times = NOISE.timesteps(4)
    assert list(jump_lengths(NOISE, "ddim", times).values()) == [0.25] * 4
    assert list(jump_lengths(NOISE, "consistency", times).values()) == [1.0, 0.75, 0.5, 0.25]
    assert jump_lengths(NOISE, "heun", times) == {} and jump_lengths(NOISE, "ddim", []) == {}
    assert sum(jump_lengths(SHIFTED, "ddim", SHIFTED.timesteps(3)).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("steps", CALLS)
def test_the_sampler_ends_on_the_true_path(steps):
    """By the exact network, told how far each step goes, any number of calls has the true end."""
    network, times = exact(NOISE, "v_prediction", MIXTURE), NOISE.timesteps(steps)
    lengths = jump_lengths(NOISE, "ddim", times)

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return network(x, torch.full((len(x),), t), torch.full((len(x),), lengths[t]))

    x = points(9)
    found = get_sampler("ddim")(denoise, x, times, NOISE, "v_prediction")
    assert torch.allclose(found, MIXTURE.carried(x, NOISE.alpha_sigma(999), (1.0, 0.0)), atol=1e-5)


class WithJump(nn.Module):
    """The small network, whose input of the jump begins without effect."""

    def __init__(self):
        super().__init__()
        self.net, self.more = Small(), Small()
        nn.init.zeros_(self.more.layers[-1].weight)
        nn.init.zeros_(self.more.layers[-1].bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
        share = t.float() * (0.001 if t.dtype == torch.int64 else 1.0)
        return self.net(x, t) + jump.reshape(-1, 1, 1, 1) * self.more(x, share + 2 * jump)


@pytest.mark.parametrize(("schedule", "kind"), [(FLOW, "flow"), (NOISE, "v_prediction"), (NOISE, "sample")],
                         ids=["flow", "v", "x_0"])
def test_a_small_network_comes_near_the_truth(schedule, kind):
    """Short jumps follow the exact network; one long one comes far nearer to the end of the path than the mean is."""
    torch.manual_seed(0)
    random, net, steps = torch.Generator().manual_seed(0), WithJump(), 400
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps) + 1e-5
        u = torch.rand(256, generator=random)
        jumps = draw_jumps(u if schedule.is_flow else (u * schedule.steps).long(), 0.5, 8, schedule, random)
        here = levels(schedule, jumps.t)
        which = torch.multinomial(MIXTURE.weight, 256, replacement=True, generator=random)
        x_0 = (MIXTURE.mean[which] + MIXTURE.std[which] * torch.randn(256, generator=random)).float()
        x_t = here[0] * x_0.reshape(-1, 1, 1, 1) + here[1] * torch.randn(256, 1, 1, 1, generator=random)
        wanted = tangent(schedule, kind, MIXTURE)(x_t, jumps.t, jumps.t).float()
        rows = jumps.doubled
        wanted[rows] = two_jumps(net, x_t[rows], jumps.each(lambda values: values[rows]), schedule, kind)
        found = net(x_t, jumps.t, length(jumps.t, jumps.end, schedule))
        optimizer.zero_grad()
        jump_distance(found, wanted, x_t, here, kind, offset=0.01).mean().backward()
        optimizer.step()
    t, x = torch.full((41,), schedule.last), torch.linspace(-1.5, 1.5, 41).reshape(-1, 1, 1, 1)
    start = schedule.alpha_sigma(schedule.last)
    end, mean = MIXTURE.carried(x.double(), start, (1.0, 0.0)), MIXTURE.x_0(x.double(), *start)
    with torch.no_grad():
        made = next_point(net(x, t, torch.ones(41)), x, levels(schedule, t), (1.0, 0.0), kind)
    error, before = ((value - end).square().mean().sqrt().item() for value in (made, mean))
    print(f"{kind}: {before:.3f} -> {error:.3f}")
    assert error < 0.35 * before
