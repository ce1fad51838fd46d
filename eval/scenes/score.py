"""Scores of images against the facts that their prompts promised, with intervals, a chance row and the reader's error.

Facts are a plain dict: "count", "objects" [{"colour", "shape", "size"}], "relations" [[subject, relation, object]],
"background", "mood", "tags". None stands for what the prompt left open (data/shapes/phrasings.py writes them).

A score is {attribute: [right or wrong, one for each promise]}:

    colour shape size relation background mood    each promise of that name
    count       the number of objects is the promised one
    object      colour and shape of one promised object, both
    scene       everything the prompt promised

Where a promised object has no counterpart in the image, every promise about it is broken.
"""

from dataclasses import dataclass
from typing import Any, Iterable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from eval.interval import Estimate, with_exact_ends
from eval.scenes.reader import Scene, SceneReader, Vocabulary

Facts = dict[str, Any]
Score = dict[str, list[bool]]

ATTRIBUTES = ("colour", "shape", "size", "count", "relation", "background", "mood")  # these make the mean
MEASURES = ("attributes", "scene", "object", *ATTRIBUTES)
WEIGHTS = {"colour": 1.0, "shape": 0.9, "size": 0.4}  # of a mismatch, when objects are matched


@dataclass(frozen=True)
class Rate:
    """A share of promises kept, its bootstrap interval over prompts, and the number of promises."""

    value: float
    low: float
    high: float
    promises: int


Table = dict[str, dict[str, Rate]]  # group -> measure -> rate


def match_objects(scene: Scene, facts: Facts) -> list[int | None]:
    """The index of each promised object's counterpart in the image, or None, by the assignment with the fewest weighted
    mismatches of colour, shape and size."""
    promised = facts["objects"]
    cost = np.zeros((len(promised), len(scene.objects)))
    for i, thing in enumerate(promised):
        for j, seen in enumerate(scene.objects):
            cost[i, j] = sum(weight for name, weight in WEIGHTS.items()
                             if thing[name] is not None and thing[name] != getattr(seen, name))
    matched: list[int | None] = [None] * len(promised)
    for row, column in zip(*linear_sum_assignment(cost)):
        matched[int(row)] = int(column)
    return matched


def score_scene(scene: Scene, facts: Facts) -> Score:
    """Whether each promise of a prompt is kept. An attribute about which nothing was promised has an empty list."""
    score: Score = {name: [] for name in ("scene", "object", *ATTRIBUTES)}
    matched = match_objects(scene, facts)
    for thing, index in zip(facts["objects"], matched):
        kept = {name: index is not None and getattr(scene.objects[index], name) == thing[name]
                for name in WEIGHTS if thing[name] is not None}
        for name, right in kept.items():
            score[name].append(right)
        score["object"].append(index is not None and kept.get("colour", True) and kept.get("shape", True))
    for subject, relation, other in facts["relations"]:
        i, j = matched[subject], matched[other]
        score["relation"].append(i is not None and j is not None and scene.holds(i, relation, j))
    if facts["count"] is not None:
        score["count"].append(len(scene.objects) == facts["count"])
    for name in ("background", "mood"):
        if facts[name] is not None:
            score[name].append(getattr(scene, name) == facts[name])
    score["scene"].append(all(right for name in ATTRIBUTES for right in score[name]))
    return score


def score_table(rows: Iterable[tuple[Facts, Score]], seed: int = 0, resamples: int = 1000,
                measures: Sequence[str] | None = None) -> Table:
    """Shares of promises kept, of "all" prompts and of the prompts of each tag: group -> measure -> rate.

    Intervals are 95 % percentile bootstrap intervals over prompts (Efron, "Bootstrap methods", 1979). The measures are
    those of MEASURES, of which "attributes" is the mean over all promises; one about which nothing was promised is left
    out. ``measures`` names the attributes where they are others than those of shapes. Raises ValueError where there are
    no rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows: 0 scored samples; valid: at least 1")
    columns = MEASURES if measures is None else ("attributes", "scene", *measures)
    kept, made = (np.zeros((len(rows), len(columns))) for _ in range(2))
    for row, (_, score) in enumerate(rows):
        for column, measure in enumerate(columns):
            names = (measures or ATTRIBUTES) if measure == "attributes" else (measure,)
            kept[row, column] = sum(sum(score[name]) for name in names)
            made[row, column] = sum(len(score[name]) for name in names)
    groups = {"all": np.arange(len(rows))}
    for tag in sorted({tag for facts, _ in rows for tag in facts["tags"]}):
        groups[tag] = np.array([row for row, (facts, _) in enumerate(rows) if tag in facts["tags"]])
    generator = np.random.default_rng(seed)
    return {name: _rates(columns, kept[members], made[members], generator, resamples)
            for name, members in groups.items()}


def _rates(measures: Sequence[str], kept: np.ndarray, made: np.ndarray, generator: np.random.Generator,
           resamples: int) -> dict[str, Rate]:
    """The rate of each measure, from the numbers of promises kept and made for each prompt and measure, (N, M)."""
    number = len(kept)
    times = generator.multinomial(number, np.full(number, 1 / number), size=resamples)  # (resamples, N)
    with np.errstate(invalid="ignore"):
        draws = (times @ kept) / (times @ made)                                         # (resamples, M)
    rates = {}
    for column, measure in enumerate(measures):
        total = made[:, column].sum()
        if total:
            low, high = np.nanpercentile(draws[:, column], [2.5, 97.5])
            share = Estimate(float(kept[:, column].sum() / total), float(low), float(high))
            # prompts are counted, not promises: the promises of one prompt go together
            share = with_exact_ends(share, int((made[:, column] > 0).sum()))
            rates[measure] = Rate(share.value, share.low, share.high, int(total))
    return rates


@dataclass(frozen=True)
class SceneReport:
    """The table of the samples and three others to read it against.

    ``chance`` scores the same samples against each other's prompts. ``calibration`` scores the real images, so that
    anything below 100 % there is an error of the reader. ``ceiling``, where there is an autoencoder, scores its
    reconstructions of the real images: no denoiser gets above it.
    """

    score: Table
    chance: Table
    calibration: Table
    ceiling: Table | None = None

    def as_dict(self) -> dict[str, Any]:
        """The tables as plain JSON types."""
        tables = {"score": self.score, "chance": self.chance, "calibration": self.calibration, "ceiling": self.ceiling}
        return {name: {group: {measure: vars(rate) for measure, rate in rates.items()}
                       for group, rates in table.items()}
                for name, table in tables.items() if table is not None}

    def __str__(self) -> str:
        """A Markdown table in percent: a row a group, then chance, the reader on real images, and the ceiling."""
        measures = list(self.score["all"])
        lines = ["| prompts | n | " + " | ".join(measures) + " |", "|---|---" + "|---" * len(measures) + "|"]
        tables = [*self.score.items(), ("chance: samples of other prompts", self.chance["all"]),
                  ("reader: real images", self.calibration["all"])]
        if self.ceiling is not None:
            tables.append(("ceiling: real images through the autoencoder", self.ceiling["all"]))
        for group, rates in tables:
            cells = [percent(rates.get(measure)) for measure in measures]
            lines.append(f"| {group} | {rates['scene'].promises} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def percent(rate: Rate | None) -> str:
    """A rate in percent with its interval, such as "71.0 (68-73)"; "" for none."""
    return "" if rate is None else f"{100 * rate.value:.1f} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"


def read_scenes(images: Iterable[Any], vocabulary: Vocabulary) -> list[Scene]:
    """The scene that is read from each image, uint8 (3, S, S)."""
    reader = SceneReader(vocabulary)
    return [reader(image) for image in images]


def scene_scores(scenes: Sequence[Scene], facts: Sequence[Facts]) -> list[tuple[Facts, Score]]:
    """(facts, score) of each scene that was read and what its prompt promised. Raises ValueError for other lengths."""
    return [(fact, score_scene(scene, fact)) for scene, fact in zip(scenes, facts, strict=True)]


def chance_scores(scenes: Sequence[Scene], facts: Sequence[Facts], seed: int = 0) -> list[tuple[Facts, Score]]:
    """(facts, score) of each prompt with a scene that was made for another prompt: what chance is scored."""
    order = np.random.default_rng(seed).permutation(len(scenes))
    others = {int(row): scenes[int(other)] for row, other in zip(order, np.roll(order, 1))}  # never its own
    return [(fact, score_scene(others[row], fact)) for row, fact in enumerate(facts)]


def counts_per_prompt(rows: Sequence[tuple[Facts, Score]],
                      attributes: Sequence[str] = ATTRIBUTES) -> dict[str, list[list[int]]]:
    """[number kept, number made] of each prompt: of its promises of all ``attributes``, and of it as a whole."""
    return {"attributes": [[sum(sum(score[name]) for name in attributes), sum(len(score[name]) for name in attributes)]
                           for _, score in rows],
            "whole scenes": [[int(score["scene"][0]), 1] for _, score in rows]}
