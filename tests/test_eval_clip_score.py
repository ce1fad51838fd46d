"""CLIP score and retrieval: by hand on small tables, ties, duplicates, and what wrong captions do."""
import pytest
import torch
import torch.nn.functional as F

from eval.clip_score import agreement, caption_ranks, clip_scores, derangement


def pairs(count: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    random = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(count, 16, generator=random), dim=1)
    images = F.normalize(texts + noise * torch.randn(count, 16, generator=random), dim=1)
    return images, texts, [f"caption {i}" for i in range(count)]


def test_the_score_is_the_cosine_in_percent_and_not_below_0():
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([100, 100 / 2**0.5, 0])


def test_ranks_count_the_captions_that_fit_better():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0], [1.0, 1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert caption_ranks(images, texts, ["a", "b", "c", "d"]).tolist() == [0, 0, 1, 3]
    found = agreement(images, texts, ["a", "b", "c", "d"])
    assert (found.recall_1.value, found.recall_5.value) == (0.5, 1.0)


def test_an_equal_caption_is_no_other_one_and_a_tie_is_no_hit():
    images, texts, captions = pairs(6, 0.1)
    images[1], texts[1], captions[1] = images[0], texts[0], captions[0]
    assert caption_ranks(images, texts, captions)[:2].tolist() == [0, 0]
    alike = torch.ones(6, 4)
    assert caption_ranks(alike, alike, [f"c{i}" for i in range(6)]).tolist() == [5] * 6


def test_blocks_do_not_show(monkeypatch):
    images, texts, captions = pairs(50, 1.0)
    whole = caption_ranks(images, texts, captions)
    monkeypatch.setattr("eval.clip_score.BLOCK", 7)
    assert torch.equal(caption_ranks(images, texts, captions), whole) and 0 < int((whole > 0).sum()) < 50


def test_wrong_captions_are_caught():
    """Shuffled pairs: the score falls, retrieval falls to chance."""
    images, texts, captions = pairs(200, 0.15)
    right, wrong = agreement(images, texts, captions), agreement(images[derangement(200)], texts, captions)
    assert right.recall_1.low > 0.9 and wrong.recall_1.high < 0.05 and wrong.recall_5.value < 0.1
    assert wrong.score.high < right.score.low


def test_a_stranger_is_never_oneself():
    for count in (2, 3, 50):
        order = derangement(count, seed=count)
        assert sorted(order.tolist()) == list(range(count)) and (order != torch.arange(count)).all()
    with pytest.raises(ValueError, match="1 images; valid: from 2 up"):
        derangement(1)


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match=r"vectors: \(3, 4\) and \(2, 4\)"):
        clip_scores(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="some are not finite"):
        clip_scores(torch.full((3, 4), torch.nan), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        caption_ranks(torch.ones(3, 4), torch.ones(3, 4), ["a", "b"])
