"""The output of a run: a progress bar with speed, loss and time left, and a line of JSON for every logged step.

TensorBoard, if it is installed, receives the same numbers.
"""
import contextlib
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from files.weights import CheckpointError, free_space
from training.distributed import ALONE, Processes


class Logger:
    """The progress bar of one stage and metrics.jsonl of the run, as a context manager. Only the main process prints
    and writes."""

    def __init__(self, path: Path, stage: str, first: int, steps: int, batch: int, processes: Processes = ALONE):
        self.path, self.stage, self.batch, self.steps, self.processes = path, stage, batch, steps, processes
        # a log file gets a line every 30 seconds, a terminal a live bar
        self.bar = tqdm(total=steps, initial=first, desc=stage, unit="step", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30.0, disable=not processes.main)
        self.began, self.first, self.count = time.perf_counter(), first, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.board = open_board(path.parent / "tensorboard" / stage, first) if processes.main else None
        if processes.main:
            cut_half_line(path)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        if self.board is not None:
            with contextlib.suppress(OSError):  # the disk is full: what is in metrics.jsonl counts
                self.board.close()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the losses of one step: scalars of this process's part of the batch, times its share."""
        for name, value in values.items():
            value = value.detach().double()  # stays on its device: reading it would make the program wait
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def flush(self, step: int, **extra: Any) -> None:
        """Write the means since the last flush, the speed since the start, and ``extra``; show the loss on the bar.

        All processes call this, because each has added its part.
        """
        means = {}
        if self.count:
            total = self.processes.sum(torch.stack(list(self.sums.values())).cpu()) / self.count
            means = dict(zip(self.sums, total.tolist()))
        seconds = time.perf_counter() - self.began
        pace = seconds / max(1, step - self.first)
        self.write({"step": step, **means, **extra, "images_per_second": self.batch / max(pace, 1e-9),
                    "seconds": seconds, "seconds_left": pace * (self.steps - step)})
        self.bar.set_postfix(loss=f"{means.get('loss', float('nan')):.4f}", images_s=f"{self.batch / pace:.0f}",
                             refresh=False)
        self.bar.update(step - self.bar.n)
        self.sums, self.count = {}, 0

    def event(self, step: int, what: str, done: str) -> None:
        """Record a problem in the step that would have completed ``step`` steps, and the reaction to it."""
        self.write({"step": step, "event": done, "reason": what})
        self.say(f"{self.stage}: {what}: {done}")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises CheckpointError if that is not possible."""
        if not self.processes.main:
            return
        line = {"stage": self.stage, **{k: round_number(v) for k, v in values.items()}}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error.strerror} ({free_space(self.path)}); the "
                                  "checkpoints are untouched") from None
        if self.board is not None:
            for name, value in flatten_numbers(values).items():
                self.board.add_scalar(f"{self.stage}/{name}", value, values["step"])

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.processes.main:
            tqdm.write(text)


def round_number(value: Any) -> Any:
    """A number rounded to nine digits for the file; None for a value that is not finite, which JSON cannot
    represent."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


def flatten_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries by their path."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = value
    return found


def cut_half_line(path: Path) -> None:
    """Remove an incomplete last line of metrics.jsonl, left by a process that was killed or by a full disk."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def open_board(folder: Path, first: int) -> Any:
    """A TensorBoard writer that continues after step ``first``, or None if TensorBoard is not installed."""
    writer = board_class()
    return None if writer is None else writer(str(folder), purge_step=first + 1)


@functools.lru_cache(maxsize=None)
def board_class() -> Any:
    """TensorBoard's writer; if it is not installed, None, and a message the first time."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed (pip install tensorboard): the curves are in metrics.jsonl only")
        return None
    return SummaryWriter
