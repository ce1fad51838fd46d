"""Where a model fails: promises by the value they name, prompts by what makes them hard, moods by distance.

`score_table` counts everything that a prompt promised. Here a row is one value ("red", "above", "three") and counts
only the promises of that value: where a green heart becomes blue, the red square beside it still has its colour right.
"""
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from eval.interval import Estimate, bootstrap_mean, with_exact_ends
from eval.scenes.reader import SceneReader, Vocabulary
from eval.scenes.score import Facts, Rate, Score, Table, score_table

LONG = 13  # words from which a caption is long: a quarter of those of shapes
NUMBERS = ("no objects", "one object", "two objects", "three objects")


def prompt_groups(facts: Facts, caption: str) -> tuple[str, ...]:
    """The groups that a prompt belongs to: its number of objects, its kind, "unseen pair", "long caption"."""
    count = len(facts["objects"])
    groups = [NUMBERS[count] if count < len(NUMBERS) else f"{count} objects", facts["kind"]]
    if "unseen pair" in facts["tags"]:
        groups.append("unseen pair")
    if len(caption.split()) >= LONG:
        groups.append("long caption")
    return tuple(groups)


def group_table(rows: Sequence[tuple[Facts, Score]], captions: Sequence[str], seed: int = 0) -> Table:
    """`score_table` by `prompt_groups`. Raises ValueError unless there is one caption for each row."""
    if len(rows) != len(captions):
        raise ValueError(f"rows, captions: {len(rows)} and {len(captions)}; valid: one caption a row")
    return score_table([({**facts, "tags": prompt_groups(facts, caption)}, score)
                        for (facts, score), caption in zip(rows, captions)], seed)


def value_table(rows: Sequence[tuple[Facts, Score]], seed: int = 0, resamples: int = 1000) -> dict[str, Rate]:
    """The share of promises kept for every value that was promised, such as "colour: red", with intervals over prompts.

    The attributes are colour, shape, size, count, relation, background and mood. Raises ValueError where there are no
    rows.
    """
    if not rows:
        raise ValueError("rows: 0 scored samples; valid: at least 1")
    kept: dict[str, np.ndarray] = {}
    made: dict[str, np.ndarray] = {}
    for row, (facts, score) in enumerate(rows):
        for name, right in promises_kept(facts, score):
            for table, value in ((kept, right), (made, True)):
                table.setdefault(name, np.zeros(len(rows)))[row] += value
    generator = np.random.default_rng(seed)
    times = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)  # (resamples, N)
    rates = {}
    for name in sorted(made):
        with np.errstate(invalid="ignore"):
            low, high = np.nanpercentile((times @ kept[name]) / (times @ made[name]), [2.5, 97.5])
        total = made[name].sum()
        share = Estimate(float(kept[name].sum() / total), float(low), float(high))
        share = with_exact_ends(share, int((made[name] > 0).sum()))
        rates[name] = Rate(share.value, share.low, share.high, int(total))
    return rates


def promises_kept(facts: Facts, score: Score) -> list[tuple[str, bool]]:
    """("attribute: value", whether it was kept) of every promise of a prompt. `score_scene` has them in this order."""
    found = []
    for attribute in ("colour", "shape", "size"):
        values = [thing[attribute] for thing in facts["objects"] if thing[attribute] is not None]
        found += [(f"{attribute}: {value}", right) for value, right in zip(values, score[attribute], strict=True)]
    found += [(f"relation: {name}", right)
              for (_, name, _), right in zip(facts["relations"], score["relation"], strict=True)]
    for attribute in ("count", "background", "mood"):
        if facts[attribute] is not None:
            found.append((f"{attribute}: {facts[attribute]}", score[attribute][0]))
    return found


def mood_distances(images: Iterable[Any], facts: Sequence[Facts], vocabulary: Vocabulary,
                   seed: int = 0) -> dict[str, Estimate]:
    """The mean CIELAB difference between images, uint8 (3, S, S), and the backdrop of the mood that was promised.

    The difference of an image is the median over its pixels, so that objects do not count; 2.3 is just noticed (CIE
    1976). The keys are the moods that were promised, and "all"; there are none where no mood was promised.
    """
    reader = SceneReader(vocabulary)
    found: dict[str, list[float]] = {}
    for image, fact in zip(images, facts, strict=True):
        if fact["mood"] is not None:
            distance = reader.distances(image)[fact["mood"]]
            for name in ("all", fact["mood"]):
                found.setdefault(name, []).append(distance)
    return {name: bootstrap_mean(values, seed) for name, values in sorted(found.items())}
