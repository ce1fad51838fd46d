"""Whether a thing that was taught is recognised on new backgrounds and beside other things, against the base.

    python -m benchmarks.personal_subject weights/emoji-64 --adapter runs/personal/subject --clip weights/emoji-64

Each prompt promises the subject (an emoji whose name is in no training image, benchmarks/personal_sets.py) on a
coloured background, or in a relation to something that the base knows. Its sample is compared, in the image space of
the evaluator, with renderings of the same promise by the subject and by 99 other names in its place. No word for the
subject is asked of the evaluator, which has not seen it either. The renderings have a fixed layout and the styles' own
drawings.

recall 1, 5:   share of samples whose nearest rendering is that of the subject, or that have it among the nearest five
partner:       the same for the other thing of a relation, with the subject left in its place
real:          the ceiling, the subject's own rendering in another layout in place of a sample; chance is 1 and 5 %
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.personal_sets import SUBJECT
from benchmarks.personalization import samples, table
from data.emoji.emoji import SCENE_GROUPS, STYLES, Emoji
from data.emoji.phrasings import article, noun
from data.emoji.scenes import scene_image
from eval.interval import bootstrap_share
from files.images import to_unit
from files.sheets import grid, save_sheet
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.loading import load_run
from pipeline.personal import Personal
from sampling.personal import parse_adapter

PARTNERS = ("bus", "red-apple", "cat-face", "star", "red-heart")
COLOURS = ("pink", "sky blue", "yellow", "mint", "orange")
PLACES = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
NAMES = 100


class Promise(NamedTuple):
    """A prompt and what it promises; ``partner`` is "" for the subject alone."""

    prompt: str
    style: str
    colour: str
    partner: str
    place: str


def promises(source: Emoji, subject: str) -> list[Promise]:
    """Every style on every colour, and every style in every relation, with partners and colours in turn."""
    thing = article(noun(source.items[source.row_of[f"{STYLES[0]}/{subject}"]]["label"]))
    found = [Promise(f"{thing} on {article(colour)} background, {style} style", style, colour, "", "")
             for style in STYLES for colour in COLOURS]
    for i, style in enumerate(STYLES):
        for k, place in enumerate(PLACES):
            partner, colour = PARTNERS[(i + k) % len(PARTNERS)], COLOURS[(i + 2 * k) % len(COLOURS)]
            other = article(noun(source.items[source.row_of[f"{style}/{partner}"]]["label"]))
            prompt = f"{thing} {place} {other} on {article(colour)} background, {style} style"
            found.append(Promise(prompt, style, colour, partner, place))
    return found


class Renderings:
    """Renders a promise with any names in its places."""

    def __init__(self, source: Emoji):
        self.source = source
        self.known: dict[tuple[Promise, str, bool], Tensor] = {}

    def __call__(self, promise: Promise, names: Sequence[str], grown: float = 1.0) -> Tensor:
        """uint8 (3, S, S); ``grown`` is a factor of the size of the things."""
        size = (0.8 if len(names) == 1 else 0.395) * grown
        dx, dy = PLACES.get(promise.place, (0, 0))
        centres = [(0.5, 0.5)] if len(names) == 1 else [(0.5 + 0.24 * s * dx, 0.5 + 0.24 * s * dy) for s in (1, -1)]
        objects = [{"id": f"{promise.style}/{name}", "centre": centre, "size": size}
                   for name, centre in zip(names, centres)]
        scene = {"objects": objects, "background": {"kind": "plain", "colours": [promise.colour]}, "mood": ""}
        image = scene_image(scene, lambda name: self.source.rgba(self.source.row_of[name]), self.source.config.size)
        return torch.from_numpy(image)

    def others(self, style: str, without: Sequence[str], count: int) -> list[str]:
        """Names of things in a style, the same at every call."""
        names = sorted({item["name"] for item in self.source.items
                        if item["style"] == style and item["group"] in SCENE_GROUPS} - set(without))
        return [names[k] for k in np.random.default_rng(7).permutation(len(names))[:count]]

    def vectors(self, clip: ClipVectors, promise: Promise, subject: str, of_partner: bool) -> Tensor:
        """The vectors (NAMES, E) of the promised rendering and of those with other names in the place of the subject,
        or of its partner; computed once."""
        key = (promise, subject, of_partner)
        if key not in self.known:
            pair = [subject, promise.partner] if promise.partner else [subject]
            others = self.others(promise.style, pair, NAMES - 1)
            answers = [pair, *([[subject, other] if of_partner else [other, *pair[1:]] for other in others])]
            self.known[key] = clip(to_unit(torch.stack([self(promise, names) for names in answers])))
        return self.known[key]


def ranks(clip: ClipVectors, render: Renderings, found: Sequence[Promise], images: Tensor, subject: str,
          of_partner: bool) -> list[int]:
    """How many of the other names' renderings are at least as near to each image as the promised one."""
    result, vectors = [], clip(to_unit(images))
    for promise, vector in zip(found, vectors, strict=True):
        near = render.vectors(clip, promise, subject, of_partner) @ vector
        result.append(int((near[1:] >= near[0]).sum()))
    return result


def rows_of(clip: ClipVectors, render: Renderings, found: Sequence[Promise], images: Tensor, subject: str,
            name: str) -> dict[str, str]:
    """A row of the table."""
    alone = [i for i, promise in enumerate(found) if not promise.partner]
    pairs = [i for i, promise in enumerate(found) if promise.partner]
    row = {"system": name, "scale": ""}
    for label, places, of_partner in (("background", alone, False), ("relation", pairs, False),
                                      ("partner", pairs, True)):
        place = ranks(clip, render, [found[i] for i in places], images[places], subject, of_partner)
        for k in (1, 5):
            row[f"{label}, recall {k}"] = str(bootstrap_share([rank < k for rank in place]))
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of the base")
    parser.add_argument("--adapter", nargs="+", required=True, metavar="FILE[:SCALE]", help="each measured by itself")
    parser.add_argument("--clip", required=True, metavar="RUN", help="run folder of the evaluator")
    parser.add_argument("--subject", default=SUBJECT, help="its name in the emoji data set (%(default)s)")
    parser.add_argument("--sheet", metavar="PNG", help="the samples")
    options = parser.parse_args(arguments)
    try:
        source = Emoji(read_data_config(Path(options.run) / "config.yaml").emoji, "test")
        clip, render = ClipVectors.of_run(options.clip), Renderings(source)
        found = promises(source, options.subject)
        pair = [[options.subject, *([promise.partner] if promise.partner else [])] for promise in found]
        real = torch.stack([render(promise, names, 0.9) for promise, names in zip(found, pair)])
        system = load_run(options.run, moderation=None)
        prompts, shown = [promise.prompt for promise in found], {"real": real, "base": samples(system, [
            promise.prompt for promise in found])}
        for text in options.adapter:
            file, scale = parse_adapter(text)
            personal = Personal(system, [(file, scale)])
            shown[f"taught, scale {scale:g}"] = samples(system, prompts)
            personal.remove()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table([rows_of(clip, render, found, images, options.subject, name) for name, images in shown.items()]))
    if options.sheet:
        last = list(shown.values())[-1]
        save_sheet(grid(last, prompts, columns=9, cell=96, title=f"{options.run} with {options.adapter[-1]}"),
                   options.sheet)


if __name__ == "__main__":
    main()
