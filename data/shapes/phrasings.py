"""Phrasings of a scene graph, each with the facts it promises.

Facts are a plain dict of JSON types. What a caption does not name is None, and free:

    kind        the scene's kind
    tags        names under which a score is reported: the kind, its relations, "mood", "unseen pair"
    count       how many objects the picture holds
    objects     [{"colour", "shape", "size"}], None where not named
    relations   [[subject, relation, object]], indices into objects
    background  or None
    mood        or None
"""

from typing import Any, Callable

from data.shapes.scene_graph import INVERSE, Scene, is_unseen

Facts = dict[str, Any]
Body = Callable[[Scene, bool], str]

NUMBERS = ("zero", "one", "two", "three")
PLACES = {"above": "above", "below": "below", "left of": "to the left of", "right of": "to the right of"}
PLURALS = {"cross": "crosses"}


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(thing: dict[str, Any], sized: bool) -> str:
    return f"{thing['size']} {thing['colour']} {thing['shape']}" if sized else f"{thing['colour']} {thing['shape']}"


def _noun(scene: Scene, index: int, sized: bool) -> str:
    return with_article(_name(scene["objects"][index], sized))


def _listed(order: tuple[int, ...]) -> Body:
    def body(scene: Scene, sized: bool) -> str:
        *first, last = (_noun(scene, index, sized) for index in order)
        return f"{', '.join(first)} and {last}"
    return body


def _single(scene: Scene, sized: bool) -> str:
    return _noun(scene, 0, sized)


def _one(scene: Scene, sized: bool) -> str:
    return f"one {_name(scene['objects'][0], sized)}"


def _counted(scene: Scene, sized: bool) -> str:
    thing = scene["objects"][0]
    plural = PLURALS.get(thing["shape"], thing["shape"] + "s")
    size = f"{thing['size']} " if sized else ""
    return f"{NUMBERS[len(scene['objects'])]} {size}{thing['colour']} {plural}"


def _related(places: dict[str, str], inverse: bool) -> Body:
    def body(scene: Scene, sized: bool) -> str:
        subject, relation, other = scene["relations"][0]
        if inverse:
            subject, relation, other = other, INVERSE[relation], subject
        return f"{_noun(scene, subject, sized)} {places[relation]} {_noun(scene, other, sized)}"
    return body


def _in_order(scene: Scene, sized: bool) -> str:
    """Three objects in a row."""
    direction = "from left to right" if scene["relations"][0][1] == "left of" else "from top to bottom"
    return f"{_listed((0, 1, 2))(scene, sized)} {direction}"


def _in_order_reversed(scene: Scene, sized: bool) -> str:
    direction = "from right to left" if scene["relations"][0][1] == "left of" else "from bottom to top"
    return f"{_listed((2, 1, 0))(scene, sized)} {direction}"


def _containing(scene: Scene, sized: bool) -> str:
    return f"{_noun(scene, 1, sized)} with {_noun(scene, 0, sized)} inside"


def _bodies(scene: Scene) -> tuple[Body, Body, Body]:
    """Three ways to say what there is and how it stands, the second from the other end."""
    kind = scene["kind"]
    if kind == "single":
        return _single, _one, _single
    if kind == "count":
        return _counted, _counted, _counted
    if kind == "relation":
        short = {place: place for place in PLACES}
        return _related(PLACES, False), _related(PLACES, True), _related(short, False)
    if kind == "inside":
        return _related({"inside": "inside"}, False), _containing, _related({"inside": "in"}, False)
    if kind == "pair":
        return _listed((0, 1)), _listed((1, 0)), _listed((0, 1))
    if scene["relations"]:
        return _in_order, _in_order_reversed, _in_order
    return _listed((0, 1, 2)), _listed((1, 2, 0)), _listed((2, 0, 1))


def _set(scene: Scene, body: str, way: int) -> str:
    """`body` with the background or the mood named, in one of three ways."""
    mood, background = scene["mood"], scene["background"]
    if mood:
        ways = (f"{with_article(mood)} picture of {body}", f"{body}, {mood} mood",
                f"{with_article(mood)} scene: {body}")
    else:
        ways = (f"{body} on {with_article(background)} background", f"{body}, {background} background",
                f"{with_article(background)} picture with {body}")
    return ways[way]


def facts_of(scene: Scene, sized: bool, setting: bool, inverse: bool = False) -> Facts:
    """What a caption promises that names sizes or not, the background or mood or not, relations from the other end."""
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
    of where it is drawn, in units of the picture's side. Larger ones first: what is inside comes after what holds it.
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
    """Every caption of a scene graph with its facts, short ones first; no two captions are equal."""
    first, second, third = _bodies(scene)
    ways = [(first, False, None), (second, False, None), (first, True, None), (third, False, 0), (second, False, 1),
            (first, True, 2), (second, True, 0), (third, True, 1)]
    found: dict[str, Facts] = {}
    for body, sized, way in ways:
        text = body(scene, sized)
        facts = facts_of(scene, sized, way is not None, inverse=body is second)
        found.setdefault(text if way is None else _set(scene, text, way), facts)
    return list(found.items())
