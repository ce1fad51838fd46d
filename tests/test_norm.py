"""Group normalisation equals the kernel of PyTorch in every form, and an image never depends on its neighbours."""
import pytest
import torch
from torch import nn

from model import norm
from model.norm import GroupNorm, kernel_is_slow

SHAPES = [(3, 32, 2, 2), (2, 64, 4, 6), (2, 64, 16, 16), (3, 96, 12, 12), (1, 128, 16, 24)]  # both sides of the limit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_every_form_equals_the_kernel(shape, dtype, offset):
    torch.manual_seed(0)
    ours = GroupNorm(32, shape[1], eps=1e-5)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    theirs = nn.GroupNorm(32, shape[1], eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    x = (torch.randn(shape) + offset).to(dtype)
    expected = theirs.double()(x.double()).float()
    with torch.no_grad():
        found = ours.to(dtype)(x.to(memory_format=torch.channels_last))
    assert found.dtype == dtype and found.shape == x.shape
    tolerance = {torch.float32: 2e-6 if offset == 0.0 else 5e-2, torch.bfloat16: 5e-2}[dtype]
    assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(shape, dtype):
    module = GroupNorm(32, shape[1]).to(dtype)
    x = torch.randn(4, *shape[1:], dtype=dtype).to(memory_format=torch.channels_last)
    assert torch.equal(module(x)[2:3], module(x[2:3].contiguous(memory_format=torch.channels_last)))


def test_the_kernel_is_taken_with_gradients_and_in_other_orders(monkeypatch):
    monkeypatch.setattr(norm, "written_out_group_norm", None)
    x = torch.randn(2, 64, 16, 16)
    last = x.to(memory_format=torch.channels_last)
    assert GroupNorm(8, 64)(last).requires_grad
    with torch.no_grad():
        assert kernel_is_slow(last) and not kernel_is_slow(x)
        GroupNorm(8, 64)(x)
        with torch.autocast("cpu", torch.bfloat16):
            GroupNorm(8, 64)(last)
