"""Distances and drift of contexts: by hand, while training, as curves; and words that training has not used yet."""
import random
from dataclasses import replace

import pytest
import torch
from small_runs import metrics
from torch import nn

from data.shapes.phrasings import word_pairs
from data.shapes.scene_graph import COLOURS, SHAPES, SIZES
from data.shapes.shapes import Shapes, ShapesConfig
from data.tokenizer import Tokenizer, TokenizerConfig
from eval.plots import draw_curves
from model.text_encoder import TextEncoder, TextEncoderConfig, trim_padding
from training.loop import set_learning_rate
from training.optim import OptimConfig, build_optimizer, learning_rate
from training.stages.contexts import (
    ContextWatch,
    captions_of,
    context_distances,
    context_drift,
    differing_word,
    distance_at_word,
    tokens_of,
)

CONFIG = TextEncoderConfig(vocab_size=512, length=24, width=32, layers=2, heads=2, mlp_width=128, causal=False,
                           token_std=1.0, position_std=0.3)


@pytest.fixture(scope="module")
def source() -> Shapes:
    return Shapes(ShapesConfig(size=16, train=400), "train")


@pytest.fixture(scope="module")
def tokenizer(source) -> Tokenizer:
    return Tokenizer.train((caption for i in range(400) for caption in source.captions(i)), TokenizerConfig(512, 24))


def new_encoder(seed: int = 0, **settings) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder(replace(CONFIG, **settings))


def test_the_word_in_which_captions_differ(tokenizer):
    one, other = "a red square above a star", "a red circle above a star"
    (begin, end), (first, last) = differing_word(one, other)
    assert (one[begin:end], other[first:last]) == ("square", "circle")
    ids = tokenizer.encode([one])[0][0]
    assert tokenizer.decode(ids[None, tokens_of(tokenizer, one, (begin, end))]) == ["square"]
    for wrong in ("a blue circle above a star", "a red circle above", one):
        with pytest.raises(ValueError, match="differ in one word"):
            differing_word(one, wrong)


def test_pairs_of_shapes_differ_in_one_word_and_are_made_of_its_words(source):
    pairs = source.word_pairs()
    assert {kind: len(members) for kind, members in pairs.items()} == {"kind": 28, "colour": 28, "relation": 2}
    assert all(differing_word(*pair) for members in pairs.values() for pair in members)
    known = {word for i in range(400) for caption in source.captions(i) for word in caption.replace(",", "").split()}
    assert {word for caption in captions_of(pairs) for word in caption.split()} <= known


def test_distance_and_drift_by_hand(tokenizer):
    one, other = "a red square", "a red circle"
    place = tokens_of(tokenizer, one, (6, 12))
    contexts = {caption: torch.zeros(len(tokenizer.offsets(caption)), 2) for caption in (one, other)}
    contexts[one][place], contexts[other][place] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    assert distance_at_word(contexts, tokenizer, one, other) == pytest.approx(10**0.5 / 2)
    before, now = {"a": torch.tensor([[3.0, 0], [0, 1]])}, {"a": torch.tensor([[3.0, 2], [0, 1]])}
    assert context_drift(before, now) == pytest.approx(2 / (13**0.5 + 1))
    assert context_drift(now, now) == 0


def test_a_word_that_is_cut_off_is_left_out(tokenizer):
    short = Tokenizer(tokenizer.bpe, 6)  # start, four tokens, end
    pairs = {"kind": [("a red square", "a red circle")], "relation": [("a red blue star above", "a red blue star in")]}
    found = context_distances(new_encoder(), short, pairs)
    assert set(found) == {"kind"}


def test_the_watch_logs_distances_then_drift_and_goes_on_from_its_state(tokenizer, source):
    encoder = new_encoder()
    watch, resumed = ContextWatch(tokenizer, source), ContextWatch(tokenizer, source)
    before = torch.get_rng_state()
    first = watch.measure(encoder)
    assert set(first) == {f"context_distance_{kind}" for kind in ("kind", "colour", "relation")}
    resumed.load_state_dict(watch.state_dict())
    with torch.no_grad():
        encoder.token_embedding.weight.mul_(1.5)
    assert watch.measure(encoder) == resumed.measure(encoder) and watch.measure(encoder)["context_drift"] == 0
    assert torch.equal(before, torch.get_rng_state())  # training draws what it would have drawn
    assert ContextWatch(tokenizer, object()).measure(encoder) == {}  # a source that names no pairs


def test_training_logs_them_and_the_page_draws_them(tiny_run, tmp_path):
    rows = [row for row in metrics(tiny_run) if row["stage"] == "denoiser" and "validation_loss" in row]
    for row in rows:
        assert 0 < row["validation_context_distance_kind"] < 2 and 0 < row["validation_context_distance_colour"] < 2
        assert 0 < row["validation_context_drift"] < 2
    pytest.importorskip("matplotlib")
    assert draw_curves(metrics(tiny_run), tmp_path / "all.png")
    assert draw_curves([{k: v for k, v in row.items() if "context" not in k} for row in metrics(tiny_run)],
                       tmp_path / "without.png")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "without.png").stat().st_size


# ---- words that training has not used yet

USED, UNUSED = SHAPES[:4], SHAPES[4:]


def after_other_text(tokenizer: Tokenizer, steps: int = 500, seed: int = 0, **settings) -> dict[str, float]:
    """Train a text encoder on captions of the first four kinds of shapes, to say by a linear layer which size,
    colour and kind they name; its last loss, and then the distance of the four kinds that never occurred."""
    encoder = new_encoder(seed, **settings)
    model = nn.ModuleDict({"text_encoder": encoder, "said": nn.Linear(CONFIG.width, 24)})
    meanings = {word: torch.randn(24) for word in (*SIZES, *COLOURS, *USED)}
    config = OptimConfig(optimizer="muon", learning_rate=4e-3, warmup=50, slow=("text_encoder",))
    rng = random.Random(seed)
    optimizer = build_optimizer(model, config, torch.float32)
    for step in range(steps):
        named = [(rng.choice(list(SIZES)), rng.choice(COLOURS), rng.choice(USED)) for _ in range(16)]
        ids, mask = trim_padding(*tokenizer.encode([f"a {' '.join(words)}" for words in named]))
        target = torch.stack([sum(meanings[word] for word in words) for words in named])  # (B, 24)
        context = (encoder(ids, mask) * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)  # (B, D)
        loss = (model["said"](context) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        set_learning_rate(optimizer, learning_rate(step, steps, config))
        optimizer.step()
    pairs = [pair for pair in word_pairs()["kind"] if all(caption.split()[-1] in UNUSED for caption in pair)]
    return {"distance": context_distances(encoder, tokenizer, {"kind": pairs})["kind"], "loss": loss.item()}


def test_words_that_training_has_not_used_yet_stay_apart(tokenizer):
    """At standard deviation 1 the embeddings outweigh what the layers write; at CLIP's 0.02 what the layers have
    learned of other words outweighs them, and words that never occurred come near each other. Three seeds: 1.41 and
    0.62, 1.31 and 0.67, 1.41 and 1.02."""
    large, small = after_other_text(tokenizer), after_other_text(tokenizer, token_std=0.02, position_std=0.01)
    assert large["loss"] < 0.05 and small["loss"] < 0.05  # both have learned what they were shown
    assert large["distance"] > 1.15 and small["distance"] < 0.85 * large["distance"]
