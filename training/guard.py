"""Handles steps whose gradient is not finite or far larger than usual: skip the step, roll back, or stop.

A single bad batch costs only its step. Several in a row indicate that the weights are at fault: the run then rolls
back to its last checkpoint and continues with the data after the bad batches. If that does not help either, it stops.
The whole state of the guard is in the checkpoint, so an interrupted run decides like an uninterrupted one.
"""
import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "skip", "roll back", "stop"]

MEMORY = 0.99  # decay of the mean of the logarithms: about the last hundred steps
KNOWN = 50  # good steps after which the usual norm is known


@dataclass(frozen=True)
class GuardConfig:
    """A gradient whose norm is ``spike`` times the usual one (the geometric mean of about the last hundred) is bad;
    with 0 only gradients that are not finite are bad. Up to ``skip`` bad steps in a row are skipped, and the next one
    rolls back, at most ``rollbacks`` times to the same checkpoint."""

    spike: float = 50.0
    skip: int = 3
    rollbacks: int = 2

    def __post_init__(self):
        if self.spike != 0 and self.spike <= 1:
            raise ValueError(f"spike: {self.spike}; valid: above 1, or 0 for off")
        for name in ("skip", "rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")


class Guard:
    """Judges steps by the norm of their gradient; ``moved`` is the number of steps by which the data is ahead of the
    run."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.moved, self.bad, self.rollbacks = 0, 0, 0
        self.known, self.usual = 0, 0.0  # good steps so far, running mean of the logarithm of their norms

    def judge(self, norm: float) -> Verdict:
        """The verdict on a step with this norm; call it once for each step."""
        if self.is_good(norm):
            self.bad = 0
            if norm > 0:
                self.known += 1
                weight = max(1 / self.known, 1 - MEMORY)
                self.usual += weight * (math.log(norm) - self.usual)
            return "good"
        self.bad += 1
        if self.bad <= self.config.skip:
            return "skip"
        return "roll back" if self.rollbacks < self.config.rollbacks else "stop"

    def is_good(self, norm: float) -> bool:
        """Whether the norm is finite and no spike."""
        if not math.isfinite(norm):
            return False
        return not self.config.spike or self.known < KNOWN or norm <= self.config.spike * math.exp(self.usual)

    def reason(self, norm: float) -> str:
        """The reason why a norm is bad, in words."""
        if not math.isfinite(norm):
            return "the gradient is not finite"
        return f"the gradient has norm {norm:.3g}, {norm / math.exp(self.usual):.0f} times the usual"

    def resume_at(self, position: int, step: int, rollbacks: int) -> None:
        """Continue with the data of ``position`` from a checkpoint after ``step`` steps, which was loaded for the
        ``rollbacks``-th time."""
        self.moved, self.rollbacks, self.bad = position - step, rollbacks, 0

    def state_dict(self) -> dict[str, float]:
        """All state that `judge` depends on."""
        return {"moved": self.moved, "bad": self.bad, "rollbacks": self.rollbacks, "known": self.known,
                "usual": self.usual}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state that `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
