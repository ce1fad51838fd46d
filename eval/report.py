"""The HTML page of a run: scores, pictures under their prompts, curves. It opens from disk and needs no network."""
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.grid import to_picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e1e22; max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.15em; margin-top: 2em } p.quiet, figcaption { color: #6e6e76 }
table { border-collapse: collapse; font-size: .86em } td, th { padding: .25em .6em; border-bottom: 1px solid #e4e4ea }
th { text-align: left; font-weight: 600 } td + td, th + th { text-align: right }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: .9em }
figure { margin: 0 } figure img { width: 100%; image-rendering: pixelated; display: block }
figcaption { font-size: .74em; line-height: 1.3; margin-top: .3em }
figure.missed img { outline: 2px solid #d0342c } .curves img, .sheet img { max-width: 100% }
"""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Loss and validation curves of every stage as one PNG; False when matplotlib is missing or nothing was logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [(stage, key) for stage in dict.fromkeys(row["stage"] for row in metrics)
              for key in ("loss", "validation_loss", "validation_psnr")
              if any(key in row for row in metrics if row["stage"] == stage)]
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        # by step: after a crash some steps are logged twice
        points = {row["step"]: row[key] for row in metrics if row["stage"] == stage and key in row}
        axes.plot(list(points), list(points.values()), marker="" if key == "loss" else ".", color="#3457d5",
                  linewidth=1.3)
        axes.set(title=f"{stage}: {key.replace('_', ' ')}" + (" (dB)" if "psnr" in key else ""), xlabel="step")
        if key != "validation_psnr":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def markdown_table(text: str) -> str:
    """A Markdown table as HTML."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()
            if line.strip() and not set(line) <= set("|- ")]
    cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
             for row, tag in zip(rows, ["th"] + ["td"] * len(rows))]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def pictures(images: torch.Tensor, captions: Sequence[str], folder: Path, missed: Sequence[bool] = ()) -> str:
    """HTML of pictures (B, 3, H, W) under their captions, each saved as a PNG in ``folder``; ``missed`` get a frame."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (image, caption) in enumerate(zip(images, captions)):
        name = f"{number:04d}.png"
        to_picture(image).save(folder / name)
        kind = ' class="missed"' if number < len(missed) and missed[number] else ""
        text = html.escape(caption)
        parts.append(f'<figure{kind}><img src="{folder.name}/{name}" alt="{text}">'
                     f"<figcaption>{text}</figcaption></figure>")
    return f'<div class="pictures">{"".join(parts)}</div>'


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML page from (heading, HTML) sections."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n')
