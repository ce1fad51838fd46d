"""What the tests of training share: what a run has left, stopping it at a step, and a fit that takes no time."""
import json
import os
import signal
from pathlib import Path

import torch
from torch import nn

from files.run_folder import RunFolder
from training import loop
from training.loop import Task, TrainConfig, fit
from training.optim import OptimConfig, learning_rate
from training.seed import generator


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict:
    """What was logged, without what the clock says; of a step that was done twice the second."""
    timing = ("seconds", "images_per_second", "seconds_left", "split", "share_of_peak", "memory")
    return {(line["stage"], line["step"], "loss" in line): {k: v for k, v in line.items() if k not in timing}
            for line in metrics(run)}


def tensors(value, path="") -> dict:
    """Every tensor and number of nested dictionaries and lists, by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in tensors(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, averages, optimizer state and logged losses are the same bits."""
    for name in ("tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for stage in ("autoencoder", "denoiser"):
        one, two = (tensors(torch.load(sorted((path / "state" / stage).glob("*.pt"))[-1], weights_only=True))
                    for path in (run, other))
        assert one.keys() == two.keys() and len(one) > 50
        for key, value in one.items():
            assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key
    assert losses(run) == losses(other)


def at_step(monkeypatch, number: int, action) -> None:
    """Run ``action`` at the start of the training step with this number, counted over all stages."""
    count = iter(range(10**6))

    def rate(*arguments):
        if next(count) == number:
            action()
        return learning_rate(*arguments)

    monkeypatch.setattr(loop, "learning_rate", rate)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def poison() -> None:
    """Marks the position in the data whose loss is not a number."""


def explode() -> None:
    """Marks the position in the data whose loss is ten thousand times too large."""


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))


def small_fit(path: Path, steps: int = 12, at: dict | None = None, processes=loop.ALONE,
              **settings) -> tuple[nn.Module, list]:
    """Fit a two-layer network to a fixed linear map; returns the average and the weights after every step. ``at`` says
    what is done at a position of the data."""
    model = small_model()
    wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    history = []

    def data_at(position):
        history.append([p.detach().clone() for p in model.parameters()])
        if at and position in at:
            at[position]()
        return torch.randn(config.batch, 4, generator=generator(0, "test", position))

    def loss_at(model, x, position, part):
        x = part.of_batch(x)
        loss = (model(x) - x @ wanted).square().mean()
        factor = {poison: float("nan"), explode: 1e4}.get(at.get(position) if at else None, 1.0)
        return {"loss": loss * factor}

    options = {"optim": OptimConfig(learning_rate=0.02, warmup=2), "checkpoint_every": 4, "log_every": 1, "batch": 32,
               "precision": "fp32", **settings}
    config = TrainConfig(steps=steps, **options)
    run = RunFolder(path, processes.main)
    run.path.mkdir(exist_ok=True)
    task = Task("small", data_at, loss_at, lambda model: {"a": float(model[0].weight.detach().sum())},
                lambda model, step: None, ("a", "min"), lambda model: model(torch.zeros(1, 4)))
    average = fit(task, model, config, run, 0, processes)
    return average, [*history[1:], [p.detach().clone() for p in model.parameters()]]
