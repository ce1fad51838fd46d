"""Kernel distances, Inception score: equal to torch-fidelity's, to the formula written out, and to their means."""
import numpy as np
import pytest
import torch

from eval.inception_score import inception_score
from eval.kernel import cmmd, kid, kid_of_subsets


def draw(count: int, width: int = 48, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Vectors that are no Gaussian and correlated, as pooled features of a ReLU are (N, D)."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return (torch.randn(count, width, generator=random) @ mixing + shift).clamp(min=0) * scale


def test_equal_to_torch_fidelity():
    """The mean and spread over the subsets it draws from the same seed."""
    theirs = pytest.importorskip("torch_fidelity.metric_kid").kid_features_to_metric
    x, y = draw(230), draw(300, seed=1, shift=0.1)
    expected = theirs(x, y, kid_subsets=7, kid_subset_size=150, rng_seed=2020, verbose=False)
    mean, spread = kid_of_subsets(x, y, subsets=7, size=150)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


def test_the_estimate_over_all_pairs_is_the_formula_written_out():
    x, y = (vectors.double().numpy() for vectors in (draw(40, 6), draw(30, 6, seed=1, scale=2.0)))
    k_xx, k_yy, k_xy = ((a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    expected = ((k_xx.sum() - np.trace(k_xx)) / (40 * 39) + (k_yy.sum() - np.trace(k_yy)) / (30 * 29)
                - 2 * k_xy.mean())
    assert kid(torch.from_numpy(x), torch.from_numpy(y)).value == pytest.approx(expected, rel=1e-10)


def test_blocks_do_not_show(monkeypatch):
    x, y = draw(50), draw(45, seed=1)
    whole = kid(x, y), cmmd(x, y)
    monkeypatch.setattr("eval.kernel.BLOCK", 7)
    for one, two in zip(whole, (kid(x, y), cmmd(x, y))):
        assert (one.value, one.low, one.high) == pytest.approx((two.value, two.low, two.high), rel=1e-10)


def test_unbiased_and_with_an_error_that_is_that_of_repetitions():
    """200 repetitions: the mean is 0 for equal distributions, and that of large sets for others, whatever the count;
    the standard error is that of the repetitions for different ones, and not below it for equal ones."""
    def repeated(shift: float, count: int) -> tuple[float, float, float]:
        found = [kid(draw(count, 16, 2 * i), draw(count, 16, 2 * i + 1, shift)) for i in range(200)]
        values = np.array([estimate.value for estimate in found])
        errors = np.array([(estimate.high - estimate.low) / 3.92 for estimate in found])
        return float(values.mean()), float(values.std()), float(np.median(errors))

    truth = kid(draw(4000, 16, 1001), draw(4000, 16, 1002, 0.3)).value
    for count in (20, 60):
        mean, spread, error = repeated(0.0, count)
        assert abs(mean) < 3 * spread / 200**0.5
        assert 0.9 * spread < error < 3 * spread
        mean, spread, error = repeated(0.3, count)
        assert abs(mean - truth) < 4 * spread / 200**0.5
        assert 0.8 * spread < error < 1.3 * spread


def test_cmmd_is_the_published_formula():
    """By numpy from unit vectors, pairs of a vector with itself included; 0 for the same set."""
    x, y = draw(30, 8), draw(20, 8, seed=1, shift=0.5)
    a, b = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (x, y))

    def mean_kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.exp(-np.square(p[:, None] - q[None]).sum(-1) / 200).mean())

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert cmmd(x, y).value == pytest.approx(expected, rel=1e-8)
    assert cmmd(3 * x, y).value == pytest.approx(expected, rel=1e-6)  # only directions count
    assert cmmd(x, x).value == pytest.approx(0, abs=1e-9) and cmmd(x, x).low == 0.0


def test_inception_score_is_torch_fidelitys():
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = 3 * torch.randn(203, 50, generator=torch.Generator().manual_seed(0))
    expected = theirs(logits, splits=10)
    mean, spread = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_of_what_is_known():
    """Sure and evenly spread over C classes: C. One class, or no idea: 1."""
    sure = 50 * torch.eye(10).repeat(20, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-6)
    assert inception_score(sure[:1].repeat(50, 1))[0] == pytest.approx(1, rel=1e-6)
    assert inception_score(torch.zeros(50, 10))[0] == pytest.approx(1, rel=1e-6)


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match=r"1 generated and 5 real images; valid: from 2 up"):
        kid(draw(1), draw(5))
    with pytest.raises(ValueError, match="40 generated and 60 real images; valid: from 50 up"):
        kid_of_subsets(draw(40), draw(60), size=50)
    with pytest.raises(ValueError, match="from the same extractor"):
        cmmd(draw(5, 8), draw(5, 9))
    with pytest.raises(ValueError, match="1 of 5 real vectors are not finite"):
        kid(draw(5), draw(5).index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(ValueError, match="N at least the number of splits"):
        inception_score(torch.zeros(5, 10))
    with pytest.raises(ValueError, match="1 values not finite"):
        inception_score(torch.zeros(20, 10).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)))
