"""The training loop every stage shares: one function, read top to bottom.

A step is a function of (state, step number): data order, noise and timesteps come from the seed and the step alone. So
a resumed run does what an uninterrupted one would have done, and a checkpoint holds no generator state.
"""
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal

import torch
from torch import nn

from files.run_folder import RunFolder
from model.device import autocast_dtype
from training.checkpoints.checkpoint import Best, Checkpoints
from training.checkpoints.state import State, Stateful
from training.distributed import ALONE, Loss, Parallel, Processes, full, gradients_kept_here, spread
from training.ema import M, PowerEma, gamma_from_std
from training.guard import Guard, GuardConfig
from training.logger import Logger
from training.optim import OptimConfig, build_optimizer, learning_rate
from training.seed import Part, parts_of, step_seed
from training.snapshots import SnapshotConfig, save_snapshots
from training.speed import Clock, forward_flops, peak_flops, peak_memory


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


class Interrupted(Exception):
    """The run was asked to stop and its state is saved."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and habits of a stage. ``batch`` is that of a step, over all processes and over the ``accumulate`` pieces
    that each computes one after the other. Intervals are in steps; ``ema_std`` is the width of the weight average as a
    share of the run; ``precision`` auto is bf16 autocast where the machine has bf16 arithmetic, with fp32 weights.
    ``workers`` processes read pictures ahead; ``parallel`` and ``shards``: see `training/distributed.py`."""

    steps: int = 1000
    batch: int = 64
    accumulate: int = 1
    workers: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema_std: float = 0.05
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    parallel: Parallel = "ddp"
    shards: int = 0
    log_every: int = 50
    validate_every: int = 500
    preview_every: int = 1000
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "preview_every",
                     "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 1 up")
        for name in ("workers", "shards"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate: {self.accumulate}; valid: up to batch = {self.batch}")
        if self.shards and self.parallel != "hybrid":
            raise ValueError(f"shards: {self.shards} with parallel: {self.parallel}; valid: 0, or parallel: hybrid")
        gamma_from_std(self.ema_std)


@dataclass(frozen=True)
class Task(Generic[M]):
    """What a stage asks of the loop. ``position`` is the number of the step in the data, which is the step number until
    a run has gone back (`training/guard.py`)."""

    name: str
    data_at: Callable[[int], Any]  # position -> what this process reads for it
    loss_at: Callable[[M, Any, int, Part], dict[str, torch.Tensor]]  # (model, data, position, part) -> means, "loss"
    validate: Callable[[M], dict[str, float]]  # of the averaged model
    preview: Callable[[M, int], None]  # of the averaged model after that many steps
    best: tuple[str, Literal["min", "max"]]  # the metric of ``validate`` by which the best weights are kept
    item: Callable[[M], Any]  # calls the model on one item, to count its operations
    beside: Mapping[str, Stateful] = field(default_factory=dict)  # ``loss_at`` alone changes it, checkpoints keep it


def fit(task: Task[M], model: M, config: TrainConfig, run: RunFolder, seed: int, workers: Processes = ALONE) -> M:
    """Train ``model`` for ``config.steps`` steps, from the newest checkpoint if there is one; returns the average.

    Raises Interrupted after SIGTERM or Ctrl-C, once the state is saved, TrainingError when skipping bad steps and going
    back have not helped, CheckpointError when a state cannot be written, and ValueError for a batch that the processes
    cannot share.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.precision, device)
    autocast = partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    parts = parts_of(config.batch, workers.rank, workers.world, config.accumulate)
    averages = averages_of(model, config)
    # three times the operations of a forward pass: the backward pass has two matrix products for each (Kaplan 2020)
    flops = 3 * config.batch * forward_flops(averages[0].average, partial(task.item, averages[0].average))
    peak = workers.world * peak_flops(device, dtype or torch.float32)
    trainer = prepared(task, model, averages, config, workers, device)
    optimizer = build_optimizer(model, config.optim)
    guard, clock = Guard(config.guard), Clock(device)
    best = Best(run.state(task.name) / "best.safetensors", *task.best)
    state = State(model, averages, optimizer, guard, task.beside, checkpoints_of(task.name, run, config, workers),
                  workers, run.about)
    step = state.restore() or 0
    model.train()
    with Logger(run.metrics, task.name, step, config.steps, config.batch, workers) as log, StopSignal() as stop:
        while step < config.steps:
            rate = learning_rate(step, config.steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = rate
            position, done = step + guard.moved, step + 1
            last, logging = done == config.steps, done % config.log_every == 0 or done == config.steps

            clock.start(exact=logging)
            data = task.data_at(position)
            clock.mark("data")
            totals: dict[str, torch.Tensor] = {}
            for part in parts:
                torch.manual_seed(step_seed(seed, task.name + (f"/{part.start}" if part.start else ""), position))
                with gradients_kept_here(trainer, part is not parts[-1]):  # dropout draws from the global generator
                    with autocast():
                        losses = trainer(data, position, part)
                    clock.mark("forward")
                    (losses["loss"] * (part.share * workers.world)).backward()  # processes are averaged, parts added
                    clock.mark("backward")
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach() * part.share
            norm = float(full(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)))
            verdict = guard.judge(norm)
            if verdict == "good":
                optimizer.step()
                log.add(totals)
            else:
                log.event(done, f"{guard.reason(norm)} at step {step}", verdict)
            optimizer.zero_grad(set_to_none=True)
            clock.mark("optimizer")

            if verdict in ("roll back", "stop"):
                rollbacks = guard.rollbacks
                back = state.restore(regular=True) if verdict == "roll back" else None
                if back is None:
                    raise TrainingError(f"{task.name}: {guard.reason(norm)} at step {step}, after {guard.bad - 1} that "
                                        f"were skipped and {rollbacks} times back; the newest checkpoint in "
                                        f"{run.state(task.name)} is from before")
                guard.moved_on(position + 1, back, rollbacks + 1)
                step = back
                continue
            for ema in averages:
                ema.update(model, done)
            clock.mark("average")

            if logging:
                split = clock.means()
                used = flops / (peak * max(sum(split.values()), 1e-9))
                log.flush(done, learning_rate=rate, gradient_norm=norm, split=split, share_of_peak=used,
                          memory=peak_memory(device))
                clock.clear()
            validating = done % config.validate_every == 0 or last
            previewing = done % config.preview_every == 0 or last
            if validating or previewing:
                average = averages[0].whole()
                if validating and workers.main:
                    with autocast():
                        measured = task.validate(average)
                    log.write({"step": done, **{f"validation_{k}": v for k, v in measured.items()}})
                    best.offer(average, done, measured)
                if previewing and workers.main:
                    task.preview(average, done)
            if config.snapshots.every and (done % config.snapshots.every == 0 or last):
                save_snapshots(run.snapshots(task.name), averages, config.snapshots, done, workers.main)
            regular = done % config.checkpoint_every == 0 and guard.bad == 0  # it may have to be gone back to
            stopping = workers.any(stop.requested)  # once: a signal during the next lines waits for the next step
            if regular:
                guard.rollbacks = 0  # counts those to the same checkpoint
            if regular or last or stopping:
                state.save(done, regular)
            if stopping:
                raise Interrupted(f"{task.name} stopped after step {done}; the same command continues it")
            step = done
    return averages[0].whole()


def averages_of(model: M, config: TrainConfig) -> list[PowerEma[M]]:
    """The average of width ``ema_std``, then those of the snapshots."""
    stds = [config.ema_std, *(config.snapshots.stds if config.snapshots.every else ())]
    return [PowerEma(model, std) for std in dict.fromkeys(stds)]


def prepared(task: Task[M], model: M, averages: list[PowerEma[M]], config: TrainConfig, workers: Processes,
             device: torch.device) -> nn.Module:
    """What is called for the loss: the model, compiled and spread over processes as configured, its averages too."""
    if config.compile:
        for part in model.children():
            part.compile()
    trainer = spread(Loss(model, task.loss_at), config.parallel, config.shards, workers, device)
    if config.parallel != "ddp":
        if task.beside:
            raise ValueError(f"parallel: {config.parallel}; valid for this stage: ddp, {', '.join(task.beside)} beside "
                             "the model is not spread over processes")
        for ema in averages:
            ema.shard(model)
    return trainer


def checkpoints_of(name: str, run: RunFolder, config: TrainConfig, workers: Processes) -> Checkpoints:
    """Whole files, or folders that every process writes its slice into where the model is spread."""
    if config.parallel == "ddp":
        return Checkpoints(run.state(name), config.keep)
    from training.checkpoints.sharded import ShardedCheckpoints
    return ShardedCheckpoints(run.state(name), config.keep, workers)


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
