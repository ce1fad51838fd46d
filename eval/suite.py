"""The figures of a run beside those of real images and of chance, as a table and as plain JSON.

Axis letters: N samples, M reference images, E width of CLIP vectors.
"""
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from eval.clip_score import agreement, derangement
from eval.features.reference import FeatureSet, frechet_estimate
from eval.interval import Estimate
from eval.kernel import cmmd, kid
from eval.memorization import Nearest, memorization
from eval.prdc import prdc


@dataclass(frozen=True)
class Figure:
    """A figure of the samples, of real images in their place, of these through the autoencoder, which a perfect
    denoiser would reach, and of chance, where there is one."""

    value: Estimate
    real: Estimate | None = None
    ceiling: Estimate | None = None
    chance: Estimate | None = None


Figures = dict[str, Figure]
COLUMNS = ("figure", "samples", "real images", "through the autoencoder", "chance")  # in the order of the fields


def distance_figures(samples: FeatureSet, reference: FeatureSet, real: FeatureSet, reconstructed: FeatureSet,
                     name: str) -> Figures:
    """Frechet distance, KID, precision, recall, density and coverage of samples against a reference of real images.

    ``real`` are other real images, as many as the samples and of the same prompts, which show what a perfect model
    would reach; ``reconstructed`` are these through the autoencoder. ``name`` is that of the features. The Frechet
    distance is continued to infinitely many images only where there are twice as many images as features: with fewer,
    its bias does not yet lie on the line that is continued. Raises ValueError for sets that are too small or come from
    different extractors.
    """
    columns = []
    enough = min(samples.count, reference.count) >= 2 * reference.width
    for found in (samples, real, reconstructed):
        at_count, unbiased = frechet_estimate(found, reference)
        shares = prdc(found.vectors, reference.vectors)
        columns.append({
            f"Frechet distance ({name}), {found.count} against {reference.count}": at_count,
            **({f"Frechet distance ({name}), continued to infinitely many": unbiased} if enough else {}),
            f"KID ({name}) x 1000": kid(found.vectors, reference.vectors).scaled(1000),
            "precision": shares.precision, "recall": shares.recall, "density": shares.density,
            "coverage": shares.coverage})
    return {key: Figure(*(column[key] for column in columns)) for key in columns[0]}


def text_figures(samples: Tensor, real: Tensor, reconstructed: Tensor, texts: Tensor, captions: list[str],
                 reference: Tensor) -> Figures:
    """CLIP score, retrieval and CMMD from CLIP vectors (N, E): of samples, of real images of the same captions, of
    these through the autoencoder, and of the captions (``texts``). Chance is the samples under each other's captions.
    ``reference`` (M, E) are the real images of the CMMD."""
    others = samples[derangement(len(samples)).to(samples.device)]
    columns = [agreement(x, texts, captions) for x in (samples, real, reconstructed, others)]
    names = {"score": "CLIP score", "recall_1": f"caption found among {len(set(captions))}",
             "recall_5": "caption among the first 5"}
    found = {label: Figure(*(getattr(column, key) for column in columns)) for key, label in names.items()}
    return {**found, "CMMD": Figure(*(cmmd(x, reference) for x in (samples, real, reconstructed)))}


def memory_figures(samples: Nearest, held_out: Nearest, where: str) -> Figures:
    """How near samples are to training images, beside what a model that does not copy reaches by definition.

    ``where`` says where they were searched, such as "features of 2000".
    """
    found = memorization(samples, held_out)
    half, twentieth = (Estimate(value, value, value, "by definition") for value in (0.5, 0.05))
    return {f"nearer to training than all but 5 % of held-out images ({where})": Figure(found.near, twentieth),
            f"nearer to training than a held-out image ({where})": Figure(found.nearer, half)}


def figures_table(figures: Figures) -> str:
    """Markdown with a row for each figure and 95 % intervals in brackets."""
    return rows_table(COLUMNS, ((name, figure.value, *(cell or "" for cell in (figure.real, figure.ceiling,
                                                                               figure.chance)))
                                for name, figure in figures.items()))


def figures_dict(figures: Figures) -> dict[str, Any]:
    """The figures as plain JSON types."""
    return {name: asdict(figure) for name, figure in figures.items()}


def rows_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of a header and rows."""
    header = list(header)
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|",
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
