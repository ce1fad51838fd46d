"""The figure of docs/data.md: three images of different sizes and what a run reads of them, with aspect buckets,
random crops and mirroring.

    python -m benchmarks.figures.data [--out docs/images]

Takes some seconds and needs scikit-image, whose sample images it shows.
"""
import argparse
import tempfile
from pathlib import Path

import skimage.data
from PIL import Image, ImageDraw, ImageFont

from data.catalog import DataConfig, build_source
from data.images.folder import FolderConfig
from data.source import item_in_epoch
from files.images import to_pil

SAMPLES = {"astronaut": ("a portrait of an astronaut", (0, 0, 400, 512)),
           "coffee": ("a cup of coffee\na cup with the spoon on the right", (0, 0, 600, 400)),
           "cat": ("a close view of a cat", (0, 0, 451, 300))}
COLOURS = ("#e6194b", "#3cb44b", "#4363d8")
HEIGHT, GAP, LINE, WIDTH, SEED = 190, 10, 16, 200, 4


def whole(image: Image.Image, frames: list[tuple[float, ...]]) -> Image.Image:
    """The image scaled to ``HEIGHT``, with the frames of its crops."""
    scale = HEIGHT / image.height
    small = image.resize((round(image.width * scale), HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(small)
    for (_, _, top, left, height, width), colour in zip(frames, COLOURS):
        box = (left * scale, top * scale, (left + width) * scale - 1, (top + height) * scale - 1)
        draw.rectangle(box, outline=colour, width=2)
    return small


def row(source, index: int) -> Image.Image:
    """The whole image with its frames, then the crops of three epochs."""
    items = [item_in_epoch(source, index, epoch, SEED) for epoch in range(len(COLOURS))]
    images = [whole(source.source.open_image(index), [item["frame"] for item in items])]
    images += [to_pil(item["image"]) for item in items]
    names = [f"{source.source.names[index]}, {items[0]['frame'][1]} x {items[0]['frame'][0]}"]
    names += [f"epoch {epoch}: {item['image'].shape[2]} x {item['image'].shape[1]}"
              f"{', mirrored' if item['flipped'] else ''}" for epoch, item in enumerate(items)]
    sheet = Image.new("RGB", (290 + 3 * WIDTH, HEIGHT + LINE + GAP), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(size=12), 0
    for place, (image, name) in enumerate(zip(images, names)):
        sheet.paste(image, (left, LINE))
        draw.text((left, 0), name, fill="black" if place == 0 else COLOURS[place - 1], font=font)
        left = 290 + place * WIDTH
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="docs/images", help="folder to write to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, (caption, box) in SAMPLES.items():
            Image.fromarray(getattr(skimage.data, name)()).crop(box).save(Path(folder, f"{name}.png"))
            Path(folder, f"{name}.txt").write_text(caption)
        config = FolderConfig(folder, 144, crop="random", flip=0.5, buckets=True, step=48, validation=0.0, test=0.0)
        source = build_source(DataConfig(source="folder", folder=config), "train")
        rows = [row(source, index) for index in range(len(source))]
    sheet = Image.new("RGB", (rows[0].width, sum(part.height for part in rows)), "white")
    for number, part in enumerate(rows):
        sheet.paste(part, (0, number * part.height))
    path = Path(options.out) / "data.png"
    sheet.quantize(128).save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
