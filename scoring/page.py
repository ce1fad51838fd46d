"""The page of an evaluation: its sections, and the tables that are also written as Markdown."""
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.interval import Estimate
from eval.plots import draw_curves
from eval.scenes.score import Rate, percent
from eval.suite import COLUMNS, rows_table
from files.pages import checked_figures, image_figures
from files.run_folder import RunFolder, read_metrics
from scoring.held_out import Prompts
from scoring.samples import Samples

NUM_OPENING = 18  # samples that the page opens with: three rows
NUM_SHOWN = 64  # samples of the page in all
NUM_REAL = 16  # real images of the page
NUM_EXTREME = 8  # samples with the best and with the worst scores
Section = tuple[str, str]  # heading, HTML
Marks = Sequence[Sequence[tuple[str, bool]]]  # of each sample: (promise, whether it was kept)


@dataclass(frozen=True)
class Part:
    """What one kind of measurement adds to a report: sections of the page, entries of metrics.json, lines for the
    terminal, and a score of each sample by which the best and the worst are found."""

    sections: list[Section]
    metrics: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    scores: list[float] | None = None


def checked_sections(samples: Samples, marks: Marks, summary: str, folder: Path) -> tuple[Section, Section | None]:
    """(the opening of the page, a later section with the other samples, None where there are none).

    Each sample stands between its prompt and the promises of the prompt, ticked where they were kept.
    """
    figures = [checked_figures(samples.images[part], samples.prompts.captions[part], marks[part], folder / "images",
                               part.start) for part in (slice(0, NUM_OPENING), slice(NUM_OPENING, NUM_SHOWN))]
    opening = (f"<p>{html.escape(summary)}</p><p>Each prompt stands above its sample. A tick marks a promise of the "
               "prompt that the sample keeps, a cross one that it breaks; samples with a cross have a red frame.</p>")
    rest = ("More samples", figures[1]) if len(samples.images) > NUM_OPENING else None
    return ("Prompts, samples, and what was kept", opening + figures[0]), rest


def plain_section(samples: Samples, folder: Path) -> Section:
    """Samples above their prompts, where nothing is known of what the prompts promise."""
    return "Samples of held-out prompts", image_figures(samples.images[:NUM_SHOWN], samples.prompts.captions,
                                                        folder / "images")


def real_section(prompts: Prompts, folder: Path) -> Section:
    """The real images of the first prompts."""
    return "The real images of the first of these prompts", image_figures(
        torch.stack(prompts.images[:NUM_REAL]), prompts.captions, folder / "real")


def best_and_worst_sections(samples: Samples, scores: Sequence[float], folder: Path) -> list[Section]:
    """The samples with the highest and with the lowest of ``scores``, which has one for each sample."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    found = []
    for name, chosen in (("Best", order[::-1][:NUM_EXTREME]), ("Worst", order[:NUM_EXTREME])):
        labels = [f"{scores[i]:.2f}: {samples.prompts.captions[i]}" for i in chosen]
        found.append((f"{name} by score", image_figures(samples.images[chosen], labels, folder / name.lower())))
    return found


def training_section(run: RunFolder) -> Section:
    """The curves of the training, and what the run recorded about itself."""
    known = json.loads(run.manifest.read_text(encoding="utf-8")) if run.manifest.is_file() else {}
    has_curves = draw_curves(read_metrics(run.metrics), run.path / "report" / "curves.png")
    content = '<p class="curves"><img src="curves.png" alt="loss and validation curves"></p>' if has_curves else (
        '<p class="quiet">There are no curves. They need matplotlib: pip install -e ".[plots]"</p>')
    return "Training", content + f"<pre>{html.escape(json.dumps(known, indent=1)[:4000])}</pre>"


def protocol_table(protocol: dict[str, Any]) -> str:
    """Markdown: a row for each entry of a protocol."""
    return rows_table(("protocol", "value"), protocol.items())


def figure_tables(metrics: dict[str, Any]) -> list[str]:
    """The figures of metrics.json as Markdown tables: scenes, then distances and agreement, then the protocol."""
    tables = []
    if "score" in metrics:
        columns = {"score": "samples", "chance": "of other prompts", "calibration": "real images",
                   "ceiling": "through the autoencoder"}
        guess = metrics.get("guess", {})
        rows = []
        for name in metrics["score"]["all"]:
            cells = [percent(Rate(**metrics[column]["all"][name])) for column in columns]
            if guess:
                cells.append(f"{100 * guess[name]:.1f}" if name in guess else "")
            rows.append((name, *cells))
        tables.append(rows_table(("measure, %", *columns.values(), *(["a guess"] if guess else [])), rows))
    if "figures" in metrics:
        tables.append(rows_table(COLUMNS, (
            (name, *("" if cell is None else Estimate(**cell) for cell in figure.values()))
            for name, figure in metrics["figures"].items())))
    return [*tables, protocol_table(metrics["protocol"])]
