"""How strongly a palette acts: images and errors of a run by the weight of the steering.

    python -m benchmarks.figures.palettes weights/emoji-64 [--palette ocean] [--clip RUN] [--out docs/images]

draws the prompts below, and with --clip held-out captions of the run, from the same first noise at every weight, writes
palette.png, a row a weight, and prints a table: the mean CIEDE2000 difference of a pixel to the nearest colour of the
palette (`eval.colour.palette_error`), and how far the image moved from the one without a palette, in levels of 255;
with the evaluator in RUN also the cosine of prompt and image and the share of images whose own prompt is the nearest.
Intervals are bootstrapped over prompts. It takes about a minute of one core with AVX512-BF16, four with --clip.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.catalog import build_source
from eval.clip_score import agreement
from eval.colour import palette_error
from eval.interval import bootstrap_mean
from files.images import to_uint8, to_unit
from files.sheets import axes_grid
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.loading import load_run
from pipeline.palette import Palette, PaletteSteer, parse_palette
from pipeline.system import TextToImage

PROMPTS = ("a red apple, noto style", "a cat face, twemoji style", "a fire engine, openmoji style",
           "a birthday cake, flat style", "a grinning face, flat style", "a woman scientist, noto style",
           "two apples on a pink background, twemoji style", "a fox above a bus on a sky blue background, noto style")
BATCH = 16
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)


def drawn(system: TextToImage, palette: Palette, weight: float, prompts: Sequence[str]) -> Tensor:
    """Samples of the prompts, uint8 (B, 3, H, W), steered with this weight."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start:start + BATCH]
        steer = PaletteSteer(palette, system.decode, weight) if weight else None
        latents = system.latents(part, range(start, start + len(part)), steer=steer)
        with torch.inference_mode():
            parts.append(to_uint8(system.decode(latents)).cpu())
    return torch.cat(parts)


def table_of(images: dict[float, Tensor], palette: Palette, prompts: Sequence[str], clip: ClipVectors | None) -> str:
    """The Markdown table, a row for each weight."""
    names = ["weight", "error", "moved, of 255", *(["fidelity", "recall 1"] if clip else [])]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for weight, at_weight in images.items():
        error = bootstrap_mean(palette_error(at_weight, palette.srgb).tolist(), 0)
        moved = bootstrap_mean((at_weight.float() - images[0.0].float()).abs().mean(dim=(1, 2, 3)).tolist(), 0)
        found = agreement(clip(to_unit(at_weight)), clip.texts(prompts), prompts) if clip else None
        fidelity = f" {found.score.scaled(0.01)} | {found.recall_1} |" if found else ""
        lines.append(f"| {weight:g} | {error} | {moved} |{fidelity}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, write the figure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--palette", default="ocean", help="as in sample.py (%(default)s)")
    parser.add_argument("--clip", type=Path, help="run folder of the evaluator, for the fidelity to the prompts")
    parser.add_argument("--captions", type=int, default=24, help="held-out captions beside the prompts (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder of the figure (%(default)s)")
    options = parser.parse_args(arguments)
    palette, system = parse_palette(options.palette), load_run(options.run)
    clip, prompts = ClipVectors.of_run(options.clip) if options.clip else None, list(PROMPTS)
    if clip is not None:
        own = build_source(read_data_config(options.run / "config.yaml").squares, "validation")
        prompts += [own.captions(i)[0] for i in range(options.captions)]
    images = {weight: drawn(system, palette, weight, prompts) for weight in tqdm(WEIGHTS, unit="weight")}
    shown = torch.cat([at_weight[:len(PROMPTS)] for at_weight in images.values()])
    sheet = axes_grid(shown, list(PROMPTS), [f"weight {weight:g}" for weight in WEIGHTS], 96,
                      f"{options.run.name}, palette {palette.name}")
    sheet.save(options.out / "palette.png")
    print(table_of(images, palette, prompts, clip))


if __name__ == "__main__":
    main()
