"""Pictures about pictures: frames on the way to x_0, attention maps, grids."""
from collections.abc import Container
from pathlib import Path

import torch

from files.sheets import axes_grid, grid, heated, save_gif, save_grid, save_sheet
from model.attention_maps import AttentionMaps
from pipeline.prompts import chunks_of
from pipeline.system import TextToImage
from sampling.draw import Sources, pictures
from sampling.request import Axis, Request, described, parse_axis

REFUSED = "refused"
SHOWN = 256  # pictures of a grid; one of thousands is no picture to look at


def frames_of(system: TextToImage, trace: list[torch.Tensor], number: int, count: int,
              sources: Sources) -> tuple[torch.Tensor, list[str]]:
    """``count`` of the predictions x_0 (B, C, H, W) of picture ``number`` as pictures uint8 (N, 3, H, W), evenly chosen
    and the last one among them, and their labels."""
    count = min(count, len(trace))
    chosen = [round((k + 1) * len(trace) / count) - 1 for k in range(count)]
    with torch.inference_mode():
        frames = torch.cat([pictures(system, trace[step][number:number + 1], sources) for step in chosen])
    return frames, [f"{step + 1} of {len(trace)}" for step in chosen]


def save_frames(frames: torch.Tensor, labels: list[str], path: Path) -> None:
    """Frames as a strip PNG and a GIF beside a picture."""
    save_grid(frames, path.with_name(f"{path.stem}_frames.png"), labels, columns=min(10, len(frames)))
    save_gif(frames, path.with_name(f"{path.stem}_frames.gif"))


def save_attention(system: TextToImage, request: Request, maps: AttentionMaps, number: int, image: torch.Tensor,
                   path: Path) -> None:
    """The picture uint8 (3, H, W) and, for each token of its prompt, where it was looked at."""
    words = chunks_of(request.read(request.prompt), system.tokenizer).words
    height, width = system.latent_shape[1:]
    heat = maps.maps(height, width)[number].cpu()  # (L, h, w)
    shown = torch.stack([image, *(heated(image, heat[place]) for place in words)])
    save_grid(shown, path.with_name(f"{path.stem}_attention.png"), ["", *words.values()], columns=min(8, len(shown)))


def save_overview(images: torch.Tensor, requests: list[Request], xy: list[str] | None, name: str, out: Path,
                  refused: Container[int] = (), original: torch.Tensor | None = None) -> Path:
    """grid.png, or xy.png with labelled axes; ``original`` (3, H, W) uint8 stands before the others. Of requests that
    were ``refused``, by number, no word is written."""
    config = requests[0].config
    if xy:
        axes = [parse_axis(text) for text in xy]
        rows = axes[1].labels if len(axes) == 2 else [""]
        across = len(axes[0].labels)
        columns = cleared(axes[0], [range(k, len(requests), across) for k in range(across)], refused)
        if len(axes) == 2:
            rows = cleared(axes[1], [range(k * across, (k + 1) * across) for k in range(len(rows))], refused)
        fixed = {**described(config), "seed": f"seed {requests[0].seed}",
                 "prompt": REFUSED if 0 in refused else requests[0].prompt}
        title = ", ".join(text for key, text in fixed.items() if key not in {axis.name for axis in axes})
        save_sheet(axes_grid(images, columns, rows, title=f"{name}: {title}"), out / "xy.png")
        return out / "xy.png"
    labels = [REFUSED if number in refused else label_of(request) for number, request in enumerate(requests)]
    labels = labels[: len(images)]
    if original is not None:
        images, labels = torch.cat([original[None], images]), ["given", *labels]
    save_sheet(grid(images, labels, columns=min(8, len(images)),
                    title=f"{name}: {', '.join(described(config).values())}"), out / "grid.png")
    return out / "grid.png"


def cleared(axis: Axis, requests: list[range], refused: Container[int]) -> list[str]:
    """The labels of an axis; of prompts, that of one whose ``requests`` were all refused is not shown."""
    if axis.name != "prompt":
        return list(axis.labels)
    return [REFUSED if all(number in refused for number in numbers) else label
            for label, numbers in zip(axis.labels, requests)]


def label_of(request: Request) -> str:
    """What stands under a picture."""
    if request.toward is None:
        return f"{request.prompt} · {request.seed}"
    return f"{request.toward.weight:.2f}"
