"""Whether held-out pairs of a name and a style are drawn in their style, by three readers, at several strengths.

    python -m benchmarks.pair_styles weights/emoji-64 --clip weights/emoji-64 [--count 200] [--strengths 1 1.5 2]

Every prompt is a name and a style of which no training image has both ("a red heart" in the style noto), on white, as
`sample.py --style NAME:STRENGTH` draws it. The readers judge the real images, these through the autoencoder, and the
samples:

classifier:   the style whose training images are nearest (linear discriminant analysis of the evaluator's vectors)
evaluator:    the style whose caption of the same name is nearest, of five
renderings:   the style whose drawing of the same name is nearest in pixels: strict, since a sample is another drawing
thing:        cosine with the name alone; and how often it is the nearest of all names

Intervals are bootstrap intervals over the pairs. A strength costs about a second of one core an image.
"""
import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.personal_scores import Kinds, images_of, singles
from data.catalog import DataConfig
from data.emoji.emoji import Emoji
from data.emoji.phrasings import article, noun
from eval.clip_score import agreement
from eval.interval import bootstrap_share
from eval.scenes.candidates import count_nearer_answers
from files.images import to_uint8, to_unit
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.loading import load_run
from pipeline.styles import DEFAULT, read_styles
from pipeline.system import TextToImage
from sampling.draw import Sources, decode_images, latents_of_requests
from sampling.request import Request
from sampling.styling import ChosenStyles, style_request
from scoring.emoji_questions import Promises

BATCH = 32


@dataclass(frozen=True)
class Pair:
    """A held-out item: its place in the split, its name with an article, and its style."""

    index: int
    thing: str
    style: str


def held_out_pairs(source: Emoji, count: int) -> list[Pair]:
    """``count`` held-out pairs on white, evenly spread over the split."""
    found = []
    for index in range(len(source)):
        row, _ = source.locate(index)
        if row is not None and source.held_out[row] == "pair" and source.background(row) == "white" \
                and not source.items[row]["tone"]:
            item = source.items[row]
            found.append(Pair(index, article(noun(item["label"])), item["style"]))
    return found[::max(1, len(found) // count)][:count]


class Readers:
    """The three readers of the style of images of ``pairs``."""

    def __init__(self, clip: ClipVectors, data: DataConfig, source: Emoji, pairs: Sequence[Pair], real: int):
        own, _, kinds = images_of(singles(data, "train"), real)
        self.clip, self.pairs, self.classifier = clip, pairs, Kinds(clip(to_unit(own)), kinds)
        promises = Promises(source)
        self.questions = [[asked for asked in promises.questions(pair.index) if asked.attribute == "style"]
                          for pair in pairs]
        names = self.classifier.names
        self.captions = [clip.texts([f"{pair.thing}, {name} style" for name in names]) for pair in pairs]

    def row(self, images: Tensor) -> list[str]:
        """What they say of images uint8 (N, 3, H, W), in the order of ``pairs``."""
        vectors, names = self.clip(to_unit(images)), self.classifier.names
        styles, things = [pair.style for pair in self.pairs], [pair.thing for pair in self.pairs]
        told = [one == style for one, style in zip(self.classifier(vectors), styles)]
        nearest = [names[int((texts @ vector).argmax())] == style
                   for texts, vector, style in zip(self.captions, vectors, styles)]
        drawn = [count_nearer_answers(asked, [image.numpy()])[0][0] == 0
                 for asked, image in zip(self.questions, images) if asked]
        found = agreement(vectors, self.clip.texts(things), things)
        return [*(str(bootstrap_share(one)) for one in (told, nearest, drawn)), str(found.score.scaled(0.01)),
                str(found.recall_1)]


def drawn_in_styles(system: TextToImage, asked: Sequence[tuple[str, str]], strength: float) -> Tensor:
    """One sample of each thing in its style, uint8 (N, 3, H, W); sample i has seed i."""
    styles, found = read_styles(DEFAULT), []
    requests = [style_request(Request(thing, seed, system.config.sampling),
                              ChosenStyles(((styles[style], strength),))) for seed, (thing, style) in enumerate(asked)]
    with torch.inference_mode():
        for start in tqdm(range(0, len(requests), BATCH), desc=f"strength {strength:g}", unit="batch"):
            latents = latents_of_requests(system, requests[start:start + BATCH], Sources())
            found.append(decode_images(system, latents, Sources()))
    return torch.cat(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of the emoji data set")
    parser.add_argument("--clip", type=Path, required=True, help="run folder of the evaluator")
    parser.add_argument("--count", type=int, default=200, help="pairs (%(default)s)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="(%(default)s)")
    parser.add_argument("--real", type=int, default=2000, help="training images for the classifier (%(default)s)")
    options = parser.parse_args(arguments)
    data, system = read_data_config(options.run / "config.yaml"), load_run(options.run)
    source = singles(data, "test")
    if not isinstance(source, Emoji):
        raise SystemExit(f"error: {options.run} was trained on {data.source}; valid: a run of the emoji data set")
    pairs = held_out_pairs(source, options.count)
    readers = Readers(ClipVectors.of_run(options.clip), data, source, pairs, options.real)
    real = torch.stack([torch.as_tensor(source[pair.index]["image"]) for pair in pairs])
    with torch.inference_mode():
        decoded = torch.cat([to_uint8(system.decode(system.encode_images(part))).cpu() for part in real.split(BATCH)])
    print(f"{len(pairs)} pairs\n\n| images | classifier | evaluator | renderings | cosine with the thing | nearest "
          "thing |\n|---|---|---|---|---|---|")
    for name, images in (("real", real), ("real, through the autoencoder", decoded)):
        print(f"| {name} | {' | '.join(readers.row(images))} |")
    asked = [(pair.thing, pair.style) for pair in pairs]
    for strength in options.strengths:
        row = readers.row(drawn_in_styles(system, asked, strength))
        print(f"| strength {strength:g} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
