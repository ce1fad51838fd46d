"""The content of a checkpoint: all that a run depends on besides its configuration.

It consists of weights, averages, optimizer, guard, and further state of the stage. The step number determines the
rest: the learning rate, the position in the data, and every random number.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from training.checkpoints.checkpoint import Checkpoints
from training.distributed import Processes
from training.ema import PowerEma
from training.guard import Guard


class Stateful(Protocol):
    """An object besides the model that changes during training, and on which the loss or what is logged depends."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass
class State:
    """Saves and restores the state of a stage. All processes call every method; the main process writes single
    files."""

    model: nn.Module
    averages: list[PowerEma]
    optimizer: Optimizer
    guard: Guard
    beside: Mapping[str, Stateful]
    checkpoints: Checkpoints
    processes: Processes
    about: Callable[[], dict[str, Any]] = dict

    @property
    def sharded(self) -> bool:
        """Whether the model is distributed over processes."""
        return self.averages[0].sharded

    def save(self, step: int, regular: bool) -> None:
        """Write a checkpoint after ``step`` steps; ``regular`` says whether its interval is over. Raises
        CheckpointError."""
        if self.sharded:
            from training.checkpoints.sharded import optimizer_tensors
            tensors = {**self._tensors(), **optimizer_tensors(self.model, self.optimizer)}
            values = {"guard": self.guard.state_dict()}
            self.checkpoints.save(step, {"tensors": tensors, "values": values}, self.about(), regular)
        elif self.processes.main:
            self.checkpoints.save(step, {
                "model": self.model.state_dict(), "average": self.averages[0].state_dict(),
                "averages": {f"{ema.std:g}": ema.state_dict() for ema in self.averages[1:]},
                "optimizer": self.optimizer.state_dict(), "guard": self.guard.state_dict(),
                **{name: part.state_dict() for name, part in self.beside.items()}}, self.about(), regular)

    def restore(self, regular: bool = False) -> int | None:
        """Load the newest undamaged checkpoint, or the newest regular one; returns its number of steps, or None if
        there is none."""
        state = self._sharded_state(regular) if self.sharded else self._whole_state(regular)
        if state is None:
            return None
        if self.processes.main:
            print(f"continuing after step {state['step']} from {self.checkpoints.folder}")
        return state["step"]

    def _whole_state(self, regular: bool) -> dict[str, Any] | None:
        state = self.checkpoints.latest(regular) if self.processes.main else None
        step = self.processes.from_main(None if state is None else state["step"])
        if step is None:
            return None
        if state is None:  # the others read the state that the main process found undamaged
            state = self.checkpoints.read(self.checkpoints.path(step))
        self.model.load_state_dict(state["model"])
        self.averages[0].load_state_dict(state["average"])
        for ema in self.averages[1:]:
            ema.load_state_dict(state["averages"][f"{ema.std:g}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state.get("guard", {}))
        for name, part in self.beside.items():
            part.load_state_dict(state.get(name, {}))
        return state

    def _sharded_state(self, regular: bool) -> dict[str, Any] | None:
        from training.checkpoints.sharded import ShardedCheckpoints, load_optimizer_tensors

        assert isinstance(self.checkpoints, ShardedCheckpoints)
        state = self.checkpoints.latest(regular, self._tensors())
        if state is None:
            return None
        tensors = state["tensors"]
        self.model.load_state_dict(_of(tensors, "model"))
        for ema in self.averages:
            ema.load_state_dict(_of(tensors, f"average_{ema.std:g}"))
        load_optimizer_tensors(self.model, self.optimizer, tensors)
        self.guard.load_state_dict(state["values"]["guard"])
        return state

    def _tensors(self) -> dict[str, Any]:
        """Weights and averages as a flat dictionary."""
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for ema in self.averages:
            found |= {f"average_{ema.std:g}/{name}": tensor for name, tensor in ema.state_dict().items()}
        return found


def _of(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.partition("/")[0] == kind}
