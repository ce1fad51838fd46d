"""The training loop that all stages share: one function, to be read from top to bottom.

A step is a function of (state, step number): data order, noise and timesteps depend only on the seed and the step.
So a resumed run does exactly what an uninterrupted run would have done, and a checkpoint holds no generator state.
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
from training.distributed import ALONE, Loss, Parallel, Processes, distribute, skip_gradient_sync, whole_tensor
from training.ema import M, PowerEma, gamma_from_std
from training.guard import Guard, GuardConfig, Verdict
from training.logger import Logger
from training.optim import OptimConfig, build_optimizer, learning_rate
from training.seed import Part, parts_of, step_seed
from training.snapshots import SnapshotConfig, save_snapshots
from training.speed import Clock, forward_flops, peak_flops, peak_memory


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what is kept."""


class Interrupted(Exception):
    """The run was asked to stop and its state is saved."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and settings of the training of a stage. ``batch`` is the size of the batch of a step, over all processes
    and over the ``accumulate`` pieces that each process computes one after the other. Intervals are in steps.
    ``ema_std`` is the width of the weight average as a share of the run. ``precision`` auto means bf16 autocast, with
    fp32 weights, if the machine has bf16 arithmetic. ``workers`` loader processes read images ahead. For ``parallel``
    and ``shards`` see `training/distributed.py`."""

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
    """The functions that a stage gives to the loop. ``position`` is the number of the step in the data, which equals
    the step number until the run rolls back (`training/guard.py`)."""

    name: str
    data_at: Callable[[int], Any]  # position -> the data of this process
    loss_at: Callable[[M, Any, int, Part], dict[str, torch.Tensor]]  # (model, data, position, part) -> means, "loss"
    validate: Callable[[M], dict[str, float]]  # of the averaged model
    preview: Callable[[M, int], None]  # of the averaged model after that many steps
    best: tuple[str, Literal["min", "max"]]  # the metric of ``validate`` that chooses the best weights
    item: Callable[[M], Any]  # calls the model on one item, to count its operations
    beside: Mapping[str, Stateful] = field(default_factory=dict)  # what else changes, kept in checkpoints
    network: nn.Module | None = None  # whose operations are counted, where ``item`` calls another one than the model


def fit(task: Task[M], model: M, config: TrainConfig, run: RunFolder, seed: int, processes: Processes = ALONE) -> M:
    """Train ``model`` for ``config.steps`` steps, from the newest checkpoint if there is one; returns the averaged
    model.

    Raises Interrupted after SIGTERM or Ctrl-C, once the state is saved, TrainingError if skipping bad steps and
    rolling back have not helped, CheckpointError if a state cannot be written, and ValueError for a batch that cannot
    be divided among the processes.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.precision, device)
    autocast = partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    parts = parts_of(config.batch, processes.rank, processes.world, config.accumulate)
    averages = averages_of(model, config)
    cost = least_step_seconds(task, averages[0].average, config, processes, device)
    trainer = prepare_trainer(task, model, averages, config, processes)
    optimizer = build_optimizer(model, config.optim, dtype or torch.float32)
    guard, clock = Guard(config.guard), Clock(device)
    state = State(model, averages, optimizer, guard, task.beside, checkpoints_of(task.name, run, config, processes),
                  processes, run.about)
    best = Best(run.state(task.name) / "best.safetensors", *task.best)
    step = state.restore() or 0
    model.train()
    with Logger(run.metrics, task.name, step, config.steps, config.batch, processes) as log, StopSignal() as stop:
        observer = Observer(task, config, log, best, processes.main, autocast)
        while step < config.steps:
            position = step + guard.moved  # place in the data, which is ahead of the step after a rollback
            done = step + 1  # steps when this one is finished
            rate = learning_rate(step, config.steps, config.optim)
            set_learning_rate(optimizer, rate)
            clock.start(exact=done % config.log_every == 0 or done == config.steps)

            data = task.data_at(position)
            clock.mark("data")
            losses: dict[str, torch.Tensor] = {}
            for part in parts:
                seed_globally(seed, task.name, position, part)  # dropout draws from the global generator
                with skip_gradient_sync(trainer, part is not parts[-1]):
                    with autocast():
                        losses_of_part = trainer(data, position, part)  # calls task.loss_at
                    clock.mark("forward")
                    loss = losses_of_part["loss"] * (part.share * processes.world)  # processes are averaged
                    loss.backward()
                    clock.mark("backward")
                for name, value in losses_of_part.items():
                    losses[name] = losses.get(name, 0.0) + value.detach() * part.share
            norm = float(whole_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)))
            verdict = guard.judge(norm)
            if verdict == "good":
                optimizer.step()
                log.add(losses)
            else:
                log.event(done, f"{guard.reason(norm)} at step {step}", verdict)
            optimizer.zero_grad(set_to_none=True)
            clock.mark("optimizer")
            if verdict in ("roll back", "stop"):
                step = roll_back(state, task.name, run, step, norm, verdict)
                continue
            for average in averages:
                average.update(model, done)
            clock.mark("average")

            if done % config.log_every == 0 or done == config.steps:
                log.flush(done, learning_rate=rate, gradient_norm=norm,
                          **speed_of_steps(clock, cost, device))
            observer.observe(averages[0], done)
            if config.snapshots.every and (done % config.snapshots.every == 0 or done == config.steps):
                save_snapshots(run.snapshots(task.name), averages, config.snapshots, done, processes.main)
            save_state(state, task.name, done, config, processes.any(stop.requested))
            step = done
    return averages[0].averaged_model()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group of parameters; each group takes its own share of it (`training/optim.py`)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def seed_globally(seed: int, name: str, position: int, part: Part) -> None:
    """Seed torch's global generator as a function of (seed, stage, place in the data, part of the batch)."""
    torch.manual_seed(step_seed(seed, name + (f"/{part.start}" if part.start else ""), position))


def least_step_seconds(task: Task[M], model: M, config: TrainConfig, processes: Processes,
                       device: torch.device) -> float:
    """The least seconds that a step can take: its operations over the speed of a large matrix product on this machine.

    A step has three times the operations of a forward pass, because the backward pass has two matrix products for
    each one of the forward pass (Kaplan et al. 2020, section 2.1).
    """
    operations = 3 * config.batch * forward_flops(task.network or model, partial(task.item, model))
    peak = peak_flops(device, autocast_dtype(config.precision, device) or torch.float32)
    return operations / (processes.world * peak)


def speed_of_steps(clock: Clock, cost: float, device: torch.device) -> dict[str, Any]:
    """Seconds of each part of a step since the last call, the share of the peak speed, and the memory."""
    split = clock.means()
    clock.clear()
    return {"split": split, "share_of_peak": cost / max(sum(split.values()), 1e-9), "memory": peak_memory(device)}


def roll_back(state: State, name: str, run: RunFolder, step: int, norm: float, verdict: Verdict) -> int:
    """Load the newest regular checkpoint, continue with the data after the bad steps, and return its number of steps.

    Raises TrainingError if the guard says stop, or if there is no such checkpoint.
    """
    guard, rollbacks = state.guard, state.guard.rollbacks
    position, reason, bad = step + guard.moved, guard.reason(norm), guard.bad
    back = state.restore(regular=True) if verdict == "roll back" else None
    if back is None:
        raise TrainingError(f"{name}: {reason} at step {step}, after {bad - 1} that were skipped and {rollbacks} times "
                            f"back; the newest checkpoint in {run.state(name)} is from before")
    guard.resume_at(position + 1, back, rollbacks + 1)
    return back


@dataclass(frozen=True)
class Observer(Generic[M]):
    """Observes the averaged model at intervals; it changes nothing that training depends on."""

    task: Task[M]
    config: TrainConfig
    log: Logger
    best: Best
    main: bool
    autocast: Callable

    def observe(self, ema: PowerEma[M], done: int) -> None:
        """Validate the average, keep it if it is the best so far, and save a preview, each at its interval."""
        last = done == self.config.steps
        validating = done % self.config.validate_every == 0 or last
        previewing = done % self.config.preview_every == 0 or last
        if not (validating or previewing):
            return
        average = ema.averaged_model()
        if validating and self.main:
            with self.autocast():
                measured = self.task.validate(average)
            self.log.write({"step": done, **{f"validation_{name}": value for name, value in measured.items()}})
            self.best.offer(average, done, measured)
        if previewing and self.main:
            self.task.preview(average, done)


def save_state(state: State, name: str, done: int, config: TrainConfig, stopping: bool) -> None:
    """Save a checkpoint at its interval, after the last step, and when the run is asked to stop.

    In the last case raises Interrupted after saving.
    """
    regular = done % config.checkpoint_every == 0 and state.guard.bad == 0  # a run may roll back to it
    if regular:
        state.guard.rollbacks = 0  # counts rollbacks to the same checkpoint
    if regular or done == config.steps or stopping:
        state.save(done, regular)
    if stopping:
        raise Interrupted(f"{name} stopped after step {done}; the same command continues it")


def averages_of(model: M, config: TrainConfig) -> list[PowerEma[M]]:
    """The average of width ``ema_std``, then those of the snapshots."""
    stds = [config.ema_std, *(config.snapshots.stds if config.snapshots.every else ())]
    return [PowerEma(model, std) for std in dict.fromkeys(stds)]


def prepare_trainer(task: Task[M], model: M, averages: list[PowerEma[M]], config: TrainConfig,
                    processes: Processes) -> nn.Module:
    """The module to call for the loss: the model, compiled and distributed over processes as configured. Its averages
    are distributed likewise."""
    if config.compile:
        for part in model.children():
            part.compile()
    trainer = distribute(Loss(model, task.loss_at), config.parallel, config.shards, processes,
                         next(model.parameters()).device)
    if config.parallel != "ddp":
        if task.beside:
            raise ValueError(f"parallel: {config.parallel}; valid for this stage: ddp, {', '.join(task.beside)} beside "
                             "the model is not distributed over processes")
        for ema in averages:
            ema.shard(model)
    return trainer


def checkpoints_of(name: str, run: RunFolder, config: TrainConfig, processes: Processes) -> Checkpoints:
    """Checkpoints as single files, or, if the model is distributed, as folders into which every process writes its
    slice."""
    if config.parallel == "ddp":
        return Checkpoints(run.state(name), config.keep)
    from training.checkpoints.sharded import ShardedCheckpoints
    return ShardedCheckpoints(run.state(name), config.keep, processes)


class StopSignal:
    """Sets ``requested`` on SIGTERM and Ctrl-C while the block runs; a second signal ends the program at once."""

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
