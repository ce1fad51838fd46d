"""Stable Diffusion 1.x at its full size, with random weights: it is read and sampled within a stated memory."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from clip_vocabulary import write_vocabulary

from files.images import read_image

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
LIMIT = 14 * 2**30  # bytes of memory
DISK = 6 * 2**30  # bytes in the temporary folder: weights 4.3 GB
SIZES = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def published_networks() -> dict[str, torch.nn.Module]:
    """The networks of diffusers and transformers in the configuration of SD-1.5; shapes without content."""
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                projection_dim=768)),
        }


def write_random(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """A safetensors file of random tensors in fp32, written one by one: the memory of the largest.

    The format: length of the header in 8 bytes, the header as JSON, then the numbers.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) > 1:
                tensor = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
            else:
                tensor = torch.full(shape, float("norm" in name and name.endswith("weight")))
            tensor.numpy().tofile(file)


def write_published(folder: Path) -> None:
    """A folder of SD-1.5 as diffusers lays it out."""
    for name, network in published_networks().items():
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        assert sum(shape.numel() for shape in shapes.values()) == SIZES[name]
        (folder / name).mkdir(parents=True)
        if name == "text_encoder":
            network.config.save_pretrained(folder / name)
        else:
            network.save_config(folder / name)
        write_random(folder / name / f"{FILES[name]}.safetensors", shapes)
    diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                            steps_offset=1).save_pretrained(folder / "scheduler")
    write_vocabulary(folder / "tokenizer")


def run(arguments: list[str]) -> tuple[int, str, float, int]:
    """(exit status, output, seconds, peak memory in bytes) of a Python program."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read().decode(errors="replace")
    _, status, used = os.wait4(process.pid, 0)  # what this process used, not the most of all before it
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return process.returncode, said, time.perf_counter() - began, peak


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no account of memory on this system")
def test_a_full_size_model_is_sampled_within_its_memory(tmp_path, capsys):
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {DISK >> 30} GiB of disk")
    folder, out = tmp_path / "sd1", tmp_path / "out"
    try:
        write_published(folder)
        weights = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        assert weights > 4 * sum(SIZES.values())
        code, said, seconds, peak = run(["sample.py", "a photo of a small red star", "--pretrained", str(folder),
                                         "--steps", "2", "--size", "256", "--out", str(out)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # temporary folders are kept for three runs
    with capsys.disabled():
        print(f"\nfull size: {weights / 2**30:.2f} GiB of weights, {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
    assert code == 0, said
    image = read_image(out / "00000_a-photo-of-a-small-red-star_seed0.png")
    assert image.shape == (3, 256, 256) and image.float().std() > 1
    assert 4 * SIZES["unet"] < peak <= LIMIT
