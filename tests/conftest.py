"""One tiny system, trained once a session by the real command, for the tests of training, sampling and evaluation."""
import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from emoji_packages import SIZE, write_packages

import train
from data.emoji.build import build

torch.set_num_threads(1)  # the networks of the tests are too small to share; threads that wait for each other cost more
TRAIN = {"batch": 8, "log_every": 1, "validate_every": 6, "preview_every": 12, "checkpoint_every": 4,
         "optim": {"learning_rate": 1e-3, "warmup": 2}}
TINY = {
    "name": "tiny",
    "seed": 3,
    "data": {"source": "shapes", "shapes": {"size": 32, "train": 64, "validation": 12, "test": 12}},
    "tokenizer": {"vocab_size": 300, "length": 24},
    "autoencoder": {
        "model": {"latent_channels": 4, "channels": [16], "blocks": 1, "mid_attention": False, "stem": 4,
                  "norm_groups": 4},
        "validation": 12, "features": "none", "edge": 0.5, "train": {**TRAIN, "steps": 12},
    },
    "denoiser": {
        "unet": {"in_channels": 4, "out_channels": 4, "channels": [16, 32], "blocks": 1, "attention": [False, True],
                 "head_width": 16, "context_width": 16, "norm_groups": 4},
        "text_encoder": {"vocab_size": 300, "length": 24, "width": 16, "layers": 1, "heads": 1, "mlp_width": 32,
                         "causal": False},
        "schedule": {"kind": "cosine", "zero_terminal_snr": True},
        "images": 32, "validation": 12, "train": {**TRAIN, "steps": 12},
    },
    "sampling": {"sampler": "ddim", "steps": 3, "guidance": {"scale": 3.0}},
}


@pytest.fixture(scope="session")
def tiny() -> dict:
    """The configuration of the tiny system as plain YAML data; a copy, to be changed freely."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny) -> Path:
    """The same as a YAML file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_config) -> Path:
    """The run folder of an uninterrupted training; read it, change copies only."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([str(tiny_config), f"run={path}"])
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A folder with half a megabyte of room; skips where nothing can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)],
                                       capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: a failed writer may still hold its file


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Made-up packages of emoji: (folder of .tgz files, their table)."""
    folder = tmp_path_factory.mktemp("packages")
    return folder, write_packages(folder)


@pytest.fixture(scope="module")
def root(packages, tmp_path_factory):
    """The emoji data set that is built from the made-up packages."""
    out = tmp_path_factory.mktemp("data") / "emoji"
    build(out, SIZE, packages[0], packages[1], workers=1)
    return out
