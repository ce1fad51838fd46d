"""Sweeps of the full suite on validation prompts: score against distance over guidance scales and numbers of steps."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.clip_score import agreement
from eval.features.reference import FeatureSet, features_of
from eval.interval import Estimate
from eval.kernel import kid
from eval.plots import draw_steps, draw_tradeoff
from eval.suite import rows_table
from files.pages import markdown_table
from files.sheets import save_grid
from scoring.held_out import Prompts
from scoring.judges import Judges, unit_batches
from scoring.page import Section
from scoring.samples import Samples
from scoring.shapes import share_of_promises_kept

NUM_COLUMNS = 6  # samples of each setting that the page shows
DISTANCE = "KID x 1000"


def tradeoff_sections(samples: Samples, judges: Judges, reference: FeatureSet, folder: Path) -> list[Section]:
    """Score against distance over guidance scales, and both against the number of steps, on validation prompts.

    Empty where there is nothing to score by: neither known promises nor a CLIP.
    """
    prompts = samples.validation
    scoring = score_function(prompts, judges)
    if scoring is None:
        return []
    score_name, score = scoring
    sections = []
    for name, found, draw in (("guidance", samples.by_scale, draw_tradeoff),
                              ("steps", samples.by_num_steps, draw_steps)):
        rows: list[dict[str, Any]] = []
        for setting, images in found:
            vectors = features_of(unit_batches(images), judges.features).vectors
            distance = kid(vectors, reference.vectors).scaled(1000)
            rows.append({name: setting, "score": vars(score(images)), "distance": vars(distance)})
        if not rows:
            continue
        has_chart = draw(rows, folder / f"{name}.png", score_name, DISTANCE)
        labels = [f"{name} {setting:g}: {caption}" for setting, _ in found
                  for caption in prompts.captions[:NUM_COLUMNS]]
        save_grid(torch.cat([images[:NUM_COLUMNS] for _, images in found]), folder / f"{name}_images.png", labels,
                  NUM_COLUMNS)
        table = rows_table((name, score_name, DISTANCE), (
            (f"{row[name]:g}", Estimate(**row["score"]), Estimate(**row["distance"])) for row in rows))
        chart = f'<p class="curves"><img src="{name}.png" alt="{name} against score and distance"></p>'
        sections.append((f"{name.capitalize()} against score and distance, {len(prompts)} validation prompts",
                         (chart if has_chart else "") + markdown_table(table)
                         + f'<p class="sheet"><img src="{name}_images.png" alt="the same prompts at each"></p>'))
    return sections


def score_function(prompts: Prompts, judges: Judges) -> tuple[str, Callable[[torch.Tensor], Estimate]] | None:
    """(name, function of samples uint8 (N, 3, H, W)) of the score of a sweep: promises kept where they are known, else
    the CLIP score, else None."""
    if prompts.facts:
        return "promises kept, %", lambda images: share_of_promises_kept(images, prompts)
    clip = judges.clip
    if clip is None:
        return None

    def clip_score(images: torch.Tensor) -> Estimate:
        vectors = features_of(unit_batches(images), clip).vectors
        return agreement(vectors, clip.texts(prompts.captions).cpu(), prompts.captions).score

    return "CLIP score", clip_score
