"""Randomness of training as a function of (seed, purpose, step): no generator state is ever stored.

The random numbers of a step are drawn for the whole batch, whichever process computes which part of it, and then
sliced. So two processes train what one would, and four small batches what one large batch would.
"""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

S = TypeVar("S", torch.Tensor, list)


def step_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose of one step; different purposes and steps are independent. Of its bits torch's generator
    on the CPU reads 32: any two of them are the same with a chance of 2^-32."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose of one step."""
    return torch.Generator().manual_seed(step_seed(seed, purpose, step))


@dataclass(frozen=True)
class Part:
    """Items ``start`` .. ``stop`` - 1 of a batch of ``batch``, of which this process has read those from ``read``
    on."""

    start: int
    stop: int
    batch: int
    read: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def share(self) -> float:
        """The share of the batch; the mean over a batch is the sum of the means over its parts times their shares."""
        return len(self) / self.batch

    def of_batch(self, values: S) -> S:
        """The items of this part, out of the items of the whole batch (B, ...)."""
        return values[self.start:self.stop]

    def of_read(self, values: S) -> S:
        """The items of this part, out of the items that this process has read."""
        return values[self.start - self.read:self.stop - self.read]

    def randn(self, shape: Sequence[int], random: torch.Generator) -> torch.Tensor:
        """Normal noise of ``shape`` (B of this part, ...), drawn for the whole batch and then sliced."""
        return self.of_batch(torch.randn(self.batch, *shape[1:], generator=random))


def parts_of(batch: int, rank: int = 0, world: int = 1, pieces: int = 1) -> list[Part]:
    """The parts of a batch that process ``rank`` of ``world`` computes in ``pieces``, whose sizes differ by at most
    one.

    Raises ValueError if a piece would be empty or the processes would have unequal shares.
    """
    if batch % world or batch // world < pieces:
        raise ValueError(f"batch: {batch} for {world} processes with accumulate: {pieces}; valid: a multiple of "
                         f"{world} from {world * pieces} up")
    own, first = batch // world, rank * (batch // world)
    edges = [first + own * piece // pieces for piece in range(pieces + 1)]
    return [Part(start, stop, batch, first) for start, stop in zip(edges, edges[1:])]


def whole_batch(batch: int) -> Part:
    """The part that is the whole batch."""
    return Part(0, batch, batch)
