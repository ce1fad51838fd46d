"""Groups of prompts and promises: each counts what it names and nothing else; moods are measured in CIELAB."""
import numpy as np
import pytest

from data.shapes.render import render, vocabulary
from data.shapes.shapes import Shapes, ShapesConfig
from eval.scenes.groups import group_table, mood_distances, promises_kept, prompt_groups, value_table
from eval.scenes.reader import SceneReader
from eval.scenes.score import ATTRIBUTES, MEASURES, score_scene, score_table


@pytest.fixture(scope="module")
def items():
    source = Shapes(ShapesConfig(size=48, lattice=8), "test")
    return [source[index] for index in range(150)]


@pytest.fixture(scope="module")
def rows(items):
    """(facts, score) of the drawn images against what their captions promise."""
    reader = SceneReader(vocabulary())
    found = []
    for item in items:
        facts = item["facts"][item["phrasing"]]
        found.append((facts, score_scene(reader(item["image"]), facts)))
    return found


def test_every_promise_is_in_one_row_of_its_value(rows):
    for facts, score in rows:
        listed = promises_kept(facts, score)
        assert sum(right for _, right in listed) == sum(sum(score[name]) for name in ATTRIBUTES)
        assert len(listed) == sum(len(score[name]) for name in ATTRIBUTES)
    table = value_table(rows)
    assert {name.split(": ")[0] for name in table} == set(ATTRIBUTES)
    assert {f"relation: {name}" for name in ("above", "below", "left of", "right of", "inside")} <= set(table)
    assert all(rate.value > 0.97 for rate in table.values())
    assert sum(rate.promises for name, rate in table.items() if name.startswith("colour")) == sum(
        len(facts["objects"]) for facts, _ in rows)


def test_what_is_wrong_shows_in_its_row_alone(items):
    """Every red object is drawn green: the red rows fall to 0, no other colour does."""
    reader, found = SceneReader(vocabulary()), []
    for item in items:
        scene = {**item["scene"], "objects": [
            {**thing, "colour": "green" if thing["colour"] == "red" else thing["colour"]}
            for thing in item["scene"]["objects"]]}
        facts = item["facts"][item["phrasing"]]
        found.append((facts, score_scene(reader(render(scene, 48)), facts)))
    table = value_table(found)
    assert table["colour: red"].value == 0 and table["colour: red"].promises > 5
    assert min(rate.value for name, rate in table.items() if name != "colour: red") > 0.9


def test_prompts_are_grouped_by_what_makes_them_hard(items, rows):
    captions = [item["caption"] for item in items]
    table = group_table(rows, captions)
    assert set(table) == {"all", "one object", "two objects", "three objects", "single", "pair", "relation", "count",
                          "triple", "inside", "unseen pair", "long caption"}
    assert table["long caption"]["scene"].promises == sum(len(caption.split()) >= 13 for caption in captions)
    assert sum(table[name]["scene"].promises for name in ("one object", "two objects", "three objects")) == 150
    unseen = [facts for facts, _ in rows if "unseen pair" in facts["tags"]]
    assert table["unseen pair"]["scene"].promises == len(unseen) and "unseen pair" in prompt_groups(unseen[0], "a b")
    with pytest.raises(ValueError, match="rows, captions: 150 and 1"):
        group_table(rows, ["one"])
    with pytest.raises(ValueError, match="rows: 0"):
        value_table([])


def test_moods_are_measured_by_their_distance(items):
    """Drawn images are within rounding of their mood; the same scenes in another mood are far from it."""
    moody = [item for item in items if item["scene"]["mood"]]
    facts = [{"mood": item["scene"]["mood"]} for item in moody]
    right = mood_distances([item["image"] for item in moody], facts, vocabulary())
    assert set(right) == {"all", "calm", "cheerful", "fiery", "gloomy"} and right["all"].value < 1.0
    other = {"calm": "fiery", "fiery": "calm", "gloomy": "cheerful", "cheerful": "gloomy"}
    swapped = [render({**item["scene"], "mood": other[item["scene"]["mood"]]}, 48) for item in moody]
    assert mood_distances(swapped, facts, vocabulary())["all"].low > 20
    grey = [np.full((3, 48, 48), 128, np.uint8)]
    one = mood_distances(grey, [{"mood": "gloomy"}], vocabulary())["gloomy"]
    assert one.value == pytest.approx(SceneReader(vocabulary()).distances(grey[0])["gloomy"])
    assert mood_distances(grey, [{"mood": None}], vocabulary()) == {}


def test_where_all_or_none_is_kept_the_interval_is_not_empty():
    """Ten prompts of ten that keep a promise do not show that all do (Clopper and Pearson 1934)."""
    facts = {"tags": ()}
    rows = [(facts, {name: [True] if name == "scene" else [name == "colour"] for name in MEASURES[1:]})
            for _ in range(10)]
    rates = score_table(rows)["all"]
    assert rates["colour"].value == rates["colour"].high == 1 and rates["shape"].value == rates["shape"].low == 0
    assert rates["colour"].low == pytest.approx(0.025 ** 0.1) and rates["shape"].high == pytest.approx(1 - 0.025 ** 0.1)
