"""Orthogonalizes matrices approximately, by moving all singular values close to 1: the update directions of Muon.

The polar factor U V^T of X = U S V^T is approached by odd polynomials of X, each (a I + b G + c G^2) X with G = X
X^T, so only matrix products are needed and no SVD. There are two sets of polynomials: the one that Muon was published
with (Jordan et al. 2024), and a shorter one with which networks learn equally well (LOG.md). Axis letters: M matrices
of one shape, R rows, C columns, R <= C after tall matrices are transposed.
"""
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from model.device import autocast_dtype

Polynomial = tuple[float, float, float]  # a, b, c
Iteration = Literal["newton_schulz", "short"]

# one polynomial, five times: singular values in (0, 1] end between about 0.7 and 1.2
NEWTON_SCHULZ: tuple[Polynomial, ...] = 5 * ((3.4445, -4.7750, 2.0315),)

# Each is the best odd quintic for what the one before leaves (Amsel et al. 2025, Polar Express, algorithm 1), for
# singular values from 0.003 of the largest up: these end within 1 +- 0.32. As there, each expects values up to 1.05 of
# what it should get, and none cares for those below 0.05 of its largest: without, bf16 leaves values of 0 and 70.
# The steeper they are at 0 the better the autoencoder learns; the denoiser does not mind (LOG.md). The last is taken
# times 0.88, which makes updates as large as the published iteration's: the same learning rates are right.
SHORT: tuple[Polynomial, ...] = (
    (8.0150, -21.7825, 15.7434), (3.7426, -2.3629, 0.3967), (3.4676, -2.3325, 0.4173), (2.3551, -1.6355, 0.3408))

TOGETHER = 2  # polynomials that are combined before X is multiplied, see `polynomial_factor`
MARGIN = 1.02  # on the bound of the largest singular value, for rounding in bf16: the quintics grow fast beyond 1


def polar_factors(matrices: Sequence[Tensor], iteration: Iteration = "short",
                  dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each matrix (R, C), of any shape, with its singular values near 1, in ``dtype`` or in that of `product_dtype`.

    Matrices of one shape, or of its transpose, form one batch: many small products at once reach twice the speed.
    """
    places: dict[tuple[int, int], list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault((min(matrix.shape), max(matrix.shape)), []).append(place)
    results = list(matrices)
    for rows in sorted({rows for rows, _ in places}):
        alike = [where for (side, _), where in places.items() if side == rows]
        batches = []
        for where in alike:
            wide = [matrices[i] if matrices[i].shape[0] == rows else matrices[i].mT for i in where]  # each (R, C)
            batch = wide[0].new_empty(len(wide), *wide[0].shape, dtype=dtype or product_dtype(wide[0]))  # (M, R, C)
            torch._foreach_copy_(list(batch), wide)
            batches.append(batch)
        for where, batch in zip(alike, apply_polynomials(batches, iteration), strict=True):
            for i, result in zip(where, batch, strict=True):
                results[i] = result if matrices[i].shape[0] == rows else result.mT
    return results


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (M, R, C) after the published iteration, with the same shape and type."""
    return torch.stack(polar_factors(list(matrices), "newton_schulz")).to(matrices.dtype)


def apply_polynomials(batches: list[Tensor], iteration: Iteration) -> list[Tensor]:
    """Batches (M, R, C), with one R for all and C from R up, after the polynomials; their Gram matrices form one
    batch."""
    polynomials = SHORT if iteration == "short" else NEWTON_SCHULZ
    counts = [len(batch) for batch in batches]
    for done in range(0, len(polynomials), TOGETHER):
        gram = torch.cat([batch @ batch.mT for batch in batches])  # (all M, R, R)
        square, scale = None, None
        if done == 0:
            gram, square, scale = scale_gram(gram, tight=iteration == "short")
        factor = polynomial_factor(gram, polynomials[done:done + TOGETHER], square)
        if scale is not None:
            factor *= scale
        batches = [part @ batch for part, batch in zip(factor.split(counts), batches, strict=True)]
    return batches


def scale_gram(gram: Tensor, tight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(G / s^2 (M, R, R), its square, 1 / s (M, 1, 1)) for Gram matrices G of X; s bounds the largest singular value.

    s is the Frobenius norm of X, as published, or if ``tight`` the fourth root of that of G^2. With the latter small
    singular values start two to six times larger at no cost, because the first polynomial needs G^2 anyway, so four
    polynomials suffice in place of five. Turbo-Muon (Boissin et al. 2025) has the same idea, but scales row by row,
    which changes the polar factor.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).float().sum(dim=-1)[:, None, None]  # |X|^2
    trace = trace.clamp_min(1e-14)  # without a gradient everything is 0, and stays 0
    gram = gram / trace.to(gram.dtype)
    square = gram @ gram
    if not tight:
        return gram, square, trace.rsqrt().to(gram.dtype)
    bound = square.float().norm(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-6) * MARGIN**2  # (M, 1, 1)
    return (gram / bound.to(gram.dtype), square / bound.square().to(gram.dtype),
            (trace * bound).rsqrt().to(gram.dtype))


def polynomial_factor(gram: Tensor, polynomials: Sequence[Polynomial], square: Tensor | None = None) -> Tensor:
    """The factor (M, R, R) by which successive polynomials multiply an X with this Gram matrix.

    All factors are polynomials of one symmetric matrix, so they commute, and if X becomes p X, then G becomes p p G:
    the long side of X is used only at both ends. ``square``, G G if it is known, is overwritten.

    At most two polynomials are combined at a time: bf16 rounds eigenvalues of G near 0 to values below 0, and each
    polynomial multiplies these by a^2, while the eigenvalues of a G computed anew from X cannot be below 0.
    """
    product = gram
    for number, (a, b, c) in enumerate(polynomials):
        if number:
            gram, square = gram @ (product @ product), None
        square = gram @ gram if square is None else square
        factor = square.mul_(c).add_(gram, alpha=b)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor @ product if number else factor
    return product


def product_dtype(x: Tensor) -> torch.dtype:
    """The type of the matrix products: bf16, summed in fp32, if the machine has bf16 arithmetic, else fp32."""
    return autocast_dtype("auto", x.device) or torch.float32
