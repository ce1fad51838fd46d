"""The full suite: measures that need features of images. Beside every figure stands that of real images.

Axis letters: N samples, H W size.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.clip_score import clip_scores, derangement
from eval.features.inception import InceptionFeatures
from eval.features.probe import fit_probe
from eval.features.reference import FeatureSet, cached_features, features_of
from eval.inception_score import inception_score
from eval.interval import Estimate, estimate_from_error
from eval.kernel import kid_of_subsets
from eval.memorization import nearest, pixel_vectors
from eval.suite import Figure, Figures, distance_figures, figures_dict, figures_table, memory_figures, text_figures
from files.images import to_unit
from files.pages import markdown_table
from files.sheets import save_grid
from pipeline.clip_vectors import ClipVectors
from scoring.held_out import Prompts
from scoring.judges import Comparison, source_batches, unit_batches
from scoring.page import Part, Section
from scoring.samples import Samples
from scoring.tradeoff import tradeoff_sections

SCORE_SPLITS = 10  # parts of the Inception score
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # of the KID as papers report it
STYLE_IMAGES = 10_000  # training images that teach the styles to the classifier of a CLIP's vectors
NUM_PAIRS = 8  # samples that the page shows above their nearest training images


@dataclass(frozen=True)
class FeatureSets:
    """Features of the samples, of the real images of the same prompts (``held_out``), of these through the autoencoder
    (``reconstructed``), of the ``reference`` and of the ``training`` images."""

    samples: FeatureSet
    held_out: FeatureSet
    reconstructed: FeatureSet
    reference: FeatureSet
    training: FeatureSet

    @property
    def columns(self) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
        """The sets that figures are computed of, in the order of the fields of `Figure`."""
        return self.samples, self.held_out, self.reconstructed


def distance_part(samples: Samples, reconstructed: Sequence[Tensor], comparison: Comparison, folder: Path) -> Part:
    """Distances, agreement with captions, copies and sweeps of the samples.

    ``reconstructed`` are the real images of the prompts through the autoencoder, uint8 (3, H, W) each.
    """
    judges = comparison.judges
    images = (samples.images, torch.stack(samples.prompts.images), torch.stack(list(reconstructed)))
    sets = feature_sets(images, comparison, folder / "cache")
    figures = distance_figures(sets.samples, sets.reference, sets.held_out, sets.reconstructed,
                               judges.features.stamp.split()[0])
    if isinstance(judges.features, InceptionFeatures):
        figures |= published_figures(sets, judges.features)
    scores = None
    if judges.clip is not None:
        agreement, scores = clip_figures(images, samples.prompts, judges.clip, comparison, folder / "cache")
        figures |= agreement | style_figures_of_clip(images, samples.prompts, judges.clip, comparison, folder / "cache")
    figures |= style_figures(sets, comparison, samples.prompts)
    copies, memory = copies_section(samples, sets, comparison, folder)
    figures |= memory
    table = figures_table(figures)
    note = "" if judges.clip else ('<p class="quiet">There is no CLIP score: the run has no stage clip, and --clip was '
                                   "not given.</p>")
    return Part([("Distances, agreement, copies", markdown_table(table) + note), copies,
                 *tradeoff_sections(samples, judges, sets.reference, folder)],
                {"figures": figures_dict(figures),
                 "per_prompt": {"CLIP score": [[score, 100] for score in scores]} if scores else {}}, table, scores)


def feature_sets(images: tuple[Tensor, Tensor, Tensor], comparison: Comparison, cache: Path) -> FeatureSets:
    """The features of samples, real images and reconstructions, uint8 (N, 3, H, W) each, and of what they are compared
    with; the latter are kept in the folder ``cache``."""
    extractor, reference, count = comparison.judges.features, comparison.reference, comparison.num_training
    samples, held_out, reconstructed = (features_of(unit_batches(x), extractor) for x in images)
    return FeatureSets(
        samples, held_out, reconstructed, cached_features(cache, reference.data, reference.batches, extractor),
        cached_features(cache, f"{reference.data} train {count}",
                        lambda: source_batches(comparison.training, 0, count), extractor, kept=count))


def published_figures(sets: FeatureSets, features: InceptionFeatures) -> Figures:
    """Figures in the form in which papers report them with InceptionV3: the Inception score, and the KID as the mean
    over 100 subsets of 1,000 images (Binkowski et al. 2018), where there are so many."""
    figures = {f"Inception score, {SCORE_SPLITS} parts": Figure(*(
        inception_estimate(features.logits(found.vectors)) for found in sets.columns))}
    if min(len(found.vectors) for found in (*sets.columns, sets.reference)) >= KID_SUBSET_SIZE:
        figures[f"KID x 1000, {KID_SUBSETS} subsets of {KID_SUBSET_SIZE}"] = Figure(*(
            subset_kid_estimate(found.vectors, sets.reference.vectors) for found in sets.columns))
    return figures


def inception_estimate(logits: Tensor) -> Estimate:
    """The Inception score of logits (N, classes): the mean over parts, with the error of that mean (Student's t)."""
    value, spread = inception_score(logits, SCORE_SPLITS)
    return estimate_from_error(value, spread / (SCORE_SPLITS - 1) ** 0.5, f"{SCORE_SPLITS} parts", SCORE_SPLITS - 1)


def subset_kid_estimate(vectors: Tensor, reference: Tensor) -> Estimate:
    """1000 times the mean KID of random subsets of features (N, D) and (M, D); the interval holds 95 % of the subsets,
    whose standard deviation is what papers print behind the mean."""
    mean, spread = kid_of_subsets(vectors, reference, KID_SUBSETS, KID_SUBSET_SIZE)
    return estimate_from_error(mean, spread, f"spread over {KID_SUBSETS} subsets").scaled(1000)


def clip_figures(images: tuple[Tensor, Tensor, Tensor], prompts: Prompts, clip: ClipVectors, comparison: Comparison,
                 cache: Path) -> tuple[Figures, list[float]]:
    """(agreement of samples, real images and reconstructions, uint8 (N, 3, H, W) each, with their captions; the CLIP
    score of each sample)."""
    reference = cached_features(cache, comparison.reference.data, comparison.reference.batches, clip)
    vectors = [features_of(unit_batches(x), clip).vectors for x in images]  # (N, E) each
    texts = clip.texts(prompts.captions).cpu()
    samples, real, reconstructed = vectors
    figures = text_figures(samples, real, reconstructed, texts, prompts.captions, reference.vectors)
    return figures, clip_scores(samples, texts).tolist()


def style_figures(sets: FeatureSets, comparison: Comparison, prompts: Prompts) -> Figures:
    """The share of samples in the style that their caption names, by a classifier of the training images.

    Empty where captions name fewer than two styles.
    """
    return styles_by("", [found.vectors for found in sets.columns], sets.training.vectors, comparison, prompts)


def style_figures_of_clip(images: tuple[Tensor, Tensor, Tensor], prompts: Prompts, clip: ClipVectors,
                          comparison: Comparison, cache: Path) -> Figures:
    """The same by the vectors of the CLIP, of samples, real images and reconstructions, uint8 (N, 3, H, W) each. It has
    read the names of styles in its training, so that it knows them better than features of photographs do."""
    if len(set(prompts.styles)) < 2:
        return {}
    count = min(comparison.num_training, STYLE_IMAGES)
    training = cached_features(cache, f"{comparison.reference.data} train {count} for styles",
                               lambda: source_batches(comparison.training, 0, count), clip, kept=count)
    vectors = [features_of(unit_batches(x), clip).vectors for x in images]
    return styles_by(", by the CLIP", vectors, training.vectors, comparison, prompts)


def styles_by(judge: str, columns: Sequence[Tensor], training: Tensor, comparison: Comparison,
              prompts: Prompts) -> Figures:
    """The share of images in the style of their prompt, for ``columns`` of vectors (N, D), of which the samples are the
    first, and for samples of other prompts, by a linear classifier of vectors (M, D) of the first training images."""
    if len(set(prompts.styles)) < 2:
        return {}
    probe = fit_probe(training, [comparison.training[index]["style"] for index in range(len(training))])
    chance = columns[0][derangement(len(prompts))]
    return {f"style that the prompt names, of {len(probe.classes)}{judge}": Figure(*(
        probe.accuracy(vectors, prompts.styles) for vectors in (*columns, chance)))}


def copies_section(samples: Samples, sets: FeatureSets, comparison: Comparison,
                   folder: Path) -> tuple[Section, Figures]:
    """(the samples nearest to a training image, above it, in features and in pixels; how near all samples are)."""
    training, count = comparison.training, comparison.num_training
    real = torch.stack(samples.prompts.images)
    in_features, held_out_in_features = (nearest(found.vectors, [sets.training.vectors])
                                         for found in (sets.samples, sets.held_out))
    in_pixels, held_out_in_pixels = (
        nearest(pixel_vectors(to_unit(x)), map(pixel_vectors, source_batches(training, 0, count)))
        for x in (samples.images, real))
    figures = (memory_figures(in_features, held_out_in_features, f"features of {count}")
               | memory_figures(in_pixels, held_out_in_pixels, f"pixels of {count}"))
    html = ""
    for found, name, unit in ((in_features, "features", "distance {:.2f}"),
                              (in_pixels, "pixels", "root mean square {:.0f} of 255")):
        closest = found.distance.argsort()[:NUM_PAIRS].tolist()
        pairs = ([samples.images[i] for i in closest]
                 + [training[int(found.index[i])]["image"] for i in closest])
        labels = [unit.format(float(found.distance[i])) for i in closest] + [""] * len(closest)
        save_grid(torch.stack(pairs), folder / f"copies_{name}.png", labels, len(closest), title=f"nearest in {name}")
        html += (f'<p class="sheet"><img src="copies_{name}.png" alt="samples above the training images nearest in '
                 f'{name}"></p>')
    return (f"The samples nearest to one of {count} training images, which lies below", html), figures
