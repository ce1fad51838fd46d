"""How images of something taught are judged, in the image space of an evaluator (the stage clip).

Axis letters: N images, E width of the evaluator's space, K kinds.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.catalog import DataConfig, build_source
from data.source import Source, stack_images
from eval.clip_score import agreement
from eval.colour import lab_from_srgb
from eval.frechet import Moments, frechet_distance
from eval.interval import bootstrap_mean, bootstrap_share
from files.images import to_unit
from pipeline.clip_vectors import ClipVectors

TAUGHT = "taught"  # the kind that was taught, beside those of the base
BATCH = 16


class Kinds:
    """Tells kinds of images apart by their vectors (N, E): the kind with the nearest mean, in the metric of the
    covariance within kinds (linear discriminant analysis with equal priors; Hastie et al., "The Elements of Statistical
    Learning", equation 4.10). ``ridge`` is a share of the mean variance that is added to each, since there may be fewer
    vectors than dimensions."""

    def __init__(self, vectors: Tensor, kinds: Sequence[str], ridge: float = 0.1):
        self.names = sorted(set(kinds))
        labels = torch.tensor([self.names.index(kind) for kind in kinds])
        x = vectors.double()
        means = torch.stack([x[labels == k].mean(dim=0) for k in range(len(self.names))])  # (K, E)
        rest = x - means[labels]
        covariance = rest.T @ rest / len(x)
        covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
        self.weight = torch.linalg.solve(covariance, means.T)  # (E, K)
        self.bias = -0.5 * (means * self.weight.T).sum(dim=1)  # (K,)

    def chances(self, vectors: Tensor) -> Tensor:
        """The probability (N, K) of each kind."""
        return (vectors.double() @ self.weight + self.bias).softmax(dim=1)

    def __call__(self, vectors: Tensor) -> list[str]:
        """The kind of each image."""
        return [self.names[k] for k in self.chances(vectors).argmax(dim=1).tolist()]


def singles(data: DataConfig, split: str) -> Source:
    """The images of one thing of the base's data, without scenes where it has any."""
    if data.source == "emoji":
        data = replace(data, emoji=replace(data.emoji, scenes=0.0, variants=1))
    return build_source(data, split)  # type: ignore[arg-type]


def images_of(source: Source, count: int) -> tuple[Tensor, list[str], list[str]]:
    """The first images (N, 3, H, W) uint8 of a source, their first captions and their kinds (``style``, else own)."""
    items = [source[i] for i in range(min(count, len(source)))]
    return stack_images(items), [item["captions"][0] for item in items], [item.get("style", "own") for item in items]


def chroma(images: Tensor) -> np.ndarray:
    """The mean CIELAB chroma of each image, uint8 (N, 3, H, W) -> (N,): 0 is grey."""
    lab = lab_from_srgb(images.movedim(1, -1).float() / 255)
    return torch.hypot(lab[..., 1], lab[..., 2]).mean(dim=(1, 2)).numpy()


@dataclass(frozen=True)
class Reference:
    """What is compared with: the vectors (N, E) of real images of what was taught, of other names than those trained
    on, and a classifier of kinds."""

    clip: ClipVectors
    real: Tensor
    kinds: Kinds

    @property
    def mean(self) -> Tensor:
        """The mean (E,) of the real images, of length 1."""
        return torch.nn.functional.normalize(self.real.mean(dim=0), dim=0)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, str]:
        """hit, similarity, fidelity, recall and chroma of images (N, 3, H, W) uint8, with intervals over images."""
        vectors = self.clip(to_unit(images))
        found = agreement(vectors, self.clip.texts(prompts), prompts)
        return {"hit": str(bootstrap_share([kind == TAUGHT for kind in self.kinds(vectors)])),
                "similarity": str(bootstrap_mean((vectors @ self.mean).numpy())),
                "fidelity": str(found.score.scaled(0.01)), "recall 1": str(found.recall_1),
                "recall 5": str(found.recall_5), "chroma": str(bootstrap_mean(chroma(images)))}


def reference(clip: ClipVectors, data: DataConfig, real: Source, more: Source, count: int) -> tuple[Reference, str]:
    """The reference, and a line on how often its classifier is right about images that it was not made from: validation
    images of the base's data, and ``real``. Its kinds are made from training images and from ``more``."""
    own, _, kinds = images_of(singles(data, "train"), count)
    taught, _, _ = images_of(more, count)
    vectors = clip(to_unit(torch.cat([own, taught])))
    found = Kinds(vectors, [*kinds, *[TAUGHT] * len(taught)])
    check, _, right = images_of(singles(data, "validation"), count)
    shown, _, _ = images_of(real, count)
    shown_vectors = clip(to_unit(shown))
    own_hits = [one == other for one, other in zip(found(clip(to_unit(check))), right)]
    taught_hits = [kind == TAUGHT for kind in found(shown_vectors)]
    line = (f"classifier of {len(found.names)} kinds on real images: {bootstrap_share(own_hits)} of {len(own_hits)} of "
            f"the base's validation images, {bootstrap_share(taught_hits)} of {len(taught_hits)} of those taught")
    return Reference(clip, shown_vectors, found), line


def distance_to(real: Moments, vectors: Tensor) -> float:
    """The Frechet distance of vectors (N, E) to real images; it falls with N, so compare equal numbers only."""
    return frechet_distance(Moments(vectors.shape[1]).update(vectors), real)
