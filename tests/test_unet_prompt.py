"""What a UNet may be given beside what published ones have: places, and the prompt in its time embedding."""

import copy

import pytest
import torch
from random_weights import randomize

from model.unet import UNet, UNetConfig


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_inputs():
    mask = torch.arange(6)[None] < torch.tensor([[6], [3]])
    return draw(2, 4, 8, 8), torch.tensor([0, 17]), draw(2, 6, 12, seed=1), mask


@pytest.fixture(scope="module")
def unet_with_prompt() -> UNet:
    """With learned positions, and with the prompt in its time embedding."""
    config = UNetConfig(channels=(16, 32), attention=(True, True), head_width=8, context_width=12, norm_groups=8,
                        positions=8, pooled_context=True)
    return randomize(UNet(config)).eval()


def test_the_prompt_in_the_time_embedding_starts_as_nothing(unet_with_prompt):
    fresh = UNet(unet_with_prompt.config)
    assert not fresh.pool(draw(2, 6, 12)).any() and not fresh(*small_inputs()).any()
    state = unet_with_prompt.state_dict()
    without = UNet(UNetConfig(**{**unet_with_prompt.config.__dict__, "pooled_context": False})).eval()
    without.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("pool.")})
    with torch.no_grad():
        assert not torch.equal(unet_with_prompt(*small_inputs()), without(*small_inputs()))
        zeroed = copy.deepcopy(unet_with_prompt)
        for parameter in zeroed.pool.parameters():
            parameter.zero_()
        assert torch.equal(zeroed(*small_inputs()), without(*small_inputs()))


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_cache_holds_what_the_time_embedding_is_given(unet_with_prompt, autocast):
    x, t, context, mask = small_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for seen in (mask, None):
            cache = unet_with_prompt.context_cache(context, seen)
            assert torch.equal(unet_with_prompt(x, t, cache=cache), unet_with_prompt(x, t, context, seen))
    other = copy.deepcopy(unet_with_prompt)
    cache = other.context_cache(context, mask)
    other.pool.linear.weight.mul_(2.0)
    with pytest.raises(ValueError, match="cache: stale"):
        other(x, t, cache=cache)


@torch.no_grad()
def test_the_mean_of_the_prompt_is_of_its_real_tokens(unet_with_prompt):
    """Whatever stands in the padding, wherever it stands: prompts of several chunks have it in the middle."""
    x, t, context, _ = small_inputs()
    mask = torch.tensor([[True, True, False, True, False, True], [True] * 3 + [False] * 3])
    changed = torch.where(mask[..., None], context, 50.0)
    assert torch.equal(unet_with_prompt(x, t, context, mask), unet_with_prompt(x, t, changed, mask))
    torch.testing.assert_close(unet_with_prompt.pool(context, mask)[1], unet_with_prompt.pool(context[1:, :3])[0])
    alone = unet_with_prompt(x[1:], t[1:], context[1:, :3])
    torch.testing.assert_close(unet_with_prompt(x, t, context, mask)[1:], alone, atol=1e-5, rtol=0)


def test_positions_are_of_rows_and_columns_and_of_one_size(unet_with_prompt):
    x, t, context, mask = small_inputs()
    zeros = unet_with_prompt.positions(torch.zeros(1, 16, 8, 8))[0]  # (C, H, W)
    rows, columns = unet_with_prompt.positions.rows.weight, unet_with_prompt.positions.columns.weight
    torch.testing.assert_close(zeros[:, 2, 5], rows[2] + columns[5])
    with pytest.raises(ValueError, match=r"x: \(2, 4, 8, 4\); valid: \(B, 4, 8, 8\), the network has learned"):
        unet_with_prompt(x[..., :4], t, context, mask)
    plain = UNet(UNetConfig(**{**unet_with_prompt.config.__dict__, "positions": 0}))
    assert plain.positions is None and plain(draw(2, 4, 4, 12), t, context, mask).shape == (2, 4, 4, 12)
