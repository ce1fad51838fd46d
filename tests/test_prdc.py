"""Precision, recall, density, coverage: equal to torch-fidelity's and the definition, moved by what they name."""
import numpy as np
import pytest
import torch

from eval.prdc import prdc


def draw(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(k):
    theirs = pytest.importorskip("torch_fidelity.metric_prc").prc_features_to_metric
    x, y = 0.9 * draw(150), draw(200, seed=1)
    expected = theirs(x, y, prc_neighborhood=k, prc_batch_size=64, verbose=False)
    found = prdc(x, y, k)
    assert found.precision.value == pytest.approx(expected["precision"], abs=1e-6)
    assert found.recall.value == pytest.approx(expected["recall"], abs=1e-6)
    assert 0.2 < found.recall.value < found.precision.value < 0.99


def test_all_four_are_the_definition_written_out():
    """Naeem et al. 2020, equations 3 and 6, by whole tables of distances."""
    x, y, k = 1.1 * draw(60, 6), draw(80, 6, seed=1), 5
    table = np.linalg.norm(y.double().numpy()[:, None] - x.double().numpy()[None], axis=-1)  # (M, N)

    def reach(v: torch.Tensor) -> np.ndarray:
        own = np.linalg.norm(v.double().numpy()[:, None] - v.double().numpy()[None], axis=-1)
        return np.sort(own, axis=1)[:, k]

    real, fake = reach(y)[:, None], reach(x)[None]
    found = prdc(x, y, k)
    assert found.precision.value == pytest.approx((table <= real).any(axis=0).mean())
    assert found.recall.value == pytest.approx((table <= fake).any(axis=1).mean())
    assert found.density.value == pytest.approx((table <= real).sum(axis=0).mean() / k)
    assert found.coverage.value == pytest.approx((table.min(axis=1) <= real[:, 0]).mean())


def test_blocks_do_not_show(monkeypatch):
    x, y = draw(40), draw(50, seed=1)
    whole = prdc(x, y)
    monkeypatch.setattr("eval.prdc.BLOCK", 7)
    assert prdc(x, y) == whole


def test_each_moves_by_what_it_names():
    """One of four modes left out: recall and coverage fall, precision does not. Samples far out: precision falls."""
    random = torch.Generator().manual_seed(0)
    centres = 8 * torch.eye(4, 16)

    def modes(count: int, used: int) -> torch.Tensor:
        return centres[torch.arange(count) % used] + torch.randn(count, 16, generator=random)

    real = modes(400, 4)
    same, dropped, spread = (prdc(x, real, 5) for x in (modes(400, 4), modes(400, 3), 2 * modes(400, 4)))
    assert dropped.recall.high < same.recall.low and dropped.coverage.high < same.coverage.low
    assert dropped.precision.high > same.precision.low
    assert spread.precision.high < same.precision.low and spread.density.high < same.density.low
    assert same.density.value == pytest.approx(1, abs=0.15)
    copied = prdc(real, real, 5)
    assert copied.precision.value == copied.recall.value == copied.coverage.value == 1.0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="3 generated and 9 real images; valid: from 4 up"):
        prdc(draw(3), draw(9))
    with pytest.raises(ValueError, match="k: 0; valid: from 1 up"):
        prdc(draw(9), draw(9), k=0)
    with pytest.raises(ValueError, match="from the same extractor"):
        prdc(draw(9, 4), draw(9, 5))
