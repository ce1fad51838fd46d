"""The figures of docs/data.md: images/s and memory of the loader, and latents read from the cache against made anew.

    python -m benchmarks.loader [--run runs/emoji] [--size 256] [--images 1000] [--samples 10000]

Writes its own images to a temporary folder: JPEG of 640 x 480, with the detail of photographs. One thread in every
process. Where one process does the work it also gives the processor's time an image, which other programs on the
machine change less. Takes some minutes.
"""
import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.cache import LatentCache
from data.catalog import DataConfig, build_source
from data.command import splits_of
from data.images.folder import FolderConfig
from data.images.shards import ShardsConfig
from data.loader import Loader
from data.order import Order
from data.source import Source, image_batch
from data.write_shards import write_shards
from files.images import to_unit
from files.weights import load_weights
from model.autoencoder import Autoencoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from training.experiment import load_experiment

BATCH = 32


def write_images(root: Path, count: int) -> None:
    """JPEG files of 640 x 480 with a spectrum that falls as 1 / frequency, each with a .txt."""
    frequency = np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(640)[None]) + 1 / 640  # (480, 321)

    def write(number: int) -> None:
        noise = np.random.default_rng(number).normal(size=(3, 480, 640))
        waves = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(480, 640))  # (3, 480, 640)
        pixels = np.clip(waves / waves.std() * 50 + 128, 0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(root / f"{number:06d}.jpg", quality=90)
        (root / f"{number:06d}.txt").write_text(f"image number {number}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(count)))


def cpu_seconds() -> float:
    """Processor time of this process in seconds."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def memory(loader: Loader) -> float:
    """MB of this process and its workers; pages that several share count once (PSS)."""
    processes = [os.getpid(), *(worker.pid for worker in getattr(loader._ahead, "_workers", ()))]
    lines = [Path(f"/proc/{number}/smaps_rollup").read_text().splitlines() for number in processes]
    return sum(int(line.split()[1]) for each in lines for line in each if line.startswith("Pss:")) / 1024


def show_throughput(name: str, source: Source, workers: int, samples: int) -> None:
    """Print images/s and processor's time an image over ``samples`` items, the workers' start not counted."""
    loader = Loader(source, Order(len(source), 0), BATCH, 0, workers)
    loader.batch_at(0)
    steps = max(1, samples // BATCH)
    began, used = time.perf_counter(), cpu_seconds()
    for step in range(1, steps + 1):
        loader.batch_at(step)
    seconds = time.perf_counter() - began
    loader.close()
    work = f", {1000 * (cpu_seconds() - used) / (steps * BATCH):.2f} ms of processor an image" if not workers else ""
    print(f"{name:8} {workers} workers: {steps * BATCH / seconds:7.1f} images/s{work}", flush=True)


def show_memory(name: str, source: Source, workers: int, samples: int) -> None:
    """Print the memory at every 1,000 of ``samples`` items."""
    with Loader(source, Order(len(source), 0), 20, 0, workers) as loader:
        found = []
        for step in range(samples // 20):
            loader.batch_at(step)
            if (step + 1) % 50 == 0:
                found.append(memory(loader))
    print(f"{name:8} {workers} workers, MB at every 1,000 of {samples} items: "
          + " ".join(f"{value:.0f}" for value in found), flush=True)


def show_speed(name: str, batches: Iterator[int], what: str) -> None:
    """Print images/s of an iterator that yields the number of images done at a time; the first is a warm-up."""
    next(batches)
    began, used = time.perf_counter(), cpu_seconds()
    done = sum(batches)
    seconds, work = time.perf_counter() - began, cpu_seconds() - used
    print(f"{name:26} {done / seconds:9.1f} images/s, {1000 * work / done:8.3f} ms of processor an image{what}",
          flush=True)


@torch.no_grad()
def show_latents(run: Path, folder: Path, count: int) -> None:
    """Print images/s of latents, read and encoded, against the cache of the same images, and images/s of a training
    step of the run's denoiser, which they supply."""
    experiment = load_experiment(run / "config.yaml", [])
    source = build_source(experiment.data, "train")
    autoencoder = Autoencoder(experiment.autoencoder.model).eval()
    load_weights(autoencoder, run / "autoencoder.safetensors")

    def encode(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = autoencoder.encode(image_batch(source, indices))
        return posterior.mean, posterior.logvar

    order = Order(count, 0)
    cache = LatentCache(folder, {"benchmark": str(run)}, count, encode, BATCH)

    def uncached() -> Iterator[int]:
        loader = Loader(source, order, BATCH, 0)
        for step in range(count // BATCH):
            autoencoder.encode(to_unit(loader.batch_at(step).images))
            yield BATCH

    def cached() -> Iterator[int]:
        for step in range(50 * count // BATCH):
            cache.moments(order.indices(step, BATCH))
            yield BATCH

    show_speed("latents, encoded anew", uncached(), "")
    show_speed("latents, from the cache", cached(), "")
    show_step(experiment.denoiser, cache, order)


@torch.enable_grad()
def show_step(config, cache: LatentCache, order: Order) -> None:
    """Print images/s of forward and backward of text encoder and UNet, in fp32, on latents of the cache."""
    unet, text = UNet(config.unet), TextEncoder(config.text_encoder)
    ids = torch.randint(3, config.text_encoder.vocab_size, (BATCH, 16))
    mask = torch.ones(BATCH, 16, dtype=torch.bool)

    def steps() -> Iterator[int]:
        for step in range(5):
            x_t = cache.moments(order.indices(step, BATCH))[0]
            unet(x_t, torch.full((BATCH,), 500), text(ids, mask), mask).square().mean().backward()
            yield BATCH

    show_speed("denoiser, a training step", steps(), " (forward and backward)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", help="run folder whose autoencoder and denoiser are measured; none: left out")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=1000, help="files that are written")
    parser.add_argument("--samples", type=int, default=10_000, help="items over which memory is watched")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "images").mkdir()
        write_images(root / "images", options.images)
        shares = {"size": options.size, "validation": 0.0, "test": 0.0}
        write_shards(splits_of(str(root / "images")), root / "shards", 250)
        sources = {"folder": DataConfig(source="folder", folder=FolderConfig(str(root / "images"), **shares)),
                   "shards": DataConfig(source="shards", shards=ShardsConfig(str(root / "shards"), **shares))}
        if options.run:
            show_latents(Path(options.run), root / "cache", 512)
        for name, config in sources.items():
            for workers in (0, 1, 2):
                show_throughput(name, build_source(config, "train"), workers, options.images)
        for name, config in sources.items():
            show_memory(name, build_source(config, "train"), 2, options.samples)


if __name__ == "__main__":
    main()
