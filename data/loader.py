"""Batches by step number, read ahead by worker processes that change nothing of what comes out.

An item of a batch is a function of (seed, epoch, index): which caption, which crop, mirrored or not. Which items a
step has is a function of (seed, step) (data/order.py), and process ``rank`` of ``world`` reads its slice of the global
batch. So a run is the same with any number of workers and of processes, and one that is resumed at step s asks for
step s. Axis letters: B items of this process's batch, H W size of the pictures.
"""
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from data.order import Order, Places
from data.source import Source, drawn, stacked

AHEAD = 2  # batches that each worker has ready


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 (B, 3, H, W), ``captions`` and ``ids`` of length B, ``indices`` and ``epochs`` (B,) int64.

    ``frames`` (B, 6) float32 says where the pictures were cut from: height and width of the whole picture, then top,
    left, height and width of the part, in its pixels; None where the source does not cut.
    """

    step: int
    images: torch.Tensor
    captions: list[str]
    ids: list[str]
    indices: np.ndarray
    epochs: np.ndarray
    frames: torch.Tensor | None


@dataclass(frozen=True)
class _Failure:
    """An error in a worker as a value: torch would wrap it into a page of tracebacks of other processes."""

    kind: type[Exception]
    message: str


def read_batch(source: Source, places: Places, seed: int, step: int = 0, caption_dropout: float = 0.0) -> Batch:
    """The batch of ``places``; ``caption_dropout`` is the chance of an empty caption."""
    items = [drawn(source, int(index), int(epoch), seed, caption_dropout)
             for epoch, index in zip(places.epochs, places.indices)]
    frames = torch.tensor([item["frame"] for item in items]) if "frame" in items[0] else None  # (B, 6)
    return Batch(step, stacked(items), [item["caption"] for item in items], [item["id"] for item in items],
                 places.indices, places.epochs, frames)


class _Steps(Dataset):
    """``[step]`` is the batch of that step, or what went wrong."""

    def __init__(self, loader: "Loader"):
        self.source, self.order, self.batch, self.seed = loader.source, loader.order, loader.batch, loader.seed
        self.rank, self.world, self.dropout = loader.rank, loader.world, loader.caption_dropout

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            places = self.order.places(step, self.batch, self.rank, self.world)
            return read_batch(self.source, places, self.seed, step, self.dropout)
        except Exception as error:  # whatever it is, the process that trains must name it
            return _Failure(type(error) if type(error) in (ValueError, OSError, MemoryError) else ValueError,
                            str(error) or type(error).__name__)


class _From:
    """Sampler of the endless steps from ``begin``."""

    def __init__(self, begin: int):
        self.begin = begin

    def __iter__(self) -> Iterator[int]:
        step = self.begin
        while True:
            yield step
            step += 1


def _quiet(reader: int, worker: int) -> None:
    """A signal for the whole group of processes is answered by the one that reads; it ends its workers itself.

    Where it is killed it cannot, so each worker looks whether process ``reader`` is there. (torch looks for the parent,
    which is another process where workers are started by a server, as they are from Python 3.14 on.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.name == "posix":  # elsewhere signal 0 is no question
        threading.Thread(target=_end_with, args=(reader,), daemon=True).start()


def _end_with(reader: int) -> None:
    while True:
        time.sleep(1.0)
        try:
            os.kill(reader, 0)
        except ProcessLookupError:
            os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch


def _unwatched(ahead: Any) -> Any:
    """torch raises from a signal handler when a worker dies, wherever the program is then; ``next`` finds it as well
    and is a place where the error can be told from others."""
    if getattr(ahead, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(ahead))
        ahead._worker_pids_set = False
    return ahead


class Loader:
    """``loader.batch_at(step)`` for any step; the steps behind it are read ahead by ``workers`` processes.

    Use it as a context or call ``close``; it also closes when it is no longer used. 0 workers read in this process.
    """

    def __init__(self, source: Source, order: Order, batch: int, seed: int, workers: int = 0, rank: int = 0,
                 world: int = 1, caption_dropout: float = 0.0):
        """``batch`` is the global one. Raises ValueError where it does not divide by ``world``."""
        if workers < 0:
            raise ValueError(f"workers: {workers}; valid: 0 (read in this process) or more processes")
        if not 0 <= rank < world or batch < 1 or batch % world:
            raise ValueError(f"batch: {batch} for process {rank} of {world}; valid: a batch that divides by {world}")
        self.source, self.order, self.batch, self.seed = source, order, batch, seed
        self.workers, self.rank, self.world, self.caption_dropout = workers, rank, world, caption_dropout
        self._ahead: Any = None
        self._next = -1

    def batch_at(self, step: int) -> Batch:
        """The batch of ``step``. Raises what its source raised, with its one line, whichever process met it."""
        if self.workers == 0:
            found = _Steps(self)[step]
        else:
            if self._ahead is None or step != self._next:  # the first one, or a jump: start reading from there
                self.close()
                steps: DataLoader = DataLoader(_Steps(self), batch_size=None, sampler=_From(step),  # type: ignore
                                               num_workers=self.workers, collate_fn=_as_it_is,
                                               prefetch_factor=AHEAD, worker_init_fn=partial(_quiet, os.getpid()),
                                               generator=torch.Generator())  # else it draws from everybody's
                self._ahead = _unwatched(iter(steps))
            try:
                found, self._next = next(self._ahead), step + 1
            except (RuntimeError, OSError, EOFError) as error:  # of torch: a source's own errors come as values
                self.close()
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise OSError(f"a worker of the loader has died ({reason}); where memory ran out, take fewer "
                              "workers") from None
        if isinstance(found, _Failure):
            self.close()
            raise found.kind(found.message)
        return found

    def close(self) -> None:
        """End the workers."""
        if self._ahead is not None:
            self._ahead._shutdown_workers()  # what its own __del__ calls, at a time that is not left to chance
            self._ahead = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
