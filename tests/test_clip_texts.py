"""What a CLIP learns from captions besides their wholes."""
import numpy as np
import pytest
import torch

from model.text_encoder import trim_padding
from training.stages.clip_texts import SMALL, Substitutes, caption_parts, cut_to_parts, texts_in_captions

CAPTIONS = [f"a {size} {colour} {shape} above a {other} star on {background}"
            for size in ("small", "large") for colour in ("red", "blue", "green") for shape in ("circle", "square")
            for other in ("red", "yellow") for background in ("white", "grey")]


@pytest.mark.parametrize("caption, parts", [
    ("a red star above a blue circle", ["a red star", "a blue circle"]),
    ("a red star to the left of a blue circle on a white background",
     ["a red star", "a blue circle", "a white background"]),
    ("three dogs, noto style", ["three dogs", "noto style"]),
    ("a fox on grass", ["a fox"]),  # one word says too little
    ("fox", ["fox"]),
    ("an onion within reach", ["an onion within reach"]),  # joints are whole words
])
def test_parts(caption, parts):
    assert caption_parts(caption) == parts


def test_a_wrong_caption_differs_in_one_word_of_the_same_kind():
    substitutes = Substitutes(CAPTIONS)
    kinds = [{"small", "large"}, {"red", "blue", "green", "yellow"}, {"circle", "square", "star"}, {"white", "grey"}]
    seen = set()
    for draw in range(100):
        right = CAPTIONS[draw % len(CAPTIONS)]
        wrong = substitutes.wrong(right, np.random.default_rng(draw))
        changed = [(a, b) for a, b in zip(right.split(), wrong.split(), strict=True) if a != b]
        assert len(changed) == 1
        (before, after), = changed
        assert any({before, after} <= kind for kind in kinds), changed
        seen.add(next(i for i, kind in enumerate(kinds) if before in kind))
    assert seen == {0, 1, 2, 3}


def test_captions_without_substitutes_stay():
    substitutes = Substitutes(CAPTIONS)
    rng = np.random.default_rng(0)
    assert substitutes.wrong("nothing of the kind", rng) == "nothing of the kind"
    assert substitutes.wrong("", rng) == ""
    twice = Substitutes(["a red star", "a blue star"] * 2)  # not seen often enough
    assert twice.wrong("a red star", rng) == "a red star"
    articles = Substitutes(["the star", "a star", "this star"] * 5)
    assert {"the", "a", "this"} <= SMALL and articles.wrong("a star", rng) == "a star"


def test_a_share_of_captions_is_shortened():
    captions = ["a red star above a blue circle"] * 4000
    found = cut_to_parts(captions, 0.3, np.random.default_rng(0))
    counts = {text: found.count(text) / len(found) for text in set(found)}
    assert set(counts) == {captions[0], "a red star", "a blue circle", "red star", "blue circle"}
    assert counts[captions[0]] == pytest.approx(0.7, abs=0.03)
    assert counts["a red star"] == pytest.approx(0.075, abs=0.02) == counts["red star"]
    assert cut_to_parts(captions, 0.0, np.random.default_rng(0)) == captions


def test_what_a_caption_says_is_no_wrong_answer():
    captions = ["a red star above a blue circle", "a red starfish, noto style", "a red star"]
    texts = ["a red star", "red star", "blue circle", "noto style", "a red star above a blue circle", "a blue star"]
    assert texts_in_captions(captions, texts).tolist() == [[True, True, True, False, True, False],
                                                           [False, False, False, True, False, False],
                                                           [True, True, False, False, False, False]]


def test_only_common_padding_is_cut():
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    short, kept = trim_padding(ids, mask)
    assert torch.equal(short, ids[:, :4]) and torch.equal(kept, mask[:, :4])
