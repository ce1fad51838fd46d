"""Training: it learns, it can be stopped anywhere without leaving a trace, and what it did is on record."""
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from data.source import image_batch
from data.tokenizer import Tokenizer
from model.autoencoder import Autoencoder
from training import loop
from training.autoencoder import AutoencoderStage, psnr, reconstruction_loss
from training.checkpoint import save_weights
from training.config import ConfigError, apply_overrides, from_dict
from training.denoiser import train_denoiser
from training.ema import PowerEma, gamma_from_std
from training.experiment import STAGES, Experiment
from training.loop import Interrupted, TrainConfig, TrainingError, fit
from training.muon import orthogonalized
from training.optim import OptimConfig, build_optimizer, learning_rate
from training.run import RunFolder
from training.seed import generator

ROOT = Path(__file__).parents[1]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict:
    """What was logged, without what the clock says; of a step that was done twice the second."""
    timing = ("seconds", "images_per_second")
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


# ---- the whole command

def test_a_run_leaves_what_sampling_and_a_reader_need(tiny_run, tiny):
    for name in ("config.yaml", "tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors",
                 "denoiser.safetensors", "samples/autoencoder_000012.png", "samples/denoiser_000012.png"):
        assert (tiny_run / name).stat().st_size > 0, name
    assert not list(tiny_run.rglob("*.part"))
    lines = metrics(tiny_run)
    for stage in ("autoencoder", "denoiser"):
        logged = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert [line["step"] for line in logged] == list(range(1, 13))
        assert all(math.isfinite(line[key]) for line in logged
                   for key in ("loss", "learning_rate", "gradient_norm", "images_per_second", "seconds"))
        checked = [line["step"] for line in lines if line["stage"] == stage and "loss" not in line]
        assert checked == [6, 12]


def test_manifest_says_what_ran(tiny_run, tiny):
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    assert manifest["seed"] == 3 and manifest["data"]["source"] == "shapes" and manifest["data"]["train"] == 64
    assert manifest["versions"]["torch"] and manifest["versions"]["python"] == sys.version.split()[0]
    assert {"revision", "device", "threads", "command", "begun"} <= manifest.keys()
    assert manifest["tokenizer"]["vocab_size"] <= 300 and manifest["tokenizer"]["length"] == 24
    last = {line["stage"]: line for line in metrics(tiny_run) if line["step"] == 12 and "loss" not in line}
    tolerance = 0.02  # the record is in fp32, the log may be in bf16
    assert manifest["autoencoder"]["psnr"] == pytest.approx(last["autoencoder"]["validation_psnr"], rel=tolerance)
    assert manifest["denoiser"]["validation_loss"] == pytest.approx(last["denoiser"]["validation_loss"], rel=tolerance)
    assert manifest["denoiser"]["pictures"] == 32 and manifest["autoencoder"]["pictures"] == 12
    assert len(manifest["autoencoder"]["latent_std"]) == 4 and min(manifest["autoencoder"]["latent_std"]) > 0


def test_finished_stages_are_skipped(tiny_run, tiny_config, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    train.main([str(tiny_config), f"run={run}"])
    said = capsys.readouterr().out
    assert [f"{stage}: finished before, skipped" in said for stage in STAGES] == [True] * 3
    (run / "denoiser.safetensors").unlink()  # one stage is missing: that one only is done, from its last state
    train.main([str(tiny_config), f"run={run}"])
    said = capsys.readouterr().out
    assert said.count("skipped") == 2 and "continuing after step 12" in said
    assert before.keys() == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}.keys()
    assert_same_run(run, tiny_run)


def test_another_configuration_is_refused(tiny_run, tiny_config):
    before = (tiny_run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train.main([str(tiny_config), f"run={tiny_run}", "denoiser.train.batch=4", "seed=4"])
    said = str(caught.value)
    assert "\n" not in said and "seed: 3 then, 4 now" in said and "denoiser.train.batch: 8 then, 4 now" in said
    assert (tiny_run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("arguments, message", [
    (["configs/nothing.yaml"], "no config file configs/nothing.yaml"),
    (["CONFIG", "run="], "run= is empty"),
    (["CONFIG", "denoiser.train.stepz=3"], "unknown key 'denoiser.train.stepz'; valid keys here"),
    (["CONFIG", "data.shapes.validation=0", "run=RUN"], "its validation split is empty"),
    (["CONFIG", "data.shapes.train=0", "run=RUN"], "its train split is empty"),
    (["CONFIG", "stages=[denoiser]", "run=RUN"], "the stage 'tokenizer' is not finished"),
])
def test_mistakes_end_in_one_line(tiny_config, tmp_path, monkeypatch, arguments, message):
    names = {"CONFIG": str(tiny_config), "run=RUN": f"run={tmp_path / 'run'}"}
    monkeypatch.setattr(sys, "argv", ["train.py", *(names.get(text, text) for text in arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    assert caught.value.code.startswith("error: ") and message in caught.value.code


# ---- stopping and going on

@pytest.mark.parametrize("steps", [(5, 18), (11, 12), (23,)], ids=["in both stages", "around a stage", "at the end"])
def test_stopped_and_continued_is_the_same_as_never_stopped(tiny_run, tiny_config, tmp_path, monkeypatch, steps):
    """SIGTERM at steps counted over both stages of 12; each start counts on from where it goes on."""
    run, done = tmp_path / "run", 0
    for step in steps:
        at_step(monkeypatch, step - done, terminate)
        with pytest.raises(Interrupted, match=rf"stopped after step {step % 12 + 1}; the same command continues it"):
            train.main([str(tiny_config), f"run={run}"])
        done = step + 1
    monkeypatch.undo()
    train.main([str(tiny_config), f"run={run}"])
    assert_same_run(run, tiny_run)


def test_a_crash_costs_the_steps_since_the_last_checkpoint(tiny_run, tiny_config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def crash():
        raise RuntimeError("power cut")

    at_step(monkeypatch, 12 + 10, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main([str(tiny_config), f"run={run}"])
    monkeypatch.undo()
    newest = max((run / "state" / "denoiser").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])  # and the newest state is damaged, too
    capsys.readouterr()
    train.main([str(tiny_config), f"run={run}"])
    said = capsys.readouterr().out
    assert f"{newest} is refused" in said and "continuing after step 4" in said
    assert_same_run(run, tiny_run)


def test_sigterm_to_the_command(tiny_config, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(tiny_config), f"run={run}", "autoencoder.train.steps=100000",
               "autoencoder.train.log_every=1", "autoencoder.train.checkpoint_every=100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        began = time.monotonic()
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    stopped = re.search(r"stopped: autoencoder stopped after step (\d+); the same command continues it\n$", said)
    assert stopped and process.returncode == 1 and "Traceback" not in said
    assert (run / "state" / "autoencoder" / f"step_{int(stopped[1]):08d}.pt").is_file()
    assert not (run / "autoencoder.safetensors").exists()


# ---- the loop on a small regression

def small_fit(path: Path, steps: int = 12, at: dict | None = None, **settings) -> tuple[nn.Module, list]:
    """Fit a two-layer network to a fixed linear map; returns the average and the weights after every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    history = []

    def loss_at(model, step):
        history.append([p.detach().clone() for p in model.parameters()])
        if at and step in at:
            at[step]()
        x = torch.randn(32, 4, generator=generator(0, "test", step))
        loss = (model(x) - x @ wanted).square().mean()
        return {"loss": loss * float("nan") if at and at.get(step) is poison else loss}

    options = {"optim": OptimConfig(learning_rate=0.02, warmup=2), "checkpoint_every": 4, "log_every": 1, **settings}
    config = TrainConfig(steps=steps, batch=32, precision="fp32", **options)
    run = RunFolder(path)
    run.path.mkdir(exist_ok=True)
    average = fit("small", model, loss_at, config, run, 0, lambda model: {"a": 0.0}, lambda model, step: None)
    return average, [*history[1:], [p.detach().clone() for p in model.parameters()]]


def poison() -> None:
    """Marks the step whose loss is not a number."""


@pytest.mark.parametrize("optimizer, rate", [("adamw", 0.05), ("muon", 0.2)])
def test_every_optimizer_learns_and_resumes_bit_for_bit(tmp_path, optimizer, rate):
    optim = OptimConfig(optimizer=optimizer, learning_rate=rate, warmup=2)
    whole, _ = small_fit(tmp_path / "whole", steps=40, optim=optim)
    with pytest.raises(Interrupted):
        small_fit(tmp_path / "parts", steps=40, optim=optim, at={17: terminate})
    parts, _ = small_fit(tmp_path / "parts", steps=40, optim=optim)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    logged = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert len(logged) == 40 and logged[-1] < 0.1 * logged[0]


def test_the_loop_is_what_a_reader_would_write(tmp_path):
    """Against plain AdamW with gradients cleared, clipped at norm 0.5 and the rate set by hand. fp32: 1e-5."""
    settings = {"learning_rate": 0.02, "warmup": 2, "weight_decay": 0.1, "clip": 0.5}
    _, history = small_fit(tmp_path, steps=10, optim=OptimConfig(**settings))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}],
                                  betas=(0.9, 0.99), foreach=False)
    for step in range(10):
        rate = 0.02 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = torch.randn(32, 4, generator=generator(0, "test", step))
        optimizer.zero_grad()
        (model(x) - x @ wanted).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
        for found, expected in zip(history[step], model.parameters()):
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def test_the_average_is_the_hand_sum_of_all_weights(tmp_path):
    """fp32 lerps against one fp64 sum: 1e-5 of the largest weight."""
    average, history = small_fit(tmp_path, steps=12, ema_std=0.1)
    gamma, t = gamma_from_std(0.1), np.arange(13) / 12
    weight = np.diff(t ** (gamma + 1))  # the integral of s^gamma over each step
    assert weight.sum() == pytest.approx(1)
    for number, parameter in enumerate(average.parameters()):
        expected = sum(w * step[number].double() for w, step in zip(weight, history))
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-5)
        assert not parameter.requires_grad and (parameter - history[-1][number]).abs().max() > 1e-4


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2])
def test_the_average_has_the_width_that_was_asked_for(std):
    gamma = gamma_from_std(std)
    # the published solution: Karras et al. 2023, algorithm 2
    assert gamma == pytest.approx(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max(), rel=1e-6)
    s = (np.arange(200_000) + 0.5) / 200_000
    density = s**gamma / (s**gamma).sum()
    mean = (density * s).sum()
    assert math.sqrt((density * (s - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)


def test_the_average_takes_buffers_as_they_are():
    model = nn.BatchNorm1d(3)
    ema = PowerEma(model, 0.05)
    model(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)) + 5)
    ema.update(model, 1)
    assert torch.equal(ema.average.running_mean, model.running_mean) and ema.average.num_batches_tracked == 1
    assert not ema.average.training and torch.equal(ema.average.weight, model.weight)


def test_a_loss_that_is_no_number_stops_and_keeps_what_is_good(tmp_path):
    with pytest.raises(TrainingError) as caught:
        small_fit(tmp_path, at={6: poison})
    said = str(caught.value)
    assert "\n" not in said and "small: " in said and "step 6" in said and str(tmp_path / "state" / "small") in said
    assert [path.name for path in (tmp_path / "state" / "small").glob("*.pt")] == ["step_00000004.pt"]
    resumed, _ = small_fit(tmp_path)  # the cause is gone
    whole, _ = small_fit(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path, at={6: twice})
    assert signal.getsignal(signal.SIGINT) is before  # handlers are put back
    small_fit(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- optimizer and learning rate

def test_learning_rate_end_points():
    config = OptimConfig(learning_rate=0.1, warmup=10, schedule="cosine")
    assert learning_rate(0, 100, config) == pytest.approx(0.01)
    assert learning_rate(9, 100, config) == learning_rate(10, 100, config) == pytest.approx(0.1)
    assert learning_rate(55, 100, config) == pytest.approx(0.05)  # half of the cosine
    assert 0 < learning_rate(99, 100, config) < 1e-4
    wsd = replace(config, schedule="wsd", decay=0.3)
    assert learning_rate(10, 100, wsd) == learning_rate(70, 100, wsd) == pytest.approx(0.1)
    assert learning_rate(85, 100, wsd) == pytest.approx(0.05)
    assert learning_rate(99, 100, wsd) == pytest.approx(0.1 / 30)
    constant = replace(config, schedule="constant")
    assert {learning_rate(step, 100, constant) for step in range(10, 100)} == {0.1}
    assert learning_rate(0, 100, replace(config, warmup=0)) == pytest.approx(0.1)
    for schedule in (config, wsd):
        after = [learning_rate(step, 100, schedule) for step in range(10, 100)]
        assert after == sorted(after, reverse=True)


def test_weight_decay_acts_on_matrices_only():
    """Without a gradient signal one step multiplies a decayed weight by 1 - rate * decay and leaves the others."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5)).step()
    for name, parameter in model.named_parameters():
        expected = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


@pytest.mark.parametrize("rows, columns, smallest, tolerance", [
    (16, 144, 1.0, 0.02), (144, 16, 1.0, 0.02), (32, 32, 1e-6, 0.4), (32, 288, 1e-6, 0.4)])
def test_orthogonalized_matches_the_iteration_in_fp64(rows, columns, smallest, tolerance):
    """Also where singular values fall over six decades, as in gradients of few pictures: there the smallest are the
    bf16 rounding of the largest, and directions agree less; none may grow."""
    draw = torch.Generator().manual_seed(0)
    side = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(3, n, side, generator=draw, dtype=torch.float64))[0]
                   for n in (rows, columns))
    values = torch.logspace(0, math.log10(smallest), side, dtype=torch.float64)
    matrices = left * values @ right.mT
    wanted = values / values.norm()
    for _ in range(5):  # a polynomial of the singular values: Jordan et al. 2024
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    expected = left * wanted @ right.mT
    given = orthogonalized(matrices.float()).double()
    assert given.shape == matrices.shape
    assert (given - expected).norm() < tolerance * expected.norm()
    assert torch.linalg.svdvals(given).max() < 1.5


def test_random_numbers_are_a_function_of_seed_purpose_and_step():
    def draw(*key):
        return tuple(torch.randn(4, generator=generator(*key)).tolist())

    keys = [(seed, purpose, step) for seed in (0, 1) for purpose in ("a", "b") for step in (0, 1, 10, 11)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, "a", 10) == draw(1, "a", 10)
    state = torch.get_rng_state()
    draw(0, "a", 0)
    assert torch.equal(state, torch.get_rng_state())


# ---- losses

@pytest.mark.parametrize("offset", [0.01, 0.1, 1.0])
def test_psnr_closed_form(offset):
    """A constant error d of a signal with peak-to-peak 2: 20 log10(2 / d)."""
    images = torch.full((3, 3, 8, 8), -0.5)
    found = psnr(images + offset, images)
    assert found.shape == (3,)
    torch.testing.assert_close(found, torch.full((3,), 20 * math.log10(2 / offset)), rtol=0, atol=1e-3)
    white = torch.ones(1, 3, 4, 4)
    assert psnr(white + 5, white) > 100  # clipped as a file would be
    error = torch.zeros(1, 3, 4, 4)
    error[0, 0, 0, 0] = 0.48  # one value of 48: mean square 0.48^2 / 48
    assert float(psnr(error, torch.zeros_like(error))) == pytest.approx(10 * math.log10(4 * 48 / 0.48**2), abs=1e-4)


def test_reconstruction_loss_terms():
    images = torch.zeros(2, 3, 4, 4)
    step = torch.zeros_like(images)
    step[..., 2:] = 0.5  # one vertical edge, half of the picture off by 0.5
    for l1, l2, edge, expected in ((1, 0, 0, 0.25), (0, 1, 0, 0.125), (2, 3, 0, 0.875), (1, 0, 2, 0.25 + 1 / 3)):
        config = AutoencoderStage(l1=l1, l2=l2, edge=edge)
        assert float(reconstruction_loss(step, images, config)) == pytest.approx(expected)


# ---- it learns

COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
           "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255)}


class Colours:
    """Eight pictures of one colour each, and its name."""

    def __len__(self):
        return len(COLOURS)

    def captions(self, index):
        return (f"all {list(COLOURS)[index]}",)

    def __getitem__(self, index):
        colour = torch.tensor(list(COLOURS.values())[index], dtype=torch.uint8)
        return {"image": colour[:, None, None].expand(3, 16, 16), "caption": self.captions(index)[0],
                "captions": self.captions(index), "id": str(index)}


def test_eight_pairs_are_learnt_by_heart(tmp_path, tiny):
    """The real stage, no mocks. An untrained network predicts 0 and has loss 1, the variance of a latent; at high noise
    only the caption tells the pictures apart, so the loss falls below 0.2 only if text, UNet and loop work together."""
    experiment = from_dict(Experiment, apply_overrides(tiny, [
        "denoiser.images=8", "denoiser.caption_dropout=0", "denoiser.prediction_type=sample",
        "denoiser.unet.channels=[32]", "denoiser.unet.attention=[true]", "denoiser.unet.context_width=64",
        "denoiser.text_encoder.width=64", "denoiser.text_encoder.heads=2", "denoiser.text_encoder.mlp_width=128",
        "denoiser.train.precision=fp32", "denoiser.train.steps=80", "denoiser.train.log_every=1",
        "denoiser.train.optim.learning_rate=3e-3", "denoiser.train.validate_every=1000"]))
    run, source = RunFolder(tmp_path), Colours()
    torch.manual_seed(0)
    autoencoder = Autoencoder(experiment.autoencoder.model).eval()
    with torch.no_grad():  # latents without noise, which is all that could not be learnt
        autoencoder.quant.weight[4:], autoencoder.quant.bias[4:] = 0.0, -20.0
    autoencoder.measure([image_batch(source, np.arange(8))])
    save_weights(autoencoder, run.weights("autoencoder"))
    tokenizer = Tokenizer.train([source.captions(i)[0] for i in range(8)], experiment.tokenizer)
    train_denoiser(experiment.denoiser, source, source, {"source": "colours"}, tokenizer, autoencoder, run, 0,
                   torch.device("cpu"), lambda networks, step: None)
    found = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert found[0] == pytest.approx(1.0, abs=0.2)
    assert sum(found[-10:]) / 10 < 0.2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["denoiser"]["validation_loss"] < 0.25
