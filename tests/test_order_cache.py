"""The order of the data is a function of (seed, step); latents are encoded once and survive interruption and damage."""
import errno
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import LatentCache
from data.order import Order, Slice


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


# ---- buckets and processes

def test_slices_of_processes_make_the_global_batch():
    order = Order(23, seed=2)
    for step in range(12):
        whole = order.places(step, 8)
        for world in (2, 4):
            parts = [order.places(step, 8, Slice(rank, world)) for rank in range(world)]
            assert (np.concatenate([part.indices for part in parts]) == whole.indices).all()
            assert (np.concatenate([part.epochs for part in parts]) == whole.epochs).all()
        assert (whole.epochs == np.arange(step * 8, step * 8 + 8) // 23).all()
    with pytest.raises(ValueError, match="batch: 8 for 3 processes; valid: a multiple of 3"):
        order.places(0, 8, Slice(0, 3))


@pytest.mark.parametrize("sizes, batch", [((40, 7, 23), 5), ((3, 50), 8), ((1, 1, 1), 4), ((16, 16), 8), ((9,), 2)])
def test_a_batch_has_one_bucket_and_no_item_is_lost(sizes, batch):
    buckets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    order, epochs = Order(len(buckets), 4, buckets), 10
    steps = order.steps_before(epochs, batch)
    assert abs(steps - epochs * len(buckets) / batch) <= len(sizes)
    seen = np.zeros((epochs + batch, len(buckets)), dtype=int)
    for step in range(steps):
        places = order.places(step, batch)
        assert len(set(buckets[places.indices])) == 1 and len(places.indices) == batch
        np.add.at(seen, (places.epochs, places.indices), 1)
    assert seen.max() == 1  # an item is seen once in an epoch, and its epochs follow each other
    assert (np.diff(seen, axis=0) <= 0).all()
    counts = seen.sum(axis=0)
    for bucket in np.unique(buckets):  # what does not fill a batch is carried over, not lost
        assert abs(counts[buckets == bucket].sum() - epochs * (buckets == bucket).sum()) < batch


def test_bucketed_order_depends_on_seed_and_step_alone():
    buckets = np.arange(60) % 7 % 3
    forward, fresh = Order(60, 5, buckets), Order(60, 5, buckets)
    batches = [forward.places(step, 4) for step in range(60)]
    for step in (59, 3, 0, 31, 3):
        found = fresh.places(step, 4)
        assert (found.indices == batches[step].indices).all() and (found.epochs == batches[step].epochs).all()
    kinds = [int(buckets[places.indices[0]]) for places in batches]
    assert kinds != sorted(kinds) and len(set(kinds[:15])) == 3  # buckets are mixed within an epoch
    with pytest.raises(ValueError, match="buckets of 3 items for a source of 60"):
        Order(60, 0, buckets[:3])


# ---- processes that meet

BUILDER = """
import sys, time, pathlib, torch
from data.cache import LatentCache
folder, calls = pathlib.Path(sys.argv[1]), 0
def encode(indices):
    global calls
    calls += 1
    time.sleep(0.02)
    mean = torch.from_numpy(indices).float()[:, None, None, None].expand(-1, 2, 3, 3)
    return mean, -mean
print("ready", flush=True)
sys.stdin.readline()
cache = LatentCache(folder, {"a": 1}, 40, encode, chunk=4)
print(calls, cache.moments(torch.arange(40).numpy())[0][:, 0, 0, 0].int().tolist() == list(range(40)))
"""


def test_processes_that_want_the_same_cache_make_it_once(tmp_path):
    root = Path(__file__).parents[1]
    runs = [subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path)], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=root) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    said = sorted(run.communicate(timeout=60)[0].split() for run in runs)
    assert said == [["0", "True"], ["11", "True"]]  # ten chunks and one look at the shape


def test_a_killed_builder_leaves_a_cache_that_another_finishes(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path)], stdin=subprocess.PIPE, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    run.stdout.readline()
    run.stdin.write("go\n")
    run.stdin.flush()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*.done")) and time.monotonic() < deadline:
        time.sleep(0.005)
    run.kill()
    run.communicate()
    done = int(next(tmp_path.glob("*.done")).read_text() or 0)
    encoder = Encoder()
    cache = LatentCache(tmp_path, {"a": 1}, 40, encoder, chunk=4)
    assert encoder.seen[-4:] == [36, 37, 38, 39] and len(encoder.seen) <= 41 - done
    assert cache.moments(np.arange(40))[0][:, 0, 0, 0].tolist() == list(range(40))


def test_images_of_several_shapes_have_no_cache(tmp_path):
    def encode(indices):
        side = 2 + int(indices[0]) // 4
        return torch.zeros(len(indices), 1, side, side), torch.zeros(len(indices), 1, side, side)

    with pytest.raises(ValueError, match="a cache holds one shape"):
        LatentCache(tmp_path, {}, 8, encode, chunk=4)
