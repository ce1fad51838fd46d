"""The cost of a step: seconds of its parts, memory, and the share of the peak speed of the machine."""
import functools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.attention import CrossAttention, SelfAttention
from model.summary import operations

PARTS = ("data", "forward", "backward", "optimizer", "average")


class Clock:
    """Measures the seconds of the parts of a step: call ``start``, and then ``mark(part)`` at the end of each part.

    A GPU works asynchronously, so a part can only be measured there if the program waits for it. It does so in steps
    that are started with ``exact``; other steps are not counted on a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget all measurements."""
        self.seconds, self.steps, self.counting, self.before = dict.fromkeys(PARTS, 0.0), 0, False, 0.0

    def start(self, exact: bool = False) -> None:
        """Begin a step."""
        self.counting = exact or self.device.type != "cuda"
        self.steps += self.counting
        self.before = self._now()

    def mark(self, part: str) -> None:
        """End ``part`` of the step."""
        if self.counting:
            now = self._now()
            self.seconds[part] += now - self.before
            self.before = now

    def means(self) -> dict[str, float]:
        """Mean seconds of each part over the steps that were counted since `clear`."""
        return {part: round(value / max(1, self.steps), 6) for part, value in self.seconds.items()}

    def _now(self) -> float:
        if self.counting and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def forward_flops(network: nn.Module, run: Callable[[], Any]) -> int:
    """The operations of ``run``, which calls the network once on one item: convolutions, matrix products, attention."""
    found = 0

    def count(part: nn.Module, arguments: tuple, result: torch.Tensor) -> None:
        nonlocal found
        found += operations(part, arguments, result)

    hooks = [part.register_forward_hook(count) for part in network.modules()
             if isinstance(part, (nn.Conv2d, nn.Linear, SelfAttention, CrossAttention))]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


@functools.lru_cache(maxsize=None)
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of some large matrix products of this type, taken as the peak of this
    machine."""
    side, best = (8192 if device.type == "cuda" else 1024), float("inf")
    a = torch.ones(side, side, device=device, dtype=dtype)
    for _ in range(4):  # the first one is slower
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> float:
    """The peak memory so far in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def duration(seconds: float) -> str:
    """Seconds in words: ``4 min 10 s``."""
    seconds = round(seconds)
    for unit, size, below, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit} {size} {seconds % unit // below} {name}"
    return f"{seconds} s"
