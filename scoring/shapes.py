"""Shapes: every sample is read back into its scene and scored against what its prompt promised."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.shapes.render import vocabulary
from diffusion.sampling import SamplingConfig
from eval.interval import Estimate
from eval.scenes.groups import group_table, mood_distances, promises_kept, value_table
from eval.scenes.score import (
    Facts,
    Rate,
    SceneReport,
    Score,
    Table,
    chance_scores,
    counts_per_prompt,
    percent,
    read_scenes,
    scene_scores,
    score_table,
)
from eval.suite import rows_table
from files.pages import markdown_table
from scoring.held_out import Prompts
from scoring.page import Part, checked_sections
from scoring.samples import Samples


def scores_of_images(images: Sequence[torch.Tensor] | torch.Tensor, prompts: Prompts) -> list[tuple[Facts, Score]]:
    """(facts, score) of each image, uint8 (3, H, W), and its prompt."""
    return scene_scores(read_scenes(images, vocabulary()), prompts.facts)


def best_guidance(by_scale: list[tuple[float, torch.Tensor]],
                  prompts: Prompts) -> tuple[float, list[dict[str, Any]]]:
    """(the guidance scale whose samples have the most whole scenes right, then attributes; the score of every scale).

    ``by_scale`` are (scale, samples uint8 (N, 3, H, W)) of the prompts.
    """
    rows: list[dict[str, Any]] = []
    for scale, images in by_scale:
        rates = score_table(scores_of_images(images, prompts))["all"]
        rows.append({"guidance": scale, **{name: rates[name].value for name in ("scene", "attributes")},
                     "intervals": {name: [rates[name].low, rates[name].high] for name in ("scene", "attributes")}})
    return max(rows, key=lambda row: (row["scene"], row["attributes"]))["guidance"], rows


def share_of_promises_kept(images: torch.Tensor, prompts: Prompts) -> Estimate:
    """The share of all promises that samples, uint8 (N, 3, H, W), keep, in percent."""
    rate = score_table(scores_of_images(images, prompts))["all"]["attributes"]
    return Estimate(100 * rate.value, 100 * rate.low, 100 * rate.high, "bootstrap over prompts")


def shapes_part(samples: Samples, reconstructed: Sequence[torch.Tensor], folder: Path) -> Part:
    """Scores of the samples, by kind of prompt and by promise, and the samples with what they kept.

    ``reconstructed`` are the real images of the prompts through the autoencoder, uint8 (3, H, W) each.
    """
    prompts, config = samples.prompts, samples.config
    scenes = read_scenes(samples.images, vocabulary())
    rows, chance = scene_scores(scenes, prompts.facts), chance_scores(scenes, prompts.facts)
    real, ceiling = (scores_of_images(images, prompts) for images in (prompts.images, reconstructed))
    report = SceneReport(*map(score_table, (rows, chance, real, ceiling)))
    groups = group_table(rows, prompts.captions)
    values, real_values, chance_values = map(value_table, (rows, real, chance))
    moods, real_moods = (mood_distances(images, prompts.facts, vocabulary())
                         for images in (samples.images, prompts.images))
    text = summary(report, len(prompts), config)
    opening, rest = checked_sections(samples, [promises_kept(facts, score) for facts, score in rows], text, folder)
    sections = [
        opening,
        ("Scores on prompts that training never saw, in percent", markdown_table(str(report))),
        ("Kinds of prompts, in percent", markdown_table(group_rows(groups))),
        ("Promises by what they name, in percent", markdown_table(value_rows(values, real_values, chance_values)))]
    if moods:
        sections.append(("Distance to the backdrop of the mood, CIELAB (2.3 is just noticed)", markdown_table(
            rows_table(("mood", "samples", "real images"), ((name, moods[name], real_moods[name]) for name in moods)))))
    sections.append((f"Guidance, chosen on {len(samples.validation)} validation prompts",
                     markdown_table(scale_rows(samples.scale_scores))))
    sections += [rest] if rest else []
    per_prompt = counts_per_prompt(rows)
    metrics = {"prompts": len(prompts), "sampler": config.sampler, "steps": config.steps,
               "guidance": config.guidance.scale, "guidance_on_validation": samples.scale_scores, **report.as_dict(),
               "groups": {name: {measure: vars(rate) for measure, rate in rates.items()}
                          for name, rates in groups.items()},
               "values": {name: vars(rate) for name, rate in values.items()},
               "moods": {name: vars(estimate) for name, estimate in moods.items()}, "per_prompt": per_prompt}
    return Part(sections, metrics, f"{report}\n{text}", [kept / made for kept, made in per_prompt["attributes"]])


def summary(report: SceneReport, count: int, config: SamplingConfig) -> str:
    """One sentence with the headline figures, the floor and the reader's own accuracy."""
    assert report.ceiling is not None

    def headline(table: Table) -> str:
        return f"{100 * table['all']['attributes'].value:.1f} and {100 * table['all']['scene'].value:.1f} %"

    rates = report.score["all"]
    return (f"{count} unseen prompts, {config.steps} {config.sampler} steps, guidance {config.guidance.scale:g}: "
            f"the samples keep {100 * rates['attributes'].value:.1f} % of all promises and "
            f"{100 * rates['scene'].value:.1f} % of whole scenes. Samples of other prompts keep "
            f"{headline(report.chance)} (chance), real images {headline(report.calibration)} (errors of the reader), "
            f"and these through the autoencoder {headline(report.ceiling)} (ceiling).")


def group_rows(groups: Table) -> str:
    """Markdown: a row for each group of prompts."""
    return rows_table(("prompts", "n", "attributes", "whole scenes"), (
        (name, rates["scene"].promises, percent(rates["attributes"]), percent(rates["scene"]))
        for name, rates in groups.items()))


def value_rows(values: dict[str, Rate], real: dict[str, Rate], chance: dict[str, Rate]) -> str:
    """Markdown: a row for each promised value, with real images and samples of other prompts beside it."""
    return rows_table(("promise", "n", "samples", "real images", "chance"), (
        (name, rate.promises, percent(rate), f"{100 * real[name].value:.1f}", f"{100 * chance[name].value:.1f}")
        for name, rate in values.items()))


def scale_rows(scale_scores: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each guidance scale that was tried on validation prompts."""
    return rows_table(("guidance", "whole scenes", "attributes"), (
        (f"{row['guidance']:g}", *(f"{100 * row[name]:.1f} ({100 * row['intervals'][name][0]:.0f}-"
                                   f"{100 * row['intervals'][name][1]:.0f})" for name in ("scene", "attributes")))
        for row in scale_scores))
