"""Batches by step number, read ahead by worker processes that do not influence their content.

The caption, the crop and the mirroring of an item are functions of (seed, epoch, index). The items of a step are a
function of (seed, step) (data/order.py), and each process of a run reads its slice of the global batch. A run is
therefore the same with any number of workers and of processes, and a resumed run simply asks for its next step.
Axis letters: B items of this process's batch, H W size of the images.
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

from data.order import WHOLE, Order, Places, Slice
from data.source import Source, item_in_epoch, stack_images

AHEAD = 2  # batches that each worker has ready


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 (B, 3, H, W), ``captions`` and ``ids`` of length B, ``indices`` and ``epochs`` (B,) int64.

    ``frames`` (B, 6) float32 holds the crops: height and width of the whole image, then top, left, height and width of
    the crop in pixels of the whole image; None for a source that does not crop.
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
    """An error in a worker as a value; torch would wrap it in the tracebacks of several processes."""

    kind: type[Exception]
    message: str


def read_batch(source: Source, places: Places, seed: int, step: int = 0, caption_dropout: float = 0.0) -> Batch:
    """The batch of the items ``places``; ``caption_dropout`` is the probability of an empty caption."""
    items = [item_in_epoch(source, int(index), int(epoch), seed, caption_dropout)
             for epoch, index in zip(places.epochs, places.indices)]
    frames = torch.tensor([item["frame"] for item in items]) if "frame" in items[0] else None  # (B, 6)
    return Batch(step, stack_images(items), [item["caption"] for item in items], [item["id"] for item in items],
                 places.indices, places.epochs, frames)


class _Steps(Dataset):
    """``[step]`` is the batch of that step, or the error that reading it raised."""

    def __init__(self, loader: "Loader"):
        self.source, self.order, self.batch, self.seed = loader.source, loader.order, loader.batch, loader.seed
        self.part, self.dropout = loader.part, loader.caption_dropout

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            places = self.order.places(step, self.batch, self.part)
            return read_batch(self.source, places, self.seed, step, self.dropout)
        except Exception as error:  # any error must reach the process that trains
            return _Failure(type(error) if type(error) in (ValueError, OSError, MemoryError) else ValueError,
                            str(error) or type(error).__name__)


class _From:
    """A sampler that yields the steps from ``begin`` without end."""

    def __init__(self, begin: int):
        self.begin = begin

    def __iter__(self) -> Iterator[int]:
        step = self.begin
        while True:
            yield step
            step += 1


def _leave_signals_to(reader: int, worker: int) -> None:
    """Ignore signals in a worker: the process ``reader`` answers them and ends its workers itself.

    A reader that is killed cannot do so, hence each worker checks whether ``reader`` still exists. (torch checks the
    parent, which is another process if workers are started by a server, as they are from Python 3.14 on.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.name == "posix":  # elsewhere signal 0 does not test for a process
        threading.Thread(target=_exit_without, args=(reader,), daemon=True).start()


def _exit_without(reader: int) -> None:
    """End this worker once the process ``reader`` no longer exists."""
    while True:
        time.sleep(1.0)
        try:
            os.kill(reader, 0)
        except ProcessLookupError:
            os._exit(1)


def _same_batch(batch: Any) -> Any:
    return batch


def _without_death_signal(ahead: Any) -> Any:
    """The iterator of a DataLoader without torch's signal handler, which raises wherever the program is when a worker
    dies. ``next`` notices the death as well, at a place where the error can be told from others."""
    if getattr(ahead, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(ahead))
        ahead._worker_pids_set = False
    return ahead


class Loader:
    """``loader.batch_at(step)`` for any step; ``workers`` processes read the following steps ahead.

    Use it as a context manager or call ``close``. With 0 workers, batches are read in this process.
    """

    def __init__(self, source: Source, order: Order, batch: int, seed: int, workers: int = 0, part: Slice = WHOLE,
                 caption_dropout: float = 0.0):
        """``batch`` is the size of the global batch, of which this process reads the slice ``part``. Raises ValueError
        if it is not a multiple of the number of processes."""
        if workers < 0:
            raise ValueError(f"workers: {workers}; valid: 0 (read in this process) or more processes")
        process, processes = part
        if not 0 <= process < processes or batch < 1 or batch % processes:
            raise ValueError(f"batch: {batch} for process {process} of {processes}; valid: a batch that divides by "
                             f"{processes}")
        self.source, self.order, self.batch, self.seed = source, order, batch, seed
        self.workers, self.part, self.caption_dropout = workers, part, caption_dropout
        self._ahead: Any = None
        self._next = -1

    def batch_at(self, step: int) -> Batch:
        """The batch of ``step``. Raises the error of the source, with its message, whichever process met it."""
        if self.workers == 0:
            found = _Steps(self)[step]
        else:
            if self._ahead is None or step != self._next:  # the first step, or a jump: start reading there
                self.close()
                steps: DataLoader = DataLoader(_Steps(self), batch_size=None, sampler=_From(step),  # type: ignore
                                               num_workers=self.workers, collate_fn=_same_batch,
                                               prefetch_factor=AHEAD,
                                               worker_init_fn=partial(_leave_signals_to, os.getpid()),
                                               generator=torch.Generator())  # else it draws from the global one
                self._ahead = _without_death_signal(iter(steps))
            try:
                found, self._next = next(self._ahead), step + 1
            except (RuntimeError, OSError, EOFError) as error:  # from torch: errors of the source arrive as values
                self.close()
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise OSError(f"a worker of the loader has died ({reason}); where memory ran out, take fewer "
                              "workers") from None
        if isinstance(found, _Failure):
            self.close()
            raise found.kind(found.message)
        return found

    def close(self) -> None:
        """End the worker processes."""
        if self._ahead is not None:
            self._ahead._shutdown_workers()  # its own __del__ calls this too, at an unknown time
            self._ahead = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
