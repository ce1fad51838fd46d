"""Numbers that a refactoring must not change: losses of a tiny run, its weights, and a sampled image.

tests/golden.json was written by ``python tests/test_golden.py`` on the machine that it names, with one thread, in fp32.
On a machine with the same version of torch and the same vector instructions every byte is compared. On others the
order in which sums are taken differs: there the losses are compared within a thousandth and the image within a few
levels of 255. Whoever changes numbers on purpose writes the file anew and says why in the commit.
"""
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import sample
import train

GOLDEN = Path(__file__).with_name("golden.json")
TRAIN = {"batch": 8, "steps": 20, "log_every": 1, "validate_every": 10, "preview_every": 20, "checkpoint_every": 10,
         "precision": "fp32", "optim": {"optimizer": "muon", "learning_rate": 2e-3, "warmup": 2}}
CONFIG = {
    "name": "golden", "seed": 3,
    "data": {"source": "shapes", "shapes": {"size": 32, "train": 64, "validation": 12, "test": 12}},
    "tokenizer": {"vocab_size": 300, "length": 24},
    "autoencoder": {
        "model": {"latent_channels": 4, "channels": [16], "blocks": 1, "mid_attention": False, "stem": 4,
                  "norm_groups": 4},
        "validation": 12, "features": "none", "edge": 0.5, "train": TRAIN},
    "denoiser": {
        "unet": {"in_channels": 4, "out_channels": 4, "channels": [16, 32], "blocks": 1, "attention": [False, True],
                 "head_width": 16, "context_width": 16, "norm_groups": 4},
        "text_encoder": {"vocab_size": 300, "length": 24, "width": 16, "layers": 1, "heads": 1, "mlp_width": 32,
                         "causal": False},
        "schedule": {"kind": "cosine", "zero_terminal_snr": True}, "images": 32, "validation": 12, "train": TRAIN},
    "sampling": {"sampler": "ddim", "steps": 3, "guidance": {"scale": 3.0}},
}


def machine() -> dict[str, str]:
    """What the bytes depend on beside the code."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = " ".join(known.get(key, "") for key in ("vendor_id", "cpu family", "model", "model name"))
    units = [flag for flag in known.get("flags", "").split() if flag.startswith(("avx512_", "amx"))]
    return {"torch": torch.__version__.split("+")[0], "vectors": torch.backends.cpu.get_cpu_capability(),
            "processor": f"{platform.machine()} {name}".strip(), "units": " ".join(units)}


def made(folder: Path) -> dict:
    """Train the tiny run, sample one image under --exact; the numbers that came of it, and the image (H, W, 3)."""
    config = folder / "golden.yaml"
    config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    train.main([str(config), f"run={folder / 'run'}"])
    sample.main(["a red star", "--run", str(folder / "run"), "--exact", "--seed", "5", "--out", str(folder / "out")])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    [path] = (folder / "out").glob("00000_*.png")
    image = np.array(Image.open(path))
    return {
        "machine": machine(),
        "losses": {stage: [row["loss"] for row in rows if row["stage"] == stage and "loss" in row]
                   for stage in ("autoencoder", "denoiser")},
        "weights": {name: hash_of_weights(folder / "run" / f"{name}.safetensors")
                    for name in ("autoencoder", "text_encoder", "denoiser")},
        "image_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "image": image.tolist()}


def hash_of_weights(path: Path) -> str:
    """SHA-256 over names and values; the file's own header may change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict:
    return made(tmp_path_factory.mktemp("golden"))


def test_the_losses_of_twenty_steps(golden, now):
    for stage, losses in golden["losses"].items():
        assert len(losses) == 20 and now["losses"][stage] == pytest.approx(losses, rel=1e-3)


def test_the_sampled_image(golden, now):
    difference = np.abs(np.array(now["image"], dtype=int) - np.array(golden["image"], dtype=int))
    assert difference.mean() < 2 and difference.max() <= 16


def test_every_byte_on_a_machine_of_the_same_kind(golden, now):
    if golden["machine"] != now["machine"]:
        pytest.skip(f"written on {golden['machine']}, this is {now['machine']}")
    assert now["losses"] == golden["losses"]
    assert now["weights"] == golden["weights"]
    assert now["image_sha256"] == golden["image_sha256"]


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(made(Path(folder))) + "\n", encoding="utf-8")
