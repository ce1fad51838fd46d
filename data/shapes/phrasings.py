"""The phrasings of a scene graph, each with the facts that it promises.

Facts are a plain dict of JSON types. A fact that the caption does not name is None and may take any value:

    kind        the scene's kind
    tags        names under which scores are reported: the kind, its relations, "mood", "unseen pair"
    count       number of objects in the image
    objects     [{"colour", "shape", "size"}], None where not named
    relations   [[subject, relation, object]], indices into objects
    background  or None
    mood        or None
"""

from itertools import combinations
from typing import Any, Callable

from data.shapes.scene_graph import COLOURS, INVERSE, SHAPES, Scene, is_unseen

Facts = dict[str, Any]
Body = Callable[[Scene, bool], str]

NUMBERS = ("zero", "one", "two", "three")
PLACES = {"above": "above", "below": "below", "left of": "to the left of", "right of": "to the right of"}
PLURALS = {"cross": "crosses"}


def with_article(words: str) -> str:
    """The words with the indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(thing: dict[str, Any], sized: bool) -> str:
    return f"{thing['size']} {thing['colour']} {thing['shape']}" if sized else f"{thing['colour']} {thing['shape']}"


def _noun(scene: Scene, index: int, sized: bool) -> str:
    return with_article(_name(scene["objects"][index], sized))


def _enumeration(order: tuple[int, ...]) -> Body:
    def body(scene: Scene, sized: bool) -> str:
        *first, last = (_noun(scene, index, sized) for index in order)
        return f"{', '.join(first)} and {last}"
    return body


def _single_phrase(scene: Scene, sized: bool) -> str:
    return _noun(scene, 0, sized)


def _one_phrase(scene: Scene, sized: bool) -> str:
    return f"one {_name(scene['objects'][0], sized)}"


def _count_phrase(scene: Scene, sized: bool) -> str:
    thing = scene["objects"][0]
    plural = PLURALS.get(thing["shape"], thing["shape"] + "s")
    size = f"{thing['size']} " if sized else ""
    return f"{NUMBERS[len(scene['objects'])]} {size}{thing['colour']} {plural}"


def _relation_phrase(places: dict[str, str], inverse: bool) -> Body:
    def body(scene: Scene, sized: bool) -> str:
        subject, relation, other = scene["relations"][0]
        if inverse:
            subject, relation, other = other, INVERSE[relation], subject
        return f"{_noun(scene, subject, sized)} {places[relation]} {_noun(scene, other, sized)}"
    return body


def _row_phrase(scene: Scene, sized: bool) -> str:
    """Three objects in a row."""
    direction = "from left to right" if scene["relations"][0][1] == "left of" else "from top to bottom"
    return f"{_enumeration((0, 1, 2))(scene, sized)} {direction}"


def _reversed_row_phrase(scene: Scene, sized: bool) -> str:
    direction = "from right to left" if scene["relations"][0][1] == "left of" else "from bottom to top"
    return f"{_enumeration((2, 1, 0))(scene, sized)} {direction}"


def _container_phrase(scene: Scene, sized: bool) -> str:
    return f"{_noun(scene, 1, sized)} with {_noun(scene, 0, sized)} inside"


def _bodies(scene: Scene) -> tuple[Body, Body, Body]:
    """Three ways to name the objects and their arrangement; the second states relations the other way round."""
    kind = scene["kind"]
    if kind == "single":
        return _single_phrase, _one_phrase, _single_phrase
    if kind == "count":
        return _count_phrase, _count_phrase, _count_phrase
    if kind == "relation":
        short = {place: place for place in PLACES}
        return _relation_phrase(PLACES, False), _relation_phrase(PLACES, True), _relation_phrase(short, False)
    if kind == "inside":
        first, third = (_relation_phrase({"inside": word}, False) for word in ("inside", "in"))
        return first, _container_phrase, third
    if kind == "pair":
        return _enumeration((0, 1)), _enumeration((1, 0)), _enumeration((0, 1))
    if scene["relations"]:
        return _row_phrase, _reversed_row_phrase, _row_phrase
    return _enumeration((0, 1, 2)), _enumeration((1, 2, 0)), _enumeration((2, 0, 1))


def _with_setting(scene: Scene, body: str, way: int) -> str:
    """`body` with the background or the mood, in one of three ways."""
    mood, background = scene["mood"], scene["background"]
    if mood:
        ways = (f"{with_article(mood)} picture of {body}", f"{body}, {mood} mood",
                f"{with_article(mood)} scene: {body}")
    else:
        ways = (f"{body} on {with_article(background)} background", f"{body}, {background} background",
                f"{with_article(background)} picture with {body}")
    return ways[way]


def facts_of(scene: Scene, sized: bool, setting: bool, inverse: bool = False) -> Facts:
    """The facts of a caption: `sized` says whether it names sizes, `setting` whether it names background or mood,
    `inverse` whether it states relations the other way round."""
    relations = [list(relation) for relation in scene["relations"]]
    if inverse and scene["kind"] != "inside":
        relations = [[other, INVERSE[relation], subject] for subject, relation, other in relations]
    tags = list(dict.fromkeys([scene["kind"], *(relation for _, relation, _ in relations)]))
    if any(is_unseen(thing) for thing in scene["objects"]):
        tags.append("unseen pair")
    if setting and scene["mood"]:
        tags.append("mood")
    objects = [{"colour": thing["colour"], "shape": thing["shape"], "size": thing["size"] if sized else None}
               for thing in scene["objects"]]
    return {"kind": scene["kind"], "tags": tags, "count": len(objects), "objects": objects,
            "relations": relations,
            "background": scene["background"] if setting else None, "mood": scene["mood"] if setting else None}


def named_places(scene: Scene, caption: str) -> list[tuple[int, int, float, float, float]]:
    """For each object that a caption of the scene names: the characters (from, to) of its words, and x, y and radius
    of where it is drawn, in units of the image's side. Larger ones first: what is inside comes after what holds it.
    """
    found = []
    for thing in sorted(scene["objects"], key=lambda thing: -thing["radius"]):
        name = _name(thing, sized=False)
        begin = caption.find(name)
        if begin >= 0:  # the plural begins with the singular, and no two objects share colour and shape unless counted
            sized = f"{thing['size']} "
            first = begin - len(sized) if caption[:begin].endswith(sized) else begin
            found.append((first, begin + len(name), *thing["centre"], thing["radius"]))
    return found


def phrasings(scene: Scene) -> list[tuple[str, Facts]]:
    """All captions of a scene graph with their facts, short ones first and without repetitions."""
    first, second, third = _bodies(scene)
    ways = [(first, False, None), (second, False, None), (first, True, None), (third, False, 0), (second, False, 1),
            (first, True, 2), (second, True, 0), (third, True, 1)]
    found: dict[str, Facts] = {}
    for body, sized, way in ways:
        text = body(scene, sized)
        facts = facts_of(scene, sized, way is not None, inverse=body is second)
        found.setdefault(text if way is None else _with_setting(scene, text, way), facts)
    return list(found.items())


def word_pairs() -> dict[str, list[tuple[str, str]]]:
    """Pairs of captions that differ in one word, by what the word names: all pairs of kinds of shapes and of colours,
    and the relations with their opposites."""
    return {"kind": list(combinations((f"a red {shape}" for shape in SHAPES), 2)),
            "colour": list(combinations((f"one {colour} square" for colour in COLOURS), 2)),
            "relation": [("a red square above a blue circle", "a red square below a blue circle"),
                         ("a red square left of a blue circle", "a red square right of a blue circle")]}
