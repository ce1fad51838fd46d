"""Scenes of one to three emoji: their arrangement, background and mood, and the image of a scene.

A scene is a plain dictionary that describes everything in the image. Positions and sizes are fractions of the side, x
to the right and y down, so a scene can be rendered at any resolution. Axis letters: S side of the image, P side of an
object, both in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from PIL import Image

COLOURS = {
    "white": (255, 255, 255), "black": (24, 24, 26), "grey": (135, 138, 142), "dark grey": (62, 65, 72),
    "red": (208, 46, 46), "dark red": (116, 20, 24), "orange": (244, 140, 40), "yellow": (250, 214, 66),
    "cream": (250, 240, 214), "green": (62, 158, 82), "mint": (188, 232, 206), "teal": (28, 140, 142),
    "sky blue": (136, 206, 244), "blue": (50, 98, 206), "navy": (28, 38, 82), "lavender": (208, 200, 240),
    "purple": (124, 66, 168), "pink": (246, 160, 194), "brown": (124, 82, 52),
}
PLAIN = tuple(name for name in COLOURS if name != "white")


@dataclass(frozen=True)
class Mood:
    """The light of a scene: saturation, then gain and lift for each channel, on colours in 0..255."""

    colours: tuple[str, ...]
    saturation: float
    gain: tuple[float, float, float]
    lift: tuple[float, float, float]


MOODS = {
    "gloomy": Mood(("dark grey", "navy", "grey", "black"), 0.45, (0.60, 0.65, 0.80), (0, 0, 6)),
    "cheerful": Mood(("yellow", "sky blue", "pink", "orange", "mint"), 1.25, (1.04, 1.03, 1.00), (10, 10, 6)),
    "calm": Mood(("mint", "lavender", "sky blue", "cream"), 0.60, (0.88, 0.93, 0.95), (26, 28, 30)),
    "fiery": Mood(("red", "orange", "dark red", "black"), 0.75, (1.12, 0.70, 0.42), (30, 4, 0)),
}
KINDS = ("one", "relation", "relation3", "count")
KIND_SHARES = (0.2, 0.35, 0.15, 0.3)
# (dx, dy) from the target to the subject: above is towards smaller y.
STEP = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
CONTRAST = 90.0  # least RGB distance between a background and the mean colours of the objects on it


def in_mood(colours: np.ndarray, alpha: np.ndarray | float, mood: str) -> np.ndarray:
    """Premultiplied colours (3, ...) in 0..255 in the light of a mood; alpha (...) is in 0..1."""
    light = MOODS[mood]
    shape = (3,) + (1,) * (colours.ndim - 1)
    luma = 0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2]
    mixed = luma + light.saturation * (colours - luma)
    gain, lift = (np.asarray(values, dtype=np.float32).reshape(shape) for values in (light.gain, light.lift))
    return np.clip(gain * mixed + lift * alpha, 0, 255 * np.asarray(alpha))


def over(rgba: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA (4, P, P) uint8 over an opaque canvas (3, P, P) uint8 -> (3, P, P) uint8.

    Porter and Duff, "Compositing Digital Images" (1984), section 4.1: over = c_A + (1 - alpha_A) c_B, rounded once.
    """
    rest = 255 - rgba[3].astype(np.uint16)
    return ((rgba[:3].astype(np.uint16) * 255 + canvas * rest + 127) // 255).astype(np.uint8)


def resize(rgba: np.ndarray, side: int) -> np.ndarray:
    """Premultiplied RGBA (4, P, P) uint8, resized with antialiasing to (4, side, side) uint8.

    Premultiplied colours can be averaged; straight ones would mix in the colours of transparent pixels.
    """
    if rgba.shape[-1] == side:
        return rgba
    pixels = np.ascontiguousarray(rearrange(rgba, "c h w -> h w c"))
    # "RGBa" is Pillow's premultiplied RGBA, whose four bands are resized alike. The Hamming filter has no overshoot.
    image = Image.frombuffer("RGBa", pixels.shape[1::-1], pixels, "raw", "RGBa", 0, 1)
    return rearrange(np.asarray(image.resize((side, side), Image.Resampling.HAMMING)), "h w c -> c h w")


def contrasting_colours(rng: np.random.Generator, names: Sequence[str],
                        means: Sequence[Sequence[float] | np.ndarray], count: int) -> list[str]:
    """`count` random colours of `names` that contrast with objects of the mean colours `means` and with each other."""
    order = [names[i] for i in rng.permutation(len(names))]
    means = [[float(value) for value in mean] for mean in means]  # plain numbers are faster than arrays one by one
    chosen: list[str] = []

    def contrast(name: str) -> float:
        others = [*means, *(COLOURS[other] for other in chosen)]
        return min(CONTRAST, *(sum((a - b) ** 2 for a, b in zip(COLOURS[name], other)) ** 0.5 for other in others))

    for _ in range(count):  # the first that contrasts enough, else the one that contrasts most
        chosen.append(max((name for name in order if name not in chosen), key=contrast))
    return chosen


def _places(rng: np.random.Generator, kind: str, count: int) -> tuple[list, list, float]:
    """(centres (x, y), relations (subject, kind, target), size) of the objects, lengths as fractions of the side."""
    if kind == "one":
        return [(0.5, 0.5)], [], rng.uniform(0.6, 0.85)
    if kind == "count":
        if count == 2:
            tilt = rng.choice((-0.12, 0.0, 0.12))
            return [(0.27, 0.5 - tilt), (0.73, 0.5 + tilt)], [], rng.uniform(0.35, 0.39)
        if rng.random() < 0.5:
            return [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)], [], rng.uniform(0.24, 0.265)
        side = rng.choice((0.27, 0.73))
        return [(0.5, side), (0.27, 1 - side), (0.73, 1 - side)], [], rng.uniform(0.35, 0.39)
    first = str(rng.choice(list(STEP)))
    dx, dy = STEP[first]
    reach, size = 0.24, rng.uniform(0.37, 0.42)
    if kind == "relation":
        return [(0.5 + reach * dx, 0.5 + reach * dy), (0.5 - reach * dx, 0.5 - reach * dy)], [(0, first, 1)], size
    # Three in an L: the third lies beside the second, across the first relation, so both relations hold.
    second = str(rng.choice([name for name, step in STEP.items() if step[0] * dx + step[1] * dy == 0]))
    ex, ey = STEP[second]
    corner = (0.5 - reach * (dx + ex), 0.5 - reach * (dy + ey))
    step = 2 * reach
    centres = [(corner[0] + step * dx, corner[1] + step * dy), corner, (corner[0] + step * ex, corner[1] + step * ey)]
    return centres, [(0, first, 1), (2, second, 1)], size


def make_scene(rng: np.random.Generator, items: Sequence[dict], pool: np.ndarray, countable: np.ndarray,
               first: int | None = None) -> dict:
    """A random scene of emoji from `pool`, rows of `items` in one style; scenes of equal objects use `countable`.

    first: a row that the scene must contain, for scenes that test a held-out image. The generator decides everything.
    Returns {"kind", "objects", "relations", "background", "mood"} of plain types; an object has id, name, style,
    centre and size, a relation is [subject, kind, target] with the numbers of objects.
    """
    shares = np.array(KIND_SHARES)
    if len(countable) == 0 or (first is not None and first not in countable):
        shares[3] = 0
    if len(pool) < 3:
        shares[1:3] = 0
    kind = str(rng.choice(KINDS, p=shares / shares.sum()))
    different = {"one": 1, "relation": 2, "relation3": 3, "count": 1}[kind]
    rows = [] if first is None else [first]
    while len(rows) < different:
        row = int(rng.choice(countable if kind == "count" else pool))
        if items[row]["name"] not in [items[r]["name"] for r in rows]:
            rows.append(row)
    if kind == "count":
        rows = rows * int(rng.integers(2, 4))
    centres, relations, size = _places(rng, kind, len(rows))
    # Small enough that neighbours never touch, even after rounding to pixels at a side of 32.
    wobble = rng.uniform(-0.015, 0.015, (len(rows), 2))
    objects = [{"id": items[row]["id"], "name": items[row]["name"], "style": items[row]["style"],
                "centre": [round(float(x + w[0]), 4), round(float(y + w[1]), 4)], "size": round(float(size), 4)}
               for row, (x, y), w in zip(rows, centres, wobble)]
    mood = str(rng.choice(list(MOODS))) if rng.random() < 0.5 else ""
    means = [np.asarray(items[row]["rgb"], dtype=np.float32) for row in rows]
    means = [in_mood(mean, 1.0, mood) if mood else mean for mean in means]
    background = str(rng.choice(["plain", "plain", "columns", "rows"]))
    palette = MOODS[mood].colours if mood else list(COLOURS)
    colours = contrasting_colours(rng, palette, means, 1 if background == "plain" else 2)
    return {"kind": "relation" if kind == "relation3" else kind, "objects": objects,
            "relations": [list(relation) for relation in relations],
            "background": {"kind": background, "colours": colours}, "mood": mood}


def canvas(background: dict, size: int) -> np.ndarray:
    """The background of a scene, (3, S, S) uint8: one colour, or two halves (left and right, or top and bottom)."""
    first, second = (COLOURS[name] for name in (background["colours"] * 2)[:2])
    image = np.empty((3, size, size), dtype=np.uint8)
    image[:] = np.array(first, dtype=np.uint8)[:, None, None]
    if background["kind"] == "columns":
        image[:, :, size // 2:] = np.array(second, dtype=np.uint8)[:, None, None]
    elif background["kind"] == "rows":
        image[:, size // 2:, :] = np.array(second, dtype=np.uint8)[:, None, None]
    return image


def scene_image(scene: dict, rgba_of: Callable[[str], np.ndarray], size: int) -> np.ndarray:
    """The image of a scene, (3, S, S) uint8. rgba_of: an object's id -> premultiplied RGBA (4, P, P) uint8."""
    image = canvas(scene["background"], size)
    for thing in scene["objects"]:
        side = max(1, round(thing["size"] * size))
        rgba = resize(rgba_of(thing["id"]), side)
        if scene["mood"]:
            colours = in_mood(rgba[:3].astype(np.float32), rgba[3].astype(np.float32) / 255, scene["mood"])
            rgba = np.concatenate([np.round(colours).astype(np.uint8), rgba[3:]])
        left, top = (round(centre * size - side / 2) for centre in thing["centre"])
        place = (slice(None), slice(top, top + side), slice(left, left + side))
        image[place] = over(rgba, image[place])
    return image
