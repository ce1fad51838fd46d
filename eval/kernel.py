"""Kernel distances of two sets of vectors: KID and CMMD, both a squared maximum mean discrepancy.

    MMD^2(P, Q) = E k(x, x') + E k(y, y') - 2 E k(x, y)          Gretton et al. 2012, lemma 6

Unlike the Frechet distance it does not assume Gaussians, and the mean of its unbiased estimate does not depend on the
number of samples. Kernels are computed in fp64 in blocks of rows, so that memory is that of the vectors and one block.
Axis letters: N, M vectors of the two sets, D width.
"""
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.interval import Estimate, estimate_from_error

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)
BLOCK = 1024  # rows of a kernel at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 5


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3, the kernel of the KID (Binkowski et al. 2018, section 4): (N, D), (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10: (N, D), (M, D) -> (N, M)."""
    distance = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None] - 2 * x @ y.T
    return torch.exp(-distance.clamp(min=0) / (2 * CMMD_SIGMA**2))


def kid(generated: Tensor, real: Tensor) -> Estimate:
    """The kernel distance of features (N, D) and (M, D): the unbiased estimate over all pairs.

    Its mean is 0 for equal distributions, so a single estimate may be below 0. Raises ValueError for other shapes, for
    fewer than 2 vectors, and for values that are not finite.
    """
    x, y = check_sets(generated, real, least=2)
    value, error = _squared_mmd(x, y, cubic_kernel, unbiased=True)
    return estimate_from_error(value, error, "standard error of a U-statistic")


def cmmd(generated: Tensor, real: Tensor) -> Estimate:
    """The CMMD of CLIP vectors (N, E) and (M, E), at least 0: 1000 times the biased estimate under a Gaussian kernel.

    Jayasumana et al. 2024, section 5 and their code. Vectors are brought to unit length. Every pair counts, also that
    of a vector with itself, which adds about 1000 (1 - mean kernel) (1/N + 1/M) for equal distributions. Raises
    ValueError as `kid` does.
    """
    x, y = (F.normalize(vectors, dim=1) for vectors in check_sets(generated, real, least=2))
    value, error = _squared_mmd(x, y, gaussian_kernel, unbiased=False)
    found = estimate_from_error(value, error, "standard error of a V-statistic").scaled(CMMD_SCALE)
    return Estimate(found.value, max(0.0, found.low), found.high, found.note)


def kid_of_subsets(generated: Tensor, real: Tensor, subsets: int = 100, size: int = 1000,
                   seed: int = 2020) -> tuple[float, float]:
    """(mean, standard deviation) of the KID over random subsets of ``size`` vectors of features (N, D) and (M, D).

    Papers report the KID in this form (Binkowski et al. 2018). The subsets are those that torch-fidelity draws from
    the same seed. Raises ValueError when a set is smaller than ``size``, and as `kid` does.
    """
    x, y = check_sets(generated, real, least=size)
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        one, two = (vectors[torch.from_numpy(random.choice(len(vectors), size, replace=False))] for vectors in (x, y))
        values.append(_squared_mmd(one, two, cubic_kernel, unbiased=True)[0])
    return float(np.mean(values)), float(np.std(values))


def check_sets(generated: Tensor, real: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both sets in fp64. Raises ValueError unless they are (N, D) and (M, D), finite, with ``least`` vectors each."""
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(f"features: {tuple(generated.shape)} and {tuple(real.shape)}; valid: (N, D) and (M, D) from "
                         "the same extractor")
    if min(len(generated), len(real)) < least:
        raise ValueError(f"features: {len(generated)} generated and {len(real)} real images; valid: from {least} up "
                         "of each")
    sets = generated.detach().double(), real.detach().double()
    for name, vectors in zip(("generated", "real"), sets):
        if not torch.isfinite(vectors).all():
            raise ValueError(f"features: {int((~torch.isfinite(vectors)).any(dim=1).sum())} of {len(vectors)} {name} "
                             "vectors are not finite")
    return sets


def _means(x: Tensor, y: Tensor, kernel: Kernel, same: bool) -> Tensor:
    """The mean of k(x_i, y_j) over j, (N,); where both are the ``same`` set, over j != i."""
    sums = []
    for rows in range(0, len(x), BLOCK):
        values = kernel(x[rows:rows + BLOCK], y)  # (block, M)
        if same:
            values.diagonal(rows).zero_()
        sums.append(values.sum(dim=1))
    return torch.cat(sums) / (len(y) - same)


def _squared_mmd(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool) -> tuple[float, float]:
    """(MMD^2, its standard error) of x (N, D) and y (M, D).

    The error is that of the projection h(x) = E k(x, x') - E k(x, y) and of its counterpart for y: four times the
    variance of each, divided by N and by M (Serfling 1980, section 5.5). Where both distributions are equal, h is
    constant and only the next order remains; the spread of the estimated h is larger than that order, so that the
    interval is then too wide.
    """
    x_x, y_y = _means(x, x, kernel, same=unbiased), _means(y, y, kernel, same=unbiased)
    x_y, y_x = _means(x, y, kernel, same=False), _means(y, x, kernel, same=False)
    value = x_x.mean() + y_y.mean() - 2 * x_y.mean()
    variance = 4 * (x_x - x_y).var() / len(x) + 4 * (y_y - y_x).var() / len(y)
    return float(value), float(variance.sqrt())
