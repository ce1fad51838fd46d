"""Does a model copy its training images? Distances of its samples to training, against those of held-out images.

A near neighbour alone says nothing, because real images have near neighbours as well. The same search is therefore made
for real images that were not trained on. Axis letters: N queries, M training images, D width of a vector.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.interval import Estimate, with_exact_ends

NEAR = 5  # percent of held-out images that are nearer to training than the distance called near
CANDIDATES = 4  # vectors of a batch whose distance is computed exactly
SLACK = 1e-5  # error of a squared distance that comes from a matrix product, as a share of the squared lengths


@dataclass(frozen=True)
class Nearest:
    """The distance of each query to its nearest training vector, (N,), and the number of that vector, (N,)."""

    distance: Tensor
    index: Tensor


@dataclass(frozen=True)
class Memorization:
    """Two measures of copying.

    ``near`` is the share of samples nearer to training than all but 5 % of held-out images; it is 5 % for a model that
    does not copy. ``nearer`` is the probability that a sample is nearer to training than a held-out image; it is one
    half for such a model and 1 for copies.
    """

    near: Estimate
    nearer: Estimate


def nearest(queries: Tensor, training: Iterable[Tensor]) -> Nearest:
    """The nearest training vector of each query (N, D), by Euclidean distance; training arrives in batches (M_i, D).

    Memory is that of the queries and one batch. Raises ValueError for different widths, for no training vectors, and
    for values that are not finite.
    """
    if queries.ndim != 2 or not len(queries) or not torch.isfinite(queries).all():
        raise ValueError(f"queries: {tuple(queries.shape)}; valid: (N, D), N from 1 up, all finite")
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    seen = 0
    for batch in training:
        if batch.ndim != 2 or batch.shape[1] != queries.shape[1] or not torch.isfinite(batch).all():
            raise ValueError(f"training vectors: {tuple(batch.shape)}; valid: (M, {queries.shape[1]}), all finite")
        value, place = nearest_in(queries.float(), batch.float())
        closer = value < best
        best[closer], index[closer] = value[closer], place[closer] + seen
        seen += len(batch)
    if not seen:
        raise ValueError("training vectors: none; valid: at least one batch")
    return Nearest(best, index)


def nearest_in(queries: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(distance fp64 (N,), place (N,)) of the vector of a batch (M, D) that is nearest to each query (N, D).

    |x|^2 + |y|^2 - 2 x.y is one matrix product, but leaves 1e-2 where a copy has 0. It therefore only chooses
    CANDIDATES, whose differences are then taken. Queries for which others could still be nearer are compared with the
    whole batch.
    """
    lengths, others = queries.square().sum(dim=1), batch.square().sum(dim=1)  # (N,), (M,)
    squared = lengths[:, None] + others - 2 * queries @ batch.T  # (N, M)
    rough, places = squared.topk(min(CANDIDATES, len(batch)), largest=False)  # (N, C)
    distances = torch.stack([(queries - batch[column]).norm(dim=1) for column in places.T], dim=1).double()  # (N, C)
    distance, best = distances.min(dim=1)
    place = places.gather(1, best[:, None])[:, 0]
    open_ = (rough[:, -1] - SLACK * (lengths + others.max()) <= distance.square()) & (len(batch) > CANDIDATES)
    if open_.any():
        exact = torch.cdist(queries[open_], batch, compute_mode="donot_use_mm_for_euclid_dist").double()
        distance[open_], place[open_] = exact.min(dim=1)
    return distance, place


def memorization(samples: Nearest, held_out: Nearest, seed: int = 0, resamples: int = 500) -> Memorization:
    """Compare the distances of samples and of held-out real images, searched among the same training images.

    ``nearer`` is the Mann-Whitney statistic of Meehan et al. 2020 (section 3), as a share of pairs. Intervals resample
    both sets. Raises ValueError for fewer than 20 held-out images, of which 5 % would be less than one.
    """
    ours, theirs = (found.distance.cpu().numpy() for found in (samples, held_out))
    if len(theirs) < 20:
        raise ValueError(f"held_out: {len(theirs)} images; valid: from 20 up")

    def shares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        y = np.sort(y)
        # for each sample, the share of held-out images that are farther from training; a tie counts half
        farther = 1 - (np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")) / (2 * len(y))
        # where held-out images repeat training ones the limit is 0, and a copy must be near all the same
        return float((x <= np.percentile(y, NEAR)).mean()), float(farther.mean())

    random = np.random.default_rng(seed)
    resampled = [shares(random.choice(ours, len(ours)), random.choice(theirs, len(theirs))) for _ in range(resamples)]
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    near, nearer = (Estimate(value, float(low[i]), float(high[i]), "bootstrap over samples and held-out images")
                    for i, value in enumerate(shares(ours, theirs)))
    return Memorization(with_exact_ends(near, len(ours)), nearer)


def pixel_vectors(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as vectors (B, 3 H W) whose distance is the root mean square error of pixels on a
    scale of 0 to 255."""
    return images.flatten(1).float() * (127.5 / images[0].numel() ** 0.5)
