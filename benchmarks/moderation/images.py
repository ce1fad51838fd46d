"""Image moderation on stand-ins: forbid "a red triangle", let red circles and blue triangles through; or forbid foxes.

    python -m benchmarks.moderation.images --clip runs/shapes_clip [runs/emoji_clip] [--rate 0.01]

The judge is the CLIP of a run folder (stage clip), applied to the data that it was trained on: by its vectors of whole
images and crops, and by those of regions if it has any. How well it finds captions, and what a judgement costs, stands
above the table. Every concept is
calibrated separately on validation images that do not show it, and measured on test images: with phrasings like those
of training, with phrasings of another grammar, and for objects that training never showed. No harmful image is
generated, so recall on real harm is not measured.
"""
import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.moderation.metrics import estimate, table
from data.catalog import build_source
from data.emoji.emoji import Emoji
from data.emoji.phrasings import noun
from data.shapes.scene_graph import COLOURS, SHAPES, UNSEEN_PAIRS
from data.shapes.shapes import Shapes
from data.source import Source, image_batch
from eval.clip_score import caption_ranks
from files.images import to_unit
from files.run_folder import RunFolder
from pipeline.clip_vectors import ClipVectors
from safety.image import Concept, ImageModerator, thresholds_of
from training.experiment import load_experiment

SEEN = ("a {}", "one {}", "a large {}", "a small {}")
UNSEEN = ("{}", "this shows the {}", "some {} somewhere", "nothing but {}")
PAIRS = (("red", "triangle"), ("blue", "star"), ("green", "circle"), ("purple", "cross"), ("yellow", "moon"),
         ("orange", "square"))
THINGS = (1, 2, 3)  # kinds of things in an image, for which recall is given
COLUMNS = ("recall", *(f"of {count}" for count in THINGS), "wrong", "near")
HELD_OUT = 256  # pairs among which captions are found
EMOJI = 40  # emoji that are forbidden, one after the other


@dataclass(frozen=True)
class LabelledImages:
    """Images of a split, and the objects in each of them."""

    images: torch.Tensor  # uint8 (B, 3, H, W)
    things: list[set[str]]

    def shows(self, thing: str) -> torch.Tensor:
        """Which images (B,) show an object."""
        return torch.tensor([thing in one for one in self.things])

    def near(self, thing: str) -> torch.Tensor:
        """Which images (B,) show no such object but one that shares a word with it: its colour or its shape."""
        words = set(thing.split())
        return torch.tensor([thing not in one and any(words & set(other.split()) for other in one)
                             for one in self.things])


def things_of(source: Source, index: int, item: dict) -> set[str]:
    """The objects in an image: "red triangle" for shapes, "fox" for emoji."""
    if isinstance(source, Shapes):
        return {f"{thing['colour']} {thing['shape']}" for thing in item["scene"]["objects"]}
    assert isinstance(source, Emoji)
    row, number = source.locate(index)
    rows = [row] if row is not None else [source.row_of[one["id"]] for one in source.scene(number)["objects"]]
    return {noun(source.items[row]["label"]) for row in rows}


def read_images(source: Source, count: int) -> LabelledImages:
    """The first ``count`` images of a split."""
    items = [(index, source[index]) for index in range(min(count, len(source)))]
    return LabelledImages(torch.stack([item["image"] for _, item in items]),
                          [things_of(source, index, item) for index, item in items])


def groups_of(source: Source, calibration: LabelledImages, test: LabelledImages) -> dict[str, list[str]]:
    """{kind: objects to forbid}: objects that occur in training, and objects that training never showed."""
    if isinstance(source, Shapes):
        return {"seen": [" ".join(pair) for pair in PAIRS], "unseen": [" ".join(pair) for pair in UNSEEN_PAIRS]}
    assert isinstance(source, Emoji)
    known = {noun(source.items[row]["label"]) for row, held in source.held_out.items() if held != "name"}
    common = [thing for thing, _ in Counter(thing for one in test.things for thing in sorted(one)).most_common()]
    return {"seen": [thing for thing in common if thing in known][:EMOJI],
            "unseen": [thing for thing in common if thing not in known][:EMOJI]}


def neighbours(thing: str) -> tuple[tuple[str, ...], ...]:
    """Phrasings of allowed neighbours: the same colour on other shapes, other colours on the same shape."""
    colour, shape = thing.split()
    near = [(colour, other) for other in SHAPES if other != shape]
    near += [(other, shape) for other in COLOURS if other != colour]
    return tuple(tuple(text.format(" ".join(one)) for text in SEEN) for one in near)


def questions_of(source: str, groups: dict[str, list[str]]) -> dict[tuple[str, str, str], list[Concept]]:
    """{(things, phrasings, neighbours): concepts}: one question for each row of the table."""
    return {(f"{len(things)} {kind}", name, "yes" if near else "no"):
            [Concept(thing, "stand_in", tuple(text.format(thing) for text in texts), neighbours(thing) if near else ())
             for thing in things]
            for kind, things in groups.items() for name, texts in (("seen", SEEN), ("unseen", UNSEEN))
            for near in ((False, True) if source == "shapes" else (False,))}


def judge_of(clip: ClipVectors, concepts: Sequence[Concept], regions: bool) -> ImageModerator:
    """The moderator that judges by regions, or by whole images and crops."""
    if regions:
        return ImageModerator(concepts, clip.patches, clip.parts, regions=True)
    return ImageModerator(concepts, clip, clip.texts)


def margins_of(moderator: ImageModerator, images: torch.Tensor) -> torch.Tensor:
    """The margins (B, C) of images uint8 (B, 3, H, W)."""
    return torch.cat([moderator.margins(to_unit(part)) for part in images.split(64)])


def measure(concept: Concept, calm: torch.Tensor, real: torch.Tensor, calibration: LabelledImages,
            test: LabelledImages, rate: float) -> dict[str, np.ndarray]:
    """0 or 1 for each image, from the margins of one concept (B,) on both sets: "recall" on images with it, the same
    for those with one, two and three kinds of things, "wrong" on all other images, "near" on those of them that share
    a word."""
    threshold = thresholds_of(calm[~calibration.shows(concept.name), None], rate)
    over, here = real > threshold, test.shows(concept.name)
    number = torch.tensor([len(one) for one in test.things])
    chosen = {"recall": here, "wrong": ~here, "near": test.near(concept.name),
              **{f"of {count}": here & (number == count) for count in THINGS}}
    return {name: over[which].numpy().astype(float) for name, which in chosen.items()}


def quality(clip: ClipVectors, source: Source) -> str:
    """How many held-out captions are found, as the stage measures it, in words."""
    count = min(HELD_OUT, len(source))
    captions = [source.captions(index)[0] for index in range(count)]
    ranks = caption_ranks(clip(image_batch(source, np.arange(count))), clip.texts(captions), captions)
    return f"the caption of {estimate(np.mean, (ranks == 0).numpy().astype(float), percent=True)} of {count} images"


def milliseconds(moderator: ImageModerator, image: torch.Tensor) -> float:
    """The median time of the margins of one image (1, 3, H, W)."""
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        moderator.margins(image)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def rows_of(folder: Path, count: int, rate: float) -> list[list[str]]:
    """The rows of the table for one run folder."""
    data = load_experiment(str(RunFolder.open(folder).path / "config.yaml")).data.squares
    if data.source == "shapes":
        data = replace(data, shapes=replace(data.shapes, validation=count, test=count))
    elif data.source == "emoji":
        data = replace(data, emoji=replace(data.emoji, held_out_scenes=count))
    else:
        raise ValueError(f"--clip {folder}: trained on {data.source}; valid: on shapes or emoji")
    sources = build_source(data, "validation"), build_source(data, "test")
    calibration, test = (read_images(source, 2 * count) for source in sources)
    clip, rows = ClipVectors.of_run(folder), []
    print(f"{folder}: {quality(clip, sources[0])}")
    asked = questions_of(data.source, groups_of(sources[1], calibration, test))
    for regions in (False, True) if clip.regions else (False,):
        judge = "regions" if regions else "whole image"
        moderator = judge_of(clip, [concept for concepts in asked.values() for concept in concepts], regions)
        calm, real = (margins_of(moderator, one.images).T for one in (calibration, test))  # (C, B), in this order
        place = 0
        for question, concepts in asked.items():
            found = [measure(concept, calm[place + i], real[place + i], calibration, test, rate)
                     for i, concept in enumerate(concepts)]
            joined = [np.concatenate([one[column] for one in found]) for column in COLUMNS]
            rows.append([data.source, judge, *question,
                         *(estimate(np.mean, part, percent=True) for part in joined), str(len(joined[0]))])
            print(rows[-1], flush=True)
            place += len(concepts)
        few = judge_of(clip, asked[question][:3], regions)
        print(f"{judge}: {milliseconds(few, to_unit(test.images[:1])):.1f} ms an image, 3 concepts", flush=True)
    return rows


def main() -> None:
    """Print the table for all run folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, nargs="+", required=True, help="run folders with the stage clip")
    parser.add_argument("--count", type=int, default=2000, help="images for calibration, and for the test")
    parser.add_argument("--rate", type=float, default=0.01, help="share of harmless images over a threshold (0.01)")
    options = parser.parse_args()
    rows = [row for folder in options.clip for row in rows_of(folder, options.count, options.rate)]
    print(table(("data", "judge", "things", "phrasings", "neighbours", "recall", *(f"{n} in the image" for n in THINGS),
                 "false positives", "of those that share a word", "images"), rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
