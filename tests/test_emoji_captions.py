"""The English of the emoji captions."""

import pytest

from data.emoji.emoji import STYLES
from data.emoji.phrasings import STYLE_WORDS, article, noun, plural, scene_captions, single_captions


@pytest.mark.parametrize("label, words", [
    ("red apple", "a red apple"), ("octopus", "an octopus"), ("hourglass done", "an hourglass done"),
    ("unicorn", "a unicorn"), ("grapes", "grapes"), ("bread", "bread"), ("eight o\u2019clock", "eight o'clock"),
    ("flag: Chad", "a flag of Chad"), ("woman: dark skin tone, red hair", "a woman with dark skin tone and red hair"),
    ("man walking: facing right", "a man walking facing right"), ("woman: bald", "a bald woman"),
    ("family: man, woman, girl", "a family of man, woman and girl"), ("keycap: 5", "a keycap 5"), ("Leo", "Leo"),
    ("men wrestling", "men wrestling"), ("rhinoceros", "a rhinoceros"),
    ("man lifting weights", "a man lifting weights"),
])
def test_noun_phrases(label, words):
    assert article(noun(label)) == words


@pytest.mark.parametrize("label, words", [
    ("red apple", "red apples"), ("mouse", "mice"), ("strawberry", "strawberries"), ("fox", "foxes"), ("fish", "fish"),
    ("monkey", "monkeys"), ("maple leaf", "maple leaves"), ("grapes", ""), ("salt", ""), ("sun behind cloud", ""),
    ("T-Rex", ""), ("canned food", "canned foods"),
])
def test_plurals(label, words):
    assert plural({"label": label, "group": "food & drink", "subgroup": "fruit"}) == words
    assert plural({"label": label, "group": "people & body", "subgroup": "person"}) == ""


def test_captions_of_a_single_emoji():
    item = {"label": "red apple", "style": "openmoji", "tags": ["apple", "fruit", "health"], "subgroup": "fruit"}
    assert single_captions(item, "white") == (
        "a red apple, openmoji style", "an emoji of a red apple, openmoji style", "an openmoji emoji of a red apple",
        "red apple, outlined style", "fruit, health, outlined style")
    assert single_captions(item, "orange")[0] == "a red apple on an orange background, openmoji style"
    assert {STYLE_WORDS[style][0] for style in STYLES} == set(STYLES)


def test_captions_of_a_scene_say_what_is_there_both_ways_round():
    things = [{"style": "flat"}, {"style": "flat"}, {"style": "flat"}]
    scene = {"kind": "relation", "objects": things, "relations": [[0, "above", 1], [2, "left of", 1]], "mood": "",
             "background": {"kind": "columns", "colours": ["red", "orange"]}}
    said = scene_captions(scene, ["cat", "apple", "owl"], "")
    where = "on a background with a red left and an orange right, flat style"
    assert said[0] == f"a cat above an apple and an owl to the left of an apple {where}"
    assert said[1] == f"an apple below a cat and an apple to the right of an owl {where}"
    gloomy = {**scene, "kind": "count", "relations": [], "mood": "gloomy",
              "background": {"kind": "plain", "colours": ["navy"]}}
    said = scene_captions(gloomy, ["cat"] * 3, "cats")
    assert said[0] == "a gloomy scene of three cats on a navy background, flat style"
