"""Everything a measurement needs to sample, in batches that are kept: a stopped measurement goes on where it was.

A batch is a file in a folder named after weights, prompts, seeds, settings and arithmetic; beside it stands which
revision of the code drew it, where and under which PyTorch. Several processes take turns. Axis letters: N samples, H W
size.
"""
import hashlib
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusion.sampling import SamplingConfig
from files.images import to_uint8
from files.run_folder import environment
from files.whole import sha256_of, whole_file, write_text
from pipeline.system import TextToImage, with_options
from scoring.held_out import Prompts
from training.distributed import ALONE, Processes

BATCH = 64  # samples at a time


@dataclass(frozen=True)
class Drawn:
    """Samples uint8 (N, 3, H, W) of the test prompts, and of the validation prompts at other settings."""

    prompts: Prompts
    config: SamplingConfig
    images: torch.Tensor
    validation: Prompts
    guidance: list[tuple[float, torch.Tensor]] = field(default_factory=list)  # (scale, samples)
    steps: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (steps, samples)


class Sampler:
    """sampler(prompts, config, name) -> samples uint8 (N, 3, H, W), drawn once and read back afterwards."""

    def __init__(self, system: TextToImage, folder: str | Path, precision: str = "fp32", processes: Processes = ALONE):
        self.system, self.folder, self.precision, self.processes = system, Path(folder), precision, processes
        self.weights = {name: sha256_of(path)[:16] for name, path in sorted(system.files.items())}
        self.made: dict[str, None] = {}  # what drew the samples of this measurement, kept ones among them

    def __call__(self, prompts: Prompts, config: SamplingConfig, name: str) -> torch.Tensor:
        """Every process draws its part of the batches and reads all of them. ``name`` is for the progress bar."""
        about = {"weights": self.weights, "captions": prompts.captions, "seeds": prompts.seeds,
                 "config": asdict(config), "precision": self.precision, "batch": BATCH}
        folder = self.folder / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        starts = list(range(0, len(prompts), BATCH))
        gone = {start for start in starts
                if batch_of(folder / f"{start:06d}.npy", min(BATCH, len(prompts) - start)) is None}
        missing = [start for start in starts[self.processes.rank::self.processes.world] if start in gone]
        for start in tqdm(missing, desc=name, unit="batch", disable=not (missing and self.processes.main),
                          mininterval=0.5 if sys.stderr.isatty() else 30):
            part = slice(start, start + BATCH)
            images = self.drawn(prompts.captions[part], prompts.seeds[part], config)
            with whole_file(folder / f"{start:06d}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, images.numpy())
        if self.processes.main:
            self.made |= dict.fromkeys(makers(folder, bool(gone)))
        self.processes.wait()
        found = [batch_of(folder / f"{start:06d}.npy", min(BATCH, len(prompts) - start)) for start in starts]
        return torch.cat([part for part in found if part is not None])

    def drawn(self, captions: Sequence[str], seeds: Sequence[int], config: SamplingConfig) -> torch.Tensor:
        """Samples uint8 (N, 3, H, W); raises ValueError for networks that draw what is not finite: as a picture it
        would be black, and be measured as one."""
        with torch.autocast(self.system.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            latents = self.system.latents(captions, seeds, config)
            images = self.system.decode(latents)
        if not (torch.isfinite(latents).all() and torch.isfinite(images).all()):
            raise ValueError(f"the samples of {self.folder.parent.parent.name} are not finite ({config.sampler}, "
                             f"{config.steps} steps, guidance {config.guidance.scale:g}): its weights are damaged, or "
                             "the sampler diverges; valid: finite ones")
        return to_uint8(images).cpu()


def makers(folder: Path, now: bool) -> list[str]:
    """What drew the batches of a folder; ``now``: some were drawn just now, by this code."""
    path = folder / "made.json"
    try:
        known = [str(line) for line in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        known = []
    here = environment()
    line = f"{here['revision']}, torch {here['versions']['torch']}, {here['device']}"
    if now and line not in known:
        known.append(line)
        write_text(path, json.dumps(known))
    return known


def batch_of(path: Path, count: int) -> torch.Tensor | None:
    """The kept batch of ``count`` samples, None when it is missing, damaged or not whole."""
    try:
        array = np.load(path, allow_pickle=False)
        whole = array.dtype == np.uint8 and array.ndim == 4 and array.shape[:2] == (count, 3)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        return None
    return torch.from_numpy(array) if whole else None


def at_scales(sampler: Sampler, prompts: Prompts, scales: Sequence[float],
              config: SamplingConfig) -> list[tuple[float, torch.Tensor]]:
    """(scale, samples) at each guidance scale."""
    return [(scale, sampler(prompts, with_options(config, scale=scale), f"validation, guidance {scale:g}"))
            for scale in scales]


def at_steps(sampler: Sampler, prompts: Prompts, steps: Sequence[int],
             config: SamplingConfig) -> list[tuple[int, torch.Tensor]]:
    """(steps, samples) with so many sampler steps."""
    return [(count, sampler(prompts, with_options(config, steps=count), f"validation, {count} steps"))
            for count in steps]
