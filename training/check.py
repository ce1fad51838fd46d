"""Checks before a run: python train.py CONFIG --check

It reports sizes, captions that are cut, the time of a few steps of each stage, their use of memory and disk, and the
scale of the latents. Finally each stage overfits eight pairs, the oldest proof that all parts work together. Nothing is
written into the run folder.
"""
import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn

from data.catalog import build_source
from data.order import Places
from data.source import Source, caption_batch, image_batch
from data.tokenizer import Tokenizer
from files.run_folder import RunFolder
from files.weights import load_weights
from model.autoencoder import Autoencoder, Posterior
from model.device import autocast_dtype, place_on
from training.experiment import Experiment
from training.loop import Task, TrainConfig, TrainingError, fit
from training.same_data import data_change
from training.seed import Part, generator, whole_batch
from training.snapshots import SnapshotConfig
from training.speed import duration, forward_flops, peak_flops, peak_memory
from training.stages.autoencoder import AutoencoderLoss
from training.stages.denoiser import Denoising, new_networks
from training.stages.pairs import PairBatch
from training.stages.perceptual_loss import perceptual_distance
from training.stages.personal import LEAST, few_images

CHECKED = ("tokenizer", "autoencoder", "denoiser")
PAIRS = 8
FALL = {"autoencoder": 0.5, "denoiser": 0.8}  # share of the first loss below which overfitting counts as proven
PATIENCE = 30.0  # largest number of seconds of a measurement
CAPTIONS = 2000  # captions that the tokenizer is tested on
STILL = 0.05  # mean and deviation of latents may be off by ten times this much without an objection

Step = Callable[[int], torch.Tensor]  # loss of a step


def check(experiment: Experiment, path: Path, device: torch.device) -> bool:
    """Print a report on a run of ``experiment`` into ``path``; whether nothing speaks against the run."""
    if experiment.teaches:
        return check_few(experiment)
    run = RunFolder(path)
    source = build_source(experiment.data.squares, "train")  # without aspect buckets, since the timing needs one size
    validation = build_source(experiment.data.squares, "validation")
    for name, split in (("train", source), ("validation", validation)):
        if not len(split):
            raise ValueError(f"data.{experiment.data.source}: its {name} split is empty; valid: at least one item")
    print(f"sizes: images {experiment.data.size} x {experiment.data.size}, latents "
          f"{' x '.join(map(str, experiment.latent_shape))}: all parts fit together")
    print(f"data: {len(source):,} images for training, {len(validation):,} held out")
    good, seconds = check_data(experiment, run), 0.0
    peak = peak_flops(device, autocast_dtype("auto", device) or torch.float32)
    print(f"machine: {device}, {torch.get_num_threads()} threads, matrix products at {peak / 1e9:,.0f} GFLOP/s")
    tokenizer = check_tokenizer(experiment, run, source)
    autoencoder = place_on(Autoencoder(experiment.autoencoder.model), device)
    if run.weights("autoencoder").is_file():
        load_weights(autoencoder, run.weights("autoencoder"))
        print("autoencoder: that of the run folder")
    elif "autoencoder" in experiment.stages:
        proven, cost = check_autoencoder(experiment, autoencoder, source, device)
        good, seconds = good and proven, seconds + cost
    good = check_latents(autoencoder, source, device, run.weights("autoencoder").is_file()) and good
    if "denoiser" in experiment.stages:
        proven, cost = check_denoiser(experiment, tokenizer, autoencoder, source, device)
        good, seconds = good and proven, seconds + cost
    for name in experiment.stages:
        if name not in CHECKED:
            print(f"{name}: not checked")
    print(f"together: about {duration(seconds)} on this machine with one process, without validation and samples")
    print("nothing speaks against this run" if good else "see above before you start this run")
    return good


def check_data(experiment: Experiment, run: RunFolder) -> bool:
    """Whether the data is what the run folder was trained on so far, if it was; print what differs."""
    differs = data_change(experiment.data, run)
    if differs:
        print(f"data: NOT what this run began with ({differs}); training goes on only with --changed-data")
    return not differs


def check_few(experiment: Experiment) -> bool:
    """Print what a run that teaches would learn from; nothing is trained."""
    for name in experiment.stages:
        source = build_source(few_images(experiment.data, getattr(experiment, name).captions), "train")
        captions = getattr(experiment, name).captions or source.captions(0) if len(source) else ()
        print(f"{name}: {len(source)} images of {experiment.data.size} x {experiment.data.size} to learn from"
              + (f", as '{captions[0]}'; the training itself is not checked" if captions else ""))
        if len(source) < LEAST:
            print(f"too few: {LEAST} at least")
            return False
    return True


def check_tokenizer(experiment: Experiment, run: RunFolder, source: Source) -> Tokenizer:
    """Print how many captions the tokenizer cuts, and return the tokenizer."""
    captions = [caption for i in range(min(CAPTIONS, len(source))) for caption in source.captions(i)]
    path = run.path / "tokenizer.json"
    tokenizer = Tokenizer.load(path) if path.is_file() else Tokenizer.train(captions, experiment.tokenizer)
    cut = [caption for caption in captions if tokenizer.overflow(caption)]
    print(f"captions: {100 * len(cut) / len(captions):.1f} % of {len(captions):,} are longer than tokenizer.length = "
          f"{tokenizer.length} and lose their end" + (f", as '{max(cut, key=len)[:100]}'" if cut else ""))
    return tokenizer


class Enough(Exception):
    """Raised to end a measurement."""


def run_steps(model: nn.Module, loss_at: Step, config: TrainConfig, most: int,
              until: float = 0.0) -> tuple[list[float], list[float]]:
    """Seconds and losses of up to ``most`` steps of the training loop itself at the configured rate. It stops earlier
    after `PATIENCE`, or when the mean of the last five losses is below ``until`` times that of the first five. Files of
    the loop go into a folder that is removed."""
    marks: list[float] = []
    found: list[float] = []

    def data_at(position: int) -> None:
        marks.append(time.perf_counter())
        learnt = len(found) >= 15 and np.mean(found[-5:]) < until * np.mean(found[:5])
        if len(found) >= most or learnt or (found and marks[-1] - marks[0] > PATIENCE):
            raise Enough

    def loss_of(model: nn.Module, data: None, position: int, part: Part) -> dict[str, torch.Tensor]:
        loss = loss_at(position)
        found.append(float(loss.detach()))
        return {"loss": loss}

    task = Task("check", data_at, loss_of, lambda model: {}, lambda model, step: None, ("loss", "min"),
                lambda model: None)
    settings = replace(config, steps=most + 1, accumulate=1, log_every=10**9, validate_every=10**9, preview_every=10**9,
                       checkpoint_every=10**9, parallel="ddp", shards=0, snapshots=SnapshotConfig(),
                       optim=replace(config.optim, warmup=20, schedule="constant"))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough, TrainingError):
        fit(task, model, settings, RunFolder(folder), seed=0)
    return np.diff(marks).tolist(), found


def report_cost(name: str, model: nn.Module, config: TrainConfig, seconds: list[float], flops: int,
                device: torch.device) -> float:
    """Print the cost of a stage, and return the seconds of all its steps."""
    step = float(np.median(seconds[1:] or seconds))
    parameters = sum(p.numel() for p in model.parameters())
    averages = 1 + (len(set(config.snapshots.stds) - {config.ema_std}) if config.snapshots.every else 0)
    kept = parameters * 4 * (1 + averages + (1 if config.optim.optimizer == "muon" else 2))
    peak = peak_flops(device, autocast_dtype(config.precision, device) or torch.float32)
    print(f"{name}: {parameters / 1e6:,.1f} million parameters; {len(seconds)} steps of {config.batch} took "
          f"{step:.3g} s each, {config.batch / step:,.1f} images/s, {300 * config.batch * flops / step / peak:.0f} % "
          f"of the machine; {config.steps:,} steps take about {duration(step * config.steps)}")
    print(f"{name}: this process has used {peak_memory(device) / 1e9:.2f} GB of memory so far; {kept / 1e9:.2f} GB a "
          f"checkpoint, of which {config.keep} to {config.keep + 1} are kept, and the best weights")
    return step * config.steps


def report_overfit(name: str, found: list[float]) -> bool:
    """Print whether eight pairs were overfitted; False if they were not."""
    first, last = float(np.mean(found[:5])), float(np.mean(found[-5:]))
    proven = len(found) >= 15 and last < FALL[name] * first
    verdict = "they are learnt" if proven else (
        "too few steps to judge" if len(found) < 100 else "NOT learnt: something does not work together")
    print(f"{name}: on {PAIRS} pairs alone the loss goes from {first:.4g} to {last:.4g} in {len(found)} steps (below "
          f"{FALL[name]:g} of the first counts): {verdict}")
    return proven or len(found) < 100


def check_autoencoder(experiment: Experiment, model: Autoencoder, source: Source,
                      device: torch.device) -> tuple[bool, float]:
    """Time a few steps of the stage, then overfit eight images, after which ``model`` knows them; (no objection,
    seconds of the stage)."""
    stage, seed = experiment.autoencoder, experiment.seed
    perceptual, _ = perceptual_distance(stage.perceptual, device)
    objective = AutoencoderLoss(stage, perceptual)

    def loss_of(images: torch.Tensor) -> Step:
        return lambda step: objective(model, images, generator(seed, "check", step), 0)["loss"]

    images = image_batch(source, np.arange(stage.train.batch) % len(source)).to(device)
    flops = forward_flops(model, lambda: model.decode_raw(model.moments(images[:1]).mean))
    seconds, _ = run_steps(model, loss_of(images), stage.train, 4)
    cost = report_cost("autoencoder", model, stage.train, seconds, flops, device)
    few = image_batch(source, np.arange(PAIRS) % len(source)).to(device)
    _, found = run_steps(model, loss_of(few), stage.train, 300, FALL["autoencoder"])
    return report_overfit("autoencoder", found), cost


def check_latents(model: Autoencoder, source: Source, device: torch.device, trained: bool) -> bool:
    """Print mean and deviation of the latents of 64 images; for an untrained autoencoder set them to 0 and 1
    instead."""
    images = image_batch(source, np.arange(64) % len(source)).to(device)
    model.eval().requires_grad_(False)
    if not trained:
        model.measure([images])
        return True
    posterior = model.encode(images)
    both = posterior.sample(torch.randn(posterior.mean.shape, device=device))  # (B, C, h, w)
    both = rearrange(both, "b c h w -> c (b h w)")
    mean, std = both.mean(dim=1), both.std(dim=1)
    good = bool((mean.abs() < 10 * STILL).all() and ((std - 1).abs() < 10 * STILL).all())
    print(f"latents: by channel, mean {mean.min():.2f} to {mean.max():.2f}, deviation {std.min():.2f} to "
          f"{std.max():.2f}: " + ("about 0 and 1, as they should be" if good else
                                  "NOT about 0 and 1, the autoencoder is of other images"))
    return good


def check_denoiser(experiment: Experiment, tokenizer: Tokenizer, autoencoder: Autoencoder, source: Source,
                   device: torch.device) -> tuple[bool, float]:
    """Time a few steps of the stage, then overfit eight pairs; (no objection, seconds of the stage)."""
    stage, seed = experiment.denoiser, experiment.seed
    networks = new_networks(stage, seed, device)
    encoded: list[float] = []

    def pairs(count: int) -> PairBatch:
        places = np.arange(count) % min(len(source), stage.images or len(source))
        parts = []
        for begin in range(0, count, PAIRS):
            began = time.perf_counter()
            with torch.no_grad():
                parts.append(autoencoder.encode(image_batch(source, places[begin:begin + PAIRS]).to(device)))
            encoded.append((time.perf_counter() - began) / len(parts[-1].mean))
        captions = caption_batch(source, Places(np.zeros_like(places), places), seed)
        both: Posterior = Posterior(*(torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "logvar")))
        return PairBatch(both.mean.cpu(), both.logvar.cpu(), captions)

    def loss_of(read: PairBatch, batch: int) -> Step:
        denoising = Denoising(stage, tokenizer, seed, device)  # the captions above are whole
        return lambda step: denoising.loss_at(networks, read, step, whole_batch(batch))["loss"]

    piece = max(1, stage.train.batch // stage.train.accumulate)
    read = pairs(piece)
    one = PairBatch(read.mean[:1], read.logvar[:1], read.captions[:1])
    flops = forward_flops(networks, lambda: loss_of(one, 1)(0))
    seconds, _ = run_steps(networks, loss_of(read, piece), stage.train, 4)
    cost = report_cost("denoiser", networks, stage.train, [s * stage.train.accumulate for s in seconds], flops, device)
    count = min(len(source), stage.images or len(source))
    if stage.cache:
        before = float(np.median(encoded)) * count
        print(f"denoiser: encoding {count:,} images before the first step takes about {duration(before)}")
        cost += before
    _, found = run_steps(networks, loss_of(pairs(PAIRS), PAIRS), stage.train, 300, FALL["denoiser"])
    return report_overfit("denoiser", found), cost
