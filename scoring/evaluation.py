"""One evaluation from beginning to end: prompts, samples, measurements, the report."""
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.catalog import build_source
from data.emoji.emoji import Emoji
from eval.compare import check_protocols, comparison_table, read_figures
from files.images import to_uint8, to_unit
from files.pages import markdown_table, page
from files.run_folder import RunFolder
from files.whole import free_path, write_text
from pipeline.loading import load_run
from pipeline.system import TextToImage, with_options
from scoring.distances import distance_part
from scoring.emoji import emoji_part
from scoring.held_out import Prompts, evaluation_prompts
from scoring.judges import Comparison, folder_reference, load_judges, split_reference
from scoring.page import (
    Part,
    best_and_worst_sections,
    figure_tables,
    plain_section,
    protocol_table,
    real_section,
    training_section,
)
from scoring.protocol import comparable_protocol, hash_of_data, hash_of_images, num_searched, sampling_protocol
from scoring.samples import Samples, SampleStore
from scoring.settings import EvaluationSettings
from scoring.shapes import best_guidance, shapes_part
from training.distributed import Processes
from training.experiment import Experiment, load_experiment
from training.same_data import data_change

CACHE = "cache"  # of samples, inside the folder of the report


def evaluate_run(settings: EvaluationSettings, processes: Processes) -> str:
    """Sample in every process; in the main one, measure the samples and write the folder report/ of the run.

    Returns the tables for the terminal, "" in other processes. Everything that can be refused is refused with
    ValueError before anything is sampled.
    """
    run = RunFolder.open(settings.run)
    if settings.reference and Path(settings.reference).resolve().is_relative_to((run.path / "report").resolve()):
        raise ValueError(f"--reference {settings.reference}: images are written there; valid: a folder outside of "
                         f"{run.path / 'report'}")
    for other in settings.compare:
        read_figures(other)
    system = load_run(run.path, processes.device(), moderation=None)  # the captions are those of the data set
    experiment = load_experiment(run.path / "config.yaml")
    store = SampleStore(system, run.path / "report" / CACHE, settings.precision, processes)
    test, validation = evaluation_prompts(experiment, settings)
    settings.check_scales(can_choose=bool(validation.facts))
    comparison = None
    protocol: dict[str, Any] = {}
    if processes.main:
        differs = data_change(experiment.data, run)
        if differs:
            print(f"data: not what this run was trained on ({differs}); the figures are of the data as it is now",
                  file=sys.stderr)
        comparison = load_comparison(settings, experiment, test, system.device) if settings.full else None
        protocol = comparable_protocol(settings, experiment, test, comparison)
        for other in settings.compare:
            check_protocols(protocol, read_figures(other)["protocol"], other)
    samples = draw_samples(system, settings, store, test, validation)
    if not processes.main:
        return ""
    protocol |= sampling_protocol(settings, samples, store)
    kept = set_other_report_aside(run.path / "report", protocol)
    parts = measure(system, experiment, samples, comparison, run.path / "report")
    note = f"the report that was there was measured otherwise; it is now {kept}\n" if kept else ""
    return note + write_report(run, parts, protocol, settings.compare)


def set_other_report_aside(folder: Path, protocol: dict[str, Any]) -> Path | None:
    """Move the report in ``folder`` to a numbered folder beside it if it was measured in another way than ``protocol``
    says, and return where it is now. What only the command line says, such as which runs it is compared with, does not
    count. The cache of samples stays."""
    if not (folder / "metrics.json").is_file():
        return None
    try:
        known = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["protocol"]
        if {**known, "command": None} == {**protocol, "command": None}:
            return None
    except (ValueError, KeyError, TypeError):
        pass  # whatever that is, it is kept
    kept = free_path(folder)
    kept.mkdir()
    for path in sorted(folder.iterdir()):
        if path.name != CACHE:
            os.rename(path, kept / path.name)
    return kept


def load_comparison(settings: EvaluationSettings, experiment: Experiment, test: Prompts,
                    device: torch.device) -> Comparison:
    """What the full suite compares with. Raises ValueError for weights or images that cannot be used."""
    squares = experiment.data.squares
    if settings.reference is not None:
        reference = folder_reference(settings.reference, test.images[0].shape[1:], experiment.data.max_pixels)
    else:
        about = f"{hash_of_data(experiment)} {hash_of_images(test.images)}"  # the settings, and the pixels they give
        reference = split_reference(build_source(squares, "test"), test.seeds[-1] + 1, about)
    judges = load_judges(settings.inception, settings.clip, settings.run, device)
    return Comparison(judges, reference, build_source(squares, "train"), num_searched(experiment))


def draw_samples(system: TextToImage, settings: EvaluationSettings, store: SampleStore, test: Prompts,
                 validation: Prompts) -> Samples:
    """All samples, with the guidance scale that scored best on validation prompts, where these can be scored.

    Every process must call this.
    """
    base = with_options(system.config.sampling, settings.sampler, settings.num_steps)
    can_choose = bool(validation.facts)
    scales = settings.scales_for(system.config.scales, base.guidance.scale)
    by_scale = (store.samples_by_scale(validation, scales, base) if can_choose or settings.full else [])
    given = scales[0] if len(scales) == 1 else base.guidance.scale
    scale, scores = best_guidance(by_scale, validation) if can_choose else (given, [])
    config = with_options(base, scale=scale)
    images = store.samples(test, config, f"test, guidance {scale:g}")
    by_num_steps = store.samples_by_num_steps(validation, settings.sweep_num_steps, config)
    return Samples(test, config, images, validation, by_scale, by_num_steps, scores)


def measure(system: TextToImage, experiment: Experiment, samples: Samples, comparison: Comparison | None,
            folder: Path) -> list[Part]:
    """The parts of the report, whose images are written to ``folder``; ``comparison`` None: the quick suite."""
    data, prompts = experiment.data, samples.prompts
    known = bool(prompts.facts) or data.source == "emoji"
    reconstructed = reconstructions(system, prompts.images) if known or comparison else []
    if prompts.facts:
        parts = [shapes_part(samples, reconstructed, folder)]
    elif data.source == "emoji":
        parts = [emoji_part(Emoji(data.emoji, "test"), samples, reconstructed, folder)]
    else:
        parts = [Part([plain_section(samples, folder)])]
    parts.append(Part([real_section(prompts, folder)]))
    if comparison is not None:
        parts.append(distance_part(samples, reconstructed, comparison, folder))
    scores = next((part.scores for part in parts if part.scores is not None), None)
    if scores is not None:
        parts.append(Part(best_and_worst_sections(samples, scores, folder)))
    return parts


@torch.no_grad()
def reconstructions(system: TextToImage, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Images, uint8 (3, H, W) each, after the autoencoder: no denoiser can be scored above them."""
    model, device = system.autoencoder, next(system.autoencoder.parameters()).device
    return [image for part in torch.stack(list(images)).split(64)
            for image in to_uint8(model.decode(model.encode(to_unit(part.to(device))).mean)).cpu()]


def write_report(run: RunFolder, parts: Sequence[Part], protocol: dict[str, Any], compare: Sequence[str]) -> str:
    """Write metrics.json, figures.md and index.html to the folder report/ of a run; returns the lines for the terminal.

    ``compare`` are other run folders, whose figures stand beside those of this run.
    """
    metrics: dict[str, Any] = {"protocol": protocol}
    for part in parts:
        per_prompt = metrics.get("per_prompt", {}) | part.metrics.get("per_prompt", {})
        metrics |= part.metrics | ({"per_prompt": per_prompt} if per_prompt else {})
    sections = [section for part in parts for section in part.sections]
    text = [part.text for part in parts if part.text]
    if compare:
        table = comparison_table(metrics, {name: read_figures(name) for name in compare})
        sections.insert(1, ("Beside other runs, 95 % intervals", markdown_table(table)))
        text.append(table)
    sections += [("How these figures were made", markdown_table(protocol_table(protocol))), training_section(run)]
    folder = run.path / "report"
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_text(folder / "figures.md", "\n\n".join(figure_tables(metrics)) + "\n")
    write_text(folder / "index.html", page(f"Run {run.path.name}", sections))
    return "\n".join(text)
