"""The autoencoder equals diffusers' from the same weights, owns its latent scale, and folds pixels exactly."""

import math
from dataclasses import replace

import pytest
import torch
from random_weights import randomize

from model.autoencoder import SD_LATENT_STD, Autoencoder, AutoencoderConfig, Posterior
from model.pretrained.names import autoencoder_from_diffusers, autoencoder_to_diffusers, with_one_scale

diffusers = pytest.importorskip("diffusers")

CASES = {
    "sd": AutoencoderConfig(channels=(16, 32, 32, 32), norm_groups=8),
    "f4, 3 channels": AutoencoderConfig(channels=(16, 24, 40), latent_channels=3, norm_groups=8),
    "f4, 8 channels": AutoencoderConfig(channels=(6, 10, 14), latent_channels=8, blocks=1, norm_groups=2),
    "f8, 16 channels": AutoencoderConfig(channels=(8, 8, 16, 24), latent_channels=16, mid_attention=False,
                                         norm_groups=4),
    "f16, 16 channels": AutoencoderConfig(channels=(8, 8, 16, 16, 32), latent_channels=16, blocks=1, norm_groups=8),
    "no attention": AutoencoderConfig(channels=(12, 24), latent_channels=5, blocks=1, mid_attention=False,
                                      norm_groups=3),
    "one level": AutoencoderConfig(image_channels=1, channels=(24,), latent_channels=2, blocks=3, norm_groups=6),
}
SMALL = AutoencoderConfig(channels=(16, 32), latent_channels=3, blocks=1, norm_groups=8)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks left at their initial weights have the same ones in every run."""
    torch.manual_seed(0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_autoencoder(config: AutoencoderConfig) -> torch.nn.Module:
    levels = len(config.channels)
    return diffusers.AutoencoderKL(
        in_channels=config.image_channels, out_channels=config.image_channels, latent_channels=config.latent_channels,
        block_out_channels=config.channels, layers_per_block=config.blocks, norm_num_groups=config.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=config.mid_attention,
    )


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(ours, diffusers') with the same weights."""
    config = CASES[request.param]
    theirs = randomize(reference_autoencoder(config)).eval()
    ours = Autoencoder(config).eval()
    ours.load_state_dict(autoencoder_from_diffusers(theirs.state_dict(), config))
    return ours, theirs


@pytest.fixture(scope="module")
def small() -> Autoencoder:
    return randomize(Autoencoder(SMALL)).eval()


def assert_within(value: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= tolerance * reference.std()


@torch.no_grad()
def test_encoder_and_decoder_equal_diffusers(pair):
    ours, theirs = pair
    assert ours.factor == 2 ** (len(ours.config.channels) - 1)
    images = draw(2, ours.config.image_channels, 3 * ours.factor, 5 * ours.factor)
    expected = theirs.encode(images).latent_dist
    raw, unit = ours.moments(images), ours.encode(images)
    assert_within(raw.mean, expected.mean, 1e-4)
    assert_within(raw.logvar, expected.logvar, 1e-4)
    torch.testing.assert_close(raw.kl(), expected.kl(), rtol=1e-5, atol=1e-5)  # two numbers have no useful std
    assert_within(unit.mean, expected.mean * theirs.config.scaling_factor, 1e-4)

    latents = draw(*expected.mean.shape, seed=1)
    assert_within(ours.decode(latents), theirs.decode(latents / theirs.config.scaling_factor).sample, 1e-4)
    noise = draw(*expected.mean.shape, seed=2)
    assert_within(raw.sample(noise), expected.mean + expected.std * noise, 1e-4)


def test_gradients_equal_diffusers(pair):
    """Of the images and of every parameter, under reconstruction and KL."""
    ours, theirs = pair
    gradients = []
    for network, encode, decode in ((ours, ours.moments, ours.decode_raw), (
            theirs, lambda x: theirs.encode(x).latent_dist, lambda z: theirs.decode(z).sample)):
        images = draw(1, ours.config.image_channels, 2 * ours.factor, 3 * ours.factor).requires_grad_()
        posterior = encode(images)
        loss = decode(posterior.mean).square().mean() + 1e-3 * posterior.kl().sum()
        weights = dict(network.named_parameters())
        first, *others = torch.autograd.grad(loss, [images, *weights.values()])
        gradients.append((first, dict(zip(weights, others))))
    (mine, mine_weights), (expected, expected_weights) = gradients
    assert_within(mine, expected, 1e-4)
    scale = max(gradient.abs().max() for gradient in expected_weights.values())
    for name, gradient in autoencoder_from_diffusers(expected_weights, ours.config).items():
        if not name.startswith("latent_"):  # a bias of keys has no gradient but rounding, hence the second term
            assert (mine_weights[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * scale, name


def test_weights_go_to_diffusers_and_back_unchanged(pair):
    ours, theirs = pair
    exported, original = autoencoder_to_diffusers(ours.state_dict(), ours.config), theirs.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_older_names_of_the_attention_are_read():
    config = CASES["sd"]
    state = reference_autoencoder(config).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        for new_name, old_name in old.items():
            name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        renamed[name] = tensor
    assert renamed.keys() != state.keys()
    old_state, new_state = (autoencoder_from_diffusers(s, config) for s in (renamed, state))
    assert old_state.keys() == new_state.keys()
    assert all(torch.equal(old_state[name], new_state[name]) for name in new_state)


def test_weights_that_do_not_fit_are_named():
    state = reference_autoencoder(SMALL).state_dict()
    state["decoder.conv_in.weight"] = torch.zeros(1)
    del state["quant_conv.bias"]
    with pytest.raises(ValueError, match=r"missing: quant_conv.bias; misshapen: decoder.conv_in.weight \(1,\), not"):
        autoencoder_from_diffusers(state, SMALL)


@torch.no_grad()
@pytest.mark.parametrize("mean, std", [([0.5, -1.0, 2.0], [1.0, 0.3, 2.5]), ([0.0] * 3, [1.0, 1.0, 2.0]),
                                       ([0.25] * 3, [2.0] * 3)])
def test_a_scale_of_each_channel_moves_into_the_convolutions(small, mean, std):
    """What diffusers then reads, without any scale, encodes to our latents of unit scale and decodes from them."""
    autoencoder = Autoencoder(SMALL).eval()
    autoencoder.load_state_dict({**small.state_dict(), "latent_mean": torch.tensor(mean),
                                 "latent_std": torch.tensor(std)})
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    state = with_one_scale(autoencoder.state_dict())
    assert torch.equal(state["latent_mean"], torch.zeros(3)) and torch.equal(state["latent_std"], torch.ones(3))
    theirs = reference_autoencoder(SMALL).eval()
    theirs.load_state_dict(autoencoder_to_diffusers(autoencoder.state_dict(), SMALL))
    images, latents = draw(2, 3, 16, 8), draw(2, 3, 8, 4, seed=1)
    ours, expected = autoencoder.encode(images), theirs.encode(images).latent_dist
    assert_within(ours.mean, expected.mean, 1e-4)
    assert_within(ours.logvar, expected.logvar, 1e-4)
    assert_within(autoencoder.decode(latents), theirs.decode(latents).sample, 1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in autoencoder.state_dict().items())


def test_a_stem_has_no_counterpart(small):
    with pytest.raises(ValueError, match="stem: 2; valid for diffusers: 1"):
        autoencoder_to_diffusers(small.state_dict(), AutoencoderConfig(stem=2))


def test_published_size_and_scale():
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig.sd())
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
    assert autoencoder.factor == 8 and autoencoder.latent_channels == 4
    assert SD_LATENT_STD == 1 / 0.18215


@torch.no_grad()
def test_latents_have_unit_scale_once_measured(small):
    """Mean 0, standard deviation 1 in every channel, over the very images measured, in whatever batches."""
    autoencoder = Autoencoder(SMALL)
    autoencoder.load_state_dict(small.state_dict())
    images = draw(12, 3, 16, 16)
    raw = autoencoder.decode_raw(autoencoder.moments(images).mean)
    autoencoder.measure(iter([images[:7], images[7:]]))
    posterior = autoencoder.encode(images)
    assert posterior.mean.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    second_moment = (posterior.mean.square() + posterior.logvar.exp()).mean(dim=(0, 2, 3))
    torch.testing.assert_close(second_moment, torch.ones(3), atol=1e-4, rtol=0)
    samples = torch.cat([posterior.sample(draw(*posterior.mean.shape, seed=s)) for s in range(20)])
    torch.testing.assert_close(samples.std(dim=(0, 2, 3)), torch.ones(3), atol=0.03, rtol=0)
    torch.testing.assert_close(autoencoder.decode(posterior.mean), raw, atol=1e-4, rtol=1e-4)

    again = Autoencoder(SMALL)
    again.load_state_dict(autoencoder.state_dict())  # the scale travels with the weights
    assert torch.equal(again.latent_std, autoencoder.latent_std) and not torch.equal(again.latent_std, torch.ones(3))


def test_measuring_nothing_is_refused(small):
    with pytest.raises(ValueError, match="batches: no images"):
        small.measure([])


def test_kl_closed_form():
    mean, logvar = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    p = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), expected)
    assert not Posterior(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl().any()


@torch.no_grad()
def test_log_variance_is_clamped(small):
    autoencoder = Autoencoder(SMALL)
    autoencoder.load_state_dict(small.state_dict())
    for bias, expected in ((1e3, 20.0), (-1e3, -30.0)):
        autoencoder.quant.bias[3:] = bias
        assert bool((autoencoder.moments(draw(1, 3, 8, 8)).logvar == expected).all())


def test_posterior_starts_with_little_noise():
    """std 0.05 up to what the encoder's own output adds."""
    std = (0.5 * Autoencoder(SMALL).moments(draw(2, 3, 16, 16)).logvar).exp()
    assert bool((std > 0.02).all()) and bool((std < 0.15).all())


@pytest.mark.parametrize("stem", [1, 2, 3, 4, 6])
def test_stem_only_rearranges_pixels(stem):
    """Coarser by the stem, and the fold of the encoder and the unfold of the decoder are each other's inverse."""
    config = AutoencoderConfig(channels=(16, 16), blocks=1, norm_groups=4, stem=stem)
    autoencoder = Autoencoder(config)
    assert autoencoder.factor == 2 * stem
    images = draw(2, 3, 4 * autoencoder.factor, 2 * autoencoder.factor)
    latents = autoencoder.encode(images).mean
    assert latents.shape == (2, 4, 4, 2)
    assert autoencoder.decode(latents).shape == images.shape

    folded = {}
    autoencoder.encoder.conv_in.register_forward_pre_hook(lambda _, args: folded.update(x=args[0]))
    autoencoder.decoder.conv_out.register_forward_hook(lambda *_: folded["x"])  # hand the decoder what it should find
    autoencoder.encode(images)
    assert folded["x"].shape[1] == 3 * stem**2
    assert torch.equal(autoencoder.decode(latents), images)


def test_gradient_checkpointing_changes_no_bit_and_saves_less(small):
    results, kept = [], []
    for checkpointing in (False, True):
        autoencoder = Autoencoder(replace(SMALL, gradient_checkpointing=checkpointing))
        autoencoder.load_state_dict(small.state_dict())
        held = {}

        def keep(tensor):
            held[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = autoencoder.decode(autoencoder.moments(draw(2, 3, 16, 24)).mean)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in autoencoder.parameters())])
        kept.append(sum(held.values()))
    for plain, recomputed in zip(*results, strict=True):
        assert (plain is None and recomputed is None) or torch.equal(plain, recomputed)
    assert kept[1] < 0.7 * kept[0]


def test_channels_last_gives_the_same_numbers(small):
    images = draw(2, 3, 16, 16)
    with torch.no_grad():
        expected = small.decode(small.encode(images).mean)
        last = Autoencoder(SMALL).to(memory_format=torch.channels_last)
        last.load_state_dict(small.state_dict())
        images = images.contiguous(memory_format=torch.channels_last)
        assert_within(last.decode(last.encode(images).mean), expected, 1e-4)


@pytest.mark.parametrize("change, message", [
    ({"stem": 0}, "stem: 0; valid: 1 to 16"),
    ({"channels": ()}, "channels"),
    ({"norm_groups": 7}, "norm_groups: 7 does not divide 16"),
    ({"latent_channels": 0}, "latent_channels: 0; valid: at least 1"),
])
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**{**SMALL.__dict__, **change})


def test_wrong_inputs_are_refused(small):
    with pytest.raises(ValueError, match=r"images: \(2, 3, 15, 16\); valid: \(B, 3, H, W\), H and W multiples of 2"):
        small.encode(draw(2, 3, 15, 16))
    with pytest.raises(ValueError, match=r"latents: \(2, 4, 8, 8\); valid: \(B, 3, h, w\)"):
        small.decode(draw(2, 4, 8, 8))
    posterior = small.encode(draw(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"noise: \(1, 3, 4, 5\); valid: \(1, 3, 4, 4\)"):
        posterior.sample(draw(1, 3, 4, 5))
    assert math.isfinite(posterior.kl().item())
