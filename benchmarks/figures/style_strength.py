"""Whether the strength of a style is an amount: how much of the style is measured in samples, by strength.

    python -m benchmarks.figures.style_strength weights/emoji-64 --clip weights/emoji-64 [--out docs/images]

draws the things below without a style and in each style at strengths up to 2, from the same first noise, and prints the
share of samples that a classifier of the drawn styles takes for the style, the mean probability that it gives to it
(linear discriminant analysis of the evaluator's vectors, made from training images and checked on validation images),
and what becomes of the thing: the cosine with the prompt without the style, and how often that is the nearest of all of
them. Bootstrap intervals over the samples. Writes style_strength.png. It takes about ten minutes of one core.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pair_styles import drawn_in_styles
from benchmarks.personal_scores import Kinds, images_of, singles
from eval.clip_score import agreement
from eval.interval import bootstrap_mean, bootstrap_share
from files.images import to_unit
from files.sheets import axes_grid, save_sheet
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.loading import load_run

THINGS = ("a red apple", "a cat face", "a fire engine", "a guitar", "a grinning face", "a woman scientist", "a bus",
          "a red heart", "a star", "a banana", "a house", "a dog face", "a birthday cake", "an umbrella", "a crown",
          "a rocket")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SHOWN = 10  # columns of the sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, write the figure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of the emoji data set")
    parser.add_argument("--clip", type=Path, required=True, help="run folder of the evaluator")
    parser.add_argument("--styles", nargs="+", default=["noto", "openmoji", "flat"],
                        help="the sheet shows the first two (%(default)s)")
    parser.add_argument("--real", type=int, default=2000, help="real images for the classifier (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="samples of each thing (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder of the figure (%(default)s)")
    options = parser.parse_args(arguments)
    data, clip, system = read_data_config(options.run / "config.yaml"), ClipVectors.of_run(options.clip), \
        load_run(options.run)
    own, _, kinds = images_of(singles(data, "train"), options.real)
    check, _, right = images_of(singles(data, "validation"), options.real)
    classifier = Kinds(clip(to_unit(own)), kinds)
    hits = [one == other for one, other in zip(classifier(clip(to_unit(check))), right)]
    print(f"classifier on {len(hits)} validation images: {bootstrap_share(hits)}\n\n| style | strength | hit | "
          "probability | cosine with the thing | nearest thing |\n|---|---|---|---|---|---|")
    asked = list(THINGS) * options.rounds  # with seeds that go on

    def drawn(style: str, strength: float) -> Tensor:
        return drawn_in_styles(system, [(thing, style) for thing in asked], strength)

    rows: dict[str, Tensor] = {"no style": drawn(options.styles[0], 0.0)}
    for style in options.styles:
        for strength in STRENGTHS:
            images = drawn(style, strength) if strength else rows["no style"]
            vectors = clip(to_unit(images))
            chance = classifier.chances(vectors)[:, classifier.names.index(style)]
            found = agreement(vectors, clip.texts(asked), asked)
            print(f"| {style} | {strength:g} | {bootstrap_share([kind == style for kind in classifier(vectors)])} | "
                  f"{bootstrap_mean(chance.numpy())} | {found.score.scaled(0.01)} | {found.recall_1} |", flush=True)
            if strength and style in options.styles[:2]:  # more make a sheet that nobody scrolls through
                rows[f"{style}:{strength:g}"] = images
    save_sheet(axes_grid(torch.cat([images[:SHOWN] for images in rows.values()]), list(THINGS[:SHOWN]), list(rows), 64,
                         f"{options.run.name}: strength of a style"), options.out / "style_strength.png")


if __name__ == "__main__":
    main()
