"""The order in which a run sees its data: a function of (seed, step), so a resumed run goes on inside the epoch."""
import numpy as np


class Order:
    """Epochs of ``count`` items, each a permutation drawn from (seed, epoch)."""

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise ValueError("the data source is empty; a run needs at least one item")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int, batch: int) -> np.ndarray:
        """Item numbers (batch,) int64 of step ``step``; a batch may reach over the end of an epoch."""
        positions = np.arange(step * batch, (step + 1) * batch)
        result = np.empty(batch, dtype=np.int64)
        for epoch in np.unique(positions // self.count):
            if epoch != self._epoch:
                self._permutation = np.random.default_rng([self.seed, int(epoch)]).permutation(self.count)
                self._epoch = int(epoch)
            inside = positions // self.count == epoch
            result[inside] = self._permutation[positions[inside] % self.count]
        return result
