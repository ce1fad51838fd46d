"""Reading emoji scenes back: a real rendering keeps all its promises, and a broken promise breaks only itself."""
from collections import Counter

import numpy as np
import pytest
import torch
from emoji_packages import emoji_folder

from data.emoji.emoji import Emoji, EmojiConfig
from data.emoji.scenes import COLOURS, MOODS, canvas, over, scene_image
from diffusion.sampling import SamplingConfig
from eval.scenes.candidates import (
    REACH,
    answer_distances,
    candidate_vectors,
    count_nearer_answers,
    make_question,
    palette_distance,
    shifted_vectors,
)
from scoring.emoji import ATTRIBUTES, mood_distances, score_of_answers, score_rows
from scoring.emoji_questions import Promises, layouts
from scoring.held_out import Prompts
from scoring.samples import Samples

SIZE = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = emoji_folder(tmp_path_factory.mktemp("emoji") / "data", SIZE)
    return Emoji(EmojiConfig(str(root), SIZE, held_out_scenes=60), "test")


@pytest.fixture(scope="module")
def promises(source):
    return Promises(source)


def scenes(source, kind: str | None = None) -> list[int]:
    found = [i for i in range(len(source)) if source.locate(i)[0] is None]
    return [i for i in found if kind in (None, source.scene(source.locate(i)[1])["kind"])]


def answered(promises, index: int, image) -> dict[str, list[bool]]:
    asked = promises.questions(index)
    return score_of_answers(asked, count_nearer_answers(asked, [np.asarray(image)])[0])


def redrawn(source, scene: dict, **changes) -> np.ndarray:
    return scene_image({**scene, **changes}, lambda name: source.rgba(source.row_of[name]), source.config.size)


def test_real_renderings_keep_their_promises(source, promises):
    """The reader itself: at least 98 % of what the data's own images promise is read, of every attribute."""
    right, made = Counter(), Counter()
    for index in range(len(source)):
        for name, kept in answered(promises, index, source[index]["image"]).items():
            right[name] += sum(kept)
            made[name] += len(kept)
    assert set(made) == {"scene", *ATTRIBUTES} and min(made.values()) >= 8
    assert all(right[name] >= 0.98 * made[name] for name in ATTRIBUTES), (right, made)


def test_images_of_other_prompts_are_near_chance(source, promises):
    found, guesses = [], []
    for index in scenes(source):
        other = source[scenes(source)[(scenes(source).index(index) + 7) % len(scenes(source))]]["image"]
        found += [kept for name, all_kept in answered(promises, index, other).items() if name == "object"
                  for kept in all_kept]
        guesses += [1 / one.answers for one in promises.questions(index) if one.attribute == "object"]
    assert abs(np.mean(found) - np.mean(guesses)) < 0.15


def test_a_guess_is_one_in_the_number_of_answers(source, promises):
    """By attribute; all promises of a prompt at once are the product of its guesses."""
    indices = scenes(source)[:6]
    images = torch.stack([source[index]["image"] for index in indices])
    prompts = Prompts([source.captions(index)[0] for index in indices], indices, list(images))
    rows, guess = score_rows(promises, Samples(prompts, SamplingConfig(), images, Prompts()), list(images))
    expected, whole = {}, []
    for index in indices:
        asked = promises.questions(index)
        whole.append(np.prod([1 / one.answers for one in asked]))
        for one in asked:
            expected.setdefault(one.attribute, []).append(1 / one.answers)
    assert set(guess) == {"attributes", "scene", *expected} and len(rows) == 4 and guess["scene"] == np.mean(whole)
    assert all(guess[name] == pytest.approx(np.mean(found)) for name, found in expected.items())
    assert guess["attributes"] == pytest.approx(np.mean(sum(expected.values(), [])))


def test_a_broken_promise_breaks_itself(source, promises):
    """Another thing, number or order in the same scene: told, and background and mood are mostly still read."""
    broken = Counter()
    for index in scenes(source):
        scene = source.scene(source.locate(index)[1])
        things = scene["objects"]
        rows = [source.row_of[thing["id"]] for thing in things]
        changes = {}
        if scene["kind"] == "relation":
            places = [thing["centre"] for thing in things]
            changes["relation"] = {"objects": [{**thing, "centre": place}
                                               for thing, place in zip(things, places[1:] + places[:1])]}
        if scene["kind"] == "count" and len(things) > 1:
            (centres, size), *_ = layouts(scene, len(things) - 1)
            changes["count"] = {"objects": [{**things[0], "centre": centre, "size": size} for centre in centres]}
        taken = {source.items[row]["base"] for row in rows}
        other = next(row for row in promises.rows[things[0]["style"]] if source.items[row]["base"] not in taken)
        strange = {"id": source.items[other]["id"]}
        if scene["kind"] == "count":
            changes["object"] = {"objects": [{**thing, **strange} for thing in things]}
        else:
            changes["object"] = {"objects": [{**things[0], **strange}, *things[1:]]}
        for name, change in changes.items():
            score = answered(promises, index, redrawn(source, scene, **change))
            broken[name, "itself"] += not all(score[name])
            broken[name, "others"] += sum(not all(score[one]) for one in ("background", "mood"))
            broken[name, "all"] += 1
    for name in ("relation", "count", "object"):
        assert broken[name, "all"] >= 5
        assert broken[name, "itself"] >= 0.9 * broken[name, "all"], (name, broken)
        assert broken[name, "others"] <= 0.25 * broken[name, "all"], (name, broken)


def test_styles_and_backgrounds_of_single_things(source, promises):
    singles = [i for i in range(len(source)) if source.locate(i)[0] is not None]
    for index in singles:
        row = source.locate(index)[0]
        twins = promises._in_all_styles(row)
        colour = source.background(row)
        if len(twins) > 1:
            wrong = over(source.rgba(twins[1]), canvas({"kind": "plain", "colours": [colour]}, SIZE))
            score = answered(promises, index, wrong)
            assert score["style"] == [False] and score["object"] == [True]
        if colour != "white":
            wrong = over(source.rgba(row), canvas({"kind": "plain", "colours": ["white"]}, SIZE))
            assert answered(promises, index, wrong)["background"] == [False]


def test_a_shifted_image_is_the_same_image(source, promises):
    """A promise is about what is shown, not about the pixel it stands on; more than the reach counts."""
    image = np.zeros((3, SIZE, SIZE), np.uint8)
    image[:, 10:20, 10:20] = 255
    moved = np.roll(image, 2 * REACH, axis=2)
    near, far = (answer_distances(shifted_vectors(one), candidate_vectors(image[None]))[0]
                 for one in (moved, np.roll(moved, 8, axis=1)))
    assert near == pytest.approx(0, abs=1e-2) and far > 30


def test_distances_are_mean_squares():
    rng = np.random.default_rng(0)
    views, candidates = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=(5, 12)).astype(np.float32)
    expected = ((views[:, None] - candidates[None]) ** 2).mean(-1).min(0)
    np.testing.assert_allclose(answer_distances(views, candidates), expected, rtol=1e-5)


def test_questions_need_another_answer():
    one, two = np.zeros((3, 4, 4), np.uint8), np.ones((3, 4, 4), np.uint8)
    assert make_question("style", [[one]]) is None and make_question("style", [[one], [one]]) is None
    # the second can look as the first, the last is there
    asked = make_question("style", [[one], [two, one], [two], [two]])
    assert asked is not None and asked.answers == 2 and asked.owners.tolist() == [0, 1]
    assert count_nearer_answers([asked], [one, two]) == [[0], [1]]
    for bad in (np.zeros((1, 3, 5, 5), np.uint8), np.zeros((1, 3, 4, 4)), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="images: .*valid: uint8"):
            candidate_vectors(bad)


def test_moods_are_measured_from_their_palettes(source):
    """A border in a colour of the palette is 0 away; black from white is 100 in CIELAB."""
    colour = np.array(COLOURS[MOODS[next(iter(MOODS))].colours[0]], np.uint8)
    image = np.broadcast_to(colour[:, None, None], (3, SIZE, SIZE))
    assert palette_distance(image, [colour.tolist(), [0, 0, 0]]) == pytest.approx(0, abs=1e-3)
    assert palette_distance(np.zeros((3, SIZE, SIZE), np.uint8), [[255, 255, 255]]) == pytest.approx(100, abs=0.1)
    inside = np.array(image)
    inside[:, SIZE // 4:-SIZE // 4, SIZE // 4:-SIZE // 4] = 0  # what stands inside does not count
    assert palette_distance(inside, [colour.tolist()]) == pytest.approx(0, abs=1e-3)
    lit = [i for i in scenes(source) if source.scene(source.locate(i)[1])["mood"]]
    found = mood_distances(source, lit, torch.stack([source[i]["image"] for i in lit]))
    black = mood_distances(source, lit, torch.zeros(len(lit), 3, SIZE, SIZE, dtype=torch.uint8))
    assert set(found) == {"all", *(source.scene(source.locate(i)[1])["mood"] for i in lit)}
    assert found["all"].value < 0.5 * black["all"].value
    assert mood_distances(source, [], []) == {}


def test_groups_name_what_was_held_out(source, promises):
    groups = Counter(group for i in range(len(source)) for group in promises.groups(i, source.captions(i)[0]))
    assert groups["single object"] and groups["scene of two things"] and groups["count"]
    assert any(name.startswith("relation: ") for name in groups) and any(name.startswith("mood: ") for name in groups)
    assert groups["unseen thing"] or groups["unseen pair of thing and style"]
