"""CLIP equals transformers' from the same weights, and its loss is the one of the paper."""

import math
from dataclasses import replace

import pytest
import torch
from random_weights import randomize

from model.clip import Clip, ClipConfig, ImageEncoderConfig, contrastive_loss
from model.pretrained.names import clip_from_transformers, clip_to_transformers
from model.text_encoder import TextEncoderConfig

transformers = pytest.importorskip("transformers")

END = 98  # the largest id


def small(size=16, patch=8, width=32, layers=2, heads=4, mlp=64, activation="quick_gelu", channels=3, mean=0.5, std=0.5,
          text_width=24, text_layers=2, text_heads=3, text_mlp=48, length=10, shared=20) -> ClipConfig:
    image = ImageEncoderConfig(size, patch, channels, width, layers, heads, mlp, activation, (mean,) * channels,
                               (std,) * channels)
    text = TextEncoderConfig(vocab_size=99, length=length, width=text_width, layers=text_layers, heads=text_heads,
                             mlp_width=text_mlp, activation=activation)
    return ClipConfig(image, text, shared)


CASES = {
    "base": small(),
    "gelu": small(activation="gelu", shared=40),
    "one patch": small(size=8, patch=8, layers=1, heads=1),
    "many patches": small(size=36, patch=4, width=24, heads=2, mlp=40),
    "deep text": small(text_layers=5, text_width=30, text_heads=5, text_mlp=20, length=16, layers=1),
    "grey, odd sizes": small(size=21, patch=7, width=27, heads=3, mlp=31, channels=1, text_width=9, text_heads=1,
                             shared=7),
    "published pixels": small(mean=0.45, std=0.27, layers=3),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks left at their initial weights have the same ones in every run."""
    torch.manual_seed(0)


def reference(config: ClipConfig) -> torch.nn.Module:
    image, text = config.image, config.text
    return transformers.CLIPModel(transformers.CLIPConfig(
        vision_config={"hidden_size": image.width, "intermediate_size": image.mlp_width, "image_size": image.size,
                       "num_hidden_layers": image.layers, "num_attention_heads": image.heads,
                       "patch_size": image.patch, "num_channels": image.channels, "hidden_act": image.activation},
        text_config={"hidden_size": text.width, "intermediate_size": text.mlp_width, "vocab_size": text.vocab_size,
                     "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "eos_token_id": END,
                     "max_position_embeddings": text.length, "hidden_act": text.activation, "bos_token_id": 0},
        projection_dim=config.width,
    ))


def inputs(config: ClipConfig, pairs: int = 4):
    """Pixel values as published, images as ours, ids and mask (B, L)."""
    generator = torch.Generator().manual_seed(3)
    c, length = config.image, config.text.length
    pixels = torch.randn(pairs, c.channels, c.size, c.size, generator=generator)
    mean, std = (torch.tensor(x)[:, None, None] for x in (c.mean, c.std))
    ends = torch.tensor([length - 1, 2, 5, 4])[:pairs, None]
    ids = torch.randint(1, END, (pairs, length), generator=generator)
    mask = torch.arange(length) <= ends
    return pixels, 2 * (pixels * std + mean) - 1, ids.where(mask, 0).scatter(1, ends, END), mask


def assert_within(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.std()


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(ours, transformers') with the same weights."""
    torch.manual_seed(0)  # biases are drawn at construction
    config = CASES[request.param]
    theirs = randomize(reference(config)).eval()
    ours = Clip(config).eval()
    ours.load_state_dict(clip_from_transformers(theirs.state_dict(), config))
    return ours, theirs


@torch.no_grad()
def test_vectors_logits_and_loss_equal_transformers(pair):
    ours, theirs = pair
    pixels, images, ids, mask = inputs(ours.config)
    expected = theirs(ids, pixels, mask.long(), return_loss=True)
    assert_within(ours.image_vectors(images), expected.image_embeds)
    assert_within(ours.text_vectors(ids, mask), expected.text_embeds)
    logits = ours(images, ids, mask)
    assert_within(logits, expected.logits_per_image)
    assert_within(logits.T, expected.logits_per_text)
    assert abs(contrastive_loss(logits) - expected.loss) <= 1e-5 * expected.logits_per_image.std()


def test_gradients_equal_transformers(pair):
    """Of every parameter and of the images, under the contrastive loss."""
    ours, theirs = pair
    pixels, images, ids, mask = inputs(ours.config)
    pixels.requires_grad_(), images.requires_grad_()
    ours.zero_grad(), theirs.zero_grad()
    contrastive_loss(ours(images, ids, mask)).backward()
    theirs(ids, pixels, mask.long(), return_loss=True).loss.backward()
    expected = clip_from_transformers({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():  # a bias of keys has no gradient but rounding: the second term
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-6 * scale, name
    std = torch.tensor(ours.config.image.std)[:, None, None]
    assert (images.grad * 2 * std - pixels.grad).abs().max() <= 1e-5 * pixels.grad.abs().max()


def test_weights_go_to_transformers_and_back_unchanged(pair):
    ours, theirs = pair
    exported, original = clip_to_transformers(ours.state_dict(), ours.config), theirs.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_older_files_and_ones_that_do_not_fit():
    config = CASES["base"]
    state = clip_to_transformers(Clip(config).state_dict(), config)
    old = {**state, "text_model.embeddings.position_ids": torch.arange(10)[None],
           "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    assert clip_from_transformers(old, config).keys() == Clip(config).state_dict().keys()
    del state["logit_scale"]
    state["text_projection.weight"] = torch.zeros(20, 25)
    with pytest.raises(ValueError, match=r"missing: logit_scale; misshapen: text_projection.weight \(20, 25\), not"):
        clip_from_transformers(state, config)


@pytest.mark.parametrize("config, count", [(ClipConfig.vit_b_32(), 151_277_313), (ClipConfig.vit_l_14(), 427_616_513)])
def test_published_sizes(config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Clip(config).parameters()) == count


def test_loss_closed_forms():
    """log B when nothing is told apart, 0 when everything is, and the same for images and texts swapped."""
    assert contrastive_loss(torch.zeros(8, 8)).item() == pytest.approx(math.log(8))
    assert contrastive_loss(50 * torch.eye(8)).item() == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    rows = [math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert contrastive_loss(logits).item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    assert torch.equal(contrastive_loss(logits), contrastive_loss(logits.T))
    more = torch.cat([logits, torch.tensor([[1.0], [-1.0]])], dim=1)  # a third text that is of neither image
    rows = [math.log(2 + math.exp(2)), math.log(1 + math.exp(-2) + math.exp(-3))]
    assert contrastive_loss(more).item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    with pytest.raises(ValueError, match=r"logits: \(3, 2\); valid: \(B, T\)"):
        contrastive_loss(torch.zeros(3, 2))


def test_four_pairs_are_learnt():
    """From chance, log 4, to nearly nothing; the temperature starts at 0.07 and stays below its limit."""
    clip = Clip(CASES["base"])
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    _, images, ids, mask = inputs(clip.config)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = contrastive_loss(clip(images, ids, mask))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip.limit_scale()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.05
    with torch.no_grad():
        clip.logit_scale.fill_(7.0)
    clip.limit_scale()
    assert clip.logit_scale.exp().item() == pytest.approx(100)


def test_gradient_checkpointing_of_both_encoders_changes_no_bit():
    config = small()
    _, images, ids, mask = inputs(config)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        clip = Clip(replace(config, image=replace(config.image, gradient_checkpointing=checkpointing),
                            text=replace(config.text, gradient_checkpointing=checkpointing)))
        loss = contrastive_loss(clip(images, ids, mask))
        loss.backward()
        results.append([loss, *(p.grad for p in clip.parameters())])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@torch.no_grad()
def test_vectors_have_unit_length_and_ignore_padding_and_neighbours():
    clip = randomize(Clip(CASES["base"])).eval()
    _, images, ids, mask = inputs(clip.config)
    vectors, texts = clip.image_vectors(images), clip.text_vectors(ids, mask)
    for x in (vectors, texts):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    assert torch.equal(clip.text_vectors(ids.where(mask, 55), mask), texts)
    torch.testing.assert_close(clip.image_vectors(images[1:2]), vectors[1:2], atol=1e-6, rtol=0)


def test_other_sizes_are_resized_and_cropped():
    clip = Clip(CASES["base"])
    torch.testing.assert_close(clip.resize_images(torch.full((1, 3, 40, 64), 0.3)), torch.full((1, 3, 16, 16), 0.3))
    exact = torch.rand(1, 3, 16, 16)
    assert clip.resize_images(exact) is exact
    ramp = torch.linspace(-1, 1, 64)
    wide = ramp.expand(1, 3, 32, 64)  # every pair of columns becomes one, and the middle half is kept
    torch.testing.assert_close(clip.resize_images(wide)[0, 0, 8], ramp.view(32, 2).mean(dim=1)[8:24], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"images: \(1, 3, 32, 64\); valid: \(B, 3, 16, 16\)"):
        clip.image_vectors(wide)


@pytest.mark.parametrize("kind, change, message", [
    (ImageEncoderConfig, {"patch": 30}, "patch: 30 does not divide size 224"),
    (ImageEncoderConfig, {"heads": 7}, "width: 768 does not divide into 7 heads"),
    (ImageEncoderConfig, {"activation": "relu"}, "activation: 'relu'"),
    (ImageEncoderConfig, {"mean": (0.5,)}, r"mean: \(0.5,\); valid: a number for each of 3"),
    (ImageEncoderConfig, {"std": (0.5, 0.0, 0.5)}, r"std: .*; valid: above 0"),
    (ImageEncoderConfig, {"layers": 0}, "layers: 0; valid: at least 1"),
    (ClipConfig, {"width": 0}, "width: 0; valid: at least 1"),
    (ClipConfig, {"temperature": 0.001}, "temperature: 0.001; valid: 0.01"),
])
def test_wrong_configurations_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)
