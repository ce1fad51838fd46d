"""How strongly a palette acts: images and errors of a run by the weight of the steering.

    python -m benchmarks.figures.palettes weights/emoji-64 [--palette ocean] [--out docs/images]

draws the prompts below from the same first noise at every weight, writes palette.png, a row a weight, and prints a
table: the mean CIEDE2000 difference of a pixel to the nearest colour of the palette (`eval.colour.palette_error`), and
how far the image moved from the one without a palette, in levels of 255, with bootstrap intervals over prompts. It
takes about a minute of one core with AVX512-BF16.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from eval.colour import palette_error
from eval.interval import bootstrap_mean
from files.images import to_uint8
from files.sheets import axes_grid
from pipeline.loading import load_run
from pipeline.palette import Palette, PaletteSteer, parse_palette
from pipeline.system import TextToImage

PROMPTS = ("a red apple, noto style", "a cat face, twemoji style", "a fire engine, openmoji style",
           "a birthday cake, flat style", "a grinning face, flat style", "a woman scientist, noto style",
           "two apples on a pink background, twemoji style", "a fox above a bus on a sky blue background, noto style")
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)


def drawn(system: TextToImage, palette: Palette, weight: float) -> Tensor:
    """Samples of the prompts, uint8 (B, 3, H, W), steered with this weight."""
    steer = PaletteSteer(palette, system.decode, weight) if weight else None
    latents = system.latents(PROMPTS, range(len(PROMPTS)), steer=steer)
    with torch.inference_mode():
        return to_uint8(system.decode(latents)).cpu()


def table_of(images: dict[float, Tensor], palette: Palette) -> str:
    """The Markdown table, a row for each weight."""
    lines = ["| weight | error | moved, of 255 |", "|---|---|---|"]
    for weight, at_weight in images.items():
        error = bootstrap_mean(palette_error(at_weight, palette.srgb).tolist(), 0)
        moved = bootstrap_mean((at_weight.float() - images[0.0].float()).abs().mean(dim=(1, 2, 3)).tolist(), 0)
        lines.append(f"| {weight:g} | {error} | {moved} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, write the figure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--palette", default="ocean", help="as in sample.py (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder of the figure (%(default)s)")
    options = parser.parse_args(arguments)
    palette, system = parse_palette(options.palette), load_run(options.run)
    images = {weight: drawn(system, palette, weight) for weight in tqdm(WEIGHTS, unit="weight")}
    sheet = axes_grid(torch.cat(list(images.values())), list(PROMPTS), [f"weight {weight:g}" for weight in WEIGHTS], 96,
                      f"{options.run.name}, palette {palette.name}")
    sheet.save(options.out / "palette.png")
    print(table_of(images, palette))


if __name__ == "__main__":
    main()
