"""How well emoji scenes are read back, and the image of docs/scenes.md: what a sample is compared with.

    python -m benchmarks.emoji_questions [--root runs/data/emoji64] [--count 120] [--out docs/images/emoji_scenes.png]

Prints promises kept by real renderings, by the same blurred or with noise, and by renderings of other prompts.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from data.emoji.emoji import Emoji, EmojiConfig
from eval.scenes.candidates import Question, count_nearer_answers
from eval.scenes.score import score_table
from files.sheets import save_grid
from scoring.emoji import ATTRIBUTES, score_of_answers
from scoring.emoji_questions import Promises

SHOWN = 7  # candidates of a question in the image
BLUR, NOISE = 2.5, 60  # standard deviations: pixels, levels of 255


def degraded_images(image: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """uint8 (3, S, S) -> the image, blurred, and with noise."""
    blurred = gaussian_blur(image.float()[None], [13, 13], [BLUR, BLUR])[0]
    noisy = image + NOISE * torch.randn(image.shape, generator=generator)
    return [image, *(one.round().clamp(0, 255).to(torch.uint8) for one in (blurred, noisy))]


def draw(source: Emoji, promises: Promises, path: Path) -> str:
    """The candidates of the first relation with a mood: a row a question, the promised answer first."""
    def fits(index: int) -> bool:
        row, number = source.locate(index)
        return row is None and source.scene(number)["kind"] == "relation" and source.scene(number)["mood"] != ""

    index = next(index for index in range(len(source)) if fits(index))
    images, labels = [], []
    for asked in promises.questions(index):
        firsts = [asked.images[asked.owners == answer][0] for answer in range(min(SHOWN, asked.answers))]
        firsts += [np.full_like(firsts[0], 255)] * (SHOWN - len(firsts))
        images += firsts
        labels += [f"{asked.attribute}: as promised", *[""] * (SHOWN - 1)]
    save_grid(torch.from_numpy(np.stack(images)), path, labels, SHOWN, cell=96)
    return source.captions(index)[0]


def main() -> None:
    """Read real renderings back, print the table, draw the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/data/emoji64", help="folder of the emoji data (%(default)s)")
    parser.add_argument("--count", type=int, default=120, help="test items (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the image here")
    options = parser.parse_args()
    source = Emoji(EmojiConfig(options.root), "test")
    promises, generator = Promises(source), torch.Generator().manual_seed(0)
    step = len(source) // options.count
    chosen = range(0, step * options.count, step)
    names = ["real renderings", f"blurred by {BLUR} pixels", f"noise of {NOISE} levels", "renderings of other prompts"]
    rows: dict[str, list] = {name: [] for name in names}
    guesses, seconds = [], 0.0
    for place, index in enumerate(tqdm(chosen, unit="image")):
        stranger = chosen[(place + len(chosen) // 2) % len(chosen)]
        shown = [*degraded_images(source[index]["image"], generator), source[stranger]["image"]]
        started = time.perf_counter()
        asked: list[Question] = promises.questions(index)
        found = count_nearer_answers(asked, [image.numpy() for image in shown])
        seconds += time.perf_counter() - started
        guesses += [1 / one.answers for one in asked]
        for name, one in zip(names, found, strict=True):
            rows[name].append(({"tags": ()}, score_of_answers(asked, one)))
    print("| images | " + " | ".join(("promises", "whole prompts", *ATTRIBUTES)) + " |")
    print("|---|" + "---|" * (2 + len(ATTRIBUTES)))
    for name in names:
        table = score_table(rows[name], measures=ATTRIBUTES)["all"]
        print(f"| {name} | " + " | ".join(f"{100 * rate.value:.1f}" for rate in table.values()) + " |")
    print(f"a guess: {100 * np.mean(guesses):.1f} %; {1000 * seconds / len(chosen) / len(names):.0f} ms an image")
    if options.out is not None:
        print(f"{options.out}: {draw(source, promises, options.out)}")


if __name__ == "__main__":
    main()
