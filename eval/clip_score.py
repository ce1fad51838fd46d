"""How well images fit their captions: the CLIP score, and retrieval of captions by images, from CLIP vectors.

Axis letters: N pairs, E width of the shared space.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.interval import Estimate, bootstrap_mean, bootstrap_share

BLOCK = 1024  # images compared with all captions at a time


@dataclass(frozen=True)
class Agreement:
    """The CLIP score, and the shares of images whose own caption is the nearest of all, or among the nearest five."""

    score: Estimate
    recall_1: Estimate
    recall_5: Estimate


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each pair of vectors (N, E), at least 0: (N,). Hessel et al. 2021, equation 1, w = 100.

    Raises ValueError for vectors of other shapes, and for values that are not finite.
    """
    x, y = _unit_vectors(images, texts)
    return 100 * (x * y).sum(dim=1).clamp(min=0)


def caption_ranks(images: Tensor, texts: Tensor, captions: Sequence[str]) -> Tensor:
    """The number of other captions that fit each image at least as well as its own, (N,); 0 is the best.

    A caption with the same text as the image's own does not count as another one. A tie counts against the image, so
    that vectors that are all alike find nothing. Raises ValueError unless there is one caption for each image.
    """
    x, y = _unit_vectors(images, texts)
    if len(captions) != len(x):
        raise ValueError(f"{len(captions)} captions for {len(x)} images; valid: one each")
    known: dict[str, int] = {}
    same = torch.tensor([known.setdefault(caption, len(known)) for caption in captions], device=x.device)  # (N,)
    ranks = []
    for rows in range(0, len(x), BLOCK):
        part = slice(rows, rows + BLOCK)
        cosine = x[part] @ y.T  # (block, N)
        own = cosine.diagonal(rows)[:, None]
        # the two products are summed in different orders: what differs by rounding alone is a tie
        ranks.append(((cosine >= own - 1e-12) & (same[part][:, None] != same)).sum(dim=1))
    return torch.cat(ranks)


def agreement(images: Tensor, texts: Tensor, captions: Sequence[str], seed: int = 0) -> Agreement:
    """Score and retrieval of images against the vectors of their captions, both (N, E), with intervals over pairs."""
    ranks = caption_ranks(images, texts, captions).cpu().numpy()
    return Agreement(bootstrap_mean(clip_scores(images, texts).cpu().numpy(), seed),
                     *(bootstrap_share(ranks < k, seed) for k in (1, 5)))


def derangement(count: int, seed: int = 0) -> Tensor:
    """A permutation of 0 .. ``count`` - 1 that leaves nothing in its place, (count,).

    It gives every image the caption of another one, for the score that chance reaches. Raises ValueError below 2.
    """
    if count < 2:
        raise ValueError(f"{count} images; valid: from 2 up, a single image cannot be given the caption of another one")
    order = np.random.default_rng(seed).permutation(count)
    result = np.empty(count, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return torch.from_numpy(result)


def _unit_vectors(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise ValueError(f"vectors: {tuple(images.shape)} and {tuple(texts.shape)}; valid: both (N, E), one each")
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise ValueError("vectors: some are not finite")
    return F.normalize(images.double(), dim=1), F.normalize(texts.double(), dim=1)
