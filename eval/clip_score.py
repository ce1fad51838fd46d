"""Does the image fit its caption: CLIP score, and retrieval of captions by images, from vectors of unit length.

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
    """CLIP score, and the share of images whose own caption is the nearest, or among the nearest five, of all."""

    score: Estimate
    recall_1: Estimate
    recall_5: Estimate


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each pair of vectors (N, E), not below 0: (N,). Hessel et al. 2021, eq. 1, w = 100."""
    x, y = _unit_vectors(images, texts)
    return 100 * (x * y).sum(dim=1).clamp(min=0)


def caption_ranks(images: Tensor, texts: Tensor, captions: Sequence[str]) -> Tensor:
    """How many other captions fit each image at least as well as its own, (N,); 0 is the best.

    A caption that reads the same as its own is no other caption. A tie counts against the image, so that vectors
    that are all alike find nothing.
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
    """Score and retrieval of images against their captions' vectors, both (N, E), with intervals over pairs."""
    ranks = caption_ranks(images, texts, captions).cpu().numpy()
    return Agreement(bootstrap_mean(clip_scores(images, texts).cpu().numpy(), seed),
                     *(bootstrap_share(ranks < k, seed) for k in (1, 5)))


def derangement(count: int, seed: int = 0) -> Tensor:
    """An order of ``count`` images in which none keeps its place, (N,): pairs for the floor of a score."""
    if count < 2:
        raise ValueError(f"{count} images; valid: from 2 up, one cannot be given another's caption")
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
