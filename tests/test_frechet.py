"""Frechet distance against closed forms and scipy's matrix root, with few vectors and with many."""
import numpy as np
import pytest
import scipy.linalg
import torch

from eval.frechet import Moments, covariance_factor, frechet_distance


def draw(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated vectors (N, D) of unequal variances, fp64."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=random, dtype=torch.float64)
    mixing = mixing * torch.logspace(0, -2, width, dtype=torch.float64)
    return torch.randn(count, width, generator=random, dtype=torch.float64) @ mixing.T + mixing[0]


def moments(vectors: torch.Tensor, batch: int = 37) -> Moments:
    found = Moments(vectors.shape[1])
    for part in vectors.split(batch):
        found.update(part)
    return found


def exactly(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    """Moments of a Gaussian that is known."""
    found = Moments(len(mean))
    found.count, found.mean, found.scatter = 2, mean.double(), covariance.double()
    return found


def by_scipy(x: torch.Tensor, y: torch.Tensor) -> float:
    """The formula as it is written, from whole arrays."""
    c_x, c_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = np.real(scipy.linalg.sqrtm(c_x @ c_y))
    mean = x.numpy().mean(0) - y.numpy().mean(0)
    return float(mean @ mean + np.trace(c_x) + np.trace(c_y) - 2 * np.trace(root))


@pytest.mark.parametrize("offset, tolerance", [(0.0, 1e-12), (1e6, 1e-9)])
def test_streamed_moments_are_numpys(offset, tolerance):
    """At 1e6 from 0 a sum of squares would have lost the covariance: 12 of 16 digits."""
    x = draw(500, 12) + offset
    found = moments(x)
    assert found.count == 500
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    expected = np.cov((x - offset).numpy(), rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_merged_moments_are_those_of_all():
    x = draw(300, 8)
    whole = moments(x)
    merged = moments(x[:120]).merge(Moments(8)).merge(moments(x[120:]))
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    empty = Moments(8).merge(whole)
    assert empty.count == 300 and torch.equal(empty.covariance, whole.covariance)


def test_two_gaussians_of_one_dimension():
    """(m_1 - m_2)^2 + (s_1 - s_2)^2."""
    one, two = exactly(torch.tensor([1.0]), torch.tensor([[4.0]])), exactly(torch.tensor([4.0]), torch.tensor([[0.25]]))
    assert frechet_distance(one, two) == pytest.approx(3**2 + 1.5**2, rel=1e-12)


def test_covariances_with_common_axes():
    """|m|^2 + sum of (s_1 - s_2)^2 along the axes, also where one has no extent."""
    axes = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    s_1, s_2 = torch.linspace(0, 3, 20, dtype=torch.float64), torch.linspace(5, 0, 20, dtype=torch.float64)
    one, two = (exactly(axes[number], axes @ torch.diag(s**2) @ axes.T) for number, s in enumerate((s_1, s_2)))
    assert frechet_distance(one, two) == pytest.approx(2 + float((s_1 - s_2).square().sum()), rel=1e-10)


def test_equal_to_the_formula_with_scipys_root():
    x, y = draw(400, 24), 1.3 * draw(350, 24, seed=1) + 0.2
    expected = by_scipy(x, y)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [5, 64, 500])
def test_a_set_and_itself(count):
    """Fewer and more vectors than the width of 64; another order and other batches."""
    x = 10 * draw(count, 64)
    assert frechet_distance(moments(x), moments(x.flip(0), batch=11)) < 1e-9 * float(moments(x).covariance.trace())


def test_missing_rank_is_no_trouble():
    """6 vectors in 64 dimensions; in spaces at right angles the root is 0, in one space scipy solves the small one."""
    x, y = draw(6, 8), draw(6, 8, seed=2)
    wide = torch.zeros(6, 64, dtype=torch.float64)
    x_wide, y_wide, y_apart = wide.clone(), wide.clone(), wide.clone()
    x_wide[:, :8], y_wide[:, :8], y_apart[:, 8:16] = x, y, y
    one, two = moments(x_wide), moments(y_apart)
    expected = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace()
    assert frechet_distance(one, two) == pytest.approx(float(expected), rel=1e-12)
    assert covariance_factor(one.covariance).shape == (64, 5)
    # the root of F_1^T C_2 F_1, symmetric and of full rank, by scipy
    f = covariance_factor(one.covariance)
    inner = (f.T @ moments(y_wide).covariance @ f).numpy()
    expected = ((one.mean - moments(y_wide).mean).square().sum() + one.covariance.trace()
                + moments(y_wide).covariance.trace() - 2 * np.trace(np.real(scipy.linalg.sqrtm(inner))))
    assert frechet_distance(one, moments(y_wide)) == pytest.approx(float(expected), rel=1e-8)
    still = moments(torch.ones(4, 64))
    assert frechet_distance(still, still) == 0.0


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match=r"vectors: \(3, 4\); valid: \(N, 5\)"):
        Moments(5).update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="2 values are not finite"):
        Moments(2).update(torch.tensor([[0.0, float("nan")], [float("inf"), 1.0]]))
    with pytest.raises(ValueError, match="a covariance of 1 vectors; valid: from 2 up"):
        frechet_distance(moments(draw(1, 4)), moments(draw(9, 4)))
    with pytest.raises(ValueError, match="width: 4 and 5"):
        frechet_distance(moments(draw(9, 4)), moments(draw(9, 5)))
    with pytest.raises(ValueError, match="width: 5; valid: 4"):
        Moments(4).merge(Moments(5))
    with pytest.raises(ValueError, match="width: 0"):
        Moments(0)
