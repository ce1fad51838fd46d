"""Scenes read back from images: exact on drawn ones, steady under noise and blur, and no mistake goes unseen."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from scipy import ndimage

from data.shapes.phrasings import facts_of
from data.shapes.render import render, vocabulary
from data.shapes.scene_graph import COLOURS, SHAPES
from data.shapes.shapes import Shapes, ShapesConfig
from eval.scenes.reader import SceneReader, lab
from eval.scenes.score import (
    ATTRIBUTES,
    MEASURES,
    SceneReport,
    chance_scores,
    counts_per_prompt,
    match_objects,
    read_scenes,
    scene_scores,
    score_scene,
    score_table,
)

COUNT = 300


@pytest.fixture(scope="module")
def reader():
    return SceneReader(vocabulary())


@pytest.fixture(scope="module")
def drawn():
    """(scene graph, everything it holds as facts, image) of test scenes."""
    source = Shapes(ShapesConfig(), "test")
    scenes = [source.scene(index) for index in range(COUNT)]
    return [(scene, facts_of(scene, sized=True, setting=True), render(scene, 64)) for scene in scenes]


def accuracies(reader, pairs):
    """Attribute -> share of promises kept."""
    kept = defaultdict(list)
    for image, facts in pairs:
        for name, rights in score_scene(reader(image), facts).items():
            kept[name] += rights
    return {name: np.mean(rights) for name, rights in kept.items()}


def spoil(image, sigma, blur, generator):
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (0, blur, blur))
    return np.clip(np.rint(smooth + sigma * generator.standard_normal(image.shape)), 0, 255).astype(np.uint8)


def test_lab_agrees_with_published_values():
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]])
    known = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86],
             [53.59, 0, 0]]
    np.testing.assert_allclose(lab(rgb), known, atol=0.1)


def test_colours_can_be_told_apart_on_every_background_and_in_every_mood(reader):
    words = vocabulary()
    for setting in (*words.backgrounds, *words.moods):
        palette = reader.palette_lab[setting]
        apart = np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 1e3 * np.eye(len(palette))
        assert apart.min() > 25, setting
        behind = lab(words.backdrop(setting, 64)).reshape(-1, 3)
        assert np.linalg.norm(palette[:, None] - behind[None], axis=-1).min() > 25, setting


def test_drawn_images_are_read_without_error(reader, drawn):
    rates = accuracies(reader, [(image, facts) for _, facts, image in drawn])
    assert set(rates) == {"scene", "object", *ATTRIBUTES}
    assert min(rates.values()) >= 0.995, rates


def test_centres_and_radii_are_read_to_a_fraction_of_a_pixel(reader, drawn):
    for scene, facts, image in drawn[:100]:
        seen = reader(image).objects
        for thing in scene["objects"]:
            near = min(seen, key=lambda other: np.hypot(*np.subtract(other.centre, thing["centre"])))
            others = [near] + [other for other in seen if other.colour == thing["colour"]]
            error = min(np.hypot(*np.subtract(other.centre, thing["centre"])) for other in others) * 64
            assert error < 0.5
            assert min(abs(other.radius - thing["radius"]) for other in others) * 64 < 0.5


@pytest.mark.parametrize("sigma, blur", [(8, 0.0), (0, 0.8), (8, 0.8)])
def test_noise_and_blur_change_little(reader, drawn, sigma, blur):
    generator = np.random.default_rng(0)
    rates = accuracies(reader, [(spoil(image, sigma, blur, generator), facts) for _, facts, image in drawn[:150]])
    assert min(rates.values()) > 0.97, rates


@pytest.mark.parametrize("size", [48, 128])
def test_other_sizes_are_read_as_well(reader, drawn, size):
    rates = accuracies(reader, [(render(scene, size), facts) for scene, facts, _ in drawn[:60]])
    assert min(rates.values()) >= 0.98, rates


def test_specks_are_no_objects(reader, drawn):
    generator = np.random.default_rng(1)
    for _, facts, image in drawn[:40]:
        spotted = image.copy()
        for row, column in generator.integers(0, 62, (6, 2)):
            spotted[:, row:row + 2, column:column + 2] = generator.integers(0, 256, (3, 1, 1))
        assert len(reader(spotted).objects) == facts["count"]


def test_something_shapeless_has_no_shape(reader):
    image = np.full((3, 64, 64), 250, np.uint8)
    for row, column in ((10, 10), (10, 42), (42, 10), (26, 26), (42, 42)):  # a checked pattern joined at its corners
        image[:, row:row + 17, column:column + 17] = np.array([222, 44, 52], np.uint8)[:, None, None]
    seen, = reader(image).objects
    assert seen.colour == "red" and seen.shape is None


def altered(scene, change):
    scene = copy.deepcopy(scene)
    change(scene)
    return scene


def next_of(names, name, avoid=()):
    names = [other for other in names if other not in avoid or other == name]
    return names[(names.index(name) + 1) % len(names)]


def test_every_kind_of_mistake_is_caught(reader, drawn):
    def colour(scene):
        used = [thing["colour"] for thing in scene["objects"]]
        scene["objects"][0]["colour"] = next_of(COLOURS, used[0], used[1:])

    def shape(scene):
        used = [thing["shape"] for thing in scene["objects"]]
        scene["objects"][0]["shape"] = next_of(SHAPES, used[0], used[1:])

    def setting(scene):
        scene["mood"] = "calm" if scene["mood"] == "gloomy" else "gloomy"
        scene["background"] = None

    def mirror(scene):
        for thing in scene["objects"]:
            thing["centre"] = [1 - value for value in thing["centre"]]

    def remove(scene):
        scene["objects"].pop(0)

    about_objects = {"colour", "shape", "size", "relation"}
    changes = {"colour": colour, "shape": shape, "relation": mirror, "count": remove}
    for name, change in changes.items():
        tried = 0
        for scene, facts, _ in drawn:
            if scene["kind"] == "relation" or (scene["kind"] == "single" and name in ("colour", "shape")):
                wrong = score_scene(reader(render(altered(scene, change), 64)), facts)
                assert wrong[name].count(False) == 1 and wrong["scene"] == [False], (name, scene)
                others = set(ATTRIBUTES) - {name} - (about_objects if name == "count" else set())
                assert all(all(wrong[other]) for other in others), (name, scene)
                tried += 1
        assert tried > 30
    for scene, facts, _ in drawn[:60]:
        wrong = score_scene(reader(render(altered(scene, setting), 64)), facts)
        assert wrong["background"] + wrong["mood"] == [False] and wrong["scene"] == [False]


def test_exchanged_colours_are_caught(reader, drawn):
    """A red star and a blue square, drawn as a blue star and a red square: every name is there, no object is."""
    tried = 0
    for scene, facts, _ in drawn:
        first, second = (scene["objects"] + [None])[:2]
        if len(scene["objects"]) == 2 and first["colour"] != second["colour"] and first["shape"] != second["shape"]:
            swapped = copy.deepcopy(scene)
            swapped["objects"][0]["colour"], swapped["objects"][1]["colour"] = second["colour"], first["colour"]
            score = score_scene(reader(render(swapped, 64)), facts)
            assert score["object"] == [False, False] and score["scene"] == [False]
            assert sorted([score["colour"], score["shape"]]) == [[False, False], [True, True]]
            tried += 1
    assert tried > 40


def test_sizes_and_extra_objects_are_caught(reader):
    thing = {"colour": "red", "shape": "star", "size": "small", "centre": [0.3, 0.3], "radius": 0.11}
    scene = {"kind": "single", "background": "white", "mood": None, "objects": [thing], "relations": []}
    facts = facts_of(scene, sized=True, setting=True)
    large = score_scene(reader(render(scene | {"objects": [thing | {"radius": 0.21}]}, 64)), facts)
    assert large["size"] == [False] and large["shape"] == large["colour"] == large["count"] == [True]
    two = score_scene(reader(render(scene | {"objects": [thing, thing | {"centre": [0.7, 0.6]}]}, 64)), facts)
    assert two["count"] == [False] and two["object"] == [True] and two["scene"] == [False]
    empty = score_scene(reader(render(scene | {"objects": []}, 64)), facts)
    assert empty["colour"] == empty["shape"] == empty["size"] == empty["count"] == [False]
    assert empty["background"] == [True]


def test_what_a_caption_leaves_out_is_free(reader, drawn):
    scene, _, image = next(row for row in drawn if row[0]["kind"] == "relation")
    score = score_scene(reader(image), facts_of(scene, sized=False, setting=False))
    assert score["size"] == score["background"] == score["mood"] == [] and score["scene"] == [True]
    resized = altered(scene, lambda s: [thing.update(radius=0.13) for thing in s["objects"]])
    assert score_scene(reader(render(resized, 64)), facts_of(scene, sized=False, setting=False))["scene"] == [True]


def test_matching_does_not_depend_on_the_order_of_promises(reader, drawn):
    for scene, facts, image in drawn[:80]:
        if facts["kind"] != "triple":
            continue
        seen = reader(image)
        forward = match_objects(seen, facts)
        backward = match_objects(seen, facts | {"objects": facts["objects"][::-1]})
        assert forward == backward[::-1] and sorted(forward) == [0, 1, 2]


def test_inside_is_not_beside(reader):
    inner = {"colour": "yellow", "shape": "moon", "size": "small", "centre": [0.5, 0.5], "radius": 0.11}
    outer = {"colour": "purple", "shape": "circle", "size": "large", "centre": [0.5, 0.5], "radius": 0.26}
    scene = {"kind": "inside", "background": "grey", "mood": None, "objects": [inner, outer],
             "relations": [[0, "inside", 1]]}
    seen = reader(render(scene, 64))
    i, j = ([thing.colour for thing in seen.objects].index(name) for name in ("yellow", "purple"))
    assert seen.holds(i, "inside", j) and not seen.holds(j, "inside", i)
    assert not any(seen.holds(i, name, j) for name in ("above", "below", "left of", "right of"))
    apart = render(scene | {"objects": [inner | {"centre": [0.15, 0.15]}, outer | {"centre": [0.65, 0.65]}]}, 64)
    assert score_scene(reader(apart), facts_of(scene, True, True))["relation"] == [False]
    with pytest.raises(ValueError, match="relation: value 'near'; valid: above"):
        seen.holds(0, "near", 1)


def row(right, total, tag="some"):
    score = {name: [] for name in ("scene", "object", *ATTRIBUTES)}
    return {"tags": [tag]}, score | {"colour": [True] * right + [False] * (total - right), "scene": [right == total]}


def test_table_is_a_ratio_of_sums_with_the_binomial_interval():
    table = score_table([row(1, 1, "a"), row(1, 3, "b"), row(2, 2, "a")])
    assert table["all"]["attributes"].value == pytest.approx(4 / 6) and table["all"]["attributes"].promises == 6
    assert table["a"]["colour"].value == 1 and table["b"]["colour"].value == pytest.approx(1 / 3)
    assert "shape" not in table["all"] and table["all"]["scene"].value == pytest.approx(2 / 3)
    rate = score_table([row(int(i % 4 != 0), 1) for i in range(400)], resamples=2000)["all"]["scene"]
    width = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert rate.value == 0.75 and abs(rate.low - (0.75 - width)) < 0.006 and abs(rate.high - (0.75 + width)) < 0.006
    with pytest.raises(ValueError, match="rows: 0"):
        score_table([])


def test_a_report_sets_samples_beside_chance_real_images_and_a_ceiling(drawn):
    images, facts = [image for *_, image in drawn[:80]], [fact for _, fact, _ in drawn[:80]]
    scenes = read_scenes([torch.from_numpy(image) for image in images], vocabulary())
    score, chance = score_table(scene_scores(scenes, facts)), score_table(chance_scores(scenes, facts))
    real = score_table(scene_scores(read_scenes([image for *_, image in drawn[80:120]], vocabulary()),
                                    [fact for _, fact, _ in drawn[80:120]]))
    report = SceneReport(score, chance, real)
    assert score["all"]["attributes"].value > 0.99 and real["all"]["attributes"].value > 0.99
    assert chance["all"]["attributes"].value < 0.45 and chance["all"]["scene"].value < 0.1
    text = str(report)
    assert "| all | 80 |" in text and "chance" in text and "reader" in text
    assert set(report.as_dict()["score"]["all"]["scene"]) == {"value", "low", "high", "promises"}
    assert set(score["all"]) == set(MEASURES)
    assert report.ceiling is None and "ceiling" not in text and "ceiling" not in report.as_dict()
    blurred = read_scenes([ndimage.gaussian_filter(image, (0, 3, 3)) for image in images[:40]], vocabulary())
    worse = SceneReport(score, chance, real, score_table(scene_scores(blurred, facts[:40])))
    assert worse.ceiling["all"]["shape"].value < 0.9 and "| ceiling" in str(worse)
    assert worse.as_dict()["ceiling"]["all"]["shape"]["value"] == worse.ceiling["all"]["shape"].value
    with pytest.raises(ValueError):
        scene_scores(scenes, facts[:2])


def test_counts_per_prompt_are_those_of_its_score():
    found = counts_per_prompt([row(1, 3), row(2, 2)])
    assert found == {"attributes": [[1, 3], [2, 2]], "whole scenes": [[0, 1], [1, 1]]}


def test_wrong_images_are_refused():
    for wrong in (np.zeros((3, 64, 64), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((3, 64, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"valid: uint8 \(3, S, S\)"):
            SceneReader(vocabulary())(wrong)
