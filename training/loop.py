"""The training loop every stage shares: one function, read top to bottom.

A step is a function of (state, step number): ``loss_at(model, step)`` draws its data order, noise and timesteps
from the seed and the step alone. So a resumed run does what an uninterrupted one would have done, and a checkpoint
holds no generator state.
"""
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from training.checkpoint import Checkpoints
from training.device import autocast_dtype
from training.ema import M, PowerEma, gamma_from_std
from training.logger import Logger
from training.optim import OptimConfig, build_optimizer, learning_rate
from training.run import RunFolder
from training.seed import step_seed


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


class Interrupted(Exception):
    """The run was asked to stop and its state is saved."""


class Stateful(Protocol):
    """Something besides the model that the loss depends on and that changes from step to step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class TrainConfig:
    """Length and habits of a stage. Intervals are in steps; ``ema_std`` is the width of the weight average as a share
    of the run; ``precision`` auto is bf16 autocast where the machine has bf16 arithmetic, with fp32 weights."""

    steps: int = 1000
    batch: int = 64
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema_std: float = 0.05
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = 50
    validate_every: int = 500
    preview_every: int = 1000
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "validate_every", "preview_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 1 up")
        gamma_from_std(self.ema_std)


def fit(stage: str, model: M, loss_at: Callable[[M, int], dict[str, torch.Tensor]], config: TrainConfig,
        run: RunFolder, seed: int, validate: Callable[[M], dict[str, float]], preview: Callable[[M, int], None],
        beside: Mapping[str, Stateful] | None = None) -> M:
    """Train ``model`` for ``config.steps`` steps, from the newest checkpoint if there is one; returns the average.

    ``loss_at(model, step)`` gives a dictionary of scalars, of which ``loss`` is minimised. ``validate`` and ``preview``
    get the averaged model. ``beside`` names what else has a state, as a discriminator with its optimizer: ``loss_at``
    alone changes it, checkpoints keep it. Raises Interrupted after SIGTERM or Ctrl-C, once the state is saved, and
    TrainingError when the loss is no longer a number.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.precision, device)
    optimizer = build_optimizer(model, config.optim)
    ema = PowerEma(model, config.ema_std)
    checkpoints = Checkpoints(run.state(stage), config.keep)
    beside = beside or {}
    first = restore(checkpoints, model, ema, optimizer, beside)
    model.train()
    with Logger(run.metrics, stage, first, config.steps, config.batch) as log, StopSignal() as stop:
        for step in range(first, config.steps):
            rate = learning_rate(step, config.steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(step_seed(seed, stage, step))  # dropout draws from the global generator
            with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                losses = loss_at(model, step)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            if not torch.isfinite(norm):
                raise TrainingError(f"{stage}: the gradient is not finite at step {step}; the newest checkpoint in "
                                    f"{run.state(stage)} is from before")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            ema.update(model, done)

            log.add({name: float(loss.detach()) for name, loss in losses.items()})
            last = done == config.steps
            if done % config.log_every == 0 or last:
                log.flush(done, learning_rate=rate, gradient_norm=float(norm))
            if done % config.validate_every == 0 or last:
                with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    log.write({"step": done, **{f"validation_{k}": v for k, v in validate(ema.average).items()}})
            if done % config.preview_every == 0 or last:
                preview(ema.average, done)
            stopping = stop.requested  # read once: a signal that comes during the next lines waits for the next step
            if done % config.checkpoint_every == 0 or last or stopping:
                checkpoints.save(done, {"model": model.state_dict(), "average": ema.average.state_dict(),
                                        "optimizer": optimizer.state_dict(),
                                        **{name: part.state_dict() for name, part in beside.items()}})
            if stopping:
                raise Interrupted(f"{stage} stopped after step {done}; the same command continues it")
    return ema.average


def restore(checkpoints: Checkpoints, model: nn.Module, ema: PowerEma, optimizer: torch.optim.Optimizer,
            beside: Mapping[str, Stateful]) -> int:
    """Load the newest whole state into everything given; returns the number of steps done, 0 if there is none."""
    state = checkpoints.latest()
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    ema.average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    for name, part in beside.items():
        part.load_state_dict(state[name])
    print(f"continuing after step {state['step']} from {checkpoints.folder}")
    return state["step"]


class StopSignal:
    """Turns SIGTERM and Ctrl-C into ``requested`` while the block runs; a second one ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.getsignal(number)
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
