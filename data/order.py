"""The order in which a run sees its data: a function of (seed, step), so a resumed run continues inside an epoch.

Without buckets, epoch e is the permutation of all items drawn from (seed, e), and step s takes the next ``batch`` items
of the endless sequence of epochs. With aspect buckets, every bucket has such a sequence of its own with n_b items an
epoch, and batch k of bucket b belongs to epoch e if floor(e n_b / batch) <= k < floor((e + 1) n_b / batch). A batch
therefore holds one bucket only, no item is lost or seen twice as often as another, and the items of a step are computed
from its number without any stored state. Axis letters: B items of a batch.
"""
from typing import NamedTuple

import numpy as np


class Places(NamedTuple):
    """The items of a batch: ``epochs`` (B,), how often each was seen before, and ``indices`` (B,), both int64."""

    epochs: np.ndarray
    indices: np.ndarray


class Slice(NamedTuple):
    """The part of every global batch that one process reads: number ``process`` of ``processes`` equal slices."""

    process: int = 0
    processes: int = 1


WHOLE = Slice()  # of a run with one process


class Order:
    """Epochs of ``count`` items, each a permutation drawn from (seed, epoch); ``buckets`` (count,) holds the number of
    the aspect bucket of every item, None for a single bucket."""

    def __init__(self, count: int, seed: int, buckets: np.ndarray | None = None):
        if count < 1:
            raise ValueError("the data source is empty; a run needs at least one item")
        if buckets is not None and len(buckets) != count:
            raise ValueError(f"buckets of {len(buckets)} items for a source of {count}; valid: one for each item")
        self.count, self.seed = count, seed
        numbers = [0] if buckets is None else np.unique(buckets).tolist()
        self._members = [np.arange(count) if buckets is None else np.flatnonzero(buckets == b) for b in numbers]
        self._kept: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> its newest epoch and permutation
        self._epoch_batches: tuple[tuple[int, int], np.ndarray] | None = None

    def indices(self, step: int, batch: int, part: Slice = WHOLE) -> np.ndarray:
        """Indices (B,) int64 of the items of step ``step``; a batch may reach over the end of an epoch."""
        return self.places(step, batch, part).indices

    def places(self, step: int, batch: int, part: Slice = WHOLE) -> Places:
        """The items that step ``step`` reads: the slice ``part`` of the global batch of ``batch`` items.

        Raises ValueError if ``batch`` is not a multiple of the number of processes.
        """
        process, processes = part
        if batch < 1 or batch % processes:
            raise ValueError(f"batch: {batch} for {processes} processes; valid: a multiple of {processes}")
        share = batch // processes
        bucket, number = (0, step) if len(self._members) == 1 else self._batch_at(step, batch)
        positions = np.arange(number * batch + process * share, number * batch + (process + 1) * share)
        members = self._members[bucket]
        epochs, inside = np.divmod(positions, len(members))
        result = np.empty(share, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = members[self._permutation(bucket, int(epoch))[inside[chosen]]]
        return Places(epochs, result)

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        kept = self._kept.get(bucket)
        if kept is None or kept[0] != epoch:
            words = [self.seed, epoch] + ([bucket] if bucket else [])
            kept = (epoch, np.random.default_rng(words).permutation(len(self._members[bucket])))
            self._kept[bucket] = kept
        return kept[1]

    def steps_before(self, epoch: int, batch: int) -> int:
        """Number of steps before epoch ``epoch``: the whole batches of each bucket."""
        return sum(epoch * len(members) // batch for members in self._members)

    def _batch_at(self, step: int, batch: int) -> tuple[int, int]:
        """(bucket, number of the batch in the bucket's sequence) of a step; the batches of an epoch are shuffled."""
        epoch = step * batch // self.count  # close to it: at most one batch of each bucket is carried to the next epoch
        while self.steps_before(epoch + 1, batch) <= step:
            epoch += 1
        while self.steps_before(epoch, batch) > step:
            epoch -= 1
        if self._epoch_batches is None or self._epoch_batches[0] != (epoch, batch):
            pairs = [(bucket, number) for bucket, members in enumerate(self._members)
                     for number in range(epoch * len(members) // batch, (epoch + 1) * len(members) // batch)]
            shuffled = np.random.default_rng([self.seed, epoch, len(self._members)]).permutation(np.array(pairs))
            self._epoch_batches = ((epoch, batch), shuffled)
        bucket, number = self._epoch_batches[1][step - self.steps_before(epoch, batch)]
        return int(bucket), int(number)
