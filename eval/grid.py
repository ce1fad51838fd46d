"""Labelled grids of pictures, as PNG files a person looks at."""
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = (30, 30, 34), (255, 255, 255), (110, 110, 118)


def to_picture(image: torch.Tensor) -> Image.Image:
    """A PIL picture of uint8 (3, H, W), or of float in [-1, 1]."""
    if image.dtype != torch.uint8:
        image = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))


def grid(images: torch.Tensor, labels: list[str] | None = None, columns: int = 8, cell: int = 128,
         title: str = "") -> Image.Image:
    """Pictures (B, 3, H, W) in rows of ``columns``, enlarged to about ``cell`` pixels, each label under its own.

    Enlarging is by whole factors without smoothing, so that what is seen is what was made.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures")
    font = ImageFont.load_default(size=12)
    factor = max(1, round(cell / images.shape[-1]))
    width, height, gap = images.shape[-1] * factor, images.shape[-2] * factor, 8
    wrapped = [textwrap.wrap(label, max(8, width // 6))[:5] for label in labels or [""] * len(images)]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    top = 26 if title else gap
    heights = [height + 15 * max(len(wrapped[i]) for i in row) + gap for row in rows]
    sheet = Image.new("RGB", (gap + min(columns, len(images)) * (width + gap), top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 6), title, fill=INK, font=ImageFont.load_default(size=14))
    y = top
    for row, row_height in zip(rows, heights):
        for column, i in enumerate(row):
            x = gap + column * (width + gap)
            sheet.paste(to_picture(images[i]).resize((width, height), Image.Resampling.NEAREST), (x, y))
            for line, text in enumerate(wrapped[i]):
                draw.text((x, y + height + 1 + 15 * line), text, fill=QUIET, font=font)
        y += row_height
    return sheet


def save_grid(images: torch.Tensor, path: str | Path, labels: list[str] | None = None, columns: int = 8,
              cell: int = 128, title: str = "") -> None:
    """Write ``grid`` as a PNG, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        grid(images, labels, columns, cell, title).save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
