"""Reading shards one after the other: shuffled shards and a seeded buffer instead of a seek for every item.

``ShardOrder`` is an order as in data/order.py, exact to the item: the same batches for any number of workers and
processes, resumed inside the epoch. ``ShardStream`` gives whole shards to ranks and workers, so that no tar is read by
two of them, as the webdataset library does; what a worker reads then depends on how many there are.
"""
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from data.order import Order
from data.source import Source, drawn


def shard_stream(shard_of: np.ndarray, seed: int, epoch: int, part: int = 0, parts: int = 1,
                 buffer: int = 1000) -> Iterator[int]:
    """Indices of epoch ``epoch`` as a stream: shuffled shards one by one, through a buffer of ``buffer`` items.

    ``shard_of`` (N,) is the shard of every item (``source.where[:, 0]``). Of the shuffled shards, part p of ``parts``
    (rank * workers + worker of world * workers) reads every parts-th: together all items once, none twice. The items
    depend on (seed, epoch) and the parts alone. Parts differ in length, by a shard or so.
    """
    if not 0 <= part < parts or buffer < 1:
        raise ValueError(f"part: {part} of {parts}, buffer: {buffer}; valid: a part below the parts, a buffer from 1")
    shards = np.random.default_rng([seed, epoch]).permutation(np.unique(shard_of))[part::parts]
    rng = np.random.default_rng([seed, epoch, part, parts])
    held: list[int] = []
    for shard in shards:
        for index in np.flatnonzero(shard_of == shard).tolist():
            if len(held) < buffer:
                held.append(index)
                continue
            place = int(rng.integers(buffer))
            held[place], index = index, held[place]
            yield index
    yield from (held[place] for place in rng.permutation(len(held)))


class ShardOrder(Order):
    """Epochs in which shuffled shards are read through a buffer of ``buffer`` items; ``shard_of`` (N,) as above."""

    def __init__(self, shard_of: np.ndarray, seed: int, buffer: int = 1000):
        super().__init__(len(shard_of), seed)
        self._shard_of, self._buffer = shard_of, buffer

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        if self._kept.get(bucket, (-1,))[0] != epoch:
            stream = shard_stream(self._shard_of, self.seed, epoch, buffer=self._buffer)
            self._kept[bucket] = (epoch, np.fromiter(stream, dtype=np.int64, count=self.count))
        return self._kept[bucket][1]


class ShardStream(IterableDataset):
    """The items of one epoch as this rank's worker reads them, for torch's DataLoader: each with its ``index``.

    Over all ranks and workers every item comes once. ``source`` is a source of shards, perhaps within ``Readable``.
    """

    def __init__(self, source: Source, seed: int, epoch: int, rank: int = 0, world: int = 1, buffer: int = 1000):
        self.source, self.seed, self.epoch, self.buffer = source, seed, epoch, buffer
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        shards: Any = getattr(self.source, "source", self.source)
        for index in shard_stream(shards.where[:, 0], self.seed, self.epoch, self.rank * workers + number,
                                  self.world * workers, self.buffer):
            yield {**drawn(self.source, index, self.epoch, self.seed), "index": index}
