"""Precision, recall, density and coverage: are samples among the real images, and are all real images reached?

A set is modelled as the union of balls around its vectors, each of which reaches to the k-th nearest neighbour in the
set. Distances are computed in fp64 in blocks of rows. Axis letters: N samples, M real vectors, D width.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.interval import Estimate, bootstrap_mean, bootstrap_share
from eval.kernel import BLOCK, check_sets


@dataclass(frozen=True)
class Prdc:
    """Precision is the share of samples inside the real set, recall the share of real images inside the set of samples.
    Density is the mean number of real balls that a sample lies in, divided by k; it exceeds 1 where samples crowd at
    dense places of the real set. Coverage is the share of real images with a sample in their ball. Intervals hold the
    balls fixed."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def prdc(generated: Tensor, real: Tensor, k: int = 3, seed: int = 0) -> Prdc:
    """The four measures of features of samples (N, D) and of real images (M, D).

    Precision and recall: Kynkaanniemi et al. 2019, equations 1 to 3. Density and coverage: Naeem et al. 2020,
    equations 3 and 6. Raises ValueError for k below 1, fewer than k + 1 vectors, and features of different widths.
    """
    if k < 1:
        raise ValueError(f"k: {k}; valid: from 1 up")
    x, y = check_sets(generated, real, least=k + 1)
    x_reach, y_reach = neighbour_distances(x, k), neighbour_distances(y, k)  # (N,), (M,)
    inside, counts, nearest = [], [], torch.full((len(y),), torch.inf, dtype=torch.float64, device=y.device)
    recalled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part, reach in zip(x.split(BLOCK), x_reach.split(BLOCK)):
        distance = torch.cdist(part, y)  # (block, M)
        hit = distance <= y_reach
        inside.append(hit.any(dim=1))
        counts.append(hit.sum(dim=1))
        recalled |= (distance <= reach[:, None]).any(dim=0)
        nearest = torch.minimum(nearest, distance.min(dim=0).values)
    precision, recall, coverage = (bootstrap_share(hits.double().cpu().numpy(), seed)
                                   for hits in (torch.cat(inside), recalled, nearest <= y_reach))
    return Prdc(precision, recall, bootstrap_mean(torch.cat(counts).double().cpu().numpy() / k, seed), coverage)


def neighbour_distances(vectors: Tensor, k: int) -> Tensor:
    """The distance of each vector (N, D) to its k-th nearest neighbour, (N,)."""
    # the smallest of a row is the vector itself, exactly 0 or a rounding error
    return torch.cat([torch.cdist(part, vectors).kthvalue(k + 1, dim=1).values for part in vectors.split(BLOCK)])
