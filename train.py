"""Train the stages of a config in order: python train.py configs/shapes.yaml [run=DIR] [key.path=value ...]

A finished stage is skipped, an interrupted one continues. Ctrl-C or SIGTERM saves the state first. With several
processes: torchrun --nproc-per-node 8 train.py CONFIG
"""
import argparse
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from data.catalog import build_source, data_key
from data.source import Source
from data.tokenizer import Tokenizer
from files.config import from_dict, read_yaml, to_dict
from files.run_folder import RunFolder
from files.sheets import save_grid
from files.weights import load_weights
from files.whole import write_text
from model.autoencoder import Autoencoder
from model.device import default_device, frozen, placed
from pipeline.system import TextToImage
from training.check import check
from training.distributed import Processes, ProcessLost, leave, processes
from training.experiment import Experiment, load_experiment
from training.loop import Interrupted, TrainingError
from training.moderation.stage import load_config, train_moderator
from training.stages.autoencoder import train_autoencoder
from training.stages.clip import train_clip
from training.stages.denoiser import Networks, train_denoiser

CORPUS = 50_000  # items whose captions the tokenizer is fitted to


def train_tokenizer(experiment: Experiment, source: Source, run: RunFolder) -> None:
    """Fit the byte-pair encoding to the captions of the training split and write tokenizer.json."""
    items = range(min(len(source), CORPUS))
    tokenizer = Tokenizer.train((caption for i in items for caption in source.captions(i)), experiment.tokenizer)
    cut = sum(bool(tokenizer.lost(caption)) for i in items[:2000] for caption in source.captions(i))
    write_text(run.path / "tokenizer.json", tokenizer.to_json())
    run.record(tokenizer={"vocab_size": tokenizer.vocab_size, "length": tokenizer.length, "cut_of_first_2000": cut})
    if cut:
        print(f"warning: {cut} captions of the first 2000 items are longer than tokenizer.length = {tokenizer.length}")


def run_stage(stage: str, experiment: Experiment, run: RunFolder, device: torch.device, workers: Processes) -> None:
    """Train one stage to its end and write what it leaves in the run folder."""
    unreadable = run.path / "unreadable.jsonl"
    source = build_source(experiment.data, "train", unreadable)
    validation = build_source(experiment.data.squares, "validation", unreadable)
    for split, items in (("train", source), ("validation", validation)):
        if not len(items):
            raise ValueError(f"data.{experiment.data.source}: its {split} split is empty; valid: at least one item")
    if stage == "tokenizer":
        return train_tokenizer(experiment, source, run) if workers.main else None
    if stage == "autoencoder":
        return train_autoencoder(experiment.autoencoder, source, validation, run, experiment.seed, device, workers)
    if stage == "clip":
        return train_clip(experiment.clip, source, validation, run, device, workers)
    run.require("tokenizer", "autoencoder")
    tokenizer = Tokenizer.load(run.path / "tokenizer.json")
    autoencoder = Autoencoder(experiment.autoencoder.model)
    load_weights(autoencoder, run.weights("autoencoder"))
    frozen(placed(autoencoder, device))

    def preview(networks: Networks, step: int) -> None:
        system = TextToImage(experiment.system, tokenizer, networks.text_encoder, networks.unet, autoencoder)
        items = range(min(16, len(validation)))
        prompts = list(experiment.preview_prompts) or [validation.captions(i)[0] for i in items]
        images = system.images(prompts, range(len(prompts)))
        save_grid(images, run.path / "samples" / f"denoiser_{step:06d}.png", prompts,
                  title=f"step {step}, guidance {experiment.sampling.guidance.scale:g}, {experiment.sampling.steps} "
                        f"{experiment.sampling.sampler} steps, averaged weights")

    train_denoiser(experiment.denoiser, source, validation, data_key(experiment.data), tokenizer, autoencoder, run,
                   experiment.seed, device, preview, workers)


def main(arguments: list[str]) -> None:
    """Parse the command line and run what is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file in configs/, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value",
                        help="any key of the config; run=DIR names the run folder (runs/NAME)")
    parser.add_argument("--check", action="store_true", help="say what speaks for and against the run, train nothing")
    # flags first, of which none has a value: argparse wants the overrides in one piece
    options = parser.parse_args(sorted(arguments, key=lambda text: not text.startswith("-")))
    folders = [text.partition("=")[2] for text in options.overrides if text.startswith("run=")]
    overrides = [text for text in options.overrides if not text.startswith("run=")]
    if "" in folders:
        raise ValueError("run= is empty; valid: run=DIR, the run folder to write")
    if read_yaml(options.config).get("stages") == ["moderator"]:  # on text alone, without the rest
        return train_moderation(options.config, overrides, folders[-1] if folders else None, options.check)
    experiment = load_experiment(options.config, overrides)
    path = Path(folders[-1] if folders else Path("runs") / experiment.name)
    if options.check:
        if not check(experiment, path, default_device()):
            raise SystemExit(1)
        return
    with processes() as workers, contextlib.ExitStack() as stack:
        with workers.main_first():
            run = RunFolder.create(path, to_dict(experiment), lambda data: to_dict(from_dict(Experiment, data)),
                                   workers.main)
            stack.enter_context(run.locked())
        run_stages(experiment, run, workers)


def train_moderation(config: str, overrides: list[str], folder: str | None, check: bool) -> None:
    """Train the classifier of prompts and write it into the run folder."""
    if check:
        raise ValueError("--check is for stages that draw pictures; valid: without it, training takes minutes")
    experiment = load_config(config, overrides)
    path = Path(folder or Path("runs") / experiment.name)
    train_moderator(experiment.moderator, experiment.data, path, experiment.seed)
    print(f"moderator: written to {path}; it is safety/moderation.safetensors that `python moderate.py` reads")


def run_stages(experiment: Experiment, run: RunFolder, workers: Processes) -> None:
    """Train what is not finished."""
    key = data_key(experiment.data)
    run.record(seed=experiment.seed, data=key, data_sha256=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
               processes=workers.world)
    for stage in experiment.stages:
        finished = workers.from_main(run.finished(stage))
        if finished and workers.main:
            print(f"{stage}: finished before, skipped")
        if finished:
            continue
        began = time.perf_counter()
        run_stage(stage, experiment, run, workers.device(), workers)
        workers.from_main()  # what the main process writes last is there
        if workers.main:
            print(f"{stage}: done in {time.perf_counter() - began:.0f} s")
    if workers.main:
        how = f"; sample with: python sample.py --run {run.path} \"a prompt\""
        print(f"trained: {run.path}{how if 'denoiser' in experiment.stages else ''}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        leave()
    except (ValueError, OSError, TrainingError, ProcessLost) as error:
        raise SystemExit(f"error: {error}") from None
    except (Interrupted, KeyboardInterrupt) as error:
        raise SystemExit(f"stopped: {error or 'by the keyboard, before the first checkpoint'}") from None
