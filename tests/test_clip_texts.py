"""What a CLIP learns from captions besides their wholes."""
import numpy as np
import pytest
import torch

from model.text_encoder import trim_padding
from training.stages.clip_texts import (
    SMALL,
    Substitutes,
    among_made_up_words,
    caption_parts,
    cut_to_parts,
    draw_parts,
    parts_in_captions,
    texts_in_captions,
)

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


def test_parts_are_drawn_without_repetition():
    captions, rng = ["a red star, a blue star and a pink star", "a fox"], np.random.default_rng(0)
    draws = [draw_parts(captions, 2, rng) for _ in range(300)]
    assert all(len(one) == 3 and one[0] != one[1] and one[2] == "a fox" for one in draws)
    counts = [sum(name in one for one in draws) for name in ("a red star", "a blue star", "a pink star")]
    assert sum(counts) == 600 and min(counts) > 160


def test_a_text_stays_whole_among_made_up_words():
    rng = np.random.default_rng(0)
    found = [among_made_up_words("a red star", rng).split() for _ in range(2000)]
    places = [words.index("red") for words in found]
    assert all(words[place:place + 2] == ["red", "star"] and "a" not in words for words, place in zip(found, places))
    assert set(places) == {0, 1, 2} and {len(words) - place for words, place in zip(found, places)} == {2, 3}
    others = [word for words in found for word in words if word not in ("red", "star")]
    assert {len(word) for word in others} == set(range(2, 7)) and len(set("".join(others))) == 26
    assert among_made_up_words("fox", np.random.default_rng(1)).split().count("fox") == 1


def test_parts_stand_in_captions_with_any_article_and_in_the_plural():
    captions = ["a red picture with three red stars", "one red star, white background", "the foxes", "a red starfish"]
    parts = ["a red star", "red star", "one red star", "a fox", "three red stars", "a white background", "a"]
    assert parts_in_captions(captions, parts).T.tolist() == [
        [True, True, False, False], [True, True, False, False], [True, True, False, False], [False, False, True, False],
        [True, False, False, False], [False, True, False, False], [True, False, False, True]]


def test_only_common_padding_is_cut():
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    short, kept = trim_padding(ids, mask)
    assert torch.equal(short, ids[:, :4]) and torch.equal(kept, mask[:, :4])
