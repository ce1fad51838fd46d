"""Copies of training images are found, and a model that draws from the same distribution is not accused."""
import pytest
import torch

from eval.memorization import memorization, nearest, pixel_vectors


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_is_that_of_the_whole_table():
    queries, training = draw(20, 0), draw(101, 1)
    found = nearest(queries, training.split(17))
    expected = torch.cdist(queries.double(), training.double()).min(dim=1)
    torch.testing.assert_close(found.distance, expected.values, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.index, expected.indices)


def test_nearly_equal_vectors_of_great_length_are_told_apart():
    """Where the matrix product cannot decide among many candidates, the whole batch is compared."""
    training = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) * 1e-3 + 300  # far from zero
    queries = training[20:30] + 1e-5 * torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    table = (queries.double()[:, None] - training.double()).norm(dim=2)
    rough = queries.square().sum(1)[:, None] + training.square().sum(1) - 2 * queries @ training.T
    assert (rough.argmin(dim=1) != table.argmin(dim=1)).any()  # the product alone is wrong
    found = nearest(queries, training.split(17))
    assert torch.equal(found.index, table.argmin(dim=1))
    torch.testing.assert_close(found.distance, table.min(dim=1).values, rtol=1e-5, atol=1e-9)


def test_a_copy_has_no_distance():
    training = 100 + draw(50, 1)
    found = nearest(training[[7, 3]], [training])
    assert found.distance.tolist() == [0.0, 0.0] and found.index.tolist() == [7, 3]


def test_a_memorizing_sampler_is_caught_and_another_is_not():
    training, held_out = draw(800, 1), nearest(draw(300, 2), draw(800, 1).split(100))
    honest = memorization(nearest(draw(300, 3), [training]), held_out)
    assert honest.near.low <= 0.05 <= honest.near.high and honest.nearer.low <= 0.5 <= honest.nearer.high
    half = torch.cat([training[:150] + 0.1 * draw(150, 4), draw(150, 5)])
    copying = memorization(nearest(half, [training]), held_out)
    assert copying.near.value == pytest.approx(0.525, abs=0.06) and copying.near.low > honest.near.high
    assert copying.nearer.low > 0.7


def test_ties_are_half():
    same = nearest(draw(40, 0), [draw(100, 1)])
    assert memorization(same, same).nearer.value == pytest.approx(0.5)


def test_pixel_distance_is_the_root_mean_square_in_levels():
    images = torch.zeros(2, 3, 4, 4)
    images[1] = 2 / 255 * 10
    one, two = pixel_vectors(images)
    assert float((one - two).norm()) == pytest.approx(10, rel=1e-5)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match="training vectors: none"):
        nearest(draw(3, 0), [])
    with pytest.raises(ValueError, match=r"training vectors: \(4, 5\); valid: \(M, 12\)"):
        nearest(draw(3, 0), [torch.zeros(4, 5)])
    with pytest.raises(ValueError, match="queries: .*; valid"):
        nearest(torch.full((2, 3), torch.nan), [torch.zeros(4, 3)])
    few = nearest(draw(10, 0), [draw(9, 1)])
    with pytest.raises(ValueError, match="held_out: 10 images; valid: from 20 up"):
        memorization(few, few)
