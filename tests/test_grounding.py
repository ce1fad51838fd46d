"""Attention supervised by the scene: which words belong to which places, the loss by hand, and what training logs."""
from dataclasses import replace

import pytest
import torch

from data.shapes.phrasings import phrasings
from data.shapes.shapes import Shapes, ShapesConfig
from data.tokenizer import Tokenizer, TokenizerConfig
from files.run_folder import RunFolder
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.text_encoder import TextEncoderConfig
from model.unet import UNetConfig
from training.loop import TrainConfig
from training.seed import whole_batch
from training.stages.context import StageContext
from training.stages.denoiser import DenoiserStage, Denoising, new_networks
from training.stages.grounding import (
    GroundingConfig,
    attention_loss,
    keep_attention,
    keep_output,
    named_tokens,
    words_loss,
)
from training.stages.pairs import CachedPairs

SIDE, LENGTH = 8, 40


@pytest.fixture(scope="module")
def source() -> Shapes:
    return Shapes(ShapesConfig(size=16, lattice=8, train=200), "train")


@pytest.fixture(scope="module")
def tokenizer(source) -> Tokenizer:
    captions = (caption for index in range(200) for caption in source.captions(index))
    return Tokenizer.train(captions, TokenizerConfig(512, LENGTH))


def test_offsets_are_of_the_tokens_of_a_row(tokenizer):
    caption = "a small Red square, calm mood"
    offsets, (ids, mask) = tokenizer.offsets(caption), tokenizer.encode([caption])
    assert len(offsets) == int(mask.sum()) and offsets[0] == offsets[-1] == (0, 0)
    for (begin, end), token in zip(offsets[1:-1], ids[0][1:]):
        assert caption[begin:end].strip().lower() == tokenizer.decode(token[None, None])[0]
    assert len(tokenizer.offsets("square " * 100)) == LENGTH


def test_every_object_of_every_phrasing_has_its_words_and_its_place(source):
    for index in range(120):
        scene = source.scene(index)
        for caption, facts in phrasings(scene):
            places = source.places(index, caption)
            assert len(places) == len(scene["objects"])
            for begin, end, x, y, radius in places:
                thing = next(one for one in scene["objects"] if [*one["centre"], one["radius"]] == [x, y, radius])
                name = f"{thing['colour']} {thing['shape']}"
                sized = facts["objects"][0]["size"] is not None
                assert caption[begin:end] == (f"{thing['size']} {name}" if sized else name)
    assert source.places(0, "") == []  # where the caption is dropped


def test_what_is_in_front_takes_the_place(tokenizer):
    caption = "a red circle inside a blue square"
    places = [(22, 33, 0.5, 0.5, 0.3), (2, 12, 0.5, 0.5, 0.15)]
    found = named_tokens(tokenizer, [caption, ""], [places, []], SIDE, SIDE, 12)  # (2, 64, 12)
    words = tokenizer.encode([caption])[0][0]
    read = [tokenizer.decode(words[:12][row][None])[0] for row in found[0]]
    grid = [read[SIDE * y:SIDE * (y + 1)] for y in range(SIDE)]
    assert grid[3][3] == grid[4][4] == "red circle"
    assert grid[2][2] == grid[5][3] == "blue square" and grid[1][1] == grid[0][4] == ""
    assert not found[1].any()


def test_loss_by_hand(tokenizer):
    caption, places = "a red circle", [[(2, 12, 0.25, 0.25, 0.2)]]  # four places of a map of 4 x 4
    words = named_tokens(tokenizer, [caption], places, 4, 4, 5)[0]  # (16, 5)
    assert words.any(dim=1).sum() == 4
    attention = torch.full((1, 3, 16, 5), 0.2)
    loss = attention_loss([attention], tokenizer, [caption], places, (4, 4), 2)
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    right = torch.where(words, 1.0 / words.sum(dim=1, keepdim=True).clamp(min=1), 0.0).expand(1, 3, 16, 5).clone()
    right[:, 2] = 0.0  # a head that is free
    count = words.sum(dim=1).max()
    least = attention_loss([right], tokenizer, [caption], places, (4, 4), 2)
    torch.testing.assert_close(least, count.float().log())
    assert attention_loss([right], tokenizer, [caption], places, (4, 4), 3) > least + 1.0
    one_word = torch.where(words, right, 0.0).cumsum(dim=-1).eq(right.amax(dim=-1, keepdim=True)).float() * words
    if count > 1:  # all of the attention on one of the words
        assert attention_loss([one_word], tokenizer, [caption], places, (4, 4), 2) > least + 1.0
    assert attention_loss([attention], tokenizer, [""], [[]], (4, 4), 2) == 0.0
    coarse = torch.full((1, 3, 4, 5), 0.2)  # another level of the same network
    torch.testing.assert_close(attention_loss([attention, coarse], tokenizer, [caption], places, (4, 4), 2), loss)


def test_words_that_features_say(tokenizer):
    caption, places = "a red circle", [[(2, 12, 0.25, 0.25, 0.2)]]
    features = torch.randn(1, 6, 4, 4, requires_grad=True)
    head = torch.nn.Linear(6, 512)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    torch.testing.assert_close(words_loss(features, head, tokenizer, [caption], places), torch.tensor(512.0).log())
    ids = tokenizer.encode([caption])[0][0][named_tokens(tokenizer, [caption], places, 4, 4, LENGTH)[0].any(dim=0)]
    with torch.no_grad():
        head.bias[ids] = 50.0  # says these words and no others, each as much
    torch.testing.assert_close(words_loss(features, head, tokenizer, [caption], places),
                               torch.tensor(float(len(ids))).log())
    torch.nn.init.normal_(head.weight)
    words_loss(features, head, tokenizer, [caption], places).backward()
    assert (features.grad[0].abs().amax(dim=0) > 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert words_loss(features, head, tokenizer, [""], [[]]) == 0.0
    with keep_output(head) as kept:
        out = head(torch.zeros(6))
    head(torch.zeros(6))
    assert len(kept) == 1 and kept[0] is out


def test_weight_falls_to_nothing():
    config = GroundingConfig(until=0.5)
    assert [config.left_at(share) for share in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0] and not config.on
    for settings in ({"attention": -1.0}, {"words": -1.0}, {"until": 0.0}, {"heads": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: .*valid"):
            GroundingConfig(**settings)


@pytest.fixture
def stage() -> DenoiserStage:
    return DenoiserStage(
        unet=UNetConfig(in_channels=4, out_channels=4, channels=(16,), attention=(True,), blocks=1, head_width=8,
                        context_width=16, norm_groups=4),
        text_encoder=TextEncoderConfig(vocab_size=512, length=LENGTH, width=16, layers=1, heads=2, mlp_width=32,
                                       causal=False),
        grounding=GroundingConfig(attention=0.5, words=0.25), train=TrainConfig(steps=10, batch=4))


def test_a_step_has_the_term_with_its_gradient_and_leaves_the_layers_alone(stage, source, tokenizer, tmp_path):
    run = RunFolder(tmp_path)
    run.weights("autoencoder").write_bytes(b"stands for weights")
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=4, channels=(8, 8), blocks=1, mid_attention=False,
                                                norm_groups=4)).eval()

    def encode(images):
        with torch.no_grad():
            posterior = autoencoder.encode(images)
        return posterior.mean, posterior.logvar

    pairs = CachedPairs(StageContext(run, source), "train", 16, encode, 4, places=True)
    networks = new_networks(stage, 0, torch.device("cpu"))
    denoising = Denoising(stage, tokenizer, 0, torch.device("cpu"))
    read = pairs.at(0)
    assert read.places is not None and [len(places) for places in read.places]
    found = denoising.loss_at(networks, read, 0, whole_batch(4))
    plain = denoising.loss_at(networks, read._replace(places=None), 0, whole_batch(4))
    assert set(plain) == {"loss"} and set(found) == {"loss", "attention", "words"}
    torch.testing.assert_close(found["loss"], plain["loss"] + 0.5 * found["attention"] + 0.25 * found["words"])
    found["loss"].backward()
    layers = networks.unet.cross_attentions()
    assert all(layer.watch is None and layer.q.weight.grad.abs().max() > 0 for layer in layers)
    assert networks.words is not None and networks.words.weight.grad.abs().max() > 0
    assert not networks.unet.mid._forward_hooks
    late = denoising.loss_at(networks, read, 6, whole_batch(4))  # after 0.6 of the ten steps
    plain = denoising.loss_at(networks, read._replace(places=None), 6, whole_batch(4))
    torch.testing.assert_close(late["loss"], plain["loss"])
    networks.words.weight.grad = None
    late["loss"].backward()
    assert networks.words.weight.grad is not None and not networks.words.weight.grad.any()


def test_sources_and_settings_that_cannot_are_refused(stage, source):
    with pytest.raises(ValueError, match="grounding: on; valid for NoImages: attention 0"):
        CachedPairs(StageContext(RunFolder(".")), "train", 0, lambda images: (images, images), 4, places=True)
    for settings in ({"cache": False}, {"unet": replace(stage.unet, gradient_checkpointing=True)},
                     {"train": replace(stage.train, compile=True)}):
        with pytest.raises(ValueError, match="grounding: .*; valid with cache: false"):
            replace(stage, **settings)


def test_attention_is_not_kept_after_an_error(stage):
    networks = new_networks(stage, 0, torch.device("cpu"))
    with pytest.raises(RuntimeError), keep_attention(networks.unet.cross_attentions()):
        raise RuntimeError
    assert all(layer.watch is None for layer in networks.unet.cross_attentions())
