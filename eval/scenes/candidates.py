"""What does a picture show? Whichever of several rendered candidates it is nearest to.

Scenes of emoji cannot be measured with a ruler as shapes are (`eval/scenes/reader.py`), but what they promise can be
drawn: the promised scene, and the same with one promise broken. A question is such a set of candidates; a promise is
kept when the candidate that keeps it is the nearest. Chance is one in the number of candidates, and is measured beside.

Distance: mean squared difference in CIELAB of pictures halved in size, the smallest over small shifts and over the
layouts that a promise leaves free. N candidate pictures, S side, V shifts.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.scenes.reader import lab

Array = np.ndarray

REACH = 2  # pixels of a halved picture by which a candidate may lie off, in both directions


@dataclass(frozen=True)
class Question:
    """Candidates of one promise. ``owners`` (N,) says which answer each picture is a layout of; 0 is promised."""

    attribute: str
    pictures: Array  # uint8 (N, 3, S, S)
    owners: Array

    @property
    def answers(self) -> int:
        return int(self.owners.max()) + 1


def question(attribute: str, answers: Sequence[Sequence[Array]]) -> Question | None:
    """The question whose answer ``k`` looks like any of ``answers[k]``, uint8 (3, S, S) each; None for fewer than two
    answers. One that can look just as the promised one, or as another one, is left out."""
    kept: list[Sequence[Array]] = []
    seen: set[bytes] = set()
    for one in answers:
        looks = {picture.tobytes() for picture in one}
        if not looks & seen:
            kept.append(one)
            seen |= looks
    if len(kept) < 2:
        return None
    return Question(attribute, np.stack([picture for one in kept for picture in one]),
                    np.repeat(np.arange(len(kept)), [len(one) for one in kept]))


def vectors(pictures: Array) -> Array:
    """uint8 (N, 3, S, S) -> CIELAB of the halved pictures, float32 (N, 3 (S/2)^2).

    Raises ValueError for another type or an odd side.
    """
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] % 2:
        raise ValueError(f"pictures: {pictures.dtype} {pictures.shape}; valid: uint8 (N, 3, S, S) with an even S")
    count, _, side, _ = pictures.shape
    halves = pictures.reshape(count, 3, side // 2, 2, side // 2, 2).mean(axis=(3, 5), dtype=np.float32)
    return lab(halves.transpose(0, 2, 3, 1)).reshape(count, -1)


def shifted(picture: Array) -> Array:
    """One picture uint8 (3, S, S) at all small shifts, its border repeated: vectors (V, 3 (S/2)^2)."""
    side = picture.shape[1] // 2
    flat = vectors(picture[None])[0].reshape(side, side, 3)
    wide = np.pad(flat, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    places = range(2 * REACH + 1)
    return np.stack([wide[y:y + side, x:x + side].ravel() for y in places for x in places])


def distances(views: Array, candidates: Array) -> Array:
    """Smallest mean squared difference of each candidate (N, D) to any of the views (V, D) of a picture: (N,)."""
    squares = (views**2).sum(1)[:, None] + (candidates**2).sum(1)[None] - 2 * views @ candidates.T  # (V, N)
    return np.maximum(squares.min(axis=0), 0) / candidates.shape[1]


def ranks(asked: Sequence[Question], pictures: Sequence[Array]) -> list[list[int]]:
    """For each picture uint8 (3, S, S) and each question: how many answers are nearer than the promised one; 0 is a
    promise kept. Candidates are looked at once for all pictures."""
    views = [shifted(picture) for picture in pictures]
    found: list[list[int]] = [[] for _ in pictures]
    for one in asked:
        candidates = vectors(one.pictures)
        for place, seen in enumerate(views):
            away = distances(seen, candidates)
            best = np.array([away[one.owners == answer].min() for answer in range(one.answers)])
            found[place].append(int((best[1:] < best[0]).sum()))
    return found


def palette_distance(picture: Array, palette: Sequence[Sequence[float]]) -> float:
    """Median CIELAB difference between the border of a picture, uint8 (3, S, S), and the nearest colour of a palette
    (K, 3) in 0..255. The border is an eighth of the side: objects stand inside."""
    width = max(1, picture.shape[1] // 8)
    frame = np.ones(picture.shape[1:], bool)
    frame[width:-width, width:-width] = False
    border = lab(picture[:, frame].T.astype(np.float32))  # (P, 3)
    colours = lab(np.asarray(palette, np.float32))  # (K, 3)
    away = np.sqrt(((border[:, None] - colours[None]) ** 2).sum(-1))  # (P, K)
    return float(np.median(away.min(axis=1)))
