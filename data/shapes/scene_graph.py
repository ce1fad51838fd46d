"""Scene graphs of the `shapes` source: their vocabulary, their random generation, and their splits.

A scene graph is a plain dict of JSON types:

    kind        one of KINDS
    background  a key of BACKGROUNDS, or None when a mood sets it
    mood        a member of MOODS, or None
    objects     [{"colour", "shape", "size", "centre": [x, y], "radius"}], lengths in units of the image's side,
                y down
    relations   [[subject, relation, object]], subject and object are indices into objects

`draw_graph` chooses everything that captions can name; `place` then adds centres and radii, which captions never name.
Only `Random.random()` is called, since Python promises to keep its stream across versions and platforms.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from random import Random
from typing import Any, Literal, Sequence, TypeVar

Item = TypeVar("Item")
Scene = dict[str, Any]
Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
KINDS = ("single", "relation", "pair", "count", "triple", "inside")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "moon")
SIZES = {"small": 0.11, "medium": 0.155, "large": 0.21}  # radius: about half of the shape's bounding box
BACKGROUNDS = ("white", "grey", "black", "beige")
MOODS = ("gloomy", "cheerful", "calm", "fiery")
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of", "inside": "around"}
# The colour and the shape are each common in training; together they occur in the test split only.
UNSEEN_PAIRS = (("purple", "star"), ("green", "heart"), ("orange", "moon"), ("blue", "triangle"))
# Shapes with room for another one, and the place (x, y) of that room, in radii from the centre.
CONTAINERS = {"circle": (0.0, 0.0), "square": (0.0, 0.0), "diamond": (0.0, 0.0), "heart": (0.0, -0.14),
              "triangle": (0.0, 0.27)}
CONTAINER_RADIUS = 0.26  # still nearest to "large"; leaves a rim around a small shape

EXTENT = 1.06  # no shape reaches further than this many radii from its centre along x or y
MARGIN = 0.02
GAP = 0.03
RADIUS_JITTER = 0.04
VALIDATION_SHARE, TEST_SHARE = 0.06, 0.10


@dataclass(frozen=True)
class SceneMix:
    """Relative weight of each kind of scene."""

    single: float = 0.25
    relation: float = 0.30
    pair: float = 0.10
    count: float = 0.15
    triple: float = 0.12
    inside: float = 0.08

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name}: value {getattr(self, field.name)}; valid: a number >= 0")
        if not any(getattr(self, kind) > 0 for kind in KINDS):
            raise ValueError(f"all weights are 0; valid: at least one of {', '.join(KINDS)} above 0")


def stream(*key: object) -> Random:
    """A random stream that is a function of `key`, the same on every platform."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "big"))


def pick(rng: Random, choices: Sequence[Item]) -> Item:
    """A uniformly random choice."""
    return choices[int(rng.random() * len(choices))]


def pick_kind(rng: Random, mix: SceneMix) -> str:
    """A random kind of scene with the weights of `mix`."""
    weights = [getattr(mix, kind) for kind in KINDS]
    remaining = rng.random() * sum(weights)
    for kind, weight in zip(KINDS, weights):
        remaining -= weight
        if remaining < 0:
            return kind
    return max(zip(weights, KINDS))[1]  # reached only through rounding


def is_unseen(thing: dict[str, Any]) -> bool:
    """Whether training never shows an object of this colour and shape."""
    return (thing["colour"], thing["shape"]) in UNSEEN_PAIRS


def _objects(rng: Random, sizes: Sequence[str]) -> list[dict[str, Any]]:
    """One object for each size, no two alike in both colour and shape."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < len(sizes):
        pair = (pick(rng, COLOURS), pick(rng, SHAPES))
        if pair not in pairs:
            pairs.append(pair)
    return [{"colour": colour, "shape": shape, "size": size} for (colour, shape), size in zip(pairs, sizes)]


def _draw_single(rng: Random) -> Scene:
    return {"objects": _objects(rng, [pick(rng, list(SIZES))]), "relations": []}


def _draw_pair(rng: Random) -> Scene:
    return {"objects": _objects(rng, [pick(rng, list(SIZES)) for _ in range(2)]), "relations": []}


def _draw_relation(rng: Random) -> Scene:
    return _draw_pair(rng) | {"relations": [[0, pick(rng, RELATIONS), 1]]}


def _draw_count(rng: Random) -> Scene:
    number = 2 + int(rng.random() * 2)
    sizes = list(SIZES) if number == 2 else ["small", "medium"]  # three large ones do not fit
    thing = _objects(rng, [pick(rng, sizes)])[0]
    return {"objects": [dict(thing) for _ in range(number)], "relations": []}


def _draw_triple(rng: Random) -> Scene:
    if rng.random() < 0.5:
        return {"objects": _objects(rng, [pick(rng, ("small", "medium")) for _ in range(3)]), "relations": []}
    sizes = ["small", "small", "small"]
    grown = int(rng.random() * 4)  # one medium shape fits into a row of three, two do not
    if grown < 3:
        sizes[grown] = "medium"
    relation = pick(rng, ("left of", "above"))
    return {"objects": _objects(rng, sizes), "relations": [[0, relation, 1], [1, relation, 2]]}


def _draw_inside(rng: Random) -> Scene:
    while True:
        inner, outer = _objects(rng, ["small", "large"])
        if outer["shape"] in CONTAINERS and inner["colour"] != outer["colour"]:
            return {"objects": [inner, outer], "relations": [[0, "inside", 1]]}


_DRAW = {"single": _draw_single, "relation": _draw_relation, "pair": _draw_pair, "count": _draw_count,
         "triple": _draw_triple, "inside": _draw_inside}


def draw_graph(rng: Random, mix: SceneMix, mood_share: float) -> Scene:
    """A random scene graph with all named attributes, without centres and radii."""
    kind = pick_kind(rng, mix)
    scene = {"kind": kind, "background": None, "mood": None} | _DRAW[kind](rng)
    if rng.random() < mood_share:
        scene["mood"] = pick(rng, MOODS)
    else:
        scene["background"] = pick(rng, BACKGROUNDS)
    return scene


def graph_key(scene: Scene) -> str:
    """The canonical form of a graph; the splits share no key.

    "A above B" and "B below A" have the same key. The key of several different objects omits size, background and
    mood, so that not even a caption that omits them occurs in two splits.
    """
    objects = scene["objects"]
    names = [f"{thing['colour']} {thing['shape']}" for thing in objects]
    if scene["kind"] in ("single", "count"):
        return f"{len(names)} {objects[0]['size']} {names[0]} {scene['background'] or scene['mood']}"
    if not scene["relations"]:
        return " + ".join(sorted(names))
    edges = []
    for subject, relation, other in scene["relations"]:
        if relation in ("below", "right of"):
            subject, relation, other = other, INVERSE[relation], subject
        edges.append(f"{names[subject]} {relation} {names[other]}")
    return " & ".join(sorted(edges))


def split_of(scene: Scene) -> Split:
    """The split of a graph: graphs with unseen pairs belong to the test split, others go by a hash of their key."""
    if any(is_unseen(thing) for thing in scene["objects"]):
        return "test"
    digest = hashlib.blake2b(graph_key(scene).encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < VALIDATION_SHARE:
        return "validation"
    return "test" if position < VALIDATION_SHARE + TEST_SHARE else "train"


def draw_scene(rng: Random, split: Split, mix: SceneMix, mood_share: float, unseen_share: float,
               lattice: int = 0) -> Scene:
    """A random placed scene of `split`; the share `unseen_share` of test scenes holds a pair unseen in training."""
    unseen = split == "test" and rng.random() < unseen_share
    while True:
        scene = draw_graph(rng, mix, mood_share)
        if unseen:
            _force_unseen(rng, scene)
        if split_of(scene) == split and any(map(is_unseen, scene["objects"])) == unseen:
            return place(rng, scene, lattice)


def _force_unseen(rng: Random, scene: Scene) -> None:
    colour, shape = pick(rng, UNSEEN_PAIRS)
    objects = scene["objects"]
    if scene["kind"] == "inside":
        chosen = objects[:1] if colour != objects[1]["colour"] else []
    else:
        chosen = objects if scene["kind"] == "count" else [pick(rng, objects)]
    for thing in chosen:
        if not any(other["colour"] == colour and other["shape"] == shape for other in objects if other is not thing) \
                or scene["kind"] == "count":
            thing["colour"], thing["shape"] = colour, shape


def place(rng: Random, scene: Scene, lattice: int = 0) -> Scene:
    """Add a centre and a radius to every object, such that relations hold and only contained objects overlap.

    With a ``lattice`` the centres lie on multiples of 1 / lattice and the radii are those of SIZES, so that renderings
    of an object differ by whole steps only.
    """
    while True:
        _place_freely(rng, scene, 0.0 if lattice else RADIUS_JITTER)
        if not lattice or _snap_to_lattice(scene, lattice):
            return scene


def has_room(lattice: int) -> bool:
    """Whether the longest rows, of two large objects or of three with a medium one, fit on multiples of 1 / lattice."""
    rows = (("large", "large"), ("medium", "small", "small"), ("small", "medium", "small"),
            ("small", "small", "medium"))
    for row in rows:
        reaches = [EXTENT * SIZES[size] for size in row]
        centre = math.ceil(reaches[0] * lattice)
        for left, right in zip(reaches, reaches[1:]):
            centre += math.ceil((left + right + GAP / 2) * lattice)
        if centre / lattice > 1 - reaches[-1]:
            return False
    return True


def _snap_to_lattice(scene: Scene, lattice: int) -> bool:
    """Move every centre to the lattice, a contained object together with its container; False if they do not fit."""
    objects = scene["objects"]
    for thing in objects:
        thing["centre"] = [round(round(value * lattice) / lattice, 5) for value in thing["centre"]]
    if scene["kind"] == "inside":
        inner, outer = objects
        inner["centre"] = [round(value + outer["radius"] * shift, 5)
                           for value, shift in zip(outer["centre"], CONTAINERS[outer["shape"]])]
        return True
    reaches = [EXTENT * thing["radius"] for thing in objects]
    inside = all(reach <= value <= 1 - reach for thing, reach in zip(objects, reaches) for value in thing["centre"])
    pairs = [(i, j) for j in range(len(objects)) for i in range(j)]
    return inside and all(max(abs(a - b) for a, b in zip(objects[i]["centre"], objects[j]["centre"]))
                          >= reaches[i] + reaches[j] + GAP / 2 for i, j in pairs)


def _place_freely(rng: Random, scene: Scene, jitter: float) -> None:
    objects, kind = scene["objects"], scene["kind"]
    for thing in objects:
        radius = CONTAINER_RADIUS if kind == "inside" and thing is objects[1] else SIZES[thing["size"]]
        thing["radius"] = radius * (1 + jitter * (2 * rng.random() - 1))
    if kind == "inside":
        _place_inside(rng, *objects)
    elif len(objects) == 1:
        objects[0]["centre"] = [0.5 + 0.2 * (rng.random() - 0.5) for _ in range(2)]
    elif scene["relations"]:
        relation = scene["relations"][0][1]
        order = objects[::-1] if relation in ("below", "right of") else objects
        _place_line(rng, order, 0 if relation in ("left of", "right of") else 1, wander=0.06)
    elif len(objects) == 2:
        _place_line(rng, objects if rng.random() < 0.5 else objects[::-1], int(rng.random() * 2), wander=0.5)
    else:
        _place_triangle(rng, objects)
    for thing in objects:
        thing["centre"] = [round(value, 5) for value in thing["centre"]]
        thing["radius"] = round(thing["radius"], 5)


def _spread(rng: Random, reaches: Sequence[float]) -> list[float]:
    """Centres of intervals of half-widths `reaches` in order along [0, 1], with the free length divided at random."""
    free = 1 - 2 * MARGIN - GAP * (len(reaches) - 1) - 2 * sum(reaches)
    cuts = sorted(rng.random() * free for _ in reaches)
    centres, position, used = [], MARGIN, 0.0
    for reach, cut in zip(reaches, cuts):
        position += cut - used + reach
        centres.append(position)
        position, used = position + reach + GAP, cut
    return centres


def _place_line(rng: Random, objects: Sequence[dict[str, Any]], axis: int, wander: float) -> None:
    """Place objects in order along `axis` (0 is x, 1 is y), each at most `wander` off the middle across it."""
    reaches = [EXTENT * thing["radius"] for thing in objects]
    for thing, reach, along in zip(objects, reaches, _spread(rng, reaches)):
        room = min(wander, 0.5 - MARGIN - reach)
        across = 0.5 + room * (2 * rng.random() - 1)
        thing["centre"] = [along, across] if axis == 0 else [across, along]


def _place_triangle(rng: Random, objects: Sequence[dict[str, Any]]) -> None:
    """Place two objects on one side (top, bottom, left or right) and the third on the other."""
    axis, flip = int(rng.random() * 2), rng.random() < 0.5
    first = int(rng.random() * 3)
    alone, pair = objects[first], [thing for i, thing in enumerate(objects) if i != first]
    reaches = [EXTENT * max(thing["radius"] for thing in pair), EXTENT * alone["radius"]]
    across_pair, across_alone = _spread(rng, reaches[::-1] if flip else reaches)[:: -1 if flip else 1]
    along_pair = _spread(rng, [EXTENT * thing["radius"] for thing in pair])
    along_alone = 0.5 + 0.2 * (2 * rng.random() - 1)
    for thing, along, across in zip([*pair, alone], [*along_pair, along_alone], [across_pair] * 2 + [across_alone]):
        thing["centre"] = [along, across] if axis == 0 else [across, along]


def _place_inside(rng: Random, inner: dict[str, Any], outer: dict[str, Any]) -> None:
    outer["centre"] = [0.5 + 0.2 * (rng.random() - 0.5) for _ in range(2)]
    inner["centre"] = [outer["centre"][axis] + outer["radius"] * CONTAINERS[outer["shape"]][axis]
                       + 0.01 * (2 * rng.random() - 1) for axis in range(2)]
