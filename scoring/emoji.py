"""Emoji: every sample is compared with renderings of what its prompt promised, and of the same with one promise broken.

The first caption of an item is its prompt. What it promises: the things (against nine others in the same style), the
style (against the others), how many or where (against other counts and places), the background, the mood.
"""
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.emoji.emoji import Emoji
from data.emoji.scenes import COLOURS, MOODS, STEP, canvas, over, scene_image
from eval.interval import Estimate, bootstrap_mean
from eval.scenes.candidates import Question, palette_distance, question, ranks
from eval.scenes.score import Facts, SceneReport, Score, Table, score_table
from eval.suite import rows_table
from files.pages import image_figures, markdown_table
from scoring.samples import Drawn
from scoring.shapes import SHOWN, Section, percent

ATTRIBUTES = ("object", "style", "count", "relation", "background", "mood")
OTHERS = 9  # things, or colours, that a promised one is told from
LONG = 16  # words from which a caption is long: a quarter of those of scenes
CENTRES = {1: [[(0.5, 0.5)]],
           2: [[(0.27, 0.5 - tilt), (0.73, 0.5 + tilt)] for tilt in (-0.12, 0.0, 0.12)],
           3: [[(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)],
               *([(0.5, y), (0.27, 1 - y), (0.73, 1 - y)] for y in (0.27, 0.73))]}
SIZES = {1: (0.65, 0.8), 2: (0.37,), 3: (0.25, 0.37)}  # of the things in a count, by how many there are


class Promises:
    """Questions and groups of the items of a split, by index. Rendering is that of the data itself."""

    def __init__(self, source: Emoji):
        self.source, self.size = source, source.config.size
        self.rows: dict[str, list[int]] = {}
        self.twins: dict[tuple[str, str], int] = {}
        for row in source.held_out:
            item = source.items[row]
            self.twins[item["name"], item["style"]] = row
            if not item["tone"]:
                self.rows.setdefault(item["style"], []).append(row)

    def questions(self, index: int) -> list[Question]:
        """What the first caption of an item promises."""
        row, number = self.source.locate(index)
        rng = np.random.default_rng([7, index])
        asked = self._of_single(row, rng) if row is not None else self._of_scene(self.source.scene(number), rng)
        return [one for one in asked if one is not None]

    def _others(self, row: int, rng: np.random.Generator) -> list[int]:
        """Rows of other things in the style of a row."""
        item = self.source.items[row]
        pool = [other for other in self.rows[item["style"]] if self.source.items[other]["base"] != item["base"]]
        return [pool[k] for k in rng.choice(len(pool), min(OTHERS, len(pool)), replace=False)]

    def _in_styles(self, row: int) -> list[int]:
        """The row, and those of the same thing in other styles."""
        item = self.source.items[row]
        return [row, *(self.twins[item["name"], style] for style in self.source.config.styles
                       if style != item["style"] and (item["name"], style) in self.twins)]

    def _of_single(self, row: int, rng: np.random.Generator) -> list[Question | None]:
        colour = self.source.background(row)

        def drawn(one: int, on: str = colour) -> list[np.ndarray]:
            return [over(self.source.picture(one), canvas({"kind": "plain", "colours": [on]}, self.size))]

        asked = [question("object", [drawn(one) for one in (row, *self._others(row, rng))]),
                 question("style", [drawn(one) for one in self._in_styles(row)])]
        if colour != "white":  # white goes without saying
            others = [other for other in COLOURS if other != colour]
            asked.append(question("background", [drawn(row, on) for on in (colour, *others)]))
        return asked

    def _of_scene(self, scene: dict, rng: np.random.Generator) -> list[Question | None]:
        rows = [self.source.row_of[thing["id"]] for thing in scene["objects"]]
        draw = self._drawer(scene)
        asked: list[Question | None] = []
        for place, row in enumerate(rows[:1] if scene["kind"] == "count" else rows):
            answers = []
            for one in (row, *self._others(row, rng)):
                changed = [one] * len(rows) if scene["kind"] == "count" else [*rows[:place], one, *rows[place + 1:]]
                answers.append(draw(changed))
            asked.append(question("object", answers))
        styles = [dict(zip([self.source.items[r]["style"] for r in self._in_styles(row)], self._in_styles(row)))
                  for row in rows]
        own = scene["objects"][0]["style"]
        shared = [own, *sorted(set.intersection(*map(set, styles)) - {own})]
        asked.append(question("style", [draw([each[style] for each in styles]) for style in shared]))
        if scene["kind"] == "count":
            counts = [len(rows), *(n for n in (1, 2, 3) if n != len(rows))]
            asked.append(question("count", [draw([rows[0]] * n) for n in counts]))
        if scene["kind"] == "relation":
            orders = [rows, *(list(order) for order in permutations(rows) if list(order) != rows)]
            answers = [draw(order) for order in orders]
            if len(rows) == 2:  # also the two directions across
                answers += [draw(order, across=True) for order in orders]
            asked.append(question("relation", answers))
        asked.append(question("background", [draw(rows, background=other) for other in
                                             (scene["background"], *_backgrounds(scene["background"], rng))]))
        if scene["mood"]:
            moods = [scene["mood"], *(mood for mood in (*MOODS, "") if mood != scene["mood"])]
            asked.append(question("mood", [draw(rows, mood=mood) for mood in moods]))
        return asked

    def _drawer(self, scene: dict) -> Callable[..., list[np.ndarray]]:
        """draw(rows, background, mood, across) -> the scene with other things, in every layout that its words leave
        open."""

        def draw(rows: Sequence[int], background: dict | None = None, mood: str | None = None,
                 across: bool = False) -> list[np.ndarray]:
            light = scene["mood"] if mood is None else mood
            return [scene_image({**scene, "mood": light, "background": background or scene["background"],
                                 "objects": [{"id": self.source.items[row]["id"], "centre": centre, "size": size}
                                             for row, centre in zip(rows, centres)]},
                                lambda name: self.source.picture(self.source.row_of[name]), self.size)
                    for centres, size in layouts(scene, len(rows), across)]

        return draw

    def groups(self, index: int, caption: str) -> tuple[str, ...]:
        """What kind of prompt it is: its rows in the table."""
        row, number = self.source.locate(index)
        if row is not None:
            held, groups = self.source.held_out[row], ["single object"]
        else:
            scene = self.source.scene(number)
            held = self.source.held_out[self.source.row_of[scene["objects"][0]["id"]]]
            count = len(scene["objects"])
            groups = [f"scene of {('one thing', 'two things', 'three things')[count - 1]}"]
            if scene["kind"] == "count":
                groups.append("count")
            groups += [f"relation: {kind}" for kind in dict.fromkeys(kind for _, kind, _ in scene["relations"])]
            if scene["mood"]:
                groups.append(f"mood: {scene['mood']}")
            if len(caption.split()) >= LONG:
                groups.append("long caption")
        return (*groups, *{"pair": ("unseen pair of thing and style",), "name": ("unseen thing",)}.get(held, ()))


def layouts(scene: dict, count: int, across: bool = False) -> list[tuple[list[tuple[float, float]], float]]:
    """(centres, size) of every layout that the words of a scene leave open; ``across`` turns a pair by 90 degrees."""
    if scene["kind"] != "relation":
        return [(centres, size) for centres in CENTRES[count] for size in SIZES[count]
                if not (count == 3 and (centres[0][0] < 0.4) != (size < 0.3))]  # a row of three is small
    reach, size = 0.24, 0.395
    dx, dy = STEP[scene["relations"][0][1]]
    if across:
        dx, dy = dy, dx
    if count == 2:
        return [([(0.5 + reach * dx, 0.5 + reach * dy), (0.5 - reach * dx, 0.5 - reach * dy)], size)]
    ex, ey = STEP[scene["relations"][1][1]]
    corner = (0.5 - reach * (dx + ex), 0.5 - reach * (dy + ey))
    return [([(corner[0] + 2 * reach * dx, corner[1] + 2 * reach * dy), corner,
              (corner[0] + 2 * reach * ex, corner[1] + 2 * reach * ey)], size)]


def _backgrounds(promised: dict, rng: np.random.Generator) -> list[dict]:
    """Others of the same colours arranged otherwise, and of other colours in the same arrangement."""
    kind, colours = promised["kind"], promised["colours"]
    found = []
    if kind != "plain":
        other = "rows" if kind == "columns" else "columns"
        found = [{"kind": kind, "colours": colours[::-1]}, {"kind": other, "colours": colours},
                 {"kind": "plain", "colours": colours[:1]}]
    names = [name for name in COLOURS if name not in colours]
    for _ in range(OTHERS):
        found.append({"kind": kind, "colours": [names[k] for k in rng.choice(len(names), len(colours), replace=False)]})
    return found


def score_of(asked: Sequence[Question], found: Sequence[int]) -> Score:
    """Promises kept, by attribute, from the ranks of the promised answers."""
    score: Score = {name: [] for name in ("scene", *ATTRIBUTES)}
    for one, rank in zip(asked, found, strict=True):
        score[one.attribute].append(rank == 0)
    score["scene"] = [all(kept for name in ATTRIBUTES for kept in score[name])]
    return score


def compared(promises: Promises, drawn: Drawn,
             ceiling: Sequence[torch.Tensor]) -> tuple[list[list[tuple[Facts, Score]]], dict[str, float]]:
    """(rows of the samples, of samples of other prompts, of the drawn pictures, of those through the autoencoder; what
    a guess among the candidates gets right, by attribute).

    Samples of other prompts are mostly of other kinds: they can keep fewer promises than a guess does, so both are
    floors.
    """
    prompts = drawn.prompts
    order = np.random.default_rng(0).permutation(len(prompts))
    stranger = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    rows: list[list[tuple[Facts, Score]]] = [[], [], [], []]
    guesses: dict[str, list[float]] = {"attributes": [], "scene": []}
    for i, (index, caption) in enumerate(zip(tqdm(prompts.seeds, desc="scenes of emoji", unit="picture"),
                                             prompts.captions)):
        asked = promises.questions(index)
        for one in asked:
            for name in ("attributes", one.attribute):
                guesses.setdefault(name, []).append(1 / one.answers)
        guesses["scene"].append(float(np.prod([1 / one.answers for one in asked])))
        facts = {"tags": promises.groups(index, caption)}
        sets = [drawn.images[i], drawn.images[stranger[i]], prompts.drawn[i], ceiling[i]]
        for place, found in enumerate(ranks(asked, [np.asarray(picture) for picture in sets])):
            rows[place].append((facts, score_of(asked, found)))
    return rows, {name: float(np.mean(chances)) for name, chances in guesses.items()}


def emoji_sections(source: Emoji, drawn: Drawn, ceiling: Sequence[torch.Tensor],
                   folder: Path) -> tuple[list[Section], dict[str, Any], list[float]]:
    """(sections of the page, entries of metrics.json, share of promises kept of each prompt); prints the table.
    ``ceiling`` are the real pictures of the prompts through the autoencoder."""
    promises = Promises(source)
    rows, guess = compared(promises, drawn, ceiling)
    report = SceneReport(*(score_table(part, measures=ATTRIBUTES) for part in rows))
    prompts, config = drawn.prompts, drawn.config
    moods, real_moods = (mood_distances(source, prompts.seeds, found) for found in (drawn.images, prompts.drawn))
    text = summary(report, len(prompts), guess["attributes"])
    lines = str(report).splitlines()
    cells = ["a guess", "", *(f"{100 * guess[name]:.1f}" if name in guess else "" for name in report.score["all"])]
    lines.insert(-2, f"| {' | '.join(cells)} |")
    report_table = "\n".join(lines)
    print(f"{report_table}\n{text}")
    missed = [not score["scene"][0] for _, score in rows[0][:SHOWN]]
    sections = [("What was promised, told from renderings of other things, in percent",
                 f"<p>{text}</p>" + markdown_table(report_table)),
                ("Pictures (framed: something in the prompt is missed)",
                 image_figures(drawn.images[:SHOWN], prompts.captions, folder / "pictures", missed))]
    if moods:
        table = rows_table(("mood", "samples", "drawn"), ((n, moods[n], real_moods[n]) for n in moods))
        sections.append(("Distance of the border to the palette of the mood, CIELAB (2.3 is just noticed)",
                         markdown_table(table)))
    kept = {"attributes": [[sum(map(sum, (s[name] for name in ATTRIBUTES))), sum(len(s[name]) for name in ATTRIBUTES)]
                           for _, s in rows[0]],
            "whole scenes": [[int(s["scene"][0]), 1] for _, s in rows[0]]}
    metrics = {"prompts": len(prompts), "sampler": config.sampler, "steps": config.steps,
               "guidance": config.guidance.scale, "guess": guess, **report.as_dict(),
               "moods": {name: vars(estimate) for name, estimate in moods.items()}, "per_prompt": kept}
    return sections, metrics, [right / made for right, made in kept["attributes"]]


def mood_distances(source: Emoji, indices: Sequence[int],
                   images: Sequence[torch.Tensor] | torch.Tensor) -> dict[str, Estimate]:
    """Mean CIELAB difference between the border of pictures, uint8 (3, S, S), and the palette of the mood that was
    promised; empty where none was."""
    found: dict[str, list[float]] = {}
    for index, image in zip(indices, images, strict=True):
        row, number = source.locate(index)
        mood = source.scene(number)["mood"] if row is None else ""
        if mood:
            distance = palette_distance(np.asarray(image), [COLOURS[name] for name in MOODS[mood].colours])
            for name in ("all", mood):
                found.setdefault(name, []).append(distance)
    return {name: bootstrap_mean(values, 0) for name, values in sorted(found.items())}


def summary(report: SceneReport, count: int, guess: float) -> str:
    """One sentence with the headline figures, the floors and the reader's own accuracy."""
    assert report.ceiling is not None

    def headline(table: Table) -> str:
        return (f"{percent(table['all']['attributes'])} % of promises, {percent(table['all']['scene'])} % of whole "
                "prompts")

    return (f"{count} held-out prompts: {headline(report.score)}; pictures of other prompts {headline(report.chance)}, "
            f"a guess {100 * guess:.0f} %; drawn pictures {headline(report.calibration)}; those through the "
            f"autoencoder {headline(report.ceiling)}.")
