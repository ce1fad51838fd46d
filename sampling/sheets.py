"""Sheets of images: frames on the way to x_0, attention maps, grids."""
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from files.sheets import axes_grid, grid, heat_overlay, save_gif, save_grid, save_sheet
from files.whole import free_path
from sampling.request import Axis, Request, describe, parse_axis

REFUSED = "refused"
LARGEST_GRID = 256  # images of grid.png; nobody looks at one of thousands


def save_frames(frames: torch.Tensor, labels: list[str], path: Path) -> None:
    """Frames as a strip PNG and a GIF beside an image."""
    save_grid(frames, path.with_name(f"{path.stem}_frames.png"), labels, columns=min(10, len(frames)), new=True)
    save_gif(frames, path.with_name(f"{path.stem}_frames.gif"), new=True)


def save_attention(words: dict[int, str], heat: torch.Tensor, image: torch.Tensor, path: Path) -> None:
    """The image uint8 (3, H, W) and, for each of the ``words`` by its place among the tokens, the share of attention
    (L, h, w) that it has at each pixel."""
    cells = torch.stack([image, *(heat_overlay(image, heat[place]) for place in words)])
    save_grid(cells, path.with_name(f"{path.stem}_attention.png"), ["", *words.values()], columns=min(8, len(cells)),
              new=True)


@dataclass(frozen=True)
class Sheet:
    """What an overview shows beside the images: the name of the system, the folder it is written to, the number of the
    call's first image there, the axes of an X/Y grid, the numbers of the refused requests, the image that was given,
    and the names of the requests where their prompts are not to be shown."""

    name: str
    out: Path
    first: int = 0
    axes: Sequence[str] = ()
    refused: Container[int] = ()
    original: torch.Tensor | None = None
    names: Sequence[str] = ()


def save_overview(images: torch.Tensor, requests: Sequence[Request], sheet: Sheet) -> Path:
    """grid.png of images uint8 (B, 3, H, W), or xy.png with labelled axes; the original stands before the others. A
    folder with such a file gets grid_00012.png, by the number of the first image. Of refused requests no word is
    written."""
    config, refused = requests[0].config, sheet.refused
    path = sheet.out / ("xy.png" if sheet.axes else "grid.png")
    if path.exists():
        path = free_path(path.with_stem(f"{path.stem}_{sheet.first:05d}"))
    if sheet.axes:
        axes = [parse_axis(text) for text in sheet.axes]
        rows = axes[1].labels if len(axes) == 2 else [""]
        across = len(axes[0].labels)
        columns = axis_labels(axes[0], [range(k, len(requests), across) for k in range(across)], refused)
        if len(axes) == 2:
            rows = axis_labels(axes[1], [range(k * across, (k + 1) * across) for k in range(len(rows))], refused)
        fixed = {**describe(config), "seed": f"seed {requests[0].seed}",
                 "prompt": REFUSED if 0 in refused else requests[0].prompt}
        title = ", ".join(text for key, text in fixed.items() if key not in {axis.name for axis in axes})
        save_sheet(axes_grid(images, columns, rows, title=f"{sheet.name}: {title}"), path, new=True)
        return path
    labels = [REFUSED if number in refused else label_of(request) for number, request in enumerate(requests)]
    labels = [name if label != REFUSED else label for name, label in zip(sheet.names, labels)] or labels
    labels = labels[: len(images)]
    if sheet.original is not None:
        images, labels = torch.cat([sheet.original[None], images]), ["given", *labels]
    save_sheet(grid(images, labels, columns=min(8, len(images)),
                    title=f"{sheet.name}: {', '.join(describe(config).values())}"), path, new=True)
    return path


def axis_labels(axis: Axis, requests: list[range], refused: Container[int]) -> list[str]:
    """The labels of an axis, without the words of a prompt whose ``requests`` were all refused."""
    if axis.name != "prompt":
        return list(axis.labels)
    return [REFUSED if all(number in refused for number in numbers) else label
            for label, numbers in zip(axis.labels, requests)]


def label_of(request: Request) -> str:
    """The text under an image: prompt and seed, or how far it stands on the way of an interpolation."""
    if request.toward is None:
        return f"{request.prompt} · {request.seed}"
    return f"{request.toward.weight:.2f}"
