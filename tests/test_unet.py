"""The UNet equals diffusers' from the same weights, starts as a function of nothing, and ignores padding."""

import copy

import pytest
import torch
from random_weights import randomize

from model.blocks import ResBlock, SpatialTransformer, timestep_embedding, to_image, to_tokens
from model.pretrained.names import unet_from_diffusers, unet_to_diffusers
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

# Ours; what diffusers calls `attention_head_dim` (it is the number of heads); height, width of the latent; masked.
CASES = {
    "sd1": (UNetConfig(channels=(32, 64, 96, 96), attention=(True, True, True, False), heads=4, context_width=24,
                       linear_projection=False, norm_groups=16), 4, 8, 16, False),
    "sd2": (UNetConfig(channels=(32, 64, 64), attention=(True, True, False), head_width=16, context_width=40,
                       linear_projection=True, norm_groups=8), (2, 4, 4), 12, 8, True),
    "odd": (UNetConfig(in_channels=5, out_channels=3, channels=(18, 42), attention=(False, True), blocks=1, depth=2,
                       head_width=7, context_width=9, norm_groups=3), 6, 6, 10, True),
    "one level": (UNetConfig(in_channels=16, out_channels=16, channels=(30,), attention=(True,), blocks=3, heads=5,
                             context_width=16, linear_projection=False, norm_groups=10), 5, 3, 7, False),
    "coarse attention": (UNetConfig(in_channels=9, channels=(16, 24, 40, 56), attention=(False, False, False, True),
                                    blocks=1, depth=3, head_width=8, context_width=11, norm_groups=8), (2, 3, 5, 7),
                         16, 8, True),
    "fine attention": (UNetConfig(in_channels=3, out_channels=6, channels=(20, 45), attention=(True, False),
                                  head_width=5, context_width=33, linear_projection=False, norm_groups=5), (4, 9), 2,
                       20, True),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks left at their initial weights have the same ones in every run."""
    torch.manual_seed(0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_unet(config: UNetConfig, heads) -> torch.nn.Module:
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention))
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels, block_out_channels=config.channels,
        down_block_types=down, up_block_types=up, layers_per_block=config.blocks,
        cross_attention_dim=config.context_width, attention_head_dim=heads, norm_num_groups=config.norm_groups,
        use_linear_projection=config.linear_projection, transformer_layers_per_block=config.depth,
    )


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(ours, diffusers', inputs) with the same weights."""
    config, heads, height, width, masked = CASES[request.param]
    theirs = randomize(reference_unet(config, heads)).eval()
    ours = UNet(config).eval()
    ours.load_state_dict(unet_from_diffusers(theirs.state_dict(), config))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3]) if masked else None
    inputs = (draw(2, config.in_channels, height, width), torch.tensor([3, 981]),
              draw(2, 7, config.context_width, seed=1), mask)
    return ours, theirs, inputs


@pytest.fixture(scope="module")
def small() -> UNet:
    config = UNetConfig(channels=(16, 32), attention=(True, True), head_width=8, context_width=12, norm_groups=8,
                        qk_norm=True)
    return randomize(UNet(config)).eval()


def small_inputs(batch: int = 2):
    mask = torch.arange(6)[None] < torch.tensor([[6], [3], [5], [1]])[:batch]
    return draw(batch, 4, 8, 8), torch.tensor([0, 17, 500, 999])[:batch], draw(batch, 6, 12, seed=1), mask


@torch.no_grad()
def test_output_equals_diffusers(pair):
    ours, theirs, (x, t, context, mask) = pair
    expected = theirs(x, t, context, encoder_attention_mask=mask).sample
    assert (ours(x, t, context, mask) - expected).abs().max() <= 1e-4 * expected.std()


@torch.no_grad()
def test_fractional_timesteps_equal_diffusers(pair):
    ours, theirs, (x, _, context, mask) = pair
    t = torch.tensor([0.25, 713.5])
    expected = theirs(x, t, context, encoder_attention_mask=mask).sample
    assert (ours(x, t, context, mask) - expected).abs().max() <= 1e-4 * expected.std()


def test_gradients_equal_diffusers(pair):
    """Of the latent, of the context, and of every parameter."""
    ours, theirs, (x, t, context, mask) = pair
    gradients = []
    for network, kwargs in ((ours, {"mask": mask}), (theirs, {"encoder_attention_mask": mask})):
        leaves = {"x": x.clone().requires_grad_(), "context": context.clone().requires_grad_()}
        out = network(leaves["x"], t, leaves["context"], **kwargs)
        out = out if isinstance(out, torch.Tensor) else out.sample
        weights = dict(network.named_parameters())
        loss = (out * draw(*out.shape, seed=5)).sum()
        found = torch.autograd.grad(loss, [*leaves.values(), *weights.values()])
        gradients.append((dict(zip(leaves, found)), dict(zip(weights, found[len(leaves):]))))
    (mine, mine_weights), (expected, expected_weights) = gradients
    for name, gradient in unet_from_diffusers(expected_weights, ours.config).items():
        mine[name], expected[name] = mine_weights[name], gradient
    for name, gradient in expected.items():
        assert (mine[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_weights_go_to_diffusers_and_back_unchanged(pair):
    ours, theirs, _ = pair
    exported, original = unet_to_diffusers(ours.state_dict(), ours.config), theirs.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_weights_that_do_not_fit_are_named():
    config, heads, *_ = CASES["odd"]
    state = reference_unet(config, heads).state_dict()
    del state["mid_block.attentions.0.transformer_blocks.1.attn2.to_v.weight"]
    state["conv_out.bias"] = torch.zeros(7)
    state["class_embedding.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        unet_from_diffusers(state, config)
    assert "missing: mid_block.attentions.0.transformer_blocks.1.attn2.to_v.weight;" in str(error.value)
    assert "unexpected: class_embedding.weight;" in str(error.value)
    assert str(error.value).endswith("misshapen: conv_out.bias (7,), not (3,)")


@pytest.mark.parametrize("config, count", [(UNetConfig.sd1(), 859_520_964), (UNetConfig.sd2(), 865_910_724)])
def test_published_sizes(config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == count


def test_heads_of_new_models_are_64_wide():
    config = UNetConfig()
    assert [config.heads_at(level) for level in range(4)] == [5, 10, 20, 20] and config.head_width == 64


def test_every_residual_branch_is_the_identity_at_initialisation():
    unet = UNet(UNetConfig(channels=(16, 32), attention=(True, True), head_width=8, context_width=12, norm_groups=8))
    time, context = draw(2, 64), draw(2, 5, 12)
    seen = 0
    for block in unet.modules():
        if isinstance(block, ResBlock) and block.shortcut is None:
            x = draw(2, block.conv1.in_channels, 4, 4)
            assert torch.equal(block(x, time), x)
        elif isinstance(block, SpatialTransformer):
            x = draw(2, block.norm.num_channels, 4, 4)
            pairs = tuple(b.cross_attention.keys_values(context) for b in block.blocks)
            assert torch.equal(block(x, pairs, None), x)
        else:
            continue
        seen += 1
    assert seen >= 12
    assert not unet(*small_inputs()[:3]).any()


def test_learns_from_the_zero_initialisation():
    """The loss falls, and within four steps every parameter has moved."""
    config = UNetConfig(channels=(16, 32), attention=(True, True), head_width=8, context_width=12, norm_groups=4)
    unet, (x, t, context, mask) = UNet(config), small_inputs()
    start = copy.deepcopy(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = (unet(x, t, context, mask) - x.flip(3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert [name for name, p in unet.state_dict().items() if torch.equal(p, start[name])] == []


@torch.no_grad()
def test_padded_tokens_change_nothing(small):
    x, t, context, mask = small_inputs()
    changed = torch.where(mask[..., None], context, 50.0)
    assert torch.equal(small(x, t, context, mask), small(x, t, changed, mask))
    assert not torch.equal(small(x, t, context), small(x, t, changed))


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", [8, 32])  # few queries take the fused kernel, many the written-out form
def test_padded_ids_change_no_bit_from_the_prompt_to_the_prediction(small, causal, side):
    encoder = randomize(TextEncoder(TextEncoderConfig(vocab_size=50, length=6, width=12, layers=2, heads=2,
                                                      mlp_width=24, causal=causal))).eval()
    x, t, mask = draw(2, 4, side, side), torch.tensor([3, 700]), small_inputs()[3]
    ids = torch.arange(12).view(2, 6)
    one, other = (encoder(row, mask) for row in (ids, ids.where(mask, 49)))
    assert not torch.equal(one, other) and torch.equal(small(x, t, one, mask), small(x, t, other, mask))
    cache = small.context_cache(other, mask)
    assert torch.equal(small(x, t, one, mask), small(x, t, cache=cache))


@torch.no_grad()
def test_padding_gives_what_the_shorter_prompt_gives(small):
    x, t, context, mask = small_inputs()
    short = small(x[1:], t[1:], context[1:, :3])
    torch.testing.assert_close(small(x, t, context, mask)[1:], short, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_cache_gives_the_same_bits(small, masked, autocast):
    x, t, context, mask = small_inputs()
    mask = mask if masked else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = small.context_cache(context, mask)
        for step in (999, 500, 0):
            t = torch.full((2,), step)
            assert torch.equal(small(x, t, cache=cache), small(x, t, context, mask))


def test_cache_cannot_be_misused(small):
    x, t, context, mask = small_inputs()
    unet = copy.deepcopy(small)
    cache = unet.context_cache(context, mask)
    with pytest.raises(ValueError, match="cache: given beside a context"):
        unet(x, t, context, cache=cache)
    with pytest.raises(ValueError, match="cache: stale"):
        small(x, t, cache=cache)  # the same weights, but another network
    with pytest.raises(ValueError, match="in training mode"):
        unet.train()(x, t, cache=cache)
    with pytest.raises(ValueError, match="in training mode"):
        unet.context_cache(context, mask)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_cache_does_not_outlive_a_training_step(small, optimizer, fused):
    x, t, context, mask = small_inputs()
    unet = copy.deepcopy(small).eval()
    cache = unet.context_cache(context, mask)
    wrapper = torch.nn.Sequential(unet).train()  # as a trainer would hold it
    unet(x, t, context, mask).square().sum().backward()
    optimizer(unet.parameters(), lr=0.1, fused=fused).step()
    wrapper.eval()
    with pytest.raises(ValueError, match="cache: stale"):
        unet(x, t, cache=cache)


@torch.no_grad()
def test_what_the_owner_of_a_cache_must_know(small):
    """Writing around autograd leaves no trace: the owner makes a new cache after it."""
    x, t, context, mask = small_inputs()
    unet = copy.deepcopy(small).eval()
    cache = unet.context_cache(context, mask)
    before = unet(x, t, cache=cache)
    for layer in unet.cross_attentions():
        layer.kv.weight.data.mul_(2.0)
    assert torch.equal(unet(x, t, cache=cache), before)  # the keys and values of the weights before
    expected = unet(x, t, context, mask)
    assert not torch.equal(expected, before)
    assert torch.equal(unet(x, t, cache=unet.context_cache(context, mask)), expected)


def test_gradient_checkpointing_changes_no_bit(small):
    results = []
    for checkpointing in (False, True):
        config = UNetConfig(**{**small.config.__dict__, "gradient_checkpointing": checkpointing})
        unet = UNet(config)
        unet.load_state_dict(small.state_dict())
        out = unet(*small_inputs())
        out.square().sum().backward()
        results.append([out, *(p.grad for p in unet.parameters())])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@torch.no_grad()
def test_bfloat16_is_close_to_float32(small):
    inputs = small_inputs()
    expected = small(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        error = (small(*inputs) - expected).float().square().mean().sqrt()
    assert error < 0.05 * expected.std()


@torch.no_grad()
def test_channels_last_gives_the_same_numbers_and_copies_no_tokens(small):
    x, t, context, mask = small_inputs()
    expected = small(x, t, context, mask)
    network = copy.deepcopy(small).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x, t, context, mask), expected, atol=1e-5 * expected.std().item(), rtol=1e-4)
    assert to_tokens(x).data_ptr() == x.data_ptr()
    image = to_image(to_tokens(x), *x.shape[2:])
    assert image.data_ptr() == x.data_ptr() and torch.equal(image, x)


def test_without_attention_needs_no_context():
    unet = UNet(UNetConfig(channels=(16, 32), attention=(False, False), mid_attention=False, norm_groups=8))
    assert unet(draw(2, 4, 8, 8), torch.tensor([1, 2])).shape == (2, 4, 8, 8)
    assert not unet.cross_attentions()


def test_dropout_acts_in_training_only(small):
    unet = UNet(UNetConfig(**{**small.config.__dict__, "dropout": 0.5}))
    unet.load_state_dict(small.state_dict())
    inputs = small_inputs()
    with torch.no_grad():
        assert torch.equal(unet.eval()(*inputs), small(*inputs))
        assert not torch.equal(unet.train()(*inputs), small(*inputs))


def test_timestep_embedding_closed_form():
    """The first pair turns by one radian a step, the last by 1 / 10000^(1 - 2 / width)."""
    embedding = timestep_embedding(torch.tensor([0, 1, 7]), 8)
    assert torch.equal(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    frequencies = torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
    torch.testing.assert_close(embedding[2], torch.cat([(7 * frequencies).cos(), (7 * frequencies).sin()]))


@pytest.mark.parametrize("change, message", [
    ({"attention": (True,)}, r"attention: \(True,\); valid: one entry for each of channels"),
    ({"norm_groups": 5}, "norm_groups: 5 does not divide 16"),
    ({"head_width": 5}, "head_width: 5 does not divide 16"),
    ({"heads": 3}, "heads: 3 does not divide 16"),
    ({"blocks": 0}, "blocks: 0; valid: at least 1"),
    ({"positions": -1}, "positions: -1; valid: the side of the latent, or 0"),
    ({"dropout": 1.0}, "dropout: 1.0; valid"),
    ({"channels": (15, 32), "norm_groups": 1, "head_width": 1}, "even first count"),
])
def test_wrong_configurations_are_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**small.config.__dict__, **change})


def test_wrong_inputs_are_refused(small):
    x, t, context, mask = small_inputs()
    for arguments, message in [
        ((x[:, :, :7], t, context), r"x: \(2, 4, 7, 8\); valid: \(B, 4, H, W\), H and W multiples of 2"),
        ((x[:, :3], t, context), r"x: \(2, 3, 8, 8\)"),
        ((x, t[:1], context), r"t: \(1,\); valid: \(2,\)"),
        ((x, t, context[..., :5]), r"context: \(2, 6, 5\); valid: \(2, L, 12\)"),
        ((x, t, context[:1]), r"context: \(1, 6, 12\); valid: \(2, L, 12\)"),
        ((x, t, context, mask[:, :4]), r"mask: torch.bool \(2, 4\); valid: torch.bool \(2, 6\)"),
        ((x, t), "context: None"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(*arguments)
