"""Shapes: every sample is read back into its scene and scored against what its prompt promised."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.shapes.render import vocabulary
from diffusion.sampling import SamplingConfig
from eval.interval import Estimate
from eval.scenes.groups import group_table, mood_distances, value_table
from eval.scenes.reader import Scene
from eval.scenes.score import (
    ATTRIBUTES,
    Rate,
    SceneReport,
    Score,
    Table,
    read_scenes,
    score_scene,
    score_table,
    stranger_rows,
)
from eval.suite import rows_table
from files.images import to_uint8, to_unit
from files.pages import image_figures, markdown_table
from pipeline.system import TextToImage
from scoring.held_out import Prompts
from scoring.samples import Drawn

SHOWN = 64  # pictures of the page
Section = tuple[str, str]  # heading, HTML


def scores_of(images: Sequence[torch.Tensor] | torch.Tensor, prompts: Prompts) -> list[tuple[dict[str, Any], Score]]:
    """(facts, score) of each sample."""
    return scored(read_scenes(images, vocabulary()), prompts)


def scored(scenes: Sequence[Scene], prompts: Prompts) -> list[tuple[dict[str, Any], Score]]:
    """(facts, score) of each scene that was read."""
    return [(facts, score_scene(scene, facts)) for scene, facts in zip(scenes, prompts.facts, strict=True)]


def best_guidance(guidance: list[tuple[float, torch.Tensor]], prompts: Prompts) -> tuple[float, list[dict[str, Any]]]:
    """The scale with the most whole scenes right (then attributes), and the score of every scale."""
    rows: list[dict[str, Any]] = []
    for scale, images in guidance:
        rates = score_table(scores_of(images, prompts))["all"]
        rows.append({"guidance": scale, **{name: rates[name].value for name in ("scene", "attributes")},
                     "intervals": {name: [rates[name].low, rates[name].high] for name in ("scene", "attributes")}})
    return max(rows, key=lambda row: (row["scene"], row["attributes"]))["guidance"], rows


def attributes_right(images: torch.Tensor, prompts: Prompts) -> Estimate:
    """Share of all promises kept, in percent."""
    rate = score_table(scores_of(images, prompts))["all"]["attributes"]
    return Estimate(100 * rate.value, 100 * rate.low, 100 * rate.high, "bootstrap over prompts")


@torch.no_grad()
def reconstructions(system: TextToImage, drawn: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures, uint8 (3, H, W) each, after the autoencoder: what a perfect denoiser would be scored."""
    model, device = system.autoencoder, next(system.autoencoder.parameters()).device
    return [picture for part in torch.stack(drawn).split(64)
            for picture in to_uint8(model.decode(model.encode(to_unit(part.to(device))).mean)).cpu()]


def scene_sections(drawn: Drawn, ceiling: Sequence[torch.Tensor], sweep: list[dict[str, Any]],
                   folder: Path) -> tuple[list[Section], dict[str, Any], list[float]]:
    """(sections of the page, entries of metrics.json, share of promises kept of each prompt); prints the table.
    ``ceiling`` are the real pictures of the prompts through the autoencoder."""
    prompts, images, config = drawn.prompts, drawn.images, drawn.config
    scenes = read_scenes(images, vocabulary())
    rows, chance = scored(scenes, prompts), stranger_rows(scenes, prompts.facts)
    real = scores_of(prompts.drawn, prompts)
    report = SceneReport(*map(score_table, (rows, chance, real, scores_of(ceiling, prompts))))
    groups = group_table(rows, prompts.captions)
    values, real_values, chance_values = map(value_table, (rows, real, chance))
    moods, real_moods = (mood_distances(found, prompts.facts, vocabulary()) for found in (images, prompts.drawn))
    print(f"{report}\n{summary(report, len(prompts), config)}")
    sweep_table = rows_table(("guidance", "whole scenes", "attributes"), (
        (f"{row['guidance']:g}", *(f"{100 * row[name]:.1f} ({100 * row['intervals'][name][0]:.0f}-"
                                   f"{100 * row['intervals'][name][1]:.0f})" for name in ("scene", "attributes")))
        for row in sweep))
    missed = [not score["scene"][0] for _, score in rows[:SHOWN]]
    sections = [
        ("Scores on prompts that training never saw, in percent",
         f"<p>{summary(report, len(prompts), config)}</p>" + markdown_table(str(report))),
        ("Pictures (framed: something in the prompt is missed)",
         image_figures(images[:SHOWN], prompts.captions, folder / "pictures", missed)),
        ("Kinds of prompts, in percent", markdown_table(prompt_table(groups))),
        ("Promises by what they name, in percent", markdown_table(promise_table(values, real_values, chance_values))),
        (f"Guidance, chosen on {len(drawn.validation)} validation prompts", markdown_table(sweep_table))]
    if moods:
        sections.insert(4, ("Distance to the backdrop of the mood, CIELAB (2.3 is just noticed)", markdown_table(
            rows_table(("mood", "samples", "drawn"), ((n, moods[n], real_moods[n]) for n in moods)))))
    kept = {"attributes": [[sum(map(sum, (s[name] for name in ATTRIBUTES))), sum(len(s[name]) for name in ATTRIBUTES)]
                           for _, s in rows],
            "whole scenes": [[int(s["scene"][0]), 1] for _, s in rows]}
    metrics = {"prompts": len(prompts), "sampler": config.sampler, "steps": config.steps,
               "guidance": config.guidance.scale, "guidance_on_validation": sweep, **report.as_dict(),
               "groups": {name: {measure: vars(rate) for measure, rate in rates.items()}
                          for name, rates in groups.items()},
               "values": {name: vars(rate) for name, rate in values.items()},
               "moods": {name: vars(estimate) for name, estimate in moods.items()}, "per_prompt": kept}
    return sections, metrics, [right / made for right, made in kept["attributes"]]


def summary(report: SceneReport, count: int, config: SamplingConfig) -> str:
    """One sentence with the headline figures, the floor and the reader's own accuracy."""
    assert report.ceiling is not None
    rates, reader, ceiling = report.score["all"], report.calibration["all"], report.ceiling["all"]
    return (f"{count} unseen prompts, {config.steps} {config.sampler} steps, guidance {config.guidance.scale:g}: "
            f"attributes {100 * rates['attributes'].value:.1f} %, whole scenes {100 * rates['scene'].value:.1f} %; "
            f"by chance {100 * report.chance['all']['attributes'].value:.1f} and "
            f"{100 * report.chance['all']['scene'].value:.1f} %; the reader itself on drawn pictures "
            f"{100 * reader['attributes'].value:.1f} and {100 * reader['scene'].value:.1f} %, after the autoencoder "
            f"{100 * ceiling['attributes'].value:.1f} and {100 * ceiling['scene'].value:.1f} % (ceiling).")


def prompt_table(groups: Table) -> str:
    """Markdown: a row a group of prompts."""
    return rows_table(("prompts", "n", "attributes", "whole scenes"), (
        (name, rates["scene"].promises, percent(rates["attributes"]), percent(rates["scene"]))
        for name, rates in groups.items()))


def promise_table(values: dict[str, Rate], real: dict[str, Rate], chance: dict[str, Rate]) -> str:
    """Markdown: a row a promised value, with the drawn pictures and samples of other prompts beside."""
    return rows_table(("promise", "n", "samples", "drawn", "chance"), (
        (name, rate.promises, percent(rate), f"{100 * real[name].value:.1f}", f"{100 * chance[name].value:.1f}")
        for name, rate in values.items()))


def percent(rate: Rate) -> str:
    """"71.0 (68-73)"."""
    return f"{100 * rate.value:.1f} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"
