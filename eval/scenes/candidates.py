"""What does an image show? Whichever of several rendered candidates it is nearest to.

Scenes of emoji have no geometry that could be measured, as scenes of shapes have (`eval/scenes/reader.py`), but what
they promise can be rendered: the promised scene, and the same scene with one promise broken. A question is such a set
of candidates. A promise is kept when a candidate that keeps it is the nearest. A guess is right once in as many times
as there are answers, and this chance is reported beside every score.

The distance is the mean squared difference in CIELAB of images halved in size, the smallest over small shifts and over
the layouts that a promise leaves open. Axis letters: N candidate images, S side, V shifts, P pixels, K colours.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce

from eval.scenes.reader import lab

Array = np.ndarray

REACH = 2  # pixels of a halved image by which a candidate may lie off, in both directions


@dataclass(frozen=True)
class Question:
    """The candidates of one promise about an ``attribute``: ``images`` uint8 (N, 3, S, S). ``owners`` (N,) holds the
    number of the answer that each image is a layout of; answer 0 is the promised one."""

    attribute: str
    images: Array
    owners: Array

    @property
    def answers(self) -> int:
        """The number of answers."""
        return int(self.owners.max()) + 1


def make_question(attribute: str, answers: Sequence[Sequence[Array]]) -> Question | None:
    """The question whose answer k looks like any of ``answers[k]``, uint8 (3, S, S) each.

    An answer that can look exactly as an earlier one is left out. None when fewer than two answers remain.
    """
    kept: list[Sequence[Array]] = []
    seen: set[bytes] = set()
    for answer in answers:
        looks = {image.tobytes() for image in answer}
        if not looks & seen:
            kept.append(answer)
            seen |= looks
    if len(kept) < 2:
        return None
    return Question(attribute, np.stack([image for answer in kept for image in answer]),
                    np.repeat(np.arange(len(kept)), [len(answer) for answer in kept]))


def halved_lab(images: Array) -> Array:
    """The CIELAB values of images uint8 (N, 3, S, S) halved in size, float32 (N, S/2, S/2, 3).

    Raises ValueError for another type or an odd side.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 2:
        raise ValueError(f"images: {images.dtype} {images.shape}; valid: uint8 (N, 3, S, S) with an even S")
    return lab(reduce(images.astype(np.float32), "n c (h 2) (w 2) -> n h w c", "mean"))


def shifted_vectors(image: Array) -> Array:
    """The halved CIELAB values of one image uint8 (3, S, S) at all small shifts, its border repeated: (V, D) with
    D = 3 (S/2)^2."""
    values = halved_lab(image[None])[0]  # (S/2, S/2, 3)
    side = len(values)
    wide = np.pad(values, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    places = range(2 * REACH + 1)
    return np.stack([wide[y:y + side, x:x + side].ravel() for y in places for x in places])


def candidate_vectors(images: Array) -> Array:
    """The halved CIELAB values of images uint8 (N, 3, S, S), not shifted: (N, D) with D = 3 (S/2)^2."""
    return rearrange(halved_lab(images), "n h w c -> n (h w c)")


def answer_distances(views: Array, candidates: Array) -> Array:
    """The smallest mean squared difference of each candidate (N, D) to any of the views (V, D) of an image: (N,)."""
    squares = (views**2).sum(1)[:, None] + (candidates**2).sum(1)[None] - 2 * views @ candidates.T  # (V, N)
    return np.maximum(squares.min(axis=0), 0) / candidates.shape[1]


def count_nearer_answers(questions: Sequence[Question], images: Sequence[Array]) -> list[list[int]]:
    """For each image uint8 (3, S, S) and each question, the number of answers that are nearer to the image than the
    promised one: at 0 the promise is kept. Candidates are prepared once for all images."""
    views = [shifted_vectors(image) for image in images]
    found: list[list[int]] = [[] for _ in images]
    for question in questions:
        candidates = candidate_vectors(question.images)
        for counts, seen in zip(found, views):
            away = answer_distances(seen, candidates)
            best = np.array([away[question.owners == answer].min() for answer in range(question.answers)])
            counts.append(int((best[1:] < best[0]).sum()))
    return found


def palette_distance(image: Array, palette: Sequence[Sequence[float]]) -> float:
    """The median CIELAB difference between the border of an image, uint8 (3, S, S), and the nearest colour of a palette
    (K, 3) in 0..255. The border is an eighth of the side wide, because objects stand inside."""
    width = max(1, image.shape[1] // 8)
    frame = np.ones(image.shape[1:], bool)
    frame[width:-width, width:-width] = False
    border = lab(image[:, frame].T.astype(np.float32))  # (P, 3)
    colours = lab(np.asarray(palette, np.float32))  # (K, 3)
    away = np.sqrt(((border[:, None] - colours[None]) ** 2).sum(-1))  # (P, K)
    return float(np.median(away.min(axis=1)))
