"""The order of the data is a function of (seed, step); latents are encoded once and survive interruption and damage."""
import errno

import numpy as np
import pytest
import torch

from data.cache import LatentCache
from data.order import Order


@pytest.mark.parametrize("count, batch", [(10, 5), (10, 3), (7, 10), (3, 10), (1, 4)])
def test_every_epoch_is_a_permutation(count, batch):
    order = Order(count, seed=1)
    epochs = 12
    seen = np.concatenate([order.indices(step, batch) for step in range(-(-epochs * count // batch))])
    assert seen.dtype == np.int64
    parts = seen[: epochs * count].reshape(epochs, count)
    assert (np.sort(parts, axis=1) == np.arange(count)).all()
    if count > 3:
        assert len({tuple(part) for part in parts}) > epochs // 2  # epochs differ


def test_order_depends_on_seed_and_step_alone():
    forward, fresh = Order(11, seed=5), Order(11, seed=5)
    batches = [forward.indices(step, 4) for step in range(20)]
    for step in (19, 3, 0, 11, 3):  # any step, in any order, from a fresh object
        assert (fresh.indices(step, 4) == batches[step]).all()
    assert any((Order(11, seed=6).indices(step, 4) != batches[step]).any() for step in range(3))


def test_every_item_is_as_likely_at_every_place():
    """1000 epochs of 5 items: each of the 25 (item, place) pairs is expected 200 times, standard deviation 12.6."""
    order = Order(5, seed=0)
    epochs = np.stack([order.indices(epoch, 5) for epoch in range(1000)])
    counts = np.stack([(epochs == item).sum(axis=0) for item in range(5)])
    assert np.abs(counts - 200).max() < 5 * 12.6


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="the data source is empty"):
        Order(0, seed=0)


# ---- the latent cache

class Encoder:
    """Moments that depend on the index, counted; stops after ``stop`` calls."""

    def __init__(self, stop: int | None = None):
        self.seen: list[int] = []
        self.stop = stop

    def __call__(self, indices):
        if self.stop is not None and len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        self.seen += indices.tolist()
        mean = torch.from_numpy(indices).float()[:, None, None, None].expand(-1, 2, 3, 3)
        return mean, -mean


def test_an_interrupted_cache_continues_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        LatentCache(tmp_path, {"a": 1}, 10, Encoder(stop=8), chunk=4)
    encoder = Encoder()
    cache = LatentCache(tmp_path, {"a": 1}, 10, encoder, chunk=4)
    assert encoder.seen == [8, 9] and len(cache) == 10
    mean, logvar = cache.moments(np.array([7, 9, 0]))
    assert mean.shape == (3, 2, 3, 3) and mean.dtype == torch.float32
    assert mean[:, 0, 0, 0].tolist() == [7, 9, 0] and torch.equal(logvar, -mean)
    again = Encoder()
    LatentCache(tmp_path, {"a": 1}, 10, again, chunk=4)
    assert again.seen == []  # nothing is encoded twice
    LatentCache(tmp_path, {"a": 2}, 10, again, chunk=4)
    assert len(set(again.seen)) == 10  # another key is another cache


def test_a_damaged_cache_is_refused_by_name_and_made_again(tmp_path):
    LatentCache(tmp_path, {"a": 1}, 10, Encoder(), chunk=4)
    path = next(tmp_path.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"latent cache .*{path.name} is damaged.*delete it"):
        LatentCache(tmp_path, {"a": 1}, 10, Encoder(), chunk=4)
    path.unlink()
    with pytest.raises(KeyboardInterrupt):  # stopped again before the first numbers are in
        LatentCache(tmp_path, {"a": 1}, 10, Encoder(stop=1), chunk=4)
    encoder = Encoder()
    cache = LatentCache(tmp_path, {"a": 1}, 10, encoder, chunk=4)
    assert set(encoder.seen) == set(range(10)) and cache.moments(np.array([5]))[0].max() == 5


def test_full_disk_is_an_error_of_the_latent_cache_not_a_bus_error(small_disk):
    def encode(indices):
        return torch.zeros(len(indices), 4, 64, 64), torch.zeros(len(indices), 4, 64, 64)

    with pytest.raises(OSError) as caught:
        LatentCache(small_disk / "cache", {"a": 1}, 100, encode)
    assert caught.value.errno == errno.ENOSPC
