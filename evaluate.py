"""Measure a run and write its page: python evaluate.py runs/shapes

On shapes, guidance is chosen on validation prompts; then prompts that training never saw are sampled and every picture
is read back into its scene and scored. On other data the page shows held-out prompts and the curves.
"""
import argparse
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.shapes import Shapes
from data.shapes_draw import vocabulary
from data.source import Source, build_source, to_uint8, to_unit
from diffusion.sampling import SamplingConfig
from eval.report import draw_curves, markdown_table, page, pictures, read_metrics
from eval.scenes_score import SceneReport, read_scenes, scene_report, score_scene, score_table
from pipeline import TextToImage, with_options
from training.checkpoint import write_text
from training.device import default_device
from training.run import RunFolder

SHOWN = 64  # pictures of the page


@dataclass(frozen=True)
class Prompts:
    """Prompts of a split of shapes that training never saw, with what they promise and the pictures drawn for them."""

    captions: list[str]
    facts: list[dict[str, Any]]
    drawn: list[torch.Tensor]
    seeds: list[int]


def unseen_prompts(source: Shapes, trained: set[str], count: int) -> Prompts:
    """One phrasing of each of the first ``count`` items that have one outside ``trained``."""
    found = Prompts([], [], [], [])
    for index in range(len(source)):
        item = source[index]
        number = len(item["captions"])
        order = [(item["phrasing"] + shift) % number for shift in range(number)]
        phrasing = next((i for i in order if item["captions"][i] not in trained), None)
        if phrasing is not None:
            found.captions.append(item["captions"][phrasing])
            found.facts.append(item["facts"][phrasing])
            found.drawn.append(item["image"])
            found.seeds.append(index)
        if len(found.captions) == count:
            return found
    raise ValueError(f"only {len(found.captions)} items of the split '{source.split}' have a caption that training "
                     f"never saw; valid: fewer than --count {count}, or a larger data.shapes.{source.split}")


def captions_of_training(system: TextToImage) -> set[str]:
    """Every caption the denoiser may have seen."""
    source = build_source(system.experiment.data, "train")
    count = min(system.experiment.denoiser.images or len(source), len(source))
    return {caption for index in range(count) for caption in source.captions(index)}


def choose_guidance(system: TextToImage, prompts: Prompts, scales: list[float],
                    config: SamplingConfig) -> tuple[float, list[dict[str, float]]]:
    """The scale with the most whole scenes right (then attributes) on ``prompts``, and the score of every scale."""
    rows = []
    for scale in scales:
        images = sample(system, prompts, with_options(config, scale=scale), f"validation, guidance {scale:g}")
        scored = [(facts, score_scene(scene, facts))
                  for scene, facts in zip(read_scenes(images, vocabulary()), prompts.facts)]
        rates = score_table(scored)["all"]
        rows.append({"guidance": scale, "scene": rates["scene"].value, "attributes": rates["attributes"].value})
    best = max(rows, key=lambda row: (row["scene"], row["attributes"]))
    return best["guidance"], rows


def sample(system: TextToImage, prompts: Prompts, config: SamplingConfig, name: str) -> torch.Tensor:
    """Pictures (B, 3, H, W) uint8 of all prompts."""
    def progress(starts: list) -> tqdm:
        return tqdm(starts, desc=name, unit="batch", mininterval=0.5 if sys.stderr.isatty() else 30)

    return system.images_in_batches(prompts.captions, prompts.seeds, config, progress=progress)


@torch.no_grad()
def reconstructions(system: TextToImage, drawn: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures, uint8 (3, H, W) each, after the autoencoder: what a perfect denoiser would be scored."""
    model, device = system.autoencoder, next(system.autoencoder.parameters()).device
    return [picture for part in torch.stack(drawn).split(64)
            for picture in to_uint8(model.decode(model.encode(to_unit(part.to(device))).mean)).cpu()]


def evaluate_shapes(system: TextToImage, run: RunFolder, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Choose guidance, sample, score, write metrics.json; returns the sections of the page."""
    trained = captions_of_training(system)
    validation, test = (Shapes(system.experiment.data.shapes, split) for split in ("validation", "test"))
    base = with_options(system.experiment.sampling, options.sampler, options.steps)
    held_out = unseen_prompts(validation, trained, options.validation)
    scale, sweep = choose_guidance(system, held_out, options.guidance, base)
    config = with_options(base, scale=scale)
    prompts = unseen_prompts(test, trained, options.count)
    images = sample(system, prompts, config, f"test, guidance {scale:g}")
    report = scene_report(list(images), prompts.facts, zip(prompts.drawn, prompts.facts), vocabulary(),
                          reconstructed=zip(reconstructions(system, prompts.drawn), prompts.facts))
    missed = [not score_scene(scene, facts)["scene"][0]
              for scene, facts in zip(read_scenes(images[:SHOWN], vocabulary()), prompts.facts)]
    write_text(run.path / "report" / "metrics.json", json.dumps(
        {"prompts": len(prompts.captions), "sampler": config.sampler, "steps": config.steps, "guidance": scale,
         "guidance_on_validation": sweep, **report.as_dict()}, indent=1))
    print(f"{report}\n{summary(report, len(prompts.captions), config)}")
    sweep_table = "| guidance | whole scenes | attributes |\n|---|---|---|\n" + "\n".join(
        f"| {row['guidance']:g} | {100 * row['scene']:.1f} | {100 * row['attributes']:.1f} |" for row in sweep)
    folder = run.path / "report" / "pictures"
    return [("Scores on prompts that training never saw, in percent", f"<p>{summary(report, len(images), config)}</p>"
             + markdown_table(str(report))),
            ("Pictures (framed: something in the prompt is missed)",
             pictures(images[:SHOWN], prompts.captions, folder, missed)),
            (f"Guidance, chosen on {options.validation} validation prompts", markdown_table(sweep_table))]


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


def show_held_out(system: TextToImage, source: Source, run: RunFolder,
                  options: argparse.Namespace) -> list[tuple[str, str]]:
    """Pictures of the first captions of the test split: data without a scene to read back is only looked at."""
    count = min(SHOWN, options.count, len(source))
    captions = [source.captions(index)[0] for index in range(count)]
    config = with_options(system.experiment.sampling, options.sampler, options.steps)
    images = sample(system, Prompts(captions, [], [], list(range(count))), config, "test")
    return [("Pictures of held-out prompts", pictures(images, captions, run.path / "report" / "pictures"))]


def training_section(run: RunFolder) -> tuple[str, str]:
    """Curves, and what the run wrote down about itself."""
    known = json.loads(run.manifest.read_text(encoding="utf-8")) if run.manifest.is_file() else {}
    drawn = draw_curves(read_metrics(run.metrics), run.path / "report" / "curves.png")
    content = '<p class="curves"><img src="curves.png" alt="loss and validation curves"></p>' if drawn else (
        '<p class="quiet">No curves: install matplotlib, pip install -e ".[plots]"</p>')
    return "Training", content + f"<pre>{html.escape(json.dumps(known, indent=1)[:4000])}</pre>"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, such as runs/shapes")
    parser.add_argument("--count", type=int, default=256, help="test prompts (%(default)s)")
    parser.add_argument("--validation", type=int, default=64, help="validation prompts a guidance scale (%(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 3.0, 5.0], metavar="W",
                        help="scales to choose from (%(default)s)")
    parser.add_argument("--steps", type=int, help="sampler steps")
    parser.add_argument("--sampler", help="sampler")
    options = parser.parse_args(arguments)
    for name in ("count", "validation"):
        if getattr(options, name) < 2:
            raise ValueError(f"--{name} {getattr(options, name)}; valid: from 2 up")
    return options


def main(arguments: list[str]) -> None:
    """Evaluate and write report/index.html."""
    options = parse(arguments)
    run = RunFolder.open(Path(options.run))
    system = TextToImage.load(run.path, default_device())
    if system.experiment.data.source == "shapes":
        sections = evaluate_shapes(system, run, options)
    else:
        sections = show_held_out(system, build_source(system.experiment.data, "test"), run, options)
    sections.append(training_section(run))
    write_text(run.path / "report" / "index.html", page(f"Run {run.path.name}", sections))
    print(f"wrote {run.path / 'report' / 'index.html'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard") from None
