"""The HTML page of a run: scores, pictures under their prompts, curves. It opens from disk and needs no network."""
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.files import whole
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


def draw_tradeoff(rows: Sequence[dict[str, Any]], path: Path, score: str, distance: str) -> bool:
    """Distance against score as a line through the rows, each labelled by its guidance, with both intervals.

    A row is {"guidance", "score", "distance"}, the last two as {"value", "low", "high"}. False without matplotlib.
    """
    return _draw(path, [(rows, "score", "distance", "guidance", score, distance)])


def draw_steps(rows: Sequence[dict[str, Any]], path: Path, score: str, distance: str) -> bool:
    """Score and distance against the number of sampler steps; rows as above with "steps" for "guidance"."""
    return _draw(path, [(rows, "steps", key, "", "sampler steps", name)
                        for key, name in (("score", score), ("distance", distance))])


def _draw(path: Path, panels: Sequence[tuple]) -> bool:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        rows, across, up, label, x_name, y_name = panel
        points = [[row[key] if isinstance(row[key], dict) else {"value": row[key], "low": row[key], "high": row[key]}
                   for key in (across, up)] for row in rows]
        x, y = ([point[axis]["value"] for point in points] for axis in (0, 1))
        reach_x, reach_y = ([[max(0.0, point[axis]["value"] - point[axis]["low"]) for point in points],
                             [max(0.0, point[axis]["high"] - point[axis]["value"]) for point in points]]
                            for axis in (0, 1))
        axes.errorbar(x, y, yerr=reach_y, xerr=reach_x, marker="o", color="#3457d5", ecolor="#b9c4ee", linewidth=1.3)
        for row, a, b in zip(rows, x, y):
            if label:
                axes.annotate(f"w = {row[label]:g}", (a, b), textcoords="offset points", xytext=(6, 6), fontsize=9)
        axes.set(xlabel=x_name, ylabel=y_name)
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
    parts = []
    for number, (image, caption) in enumerate(zip(images, captions)):
        name = f"{number:04d}.png"
        with whole(folder / name) as temporary:
            to_picture(image).save(temporary, format="PNG")
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
