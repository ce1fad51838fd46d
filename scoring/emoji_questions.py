"""What captions of emoji promise, as questions that have renderings of the promised answer and of others.

The first caption of an item is its prompt. It promises the things (against nine other things in the same style), the
style (against the other styles), their number or places (against others), the background, and the mood.
"""
from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np

from data.emoji.emoji import Emoji
from data.emoji.scenes import COLOURS, MOODS, STEP, canvas, over, scene_image
from eval.scenes.candidates import Question, make_question

OTHERS = 9  # other things, or other colours, beside a promised one
LONG = 16  # words from which a caption is long: a quarter of those of scenes
CENTRES = {1: [[(0.5, 0.5)]],
           2: [[(0.27, 0.5 - tilt), (0.73, 0.5 + tilt)] for tilt in (-0.12, 0.0, 0.12)],
           3: [[(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)],
               *([(0.5, y), (0.27, 1 - y), (0.73, 1 - y)] for y in (0.27, 0.73))]}
SIZES = {1: (0.65, 0.8), 2: (0.37,), 3: (0.25, 0.37)}  # of the things in a count, by their number


class Promises:
    """The questions and the groups of the items of a split, by index. Everything is rendered as the data itself is."""

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
        """A question for each promise of the first caption of an item."""
        row, number = self.source.locate(index)
        rng = np.random.default_rng([7, index])
        questions = (self._questions_of_single(row, rng) if row is not None
                     else self._questions_of_scene(self.source.scene(number), rng))
        return [question for question in questions if question is not None]

    def _other_things(self, row: int, rng: np.random.Generator) -> list[int]:
        """The rows of up to nine other things in the style of a row."""
        item = self.source.items[row]
        pool = [other for other in self.rows[item["style"]] if self.source.items[other]["base"] != item["base"]]
        return [pool[k] for k in rng.choice(len(pool), min(OTHERS, len(pool)), replace=False)]

    def _in_all_styles(self, row: int) -> list[int]:
        """The row itself, and the rows of the same thing in other styles."""
        item = self.source.items[row]
        return [row, *(self.twins[item["name"], style] for style in self.source.config.styles
                       if style != item["style"] and (item["name"], style) in self.twins)]

    def _questions_of_single(self, row: int, rng: np.random.Generator) -> list[Question | None]:
        colour = self.source.background(row)

        def render_single(one: int, on: str = colour) -> list[np.ndarray]:
            return [over(self.source.rgba(one), canvas({"kind": "plain", "colours": [on]}, self.size))]

        questions = [make_question("object", [render_single(one) for one in (row, *self._other_things(row, rng))]),
                     make_question("style", [render_single(one) for one in self._in_all_styles(row)])]
        if colour != "white":  # white goes without saying
            others = [other for other in COLOURS if other != colour]
            questions.append(make_question("background", [render_single(row, on) for on in (colour, *others)]))
        return questions

    def _questions_of_scene(self, scene: dict, rng: np.random.Generator) -> list[Question | None]:
        rows = [self.source.row_of[thing["id"]] for thing in scene["objects"]]
        render = self._renderer(scene)
        questions: list[Question | None] = []
        for place, row in enumerate(rows[:1] if scene["kind"] == "count" else rows):
            answers = []
            for one in (row, *self._other_things(row, rng)):
                changed = [one] * len(rows) if scene["kind"] == "count" else [*rows[:place], one, *rows[place + 1:]]
                answers.append(render(changed))
            questions.append(make_question("object", answers))
        styles = [dict(zip([self.source.items[r]["style"] for r in self._in_all_styles(row)], self._in_all_styles(row)))
                  for row in rows]
        own = scene["objects"][0]["style"]
        shared = [own, *sorted(set.intersection(*map(set, styles)) - {own})]
        questions.append(make_question("style", [render([each[style] for each in styles]) for style in shared]))
        if scene["kind"] == "count":
            counts = [len(rows), *(n for n in (1, 2, 3) if n != len(rows))]
            questions.append(make_question("count", [render([rows[0]] * n) for n in counts]))
        if scene["kind"] == "relation":
            orders = [rows, *(list(order) for order in permutations(rows) if list(order) != rows)]
            answers = [render(order) for order in orders]
            if len(rows) == 2:  # also the two directions across
                answers += [render(order, across=True) for order in orders]
            questions.append(make_question("relation", answers))
        backgrounds = [scene["background"], *_other_backgrounds(scene["background"], rng)]
        questions.append(make_question("background", [render(rows, background=other) for other in backgrounds]))
        if scene["mood"]:
            moods = [scene["mood"], *(mood for mood in (*MOODS, "") if mood != scene["mood"])]
            questions.append(make_question("mood", [render(rows, mood=mood) for mood in moods]))
        return questions

    def _renderer(self, scene: dict) -> Callable[..., list[np.ndarray]]:
        """A function render(rows, background, mood, across) that renders a scene with these changes, in every layout
        that its words leave open."""

        def render(rows: Sequence[int], background: dict | None = None, mood: str | None = None,
                   across: bool = False) -> list[np.ndarray]:
            light = scene["mood"] if mood is None else mood
            return [scene_image({**scene, "mood": light, "background": background or scene["background"],
                                 "objects": [{"id": self.source.items[row]["id"], "centre": centre, "size": size}
                                             for row, centre in zip(rows, centres)]},
                                lambda name: self.source.rgba(self.source.row_of[name]), self.size)
                    for centres, size in layouts(scene, len(rows), across)]

        return render

    def groups(self, index: int, caption: str) -> tuple[str, ...]:
        """The kinds of prompts that an item belongs to: its rows in the table."""
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
    """(centres, size) of every layout that the words of a scene leave open, in units of the side.

    ``across`` turns a pair by 90 degrees.
    """
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


def _other_backgrounds(promised: dict, rng: np.random.Generator) -> list[dict]:
    """Other backgrounds: the same colours in other arrangements, and other colours in the same arrangement."""
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
