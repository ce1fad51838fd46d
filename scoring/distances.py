"""The full suite: what needs features of pictures. Every figure stands beside that of real pictures.

Axis letters: N samples, M reference pictures, H W size.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.source import Source, image_batch
from eval.clip_score import agreement, clip_scores, strangers
from eval.features.efficientnet import Features
from eval.features.inception import InceptionFeatures
from eval.features.probe import fit_probe
from eval.features.reference import FeatureSet, cached_features, features_of
from eval.image_folder import hash_of_files, picture_batches, picture_files
from eval.inception_score import inception_score
from eval.interval import Estimate, from_error
from eval.kernel import kid
from eval.memorization import nearest, pixel_vectors
from eval.plots import draw_steps, draw_tradeoff
from eval.suite import (
    Figure,
    Figures,
    distance_figures,
    figures_dict,
    figures_table,
    memory_figures,
    rows_table,
    text_figures,
)
from files.images import to_unit
from files.pages import markdown_table
from files.sheets import save_grid
from pipeline.clip_vectors import ClipVectors
from scoring.held_out import Prompts
from scoring.samples import Drawn
from scoring.shapes import Section, attributes_right

REFERENCE, TRAINING = 10_000, 20_000  # real pictures that samples are compared with, and searched for copies, at most
SPLITS = 10  # parts of the Inception score
PAIRS = 8  # of a sample and its nearest training picture that are drawn
SETTINGS = 6  # pictures drawn of each setting of a sweep
PART = 64  # pictures read at a time


@dataclass(frozen=True)
class Judges:
    """The networks that look at pictures; ``clip`` None: there is no CLIP score."""

    features: Features | InceptionFeatures
    clip: ClipVectors | None


@dataclass(frozen=True)
class Real:
    """Real pictures to compare with: batches (B, 3, H, W) in [-1, 1], a line that says which, and their hash."""

    batches: Any  # () -> iterable, read again for each network
    about: str
    data: str


def judges_of(inception: str | None, clip: str | None, run: Path, device: torch.device) -> Judges:
    """InceptionV3 where its weights are given, else EfficientNet-Lite0; the CLIP at ``clip``, a run folder or one of
    transformers, else that of the run. Raises ValueError for files that are missing or do not fit."""
    features = InceptionFeatures(inception, device) if inception else Features(device)
    if clip is None:
        return Judges(features, ClipVectors.of_run(run, device) if (run / "clip.safetensors").is_file() else None)
    ours = (Path(clip) / "config.yaml").is_file() or (Path(clip) / "clip_tokenizer.json").is_file()
    return Judges(features, ClipVectors.of_run(clip, device) if ours else ClipVectors.from_pretrained(clip, device))


def real_pictures(source: Source, first: int, data: str, folder: str | None, size: torch.Size) -> Real:
    """The items of a split from ``first`` on, or a folder of pictures of the same ``size`` (H, W).

    Raises ValueError when there are fewer than 16, or they have another size.
    """
    if folder is not None:
        files = picture_files(folder)[:REFERENCE]
        shape = next(picture_batches(files[:1])).shape[2:]
        if shape != size:
            raise ValueError(f"--reference {folder}: pictures of {shape[0]}x{shape[1]}; valid: {size[0]}x{size[1]}, "
                             "the size that is drawn")
        if len(files) < 16:
            raise ValueError(f"--reference {folder}: {len(files)} pictures; valid: from 16 up")
        return Real(lambda: picture_batches(files), f"{len(files)} pictures of {Path(folder).name}",
                    hash_of_files(files))
    last = min(len(source), first + REFERENCE)
    if last - first < 16:
        raise ValueError(f"--count: only {max(0, last - first)} of the {len(source)} test items are left to compare "
                         f"with; valid: up to {max(1, len(source) - 16)}, better half of them")
    return Real(lambda: batches(source, first, last), f"test items {first} to {last - 1}", f"{data} {first} {last}")


def batches(source: Source, first: int, last: int) -> Iterator[torch.Tensor]:
    """The pictures of items ``first`` .. ``last`` - 1, (B, 3, H, W) in [-1, 1]."""
    for start in range(first, last, PART):
        yield image_batch(source, np.arange(start, min(start + PART, last)))


def unit_parts(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """uint8 pictures (N, 3, H, W) as batches in [-1, 1]."""
    return (to_unit(part) for part in images.split(PART))


def full_sections(drawn: Drawn, through: Sequence[torch.Tensor], judges: Judges, real: Real, training: Source,
                  count: int, folder: Path) -> tuple[list[Section], dict[str, Any], list[float] | None]:
    """(sections, entries of metrics.json, CLIP score of each sample). ``through`` are the real pictures of the prompts
    through the autoencoder, ``count`` the training pictures that copies are looked for among."""
    images, truth, passed = drawn.images, torch.stack(drawn.prompts.drawn), torch.stack(list(through))
    cache = folder / "cache"
    ours, held_out, ceiling = (features_of(unit_parts(x), judges.features) for x in (images, truth, passed))
    reference = cached_features(cache, real.data, real.batches, judges.features)
    name = judges.features.stamp.split()[0]
    figures = distance_figures(ours, reference, held_out, ceiling, name)
    if isinstance(judges.features, InceptionFeatures):
        figures[f"Inception score, {SPLITS} parts"] = Figure(*(
            inception_estimate(judges.features.logits(x.vectors)) for x in (ours, held_out, ceiling)))
    scores = None
    if judges.clip is not None:
        theirs = cached_features(cache, real.data, real.batches, judges.clip)
        x, y, z = (features_of(unit_parts(part), judges.clip).vectors for part in (images, truth, passed))
        texts = judges.clip.texts(drawn.prompts.captions).cpu()
        figures |= text_figures(x, y, z, texts, drawn.prompts.captions, theirs.vectors)
        scores = clip_scores(x, texts).tolist()
    trained = cached_features(cache, f"{real.data} train {count}", lambda: batches(training, 0, count),
                              judges.features, kept=count)
    figures |= style_figures(ours, held_out, ceiling, trained, training, drawn.prompts)
    copies, memory = memory_section(drawn, truth, ours, held_out, trained, training, count, folder)
    figures |= memory
    quiet = "" if judges.clip else '<p class="quiet">No CLIP score: the run has no stage clip, --clip is not given.</p>'
    sections = [("Distances, agreement, copies", markdown_table(figures_table(figures)) + quiet), copies,
                *tradeoff_sections(drawn, judges, reference, folder)]
    print(figures_table(figures))
    return sections, {"figures": figures_dict(figures)}, scores


def inception_estimate(logits: torch.Tensor) -> Estimate:
    """The Inception score, the mean of parts, with the error of that mean (Student's t)."""
    value, spread = inception_score(logits, SPLITS)
    return from_error(value, spread / (SPLITS - 1) ** 0.5, f"{SPLITS} parts", SPLITS - 1)


def style_figures(ours: FeatureSet, held_out: FeatureSet, ceiling: FeatureSet, trained: FeatureSet, training: Source,
                  prompts: Prompts) -> Figures:
    """Share of samples in the style their caption names, by a classifier of the training pictures; empty without."""
    if len(set(prompts.styles)) < 2:
        return {}
    probe = fit_probe(trained.vectors, [training[index]["style"] for index in range(len(trained.vectors))])
    found = [probe.hits(x, prompts.styles) for x in (
        ours.vectors, held_out.vectors, ceiling.vectors, ours.vectors[strangers(len(prompts))])]
    return {f"style that was asked for, of {len(probe.classes)}": Figure(*found)}


def memory_section(drawn: Drawn, truth: torch.Tensor, ours: FeatureSet, held_out: FeatureSet, trained: FeatureSet,
                   training: Source, count: int, folder: Path) -> tuple[Section, Figures]:
    """Samples nearest to a training picture, drawn above it: the nearest in features and the nearest in pixels, and how
    near all are."""
    found, real = (nearest(x.vectors, [trained.vectors]) for x in (ours, held_out))
    near, real_near = (nearest(pixel_vectors(to_unit(x)), map(pixel_vectors, batches(training, 0, count)))
                       for x in (drawn.images, truth))
    figures = (memory_figures(found, real, f"features of {count}")
               | memory_figures(near, real_near, f"pixels of {count}"))
    html = ""
    for one, name, unit in ((found, "features", "{:.2f} away"), (near, "pixels", "{:.0f} levels of 255 away")):
        closest = one.distance.argsort()[:PAIRS].tolist()
        rows = [drawn.images[i] for i in closest] + [training[int(one.index[i])]["image"] for i in closest]
        labels = [unit.format(float(one.distance[i])) for i in closest] + [""] * len(closest)
        save_grid(torch.stack(rows), folder / f"copies_{name}.png", labels, len(closest), title=f"nearest in {name}")
        html += (f'<p class="sheet"><img src="copies_{name}.png" alt="samples above the training pictures nearest in '
                 f'{name}"></p>')
    return (f"The samples nearest to one of {count} training pictures, which lies below", html), figures


def tradeoff_sections(drawn: Drawn, judges: Judges, reference: FeatureSet, folder: Path) -> list[Section]:
    """Score against distance over guidance scales, and both against the number of steps, on validation prompts."""
    prompts = drawn.validation
    score_name = "promises kept, %" if prompts.facts else "CLIP score"
    if not prompts.facts and judges.clip is None:
        return []

    def score(images: torch.Tensor) -> Estimate:
        if prompts.facts:
            return attributes_right(images, prompts)
        assert judges.clip is not None
        vectors = features_of(unit_parts(images), judges.clip).vectors
        return agreement(vectors, judges.clip.texts(prompts.captions).cpu(), prompts.captions).score

    sections = []
    for key, found, draw in (("guidance", drawn.guidance, draw_tradeoff), ("steps", drawn.steps, draw_steps)):
        rows: list[dict[str, Any]] = []
        for setting, images in found:
            distance = kid(features_of(unit_parts(images), judges.features).vectors, reference.vectors).scaled(1000)
            rows.append({key: setting, "score": vars(score(images)), "distance": vars(distance)})
        if not rows:
            continue
        shown = draw(rows, folder / f"{key}.png", score_name, "KID x 1000")
        labels = [f"{key} {setting:g}: {caption}" for setting, _ in found for caption in prompts.captions[:SETTINGS]]
        save_grid(torch.cat([images[:SETTINGS] for _, images in found]), folder / f"{key}_pictures.png", labels,
                  SETTINGS)
        table = rows_table((key, score_name, "KID x 1000"), (
            (f"{row[key]:g}", Estimate(**row["score"]), Estimate(**row["distance"])) for row in rows))
        sections.append((f"{key.capitalize()} against score and distance, {len(prompts)} validation prompts",
                         (f'<p class="curves"><img src="{key}.png" alt="{key} against score and distance"></p>'
                          if shown else "") + markdown_table(table)
                         + f'<p class="sheet"><img src="{key}_pictures.png" alt="the same prompts at each"></p>'))
    return sections
