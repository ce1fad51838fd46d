"""What a training step is made of: counted, not timed, so that it holds on every machine."""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.blocks import GEGLU, ResBlock, apply_gate
from model.device import place_on
from model.norm import fp32_in_training
from model.text_encoder import trim_padding
from model.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=(32,), blocks=1, attention=(True,), head_width=16, context_width=24, norm_groups=8)
OPERATORS = 1800  # of a step of it, forward and backward


class Operators(TorchDispatchMode):
    """Counts operators by name, and keeps the types of the first argument of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.types: dict[str, set[torch.dtype]] = {}
        self.rounded: Counter[int] = Counter()  # address of what was cast to bf16

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        if args and isinstance(args[0], torch.Tensor):
            self.types.setdefault(name, set()).add(args[0].dtype)
            if name == "_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
                self.rounded[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def counted(unet: UNet) -> Operators:
    """A forward and a backward pass under autocast."""
    draw = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 16, 24, generator=draw)
    with Operators() as found:
        with torch.autocast("cpu", torch.bfloat16):
            loss = unet(x, torch.tensor([3, 500]), context).square().mean()
        loss.backward()
    return found


def test_a_step_casts_each_weight_once_and_norms_in_fp32():
    unet = place_on(UNet(SMALL), "cpu").train()
    for p in unet.parameters():  # also what starts as zero has a gradient
        torch.nn.init.normal_(p, std=0.05)
    found = counted(unet)
    weights = {p.data_ptr() for p in unet.parameters()}
    assert max(found.rounded[address] for address in weights) == 1
    assert found.types["native_group_norm"] == found.types["native_group_norm_backward"] == {torch.float32}
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    assert found.calls["native_group_norm"] == found.calls["native_group_norm_backward"] == norms
    assert found.calls["gelu"] == found.calls["gelu_backward"] == 4  # transformers: down, middle, up twice
    assert found.calls["convolution"] == sum(isinstance(m, torch.nn.Conv2d) for m in unet.modules())


def test_the_number_of_operators_of_a_step():
    """An upper bound on all of them: whoever adds some says so here."""
    found = counted(place_on(UNet(SMALL), "cpu").train())
    assert sum(found.calls.values()) <= OPERATORS, found.calls.most_common(12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_the_formula_to_the_bit(dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 32, generator=draw).to(dtype).requires_grad_()
    gradient = torch.randn(3, 5, 16, generator=draw).to(dtype)
    value, gate = x.chunk(2, dim=-1)
    expected = value * F.gelu(gate)
    [wanted] = torch.autograd.grad(expected, x, gradient)
    found = apply_gate(x)
    [given] = torch.autograd.grad(found, x, gradient)
    assert torch.equal(found, expected) and torch.equal(given, wanted)
    with torch.no_grad():
        assert torch.equal(apply_gate(x), expected)


def test_the_gate_has_the_gradient_of_finite_differences():
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(apply_gate, x)


def test_one_graph_of_the_gate_when_compiled():
    """The compiler sees operations it can fuse, not a function it has to leave alone."""
    layer = GEGLU(8)
    found = torch.compile(layer, backend="eager", fullgraph=True)(torch.ones(1, 2, 8))
    assert torch.equal(found, layer(torch.ones(1, 2, 8)))


def test_norms_are_widened_in_training_under_autocast_alone():
    x = torch.ones(1, 8, 2, 2, dtype=torch.bfloat16)
    assert fp32_in_training(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert fp32_in_training(x).dtype == torch.float32
        with torch.no_grad():
            assert fp32_in_training(x) is x
    block = ResBlock(8, 8, 4, 1e-5).to(torch.bfloat16)  # weights in bf16: everything stays in it
    assert block(x).dtype == torch.bfloat16


def test_captions_are_padded_to_whole_vectors():
    ids = torch.arange(40).expand(2, 40)
    for longest, length in ((1, 16), (15, 16), (16, 16), (17, 32), (40, 40)):
        mask = torch.arange(40) < torch.tensor([[1], [longest]])
        for tensor, whole in zip(trim_padding(ids, mask, 16), (ids, mask)):
            assert torch.equal(tensor, whole[:, :length])
    assert trim_padding(ids, mask)[0].shape == (2, 40)
