"""HTML pages that need no network: tables, charts, images with captions."""
import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from files.images import to_pil
from files.whole import whole_file

INTERVAL = re.compile(r"[-+]?\d[\d.]* \(.*\d")  # a cell such as "71.0 (68-73)" or "0.12 (0.1 to 0.2)"
WIDE = 8  # columns from which a table is set smaller, so that it fits a window of 1,200 pixels
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#1e1e22}
h1{font-size:1.6em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
.quiet,figcaption{color:#6e6e76}li{margin:.1rem 0}
table{border-collapse:collapse;font-size:.86em;margin:.7em 0}td,th{padding:.25em .6em;border-bottom:1px solid #e4e4ea}
th{text-align:left;font-weight:600}td+td,th+th{text-align:right}td.interval{white-space:nowrap}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
table.wide{font-size:.74em}table.wide td,table.wide th{padding:.3em .35em}
figure{display:inline-block;margin:.4rem 1rem .4rem 0;vertical-align:top}img{max-width:100%}
.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:.9em}
.images figure{margin:0}.images img{width:100%;image-rendering:pixelated;display:block}
.images figcaption{font-size:.74em;line-height:1.3;margin:.3em 0}
.checked{grid-template-columns:repeat(auto-fill,minmax(160px,1fr))}
.checked figure{display:grid;grid-row:span 3;grid-template-rows:subgrid;align-content:start}
.checked figcaption{color:#1e1e22;font-size:.82em;align-self:end}
.marks{list-style:none;margin:.3em 0;padding:0;font-size:.8em}
.kept{color:#1f7a3f}.broken{color:#c02a22;font-weight:600}figure.missed img{outline:2px solid #d0342c}"""


def escape(text: object) -> str:
    """A text escaped for HTML; surrogates, as in names of files, become backslash escapes."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A complete HTML page of (heading, HTML) sections."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n")


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; its cells are escaped."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def markdown_table(text: str) -> str:
    """A Markdown table as HTML. A value stays on one line with its interval."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()
            if line.strip() and not set(line) <= set("|- ")]
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in rows[0])]
    lines += ["".join(f'<td class="interval">{escape(cell)}</td>' if INTERVAL.match(cell)
                      else f"<td>{escape(cell)}</td>" for cell in row) for row in rows[1:]]
    kind = ' class="wide"' if len(rows[0]) >= WIDE else ""
    return f"<table{kind}>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def html_list(items: Sequence[str], most: int = 200) -> str:
    """An HTML list, cut after ``most`` entries; its items are escaped."""
    more = f'<p class="quiet">and {len(items) - most} more</p>' if len(items) > most else ""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items[:most])}</ul>{more}"


def histogram(values: np.ndarray, caption: str, bins: int = 30, marks: Sequence[tuple[float, str]] = ()) -> str:
    """A histogram of ``values`` as inline SVG; ``marks`` are the (value, name) of vertical lines."""
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer) and high - low < bins:
        edges = np.arange(low - 0.5, high + 1.5)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, _ = np.histogram(values, edges)
    width, height, foot = 420, 130, 18
    bar = width / len(counts)
    parts = [f'<rect x="{i * bar:.1f}" y="{height - height * c / counts.max():.1f}" width="{max(bar - 1, 0.5):.1f}" '
             f'height="{height * c / counts.max():.1f}" fill="#4a7ab5"><title>{edges[i]:g} to {edges[i + 1]:g}: {c}'
             f"</title></rect>" for i, c in enumerate(counts)]
    for value, name in marks:
        x = (value - edges[0]) / (edges[-1] - edges[0]) * width
        if 0 <= x <= width:
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c33"/>'
                         f'<text x="{x + 3:.1f}" y="11" font-size="11" fill="#c33">{escape(name)}</text>')
    parts.append(f'<text x="0" y="{height + foot - 4}" font-size="11">{low:g}</text><text x="{width}" '
                 f'y="{height + foot - 4}" font-size="11" text-anchor="end">{high:g}</text>')
    return (f'<figure><svg width="{width}" height="{height + foot}" role="img">{"".join(parts)}</svg>'
            f"<figcaption>{escape(caption)}; highest bar {counts.max()}, median {np.median(values):g}</figcaption>"
            "</figure>")


def contact_sheet(images: Sequence[np.ndarray], columns: int, cell: int) -> Image.Image:
    """Images uint8 (H, W, 3) beside each other, each within a square of ``cell`` pixels."""
    rows = -(-len(images) // columns)
    result = Image.new("RGB", (columns * (cell + 4), rows * (cell + 4)), "#f2f2f2")
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        image.thumbnail((cell, cell))
        row, column = divmod(number, columns)
        result.paste(image, (column * (cell + 4) + (cell + 4 - image.width) // 2,
                             row * (cell + 4) + (cell + 4 - image.height) // 2))
    return result


def inline_image(image: Image.Image, caption: str) -> str:
    """An image inside the page, with a caption under it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def image_figures(images: torch.Tensor, captions: Sequence[str], folder: Path) -> str:
    """HTML of images (B, 3, H, W) above their captions; each is saved as a PNG in ``folder``."""
    parts = []
    for number, (image, caption) in enumerate(zip(images, captions)):
        source = save_figure(image, folder, number)
        parts.append(f'<figure><img src="{source}" alt="{escape(caption)}">'
                     f"<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="images">{"".join(parts)}</div>'


def checked_figures(images: torch.Tensor, captions: Sequence[str], marks: Sequence[Sequence[tuple[str, bool]]],
                    folder: Path, first: int = 0) -> str:
    """HTML of prompts with their images (B, 3, H, W) and a list of what was promised, ticked where it was kept.

    ``marks`` are (promise, whether it was kept) of each image. An image that breaks a promise has a red frame. Each is
    saved as a PNG in ``folder``, under its number from ``first`` on.
    """
    parts = []
    for number, (image, caption, promises) in enumerate(zip(images, captions, marks), first):
        source = save_figure(image, folder, number)
        kind = "" if all(kept for _, kept in promises) else ' class="missed"'
        lines = "".join(f'<li class="kept">&#10003; {escape(promise)}</li>' if kept
                        else f'<li class="broken">&#10007; {escape(promise)}</li>' for promise, kept in promises)
        parts.append(f'<figure{kind}><figcaption>{escape(caption)}</figcaption><img src="{source}" '
                     f'alt="{escape(caption)}"><ul class="marks">{lines}</ul></figure>')
    return f'<div class="images checked">{"".join(parts)}</div>'


def save_figure(image: torch.Tensor, folder: Path, number: int) -> str:
    """Save an image (3, H, W) as a PNG in ``folder``; returns its address on a page beside that folder."""
    name = f"{number:04d}.png"
    with whole_file(folder / name) as temporary:
        to_pil(image).save(temporary, format="PNG")
    return f"{folder.name}/{name}"
