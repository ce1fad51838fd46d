"""Muon's step: against singular value decompositions, one matrix against many, and the products it takes."""
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.unet import UNet, UNetConfig
from training.muon import Muon, filters_to_matrix, matrices_and_others, matrix_to_filters
from training.polar import apply_polynomials, orthogonalize, polar_factors

BAND = (0.55, 1.21)  # 0.88 (1 +- 0.32) by the polynomials, the rest is the rounding of bf16


def matrix(rows: int, columns: int, smallest: float, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    """Random directions, singular values in equal ratios from ``size`` down to ``smallest`` of it."""
    draw = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, side, generator=draw, dtype=torch.float64))[0]
                   for n in (rows, columns))
    values = size * smallest ** torch.linspace(0, 1, side, dtype=torch.float64)
    return (left * values @ right.mT).float()


def polar(x: torch.Tensor) -> torch.Tensor:
    """U V^T by a decomposition, in fp64."""
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    return left @ right


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("rows, columns", [(16, 16), (16, 144), (144, 16), (64, 128), (128, 128)])
def test_singular_values_end_within_the_band(rows, columns, size):
    """Those from 0.05 of the largest up: bf16 blurs smaller ones. Whatever the size of the gradient."""
    x = matrix(rows, columns, 0.05, size=size)
    [found] = polar_factors([x])
    values = torch.linalg.svdvals(found.double())
    assert BAND[0] < values.min() and values.max() < BAND[1]
    assert (values - 0.88).abs().median() < 0.28
    assert (found.double() - polar(x)).norm() < 0.4 * polar(x).norm()


def test_directions_that_are_nearly_absent_stay_small():
    """Of singular values over six decades none ends above the band, and the largest are as by the decomposition."""
    x = matrix(64, 256, 1e-6)
    [found] = polar_factors([x])
    assert torch.linalg.svdvals(found.double()).max() < BAND[1] + 0.1
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    kept = left[:, :16].mT @ found.double() @ right[:16].mT  # in the basis of the sixteen largest: near the identity
    assert (kept - torch.eye(16, dtype=torch.float64)).abs().max() < 0.5


def test_zeros_stay_zeros():
    found = polar_factors([torch.zeros(8, 8), torch.zeros(8, 72), torch.zeros(30, 8)])
    assert [x.abs().max() for x in found] == [0, 0, 0]


@pytest.mark.parametrize("iteration", ["short", "newton_schulz"])
def test_many_at_once_are_each_alone(iteration):
    """Of several shapes, tall and wide, of one and of different sides: within the rounding of bf16."""
    shapes = [(32, 32), (32, 96), (96, 32), (32, 288), (24, 24), (32, 32), (8, 16), (32, 96)]
    together = [matrix(rows, columns, 0.05, seed=seed) for seed, (rows, columns) in enumerate(shapes)]
    for x, found in zip(together, polar_factors(together, iteration), strict=True):
        [alone] = polar_factors([x], iteration)
        assert found.shape == x.shape
        assert (found - alone).float().norm() < 0.01 * alone.float().norm()


def test_a_turned_matrix_has_the_turned_result():
    x = matrix(40, 24, 0.1)
    assert torch.equal(polar_factors([x])[0].mT, polar_factors([x.mT.contiguous()])[0])
    assert torch.equal(orthogonalize(x[None])[0], polar_factors([x], "newton_schulz")[0].float())


def test_filters_are_matrices_as_they_lie_in_memory():
    """The order of the columns decides nothing: filters in either order of memory take the same step, whatever the
    order of their gradient."""
    x = torch.randn(12, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    for filters in (x, last):
        assert filters_to_matrix(filters, filters).data_ptr() == filters.data_ptr()
        back = matrix_to_filters(filters, filters_to_matrix(x, filters))
        assert torch.equal(back, x) and back.stride() == filters.stride()
    results = []
    for filters in (x, last):
        for gradient in (x, last):
            p = nn.Parameter(torch.zeros_like(filters))
            p.grad = gradient.clone(memory_format=torch.preserve_format)
            Muon([{"params": [p], "muon": True}], lr=0.01, betas=(0.9, 0.99)).step()
            results.append(p.detach())
    for result in results[1:]:
        assert (result - results[0]).norm() < 0.01 * results[0].norm()


class Products(TorchDispatchMode):
    """Counts products of matrices, and the operations in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.flops = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm,
                                       torch.ops.aten.baddbmm):
            one, two = args[-2:]
            self.calls += 1
            self.flops += 2 * one.numel() * two.shape[-1]
        return function(*args, **(kwargs or {}))


def blocks(number: int) -> nn.Module:
    return nn.ModuleList(nn.ModuleList([nn.Conv2d(16, 16, 3), nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 16)])
                         for _ in range(number))


def test_a_step_takes_as_many_products_for_many_blocks_as_for_one():
    """22: 2 rounds, each a Gram matrix and an application for each of 3 shapes, and 5 products of squares: G G, p p,
    (p p) G and the square of that, p p. Operations: 10 of R^3 for each matrix and 4 of R^2 C."""
    for number in (1, 5):
        model = blocks(number)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        optimizer = Muon([{"params": matrices, "muon": True}], lr=0.01, betas=(0.9, 0.99))
        with Products() as counted:
            optimizer.step()
        assert counted.calls == 2 * 2 * 3 + 2 * 5
        columns = (144, 64, 64, 16)
        assert counted.flops == number * sum(10 * 2 * 16**3 + 4 * 2 * 16**2 * c for c in columns)


def test_embeddings_are_not_matrices():
    """Of a UNet the two matrices that embed the time, of a text encoder tokens and positions."""
    unet = UNet(UNetConfig(channels=(16,), blocks=1, attention=(True,), head_width=8, context_width=8, norm_groups=4))
    matrices, others = matrices_and_others(nn.ModuleList([unet, nn.Embedding(4, 8)]))
    assert sorted(tuple(p.shape) for p in others if p.ndim > 1) == [(4, 8), (64, 16), (64, 64)]
    assert len(matrices) + len(others) == len(list(unet.parameters())) + 1


def test_batches_keep_their_order():
    batches = [torch.stack([matrix(8, c, 0.3, seed=c + n) for n in range(2)]) for c in (8, 24)]
    for batch, found in zip(batches, apply_polynomials([b.to(torch.bfloat16) for b in batches], "short"), strict=True):
        for x, y in zip(batch, found, strict=True):
            assert (y.double() - polar(x)).norm() < 0.4 * polar(x).norm()


def test_it_goes_on_from_its_state_to_the_bit():
    """Three steps, or two, a state written and read, and one."""
    def gradients(model: nn.Module, step: int) -> None:
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)

    def optimizer_of(model: nn.Module) -> Muon:
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "muon": True, "weight_decay": 0.1},
                  {"params": [p for p in model.parameters() if p.ndim < 2]}]
        return Muon(groups, lr=0.01, betas=(0.9, 0.99))

    torch.manual_seed(0)
    whole = blocks(2)
    parts = blocks(2)
    parts.load_state_dict(whole.state_dict())
    optimizer = optimizer_of(whole)
    for step in range(3):
        gradients(whole, step)
        optimizer.step()
    first = optimizer_of(parts)
    for step in range(2):
        gradients(parts, step)
        first.step()
    second = optimizer_of(parts)
    second.load_state_dict(first.state_dict())
    gradients(parts, 2)
    second.step()
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, two)
