"""Labelled grids of images, as PNG files a person looks at."""
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from files.images import to_pil
from files.whole import whole_file

INK, PAPER, QUIET = (30, 30, 34), (255, 255, 255), (110, 110, 118)


def grid(images: torch.Tensor, labels: list[str] | None = None, columns: int = 8, cell: int = 128,
         title: str = "") -> Image.Image:
    """Images (B, 3, H, W) in rows of ``columns``, enlarged to about ``cell`` pixels, each label under its own.

    Images are enlarged by whole factors without smoothing, so that the grid shows their actual pixels.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
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
            sheet.paste(to_pil(images[i]).resize((width, height), Image.Resampling.NEAREST), (x, y))
            for line, text in enumerate(wrapped[i]):
                draw.text((x, y + height + 1 + 15 * line), text, fill=QUIET, font=font)
        y += row_height
    return sheet


def axes_grid(images: torch.Tensor, columns: list[str], rows: list[str], cell: int = 128,
              title: str = "") -> Image.Image:
    """Images (R C, 3, H, W), row by row, with what a column and a row stand for written on top and on the left."""
    if len(images) != len(columns) * len(rows):
        raise ValueError(f"{len(images)} images for {len(rows)} rows of {len(columns)}; valid: one for each")
    font, line, gap = ImageFont.load_default(size=12), 15, 8
    factor = max(1, round(cell / images.shape[-1]))
    width, height = images.shape[-1] * factor, images.shape[-2] * factor
    above = [textwrap.wrap(label, max(8, width // 6))[:5] for label in columns]
    beside = [textwrap.wrap(label, 18)[: max(1, height // line)] for label in rows]
    widest = max((font.getlength(text) for label in beside for text in label), default=0)
    left = gap + (int(widest) + gap if any(beside) else 0)
    top = (26 if title else gap) + line * max(len(label) for label in above)
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 6), title, fill=INK, font=ImageFont.load_default(size=14))
    for column, label in enumerate(above):
        for k, text in enumerate(label):
            draw.text((left + column * (width + gap), top - line * (len(label) - k) - 1), text, fill=QUIET, font=font)
    for row, label in enumerate(beside):
        for k, text in enumerate(label):
            draw.text((gap, top + row * (height + gap) + line * k), text, fill=QUIET, font=font)
    for i, image in enumerate(images):
        row, column = divmod(i, len(columns))
        enlarged = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + column * (width + gap), top + row * (height + gap)))
    return sheet


def heat_overlay(image: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """An image uint8 (3, H, W) in grey under a map (h, w) of any range: black, red, yellow, white from its lowest to
    its highest value."""
    low, high = heat.min(), heat.max()
    share = (heat - low) / (high - low).clamp(min=1e-12)
    share = F.interpolate(share[None, None].float(), image.shape[1:], mode="bilinear")[0]  # (1, H, W)
    colour = 255 * (3 * share - torch.arange(3)[:, None, None]).clamp(0, 1)  # (3, H, W)
    grey = image.float().mean(dim=0, keepdim=True)  # (1, H, W)
    return (0.3 * grey + 0.7 * colour).round().to(torch.uint8)


def save_gif(images: torch.Tensor, path: str | Path, cell: int = 128, seconds: float = 0.1,
             new: bool = False) -> None:
    """Write images (B, 3, H, W) one after the other, the last one held, whole or not at all; ``new`` as in
    ``whole_file``."""
    factor = max(1, round(cell / images.shape[-1]))
    size = (images.shape[-1] * factor, images.shape[-2] * factor)
    frames = [to_pil(image).resize(size, Image.Resampling.NEAREST) for image in images]
    times = [round(1000 * seconds)] * (len(frames) - 1) + [2000]
    with whole_file(path, new) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def save_grid(images: torch.Tensor, path: str | Path, labels: list[str] | None = None, columns: int = 8,
              cell: int = 128, title: str = "", new: bool = False) -> None:
    """Write ``grid`` as a PNG, whole or not at all; ``new`` as in ``whole_file``."""
    save_sheet(grid(images, labels, columns, cell, title), path, new)


def save_sheet(sheet: Image.Image, path: str | Path, new: bool = False) -> None:
    """Write a grid as a PNG, whole or not at all; ``new`` as in ``whole_file``."""
    with whole_file(path, new) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
