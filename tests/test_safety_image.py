"""Concepts on embeddings; here the "CLIP" reads the mean colour of an image, so every figure is known."""
import math
from pathlib import Path

import pytest
import torch

from data.shapes.scene_graph import COLOURS, SHAPES
from pipeline.moderation import Moderation, mentions
from safety.image import VIEWS, Concept, ImageModerator, blur, read_concepts, views, write_concepts
from safety.policy import Decision

ROOT = Path(__file__).parents[1]
AXES = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
RED = Concept("red", "violence", ("red", "white"), threshold=0.9)


def embed_images(images: torch.Tensor) -> torch.Tensor:
    return (images.mean(dim=(2, 3)) + 1) / 2


def embed_texts(texts) -> torch.Tensor:
    return torch.tensor([AXES[text] for text in texts])


def plain_image(**colours: float) -> torch.Tensor:
    """16x16, with a little texture so that it is not of one colour."""
    values = torch.tensor([colours.get(name, 0.0) for name in ("red", "green", "blue")]) * 1.9 - 0.95
    return values[:, None, None] + 0.04 * torch.sin(torch.arange(256.0)).view(16, 16)


def moderator(*concepts: Concept, **options) -> ImageModerator:
    return ImageModerator(concepts, embed_images, embed_texts, **options)


def test_margins_are_cosines_with_the_mean_phrasing():
    mean = torch.nn.functional.normalize(torch.tensor([1.0, 0, 0]) + torch.tensor([1.0, 1, 1]) / math.sqrt(3), dim=0)
    images = torch.stack([plain_image(red=1), plain_image(blue=1), plain_image(red=1, green=1)])
    expected = torch.nn.functional.normalize(embed_images(images), dim=1) @ mean
    torch.testing.assert_close(moderator(RED).margins(images)[:, 0], expected, atol=5e-3, rtol=0)


def test_a_neighbour_takes_its_share_away():
    plain = Concept("red", "violence", ("red",), threshold=0.5)
    near = Concept("red", "violence", ("red",), allowed=(("white",), ("blue", "blue")), threshold=0.1)
    images = torch.stack([plain_image(red=1), plain_image(red=1, green=1, blue=1)])
    assert [d.action for d in moderator(plain).check(images)] == ["block", "block"]
    assert [d.action for d in moderator(near).check(images)] == ["block", "allow"]


def test_a_corner_is_seen():
    image = plain_image(blue=1)
    image[:, :10, :10] = plain_image(red=1)[:, :10, :10]
    score = moderator(Concept("red", "violence", ("red",), threshold=0.9)).margins(image[None])
    whole = embed_images(image[None])
    assert float(score) > float(whole[0, 0] / whole.norm()) + 0.1


def test_views():
    images = torch.rand(2, 3, 20, 30)
    seen = views(images)
    assert seen.shape == (2, VIEWS, 3, 20, 30) and torch.equal(seen[:, 0], images)
    flat = torch.full((1, 3, 20, 30), 0.25)
    torch.testing.assert_close(views(flat), flat[:, None].expand(-1, VIEWS, -1, -1, -1))


# ---- regions

def quarters(images: torch.Tensor) -> torch.Tensor:
    """The colours (B, 4, 3) of the quarters of images, as vectors of any length."""
    halves = [images[..., y:y + 8, x:x + 8] for y in (0, 8) for x in (0, 8)]
    return torch.stack([embed_images(part) for part in halves], dim=1)


def test_regions_find_what_the_whole_image_does_not():
    """One red quarter among blue ones: its cosine is that of red alone, wherever it is."""
    red = Concept("red", "violence", ("red",), threshold=0.9)
    for y, x in ((0, 0), (0, 8), (8, 0), (8, 8)):
        image = plain_image(blue=1)
        image[:, y:y + 8, x:x + 8] = plain_image(red=1)[:, y:y + 8, x:x + 8]
        judge = ImageModerator([red], quarters, embed_texts, regions=True)
        expected = judge.margins(plain_image(red=1)[None])
        torch.testing.assert_close(judge.margins(image[None]), expected, atol=0.01, rtol=0)
        assert judge.check(image[None])[0].action == "block"
        assert moderator(red).check(image[None])[0].action == "allow"


def test_margins_of_regions_equal_a_loop_and_ignore_the_order():
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(5, 7, 3, generator=generator)
    concepts = [Concept("a", "hate", ("red", "white"), allowed=(("blue",), ("green", "white"))),
                Concept("b", "hate", ("blue",))]

    def cosine(a, b):
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    def direction(names):
        return torch.nn.functional.normalize(embed_texts(names), dim=1).mean(dim=0)
    expected = [[max(cosine(v, direction(c.phrasings)) - max([cosine(v, direction(n)) for n in c.allowed], default=0.0)
                     for v in image) for c in concepts] for image in vectors]
    images = torch.zeros(5, 3, 16, 16)
    found = ImageModerator(concepts, lambda _: vectors, embed_texts, regions=True).margins(images)
    torch.testing.assert_close(found, torch.tensor(expected))
    mixed = vectors[:, torch.randperm(7, generator=generator)]
    again = ImageModerator(concepts, lambda _: mixed, embed_texts, regions=True).margins(images)
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 3), (2, 0, 3), (2, 4, 2)])
def test_regions_of_another_shape_refuse(shape):
    judge = ImageModerator([RED], lambda images: torch.ones(shape), embed_texts, regions=True)
    found = judge.check(torch.stack([plain_image(blue=1)] * 2))
    assert [decision.action for decision in found] == ["block", "block"]


def test_actions_and_modes():
    images = torch.stack([plain_image(red=1), plain_image(blue=1)])
    red = Concept("red", "violence", ("red",), threshold=0.8)
    for mode, expected in (("block", "block"), ("blur", "blur"), ("flag", "flag"), ("off", "allow")):
        assert [d.action for d in moderator(red, mode=mode).check(images)] == [expected, "allow"]
    soft = Concept("red", "violence", ("red",), action="blur", threshold=0.8)
    assert moderator(soft).check(images)[0].action == "blur"


def test_the_most_severe_of_those_over_their_thresholds_decides():
    """However far a milder one is over its own."""
    mild = Concept("blue", "hate", ("blue",), action="flag", threshold=-1.5)
    severe = Concept("red", "violence", ("red",), threshold=0.5)
    both = plain_image(red=0.6, blue=0.8)[None]
    assert moderator(mild).check(both)[0].action == "flag" and moderator(severe).check(both)[0].action == "block"
    for order in ((mild, severe), (severe, mild)):
        decision = moderator(*order).check(both)[0]
        assert (decision.action, decision.reason) == ("block", "concept red")
    assert moderator(mild, severe).check(plain_image(blue=0.9)[None])[0].action == "flag"


def test_the_strongest_concept_names_the_decision():
    judge = moderator(Concept("red", "violence", ("red",), threshold=0.5),
                      Concept("blue", "hate", ("blue",), threshold=0.5))
    found = judge.check(torch.stack([plain_image(blue=1, red=0.3)]))
    assert found[0].category == "hate" and set(found[0].scores) == {"red", "blue"}


@pytest.mark.parametrize("image, why", [
    (torch.full((3, 16, 16), math.nan), "finite"), (torch.full((3, 16, 16), math.inf), "finite"),
    (torch.zeros(3, 16, 16), "one colour"), (-torch.ones(3, 16, 16), "one colour"),
])
def test_a_broken_image_has_failed_and_is_not_called_unsafe(image, why):
    broken, fine = moderator(RED).check(torch.stack([image, plain_image(blue=1)]))
    assert broken.action == "block" and "failed" in broken.reason and why in broken.reason and broken.category == ""
    assert fine.action == "allow"  # its neighbour in the batch does not matter


@pytest.mark.parametrize("embed", [lambda images: 1 / 0, lambda images: embed_images(images) * math.nan,
                                   lambda images: torch.zeros(1, 7), lambda images: None])
def test_a_broken_encoder_refuses(embed):
    found = ImageModerator([RED], embed, embed_texts).check(torch.stack([plain_image(blue=1)] * 2))
    assert [decision.action for decision in found] == ["block", "block"]


def test_without_thresholds_nothing_passes():
    found = moderator(Concept("red", "violence", ("red",))).check(torch.stack([plain_image(blue=1)]))
    assert found[0].action == "block" and "calibrated" in found[0].reason


def test_calibration_keeps_the_rate_on_harmless_images():
    generator = torch.Generator().manual_seed(0)
    concepts = [Concept("red", "violence", ("red",)), Concept("green", "hate", ("green",))]
    margins = torch.randn(5000, 2, generator=generator)
    fresh = torch.randn(20000, 2, generator=generator)
    thresholds = torch.tensor([c.threshold for c in moderator(*concepts).calibrate(margins, 0.02)])
    assert float((margins > thresholds).any(dim=1).float().mean()) <= 0.02
    assert 0.014 < float((fresh > thresholds).any(dim=1).float().mean()) < 0.026
    with pytest.raises(ValueError, match="rate"):
        moderator(*concepts).calibrate(margins[:10], 0.01)


def test_blur_leaves_no_detail():
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    soft = blur(image)
    assert soft.shape == image.shape and float(soft.diff(dim=3).abs().max()) < 0.1
    assert float(image.diff(dim=3).abs().max()) > 1
    torch.testing.assert_close(soft.mean(), image.mean(), atol=0.02, rtol=0)


# ---- files

def test_concepts_round_trip(tmp_path):
    concepts = [RED, Concept("b", "stand_in", ("blue",), allowed=(("red", "white"), ("green",)), action="flag")]
    write_concepts(tmp_path / "c.yaml", concepts)
    assert read_concepts(tmp_path / "c.yaml") == concepts


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_shipped_concepts_are_read_and_wait_for_their_thresholds(name):
    found = read_concepts(ROOT / "configs" / f"concepts_{name}.yaml")
    assert {concept.action for concept in found} == {"block", "blur", "flag"}
    for concept in found:
        assert concept.threshold is None and concept.name in concept.phrasings[0]
        assert name != "shapes" or concept.name in {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}


@pytest.mark.parametrize("text", [
    "", "concepts: []", "concepts: 3", "a: [", "concepts: [1]", "concepts: [{name: a}]",
    "concepts: [{name: a, category: taste, phrasings: [b]}]", "concepts: [{name: a, category: hate, phrasings: []}]",
    "concepts: [{name: a, category: hate, phrasings: b}]",
    "concepts: [{name: a, category: hate, phrasings: [b], allowed: [[5]]}]",
    "concepts: [{name: a, category: hate, phrasings: [b], colour: c}]",
    "concepts: [{name: a, category: hate, phrasings: [b], threshold: .nan}]",
    "concepts: [{name: a, category: hate, phrasings: [b], action: allow}]",
    "concepts: [{name: a, category: hate, phrasings: [b]}, {name: a, category: hate, phrasings: [c]}]",
])
def test_bad_concepts_are_refused_by_name(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="c.yaml"):
        read_concepts(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="none.yaml"):
        read_concepts(tmp_path / "none.yaml")


def test_what_is_asked_wrongly_is_said():
    for arguments in ({"mode": "maybe"}, {"mode": "block"}):
        with pytest.raises(ValueError, match="moderation: "):
            Moderation(None, **arguments)
    with pytest.raises(ValueError, match="no CLIP to judge by"):
        Moderation.load(concepts="x.yaml")
    assert Moderation(None, mode="off").check_prompt(["anything"]) == Decision("allow", reason="off")


def test_harmless_images_are_those_whose_captions_do_not_name_it():
    assert mentions(["two red stars"], "red star") and mentions(["A Red Star."], "red star")
    assert not mentions(["a red circle above a blue star", "restart"], "red star")
