"""Calls of sample.py and what they leave, for the tests of its tasks."""
import json
from pathlib import Path

import numpy as np
from PIL import Image

import sample

PROMPT = "a small red star"


def draw(run: Path, out: Path, *arguments: str) -> dict[str, Path]:
    """Call sample.py; the files it wrote by name."""
    assert sample.main(["--run", str(run), "--out", str(out), "--steps", "3", *arguments]) == 0
    return {path.name: path for path in sorted(Path(out).iterdir()) if path.name != "results.jsonl"}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def parameters(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["parameters"])


def given_images(folder: Path) -> dict[str, str]:
    """Images to start from, good and bad, by name."""
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "INIT.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[5:20, 9:23] = 255  # on no boundary of the latent
    Image.fromarray(mask).save(folder / "MASK.png")
    Image.fromarray(mask[:16]).save(folder / "SMALL.png")
    (folder / "TEXT.png").write_text("no image")
    (folder / "CUT.png").write_bytes((folder / "INIT.png").read_bytes()[:900])
    Image.fromarray(np.zeros((32, 32), dtype=np.float32)).save(folder / "DEEP.tif")
    return {path.stem: str(path) for path in folder.iterdir()}
