"""Renders scene graphs of the `shapes` source: signed distances, antialiased masks, moods.

Axis letters: H W size of the image, h w size of the box around one object, E edges of a polygon.
Only additions, products, divisions, square roots and comparisons are used on float32. IEEE 754 rounds each of them
exactly, and none is a reduction whose order could differ, so the bytes are the same on every platform.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable

import numpy as np
from einops import rearrange

from data.shapes.scene_graph import BACKGROUNDS, COLOURS, MOODS, SIZES

Array = np.ndarray
Distance = Callable[[Array, Array], Array]
RGB = tuple[float, float, float]

COLOUR_RGB: dict[str, RGB] = {
    "red": (222, 44, 52), "orange": (247, 135, 20), "yellow": (252, 214, 44), "green": (44, 160, 70),
    "cyan": (48, 200, 214), "blue": (42, 84, 214), "purple": (146, 50, 172), "pink": (248, 134, 190)}
BACKGROUND_RGB: dict[str, RGB] = {
    "white": (250, 250, 250), "grey": (150, 153, 158), "black": (20, 20, 24), "beige": (236, 220, 192)}


@dataclass(frozen=True)
class Light:
    """The effect of a mood on an image: gradient, glow and vignette of the background, and light on the objects."""

    top: RGB
    bottom: RGB
    glow: RGB                       # colour added around glow_at, falling off within glow_reach
    glow_at: tuple[float, float]
    glow_reach: float
    vignette: float                 # share of the light lost in the corners
    gain: float                     # objects: brightness
    tint: RGB                       # objects: mixed in by tint_share
    tint_share: float
    slope: tuple[float, float]      # objects: change of brightness per radius along x and y


LIGHTS: dict[str, Light] = {
    "gloomy": Light(top=(84, 92, 108), bottom=(34, 36, 46), glow=(0, 0, 0), glow_at=(0.5, 0.5), glow_reach=1.0,
                    vignette=0.45, gain=0.78, tint=(60, 70, 90), tint_share=0.12, slope=(0.0, -0.16)),
    "cheerful": Light(top=(180, 226, 255), bottom=(255, 246, 204), glow=(75, 29, 0), glow_at=(0.85, 0.05),
                      glow_reach=0.7, vignette=0.0, gain=1.06, tint=(255, 250, 200), tint_share=0.05,
                      slope=(0.06, -0.10)),
    "calm": Light(top=(176, 186, 222), bottom=(214, 232, 226), glow=(24, 14, 8), glow_at=(0.5, 0.6), glow_reach=0.6,
                  vignette=0.06, gain=0.96, tint=(214, 220, 235), tint_share=0.20, slope=(0.0, -0.05)),
    "fiery": Light(top=(36, 8, 14), bottom=(104, 24, 8), glow=(84, 46, 6), glow_at=(0.5, 1.1), glow_reach=0.8,
                   vignette=0.20, gain=0.98, tint=(255, 120, 20), tint_share=0.06, slope=(0.0, 0.16)),
}


def _float(values: tuple[float, ...]) -> Array:
    return np.array(values, np.float32)


# ---- signed distances: negative inside, in radii; x right, y down, the shape centred on its bounding box ----

def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.98)


def _polygon(vertices: list[tuple[float, float]], rounding: float) -> Distance:
    """Exact distance to a polygon whose corners are rounded by `rounding`.

    Inigo Quilez, "2D distance functions", sdPolygon: the nearest edge gives the distance, the parity of crossings of
    a horizontal ray the sign.
    """
    start = np.array(vertices, np.float32)
    end = np.roll(start, -1, axis=0)
    (ax, ay), (bx, by) = start.T[:, :, None, None], end.T[:, :, None, None]  # (E, 1, 1)
    ex, ey = bx - ax, by - ay
    scale = 1 / (ex * ex + ey * ey)

    def distance(x: Array, y: Array) -> Array:
        px, py = x - ax, y - ay                                             # (E, h, w), or (E, 1, w) and (E, h, 1)
        along = np.clip((px * ex + py * ey) * scale, 0, 1)                  # (E, h, w)
        dx, dy = px - ex * along, py - ey * along
        nearest = np.sqrt((dx * dx + dy * dy).min(axis=0))                  # (h, w)
        crosses = ((ay <= y) != (by <= y)) & ((px * ey < py * ex) == (ey > 0))
        inside = np.logical_xor.reduce(crosses, axis=0)
        return np.where(inside, -nearest, nearest) - np.float32(rounding)

    return distance


def _heart(x: Array, y: Array) -> Array:
    """Inigo Quilez, sdHeart; there the tip is the origin, y is up and the height 1.104."""
    scale = np.float32(1.66)
    x, y = np.abs(x) / scale, np.float32(0.552) - y / scale
    lobe = np.sqrt((x - 0.25) * (x - 0.25) + (y - 0.75) * (y - 0.75)) - np.float32(0.35355339)
    foot = 0.5 * np.maximum(x + y, 0)
    side = np.minimum(x * x + (y - 1) * (y - 1), (x - foot) * (x - foot) + (y - foot) * (y - foot))
    return np.where(x + y > 1, lobe, np.sqrt(side) * np.where(x > y, 1, -1)) * scale


def _moon(x: Array, y: Array) -> Array:
    """Inigo Quilez, sdMoon: a disc of radius 1 less a disc of radius 0.84 whose centre is 0.5 to the right."""
    outer, cut, shift, a, b = _float((1.0, 0.84, 0.5, 0.5444, 0.838829))  # (a, b): the horn
    x, y = x - np.float32(0.22), np.abs(y)
    horn = np.sqrt((x - a) * (x - a) + (y - b) * (y - b))
    body = np.maximum(np.sqrt(x * x + y * y) - outer, cut - np.sqrt((x - shift) * (x - shift) + y * y))
    return np.where(x * b - y * a > shift * np.maximum(b - y, 0), horn, body)


_SIN, _COS = (0.0, 0.587785, 0.951057, 0.951057, 0.587785), (1.0, 0.809017, 0.309017, -0.309017, -0.809017)


def _star_vertices(outer: float, inner: float) -> list[tuple[float, float]]:
    """Ten corners at multiples of 36 degrees, the first one up; the sines are constants, the same on every platform."""
    sines = _SIN + (0.0,) + tuple(-value for value in reversed(_SIN[1:]))
    cosines = _COS + (-1.0,) + tuple(reversed(_COS[1:]))
    radii = [outer if corner % 2 == 0 else inner for corner in range(10)]
    return [(r * s, 0.05 - r * c) for r, s, c in zip(radii, sines, cosines)]


def _cross_vertices(long: float, short: float) -> list[tuple[float, float]]:
    quarter = [(short, -long), (short, -short), (long, -short)]
    turns = [quarter]
    for _ in range(3):
        turns.append([(-y, x) for x, y in turns[-1]])
    return [corner for turn in turns for corner in turn]


SHAPE_DISTANCE: dict[str, Distance] = {
    "circle": _circle,
    "square": _polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], 0.08),
    "triangle": _polygon([(0.0, -0.88), (0.94, 0.78), (-0.94, 0.78)], 0.08),
    "diamond": _polygon([(0.0, -0.98), (0.74, 0.0), (0.0, 0.98), (-0.74, 0.0)], 0.06),
    "star": _polygon(_star_vertices(1.03, 0.45), 0.04),
    "heart": _heart,
    "cross": _polygon(_cross_vertices(0.92, 0.26), 0.06),
    "moon": _moon,
}


# ---- colours and images ----

@lru_cache(maxsize=64)
def backdrop(name: str, size: int) -> Array:
    """The empty image of a background or mood, float32 (H, W, 3) in 0..255 and read-only."""
    if name in BACKGROUND_RGB:
        image = np.broadcast_to(_float(BACKGROUND_RGB[name]), (size, size, 3))
    else:
        light = LIGHTS[name]
        x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :, None]
        y = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None, None]
        ramp = y * y * (3 - 2 * y)
        image = _float(light.top) * (1 - ramp) + _float(light.bottom) * ramp
        dx, dy = x - np.float32(light.glow_at[0]), y - np.float32(light.glow_at[1])
        falloff = np.maximum(1 - (dx * dx + dy * dy) / np.float32(light.glow_reach * light.glow_reach), 0)
        image = image + falloff * falloff * _float(light.glow)
        corner = 2 * ((x - 0.5) * (x - 0.5) + (y - 0.5) * (y - 0.5))
        image = np.clip(image * (1 - np.float32(light.vignette) * corner), 0, 255)
    image = np.ascontiguousarray(image, np.float32)
    image.flags.writeable = False
    return image


def lit_colour(colour: str, setting: str) -> RGB:
    """The colour of an object's centre on a background or in a mood, in 0..255."""
    if setting not in LIGHTS:
        return COLOUR_RGB[colour]
    light = LIGHTS[setting]
    red, green, blue = (min(light.gain * base * (1 - light.tint_share) + light.tint_share * tint, 255.0)
                        for base, tint in zip(COLOUR_RGB[colour], light.tint))
    return red, green, blue


def render(scene: dict[str, Any], size: int) -> Array:
    """The image of a placed scene graph: uint8 (3, size, size).

    A pixel's coverage is a ramp one pixel wide across the shape's edge, taken from the signed distance at its centre.
    """
    setting = scene["mood"] or scene["background"]
    canvas = backdrop(setting, size).copy()                                         # (H, W, 3)
    slope = LIGHTS[setting].slope if setting in LIGHTS else (0.0, 0.0)
    for thing in sorted(scene["objects"], key=lambda thing: -thing["radius"]):      # the inner object comes last
        (cx, cy), radius = thing["centre"], thing["radius"]
        reach = 1.12 * radius + 1 / size
        left, right = max(int((cx - reach) * size), 0), min(int((cx + reach) * size) + 1, size)
        top, bottom = max(int((cy - reach) * size), 0), min(int((cy + reach) * size) + 1, size)
        x = (((np.arange(left, right, dtype=np.float32) + 0.5) / size - np.float32(cx)) / np.float32(radius))[None, :]
        y = (((np.arange(top, bottom, dtype=np.float32) + 0.5) / size - np.float32(cy)) / np.float32(radius))[:, None]
        distance = SHAPE_DISTANCE[thing["shape"]](x, y) * np.float32(radius * size)  # (h, w) in pixels
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        colour = _float(lit_colour(thing["colour"], setting))
        if slope != (0.0, 0.0):
            shade = 1 + np.float32(slope[0]) * x + np.float32(slope[1]) * y         # (h, w)
            colour = np.minimum(colour * shade[..., None], 255)                     # (h, w, 3)
        box = canvas[top:bottom, left:right]
        box += (colour - box) * cover
    return np.ascontiguousarray(rearrange((canvas + 0.5).astype(np.uint8), "h w c -> c h w"))


@dataclass(frozen=True)
class ShapesVocabulary:
    """Everything that a reader of images needs to know about this source: the names and what they look like."""

    colours: tuple[str, ...]
    shapes: dict[str, Distance]                     # name -> signed distance in radii at (x, y)
    sizes: dict[str, float]                         # name -> radius in units of the image's side
    backgrounds: tuple[str, ...]
    moods: tuple[str, ...]
    backdrop: Callable[[str, int], Array]           # (background or mood, size) -> float32 (H, W, 3) in 0..255
    lit_colour: Callable[[str, str], RGB]           # (colour, background or mood) -> RGB in 0..255


def vocabulary() -> ShapesVocabulary:
    """The vocabulary of this source."""
    return ShapesVocabulary(COLOURS, SHAPE_DISTANCE, dict(SIZES), BACKGROUNDS, MOODS, backdrop, lit_colour)
