"""Reads an image of the `shapes` source back into its scene by colour and geometry alone, without a network.

Axes: H, W image; h, w the box around one object; K colours.

1. Background: the known backdrop whose median colour difference to the image is smallest.
2. Colour: each pixel goes to the nearest of the backdrop and the palette in CIELAB; connected components that survive
   an opening are objects, holes in them are filled (something may be inside).
3. Shape and size: each shape's mask, placed by area and centroid of the object's soft coverage; the best overlap
   (intersection over union) names the shape, the fitted radius the size.

What there is to name arrives as a `Vocabulary`; `data.shapes.render.vocabulary()` is one.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np
from scipy import ndimage

Array = np.ndarray

MIN_FIT = 0.55        # overlap below which an object has no known shape
MIN_AREA = 0.30       # of the smallest shape's area at the smallest size; less is a speck
EDGES = (1.0, 2.5)    # widths in pixels of the edge of a mask: sharp and blurred images
THIN = 2.3            # pixels: half the width of the widest band that may be a blurred edge
MIXTURE = 15.0        # colour difference within which a band has the mixed colour of its two sides
PLUS = ndimage.generate_binary_structure(2, 1)
FULL = ndimage.generate_binary_structure(2, 2)


class Vocabulary(Protocol):
    """Names, and what they look like. Lengths are in units of the side of the image, colours in 0..255."""

    @property
    def colours(self) -> Sequence[str]: ...
    @property
    def shapes(self) -> Mapping[str, Callable[[Array, Array], Array]]: ...  # signed distance in radii at (x, y)
    @property
    def sizes(self) -> Mapping[str, float]: ...                             # radius
    @property
    def backgrounds(self) -> Sequence[str]: ...
    @property
    def moods(self) -> Sequence[str]: ...
    @property
    def backdrop(self) -> Callable[[str, int], Array]: ...                  # (setting, size) -> (H, W, 3)
    @property
    def lit_colour(self) -> Callable[[str, str], Sequence[float]]: ...      # (colour, setting) -> RGB


@dataclass(frozen=True)
class SeenObject:
    """One object of an image; ``shape`` is None where no known shape overlaps it by MIN_FIT."""

    colour: str
    shape: str | None
    size: str
    centre: tuple[float, float]
    radius: float
    fit: float


@dataclass(frozen=True)
class Scene:
    """What was read from an image; ``inside`` holds pairs (inner, outer) of indices into ``objects``."""

    background: str | None
    mood: str | None
    objects: tuple[SeenObject, ...]
    inside: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def holds(self, subject: int, relation: str, other: int) -> bool:
        """Whether a relation holds. A direction holds where it is the main axis between the two centres.

        Raises ValueError for a relation that is not known.
        """
        if relation == "inside":
            return (subject, other) in self.inside
        (sx, sy), (ox, oy) = self.objects[subject].centre, self.objects[other].centre
        dx, dy = sx - ox, sy - oy
        directions = {"above": (-dy, dx), "below": (dy, dx), "left of": (-dx, dy), "right of": (dx, dy)}
        if relation not in directions:
            raise ValueError(f"relation: value {relation!r}; valid: {', '.join(directions)}, inside")
        apart = (subject, other) not in self.inside and (other, subject) not in self.inside
        along, across = directions[relation]
        return apart and along > abs(across)


@dataclass(frozen=True)
class _Blob:
    """A connected component of one colour: its visible pixels, and these with holes filled, both boolean (H, W)."""

    colour: int
    seen: Array
    filled: Array


def lab(rgb: Array) -> Array:
    """The CIELAB values (D65) of sRGB values in 0..255 along the last axis. Their Euclidean distance is the colour
    difference Delta E* of CIE 1976."""
    table = _linear_table()
    linear = table[np.clip(np.rint(np.asarray(rgb, np.float32) * 4), 0, 1020).astype(np.int16)]
    red, green, blue = linear[..., 0], linear[..., 1], linear[..., 2]
    # IEC 61966-2-1, rows divided by the white point
    xyz = (0.43395 * red + 0.37622 * green + 0.18983 * blue, 0.21267 * red + 0.71515 * green + 0.07218 * blue,
           0.01776 * red + 0.10947 * green + 0.87277 * blue)
    fx, fy, fz = (np.where(value > 0.008856, np.cbrt(value), 7.787 * value + 16 / 116) for value in xyz)
    return np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=-1).astype(np.float32)


def _linear_table() -> Array:
    """Linear light of sRGB values from 0 to 255 in steps of a quarter, (1021,); IEC 61966-2-1."""
    value = np.arange(1021, dtype=np.float32) / 1020
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


class SceneReader:
    """reader(image) -> scene, for an array or tensor uint8 (3, S, S); what does not depend on the image is computed
    once."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.settings = (*vocabulary.backgrounds, *vocabulary.moods)
        self.palette = {name: np.array([vocabulary.lit_colour(colour, name) for colour in vocabulary.colours],
                                       np.float32) for name in self.settings}       # RGB (K, 3)
        self.palette_lab = {name: lab(palette) for name, palette in self.palette.items()}
        self.moments = {name: _moments(distance) for name, distance in vocabulary.shapes.items()}
        self._backdrops: dict[int, dict[str, Array]] = {}

    def __call__(self, image: Any) -> Scene:
        """The scene of one image. Raises ValueError unless it is uint8 (3, S, S)."""
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.shape[1] != pixels.shape[2] or pixels.dtype != np.uint8:
            raise ValueError(f"image: {pixels.dtype} {tuple(pixels.shape)}; valid: uint8 (3, S, S)")
        rgb = np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32)           # (H, W, 3)
        smooth_lab = lab(_smooth(rgb))
        setting, difference = self._setting(smooth_lab)
        blobs = self._blobs(smooth_lab, difference, setting)
        objects = tuple(self._object(rgb, setting, blobs, index) for index in range(len(blobs)))
        inside = frozenset((i, j) for i, inner in enumerate(blobs) for j, outer in enumerate(blobs)
                           if i != j and (inner.seen & outer.filled).sum() > 0.9 * inner.seen.sum())
        mood = setting if setting in self.vocabulary.moods else None
        return Scene(None if mood else setting, mood, objects, inside)

    def distances(self, image: Any) -> dict[str, float]:
        """The median CIELAB difference of an image, uint8 (3, S, S), to the backdrop of each background and mood."""
        differences = self._differences(lab(_smooth(np.asarray(image).transpose(1, 2, 0).astype(np.float32))))
        return {name: float(np.median(difference)) for name, difference in differences.items()}

    def _differences(self, image: Array) -> dict[str, Array]:
        """The colour difference of an image in CIELAB (H, W, 3) to each backdrop, (H, W)."""
        size = image.shape[0]
        if size not in self._backdrops:
            self._backdrops[size] = {name: lab(self.vocabulary.backdrop(name, size)) for name in self.settings}
        return {name: _difference(image, empty) for name, empty in self._backdrops[size].items()}

    def _setting(self, image: Array) -> tuple[str, Array]:
        """(the name of the nearest backdrop, the colour difference of an image in CIELAB to it, (H, W))."""
        differences = self._differences(image)
        nearest = min(differences, key=lambda name: float(np.median(differences[name])))
        return nearest, differences[nearest]

    def _blobs(self, image: Array, difference: Array, setting: str) -> list[_Blob]:
        size = image.shape[0]
        distances = [difference, *(_difference(image, colour) for colour in self.palette_lab[setting])]
        label = np.argmin(distances, axis=0)                                        # (H, W), 0 is background
        smallest = (min(self.vocabulary.sizes.values()) * size) ** 2 * min(area for area, _, _ in self.moments.values())
        blobs = []
        for colour in range(len(self.vocabulary.colours)):
            mask = label == colour + 1
            if mask.sum() < MIN_AREA * smallest:
                continue
            parts, number = ndimage.label(mask, FULL)
            cores = ndimage.binary_opening(mask, PLUS)  # what is thinner than three pixels is an edge, not an object
            for part in range(1, number + 1):
                seen = parts == part
                if seen.sum() >= MIN_AREA * smallest and (seen & cores).sum() >= 0.5 * MIN_AREA * smallest:
                    blobs.append(_Blob(colour, seen, ndimage.binary_fill_holes(seen)))
        return [blob for blob in blobs if not _is_edge(blob, blobs, image, label)]

    def _object(self, rgb: Array, setting: str, blobs: Sequence[_Blob], index: int) -> SeenObject:
        """The object that a blob shows: the shape whose mask overlaps its coverage best, and the size that fits."""
        size = rgb.shape[0]
        blob = blobs[index]
        rows, columns = np.flatnonzero(blob.filled.any(1)), np.flatnonzero(blob.filled.any(0))
        top, bottom = max(rows[0] - 3, 0), min(rows[-1] + 4, size)
        left, right = max(columns[0] - 3, 0), min(columns[-1] + 4, size)
        box = (slice(top, bottom), slice(left, right))
        cover = self._cover(rgb, setting, blobs, index, box)                        # (h, w)
        y, x = np.arange(top, bottom, dtype=np.float32) + 0.5, np.arange(left, right, dtype=np.float32) + 0.5
        total = float(cover.sum())
        cx, cy = float((cover.sum(0) * x).sum()) / total, float((cover.sum(1) * y).sum()) / total
        best: tuple[float, str, float, float, float] = (-1.0, "", 0.0, 0.0, 0.0)
        for name, (area, offset_x, offset_y) in self.moments.items():
            radius = math.sqrt(total / area)
            px, py = cx - radius * offset_x, cy - radius * offset_y
            distance = self.vocabulary.shapes[name](((x - px) / radius)[None, :], ((y - py) / radius)[:, None])
            for edge in EDGES:
                mask = np.clip(0.5 - distance * (radius / edge), 0, 1)
                overlap = float(np.minimum(mask, cover).sum() / np.maximum(mask, cover).sum())
                best = max(best, (overlap, name, px / size, py / size, radius / size))
        overlap, shape, px, py, radius = best
        nearest = min(self.vocabulary.sizes, key=lambda name: abs(math.log(radius / self.vocabulary.sizes[name])))
        return SeenObject(self.vocabulary.colours[blob.colour], shape if overlap >= MIN_FIT else None, nearest,
                          (px, py), radius, overlap)

    def _cover(self, rgb: Array, setting: str, blobs: Sequence[_Blob], index: int, box: tuple[slice, slice]) -> Array:
        """The share of each pixel that the object covers, (h, w): 1 in its core, and less at its edge."""
        blob = blobs[index]
        filled = blob.filled[box]
        core = ndimage.binary_erosion(filled, PLUS)
        near = ndimage.binary_dilation(filled, FULL, iterations=2)
        around = [other for other in blobs if other is not blob and (other.filled & blob.seen).sum() > 0]
        if around:
            behind: Array = self.palette[setting][around[0].colour]
        else:
            behind = self.vocabulary.backdrop(setting, rgb.shape[0])[box]
        solid = core & blob.seen[box]
        colour = np.median(rgb[box][solid], axis=0) if solid.any() else self.palette[setting][blob.colour]
        step = colour - behind
        mixture = ((rgb[box] - behind) * step).sum(-1) / np.maximum((step * step).sum(-1), 1)
        cover = np.where(core, 1, np.clip(mixture, 0, 1) * near)
        for other in blobs:
            if other is not blob:
                cover[other.seen[box] & ~filled] = 0
        return cover


def _smooth(rgb: Array) -> Array:
    """An image (H, W, 3), averaged with weights 1/4, 1/2, 1/4 along both axes."""
    weights = [0.25, 0.5, 0.25]
    return ndimage.convolve1d(ndimage.convolve1d(rgb, weights, 0, mode="nearest"), weights, 1, mode="nearest")


def _difference(first: Array, second: Array) -> Array:
    """The Euclidean distance of two arrays along the last axis."""
    step = first - second
    return np.sqrt((step * step).sum(-1))


def _is_edge(blob: _Blob, blobs: Sequence[_Blob], image: Array, label: Array) -> bool:
    """Whether a blob is a blurred edge and not an object: a thin band whose colour mixes those of its two sides.

    A mixture of purple and white, for example, is nearest to pink. The image (H, W, 3) is in CIELAB; ``label`` (H, W)
    is 0 where the background is nearest.
    """
    if ndimage.distance_transform_edt(np.pad(blob.seen, 1)).max() > THIN:
        return False
    ring = ndimage.binary_dilation(blob.seen, FULL, 3) & ~blob.seen
    sides = [ring & other.seen for other in blobs if other is not blob] + [ring & (label == 0)]
    colours = [image[side].mean(0) for side in sides if side.sum() > 0.15 * ring.sum()]
    middle = image[blob.seen].mean(0)
    for i, first in enumerate(colours):
        for second in colours[:i]:
            step = second - first
            share = float((middle - first) @ step / max(float(step @ step), 1e-6))
            if 0.1 < share < 0.9 and _difference(middle, first + share * step) < MIXTURE:
                return True
    return False


def _moments(distance: Callable[[Array, Array], Array]) -> tuple[float, float, float]:
    """(area of a shape in squared radii, the two coordinates of its centroid in radii)."""
    count, reach = 512, 1.2
    grid = ((np.arange(count, dtype=np.float32) + 0.5) / count * 2 - 1) * reach
    step = 2 * reach / count
    mask = np.clip(0.5 - distance(grid[None, :], grid[:, None]) / step, 0, 1)
    total = float(mask.sum())
    return total * step**2, float((mask.sum(0) * grid).sum()) / total, float((mask.sum(1) * grid).sum()) / total
