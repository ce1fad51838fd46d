"""Every shipped config loads, its networks fit together at full size, and its stages run once on a few images."""
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from emoji_packages import emoji_folder
from PIL import Image

import sample
import train
from diffusion.schedule import Schedule
from model.autoencoder import Autoencoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from training.experiment import STAGES, load_experiment

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml")
                 if "\nautoencoder:" in path.read_text(encoding="utf-8"))  # those that draw images
LARGEST = 150e6  # parameters that are stepped as they are; a larger config needs an entry in SMALLER
TEXT = ["denoiser.text_encoder.width=64", "denoiser.text_encoder.heads=2", "denoiser.text_encoder.layers=2",
        "denoiser.text_encoder.mlp_width=128", "denoiser.unet.context_width=64"]
SMALLER: dict[str, list[str]] = {  # the same shape with fewer channels, on smaller images
    "coco_256": [*TEXT, "autoencoder.model.channels=[32, 32, 64]", "denoiser.unet.channels=[64, 64, 128]",
                 "data.folder.size=64"],
    "sd15_512": [*TEXT, "autoencoder.model.channels=[32, 32, 64, 64]", "denoiser.unet.channels=[32, 64, 64, 64]",
                 "data.shards.size=64"],
}
PHOTOGRAPHS = {"flowers102": "folder", "coco_captions": "folder", "shards": "shards"}  # what stands in for a source
ONCE = [*(f"{stage}.train.{setting}" for stage in ("autoencoder", "denoiser", "student")
          for setting in ("workers=0", "accumulate=1", "parallel=ddp", "compile=false", "snapshots.every=0")),
        "autoencoder.train.steps=1", "autoencoder.train.batch=2", "autoencoder.validation=2", "denoiser.train.steps=1",
        "denoiser.train.batch=2", "denoiser.images=4", "denoiser.validation=2", "student.train.steps=1",
        "student.train.batch=2", "student.images=4", "student.validation=2", "sampling.steps=2",
        "preview_prompts=[a red star, two hats]"]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def photographs(root: Path, kind: str) -> list[str]:
    """Two dozen captioned images as a folder or as a tar; the overrides that name it."""
    root.mkdir()
    draw = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(draw.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(root / f"{number:03d}.png")
        (root / f"{number:03d}.txt").write_text(f"picture number {number}, of nothing")
    if kind == "shards":
        files = sorted(root.iterdir())
        with tarfile.open(root / "00000.tar", "w") as tar:
            for file in files:
                tar.add(file, file.name)
                file.unlink()
    return [f"data.source={kind}", f"data.{kind}.root={root}", f"data.{kind}.validation=0.3",
            f"data.{kind}.test=0.3"]


def networks(experiment) -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        found: dict[str, torch.nn.Module] = {"autoencoder": Autoencoder(experiment.autoencoder.model)}
        if {"denoiser", "student"} & {*experiment.stages}:
            found |= {"unet": UNet(experiment.denoiser.unet), "text": TextEncoder(experiment.denoiser.text_encoder)}
        return found


def test_there_are_configs():
    assert {"shapes", "emoji", "flowers102_64", "coco_256", "sd15_512"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", ["flowers102_64", "coco_256", "sd15_512"])
def test_what_has_not_been_run_says_what_is_an_estimate(name):
    head = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    for word in ("Memory", "Speed", "Cost"):
        assert re.search(rf"^# {word}: +estimated", head, re.MULTILINE), word
    assert re.search(r"^# Expected: not run", head, re.MULTILINE)


def test_it_opens_with_its_command_its_cost_and_its_result(path):
    head = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines() if line)
    assert f"train.py configs/{path.name}" in head
    for word in ("Command", "Cost", "Expected"):
        assert re.search(rf"^# {word}: +\S", head, re.MULTILINE), word


def test_it_loads_and_its_networks_fit_together_at_full_size(path):
    """On the meta device: every shape is computed, nothing else."""
    experiment = load_experiment(path)
    assert experiment.name == path.stem and set(experiment.stages) <= set(STAGES)
    found, size, batch = networks(experiment), experiment.data.size, 2
    images = torch.empty(batch, 3, size, size, device="meta")
    posterior = found["autoencoder"].encode(images)
    assert posterior.mean.shape == (batch, *experiment.latent_shape)
    assert found["autoencoder"].decode(posterior.mean).shape == images.shape
    if "denoiser" not in found:
        return
    ids = torch.zeros(batch, experiment.tokenizer.length, dtype=torch.int64, device="meta")
    context = found["text"](ids, torch.ones_like(ids, dtype=torch.bool))
    t = torch.zeros(batch, device="meta")
    assert found["unet"](posterior.mean, t, context).shape == posterior.mean.shape
    schedule = Schedule(experiment.denoiser.schedule)
    assert len(schedule.timesteps(experiment.sampling.steps, experiment.sampling.spacing)) == experiment.sampling.steps


def test_it_is_stepped_once_and_sampled(path, tmp_path):
    """The real stages with the real networks, one step on two images each, then the real command for sampling."""
    experiment = load_experiment(path)
    size = sum(p.numel() for network in networks(experiment).values() for p in network.parameters())
    assert size < LARGEST or path.stem in SMALLER, f"{size / 1e6:.0f} million parameters: shrink it in SMALLER"
    overrides = [*ONCE, *SMALLER.get(path.stem, [])]
    if experiment.data.source == "emoji":
        overrides += [f"data.emoji.root={emoji_folder(tmp_path / 'emoji', experiment.data.size)}",
                      "data.emoji.held_out_scenes=4"]
    elif experiment.data.source in PHOTOGRAPHS:
        kind = PHOTOGRAPHS[experiment.data.source]
        overrides += photographs(tmp_path / "photographs", kind)
        if not any(text.startswith(f"data.{kind}.size=") for text in overrides):
            overrides.append(f"data.{kind}.size={experiment.data.size}")
    else:
        overrides += ["data.shapes.train=40", "data.shapes.validation=4", "data.shapes.test=4"]
    run = tmp_path / "run"
    if experiment.start_from:  # the run of another config, or what was released of it
        teacher = ROOT / "configs" / f"{Path(experiment.start_from).name.replace('-', '_')}.yaml"
        train.main([str(teacher), f"run={tmp_path / 'teacher'}", *overrides])
        overrides.append(f"start_from={tmp_path / 'teacher'}")
    train.main([str(path), f"run={run}", *overrides])
    for stage in set(experiment.stages) & {"autoencoder", "denoiser", "student"}:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss, validation = (line for line in lines if line["stage"] == stage)
        assert loss["step"] == 1 and np.isfinite(loss["loss"]) and loss["gradient_norm"] > 0
        assert all(np.isfinite(value) for key, value in validation.items() if key.startswith("validation_"))
    if not {"denoiser", "student"} & {*experiment.stages}:
        return
    sample.main(["--run", str(run), "--out", str(tmp_path / "out"), "a red star", "--steps", "2"])
    assert len(list((tmp_path / "out").glob("*_seed0.png"))) == 1
