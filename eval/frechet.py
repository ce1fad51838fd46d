"""The Frechet distance of two sets of vectors, each modelled as a Gaussian (Heusel et al. 2017, equation 6).

Only the count, the mean and the scatter of a set are kept, so memory does not grow with it. Everything is in fp64.
Axis letters: N vectors, D width.
"""
import torch
from torch import Tensor


class Moments:
    """The mean (D,) and the covariance (D, D) of vectors that arrive in batches of any size and in any order."""

    def __init__(self, width: int):
        if width < 1:
            raise ValueError(f"width: {width}; valid: from 1 up")
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)  # (D, D), sum of (x - mean)(x - mean)^T

    def update(self, vectors: Tensor) -> "Moments":
        """Add vectors (N, D); returns itself. Raises ValueError for another width or a value that is not finite."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise ValueError(f"vectors: {tuple(vectors.shape)}; valid: (N, {len(self.mean)})")
        x = vectors.detach().to("cpu", torch.float64)
        if not torch.isfinite(x).all():
            raise ValueError(f"vectors: {int((~torch.isfinite(x)).sum())} values are not finite")
        if len(x):
            mean = x.mean(dim=0)
            self._join(len(x), mean, (x - mean).T @ (x - mean))
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Add all vectors of ``other`` to the set; returns itself. Raises ValueError for another width."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"width: {len(other.mean)}; valid: {len(self.mean)}")
        if other.count:
            self._join(other.count, other.mean, other.scatter)
        return self

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        # Chan, Golub and LeVeque 1983, equation 2.1: no sum of squares, whose difference would lose the digits
        total, shift = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D). Raises ValueError before the second vector."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} vectors; valid: from 2 up")
        return self.scatter / (self.count - 1)


def covariance_factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F F^T = covariance (D, D), which is symmetric and, up to rounding, positive semidefinite.

    Directions whose variance is only rounding, such as all beyond the rank of a few vectors, are left out.
    """
    values, directions = torch.linalg.eigh(covariance)  # (D,) ascending, (D, D)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return directions[:, kept] * values[kept].sqrt()


def frechet_distance(one: Moments, two: Moments) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), at least 0 and symmetric in its arguments.

    The root of the product, which is not symmetric, is never computed: with C = F F^T the trace of the root is the sum
    of the singular values of F_1^T F_2, which needs no inverse and allows covariances without full rank. Raises
    ValueError for sets of different widths and for fewer than 2 vectors.
    """
    if len(one.mean) != len(two.mean):
        raise ValueError(f"width: {len(one.mean)} and {len(two.mean)}; valid: the same features for both sets")
    c_1, c_2 = one.covariance, two.covariance
    f_1, f_2 = covariance_factor(c_1), covariance_factor(c_2)
    # C_1 C_2 has the eigenvalues of F_1^T C_2 F_1 = (F_1^T F_2)(F_1^T F_2)^T, whose roots are those singular values
    root = torch.linalg.svdvals(f_1.T @ f_2).sum() if f_1.shape[1] and f_2.shape[1] else torch.zeros(())
    distance = (one.mean - two.mean).square().sum() + c_1.trace() + c_2.trace() - 2 * root
    return max(0.0, float(distance))


def frechet_of_vectors(x: Tensor, y: Tensor) -> float:
    """The same as `frechet_distance`, from all vectors (N, D) and (M, D); faster where they are fewer than D.

    Centred vectors divided by sqrt(N - 1) are already a factor of their covariance, so no eigenvalues are needed.
    Raises ValueError for different widths and for fewer than 2 vectors.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"vectors: {tuple(x.shape)} and {tuple(y.shape)}; valid: (N, D) and (M, D), from 2 up of each")
    x, y = x.double(), y.double()
    f_1, f_2 = ((v - v.mean(dim=0)) / (len(v) - 1) ** 0.5 for v in (x, y))  # (N, D), (M, D)
    root = torch.linalg.svdvals(f_1 @ f_2.T).sum()
    distance = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + f_1.square().sum() + f_2.square().sum() - 2 * root
    return max(0.0, float(distance))
