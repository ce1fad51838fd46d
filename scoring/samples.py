"""Everything a measurement needs to sample, in batches that are kept: a stopped measurement continues where it was.

A batch is a file in a folder that is named after weights, prompts, seeds, settings and arithmetic. Beside the batches
stands which revision of the code drew them, on which device and under which PyTorch. Several processes take turns.
Axis letters: N samples, H W size.
"""
import hashlib
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
class Samples:
    """Samples of the test prompts, ``images`` uint8 (N, 3, H, W), and of the validation prompts at other settings.

    ``by_scale`` and ``by_num_steps`` hold (setting, samples uint8 (N, 3, H, W)) of the validation prompts;
    ``scale_scores`` are the scores that the guidance scale was chosen by, a row a scale, empty where none was chosen.
    """

    prompts: Prompts
    config: SamplingConfig
    images: torch.Tensor
    validation: Prompts
    by_scale: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    by_num_steps: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    scale_scores: list[dict[str, Any]] = field(default_factory=list)


class SampleStore:
    """Draws samples once and keeps them in ``folder``, from which later calls read them."""

    def __init__(self, system: TextToImage, folder: str | Path, precision: str = "fp32", processes: Processes = ALONE):
        self.system, self.folder, self.precision, self.processes = system, Path(folder), precision, processes
        self.weights = {name: sha256_of(path)[:16] for name, path in sorted(system.files.items())}
        self.makers: dict[str, None] = {}  # what drew the samples of this measurement, kept ones included

    def samples(self, prompts: Prompts, config: SamplingConfig, label: str) -> torch.Tensor:
        """Samples of the prompts, uint8 (N, 3, H, W).

        Every process must call this: each draws its part of the batches and reads all of them. ``label`` is written
        before the progress bar. Raises ValueError for samples that are not finite.
        """
        about = {"weights": self.weights, "captions": prompts.captions, "seeds": prompts.seeds,
                 "config": asdict(config), "precision": self.precision, "batch": BATCH}
        folder = self.folder / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        sizes = {start: min(BATCH, len(prompts) - start) for start in range(0, len(prompts), BATCH)}
        gone = {start for start, size in sizes.items() if read_batch(batch_path(folder, start), size) is None}
        missing = [start for start in list(sizes)[self.processes.rank::self.processes.world] if start in gone]
        for start in tqdm(missing, desc=label, unit="batch", disable=not (missing and self.processes.main),
                          mininterval=0.5 if sys.stderr.isatty() else 30):
            part = slice(start, start + BATCH)
            images = self.draw_batch(prompts.captions[part], prompts.seeds[part], config)
            with whole_file(batch_path(folder, start)) as temporary, open(temporary, "wb") as file:
                np.save(file, images.numpy())
        if self.processes.main:
            self.makers |= dict.fromkeys(makers_of(folder, drawn_now=bool(gone)))
        self.processes.wait()
        found = [read_batch(batch_path(folder, start), size) for start, size in sizes.items()]
        return torch.cat([part for part in found if part is not None])

    def draw_batch(self, captions: Sequence[str], seeds: Sequence[int], config: SamplingConfig) -> torch.Tensor:
        """Samples uint8 (N, 3, H, W) of a batch of captions.

        Raises ValueError for networks whose samples are not finite: rounded to uint8 such a sample would be black, and
        it would be measured as a black image.
        """
        with torch.autocast(self.system.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            latents = self.system.latents(captions, seeds, config)
            images = self.system.decode(latents)
        if not (torch.isfinite(latents).all() and torch.isfinite(images).all()):
            raise ValueError(f"the samples of {self.folder.parent.parent.name} are not finite ({config.sampler}, "
                             f"{config.steps} steps, guidance {config.guidance.scale:g}): its weights are damaged, or "
                             "the sampler diverges; valid: finite ones")
        return to_uint8(images).cpu()

    def samples_by_scale(self, prompts: Prompts, scales: Sequence[float],
                         config: SamplingConfig) -> list[tuple[float, torch.Tensor]]:
        """(scale, samples) of the prompts at each guidance scale."""
        return [(scale, self.samples(prompts, with_options(config, scale=scale), f"validation, guidance {scale:g}"))
                for scale in scales]

    def samples_by_num_steps(self, prompts: Prompts, num_steps: Sequence[int],
                             config: SamplingConfig) -> list[tuple[int, torch.Tensor]]:
        """(number of steps, samples) of the prompts with each number of sampler steps."""
        return [(count, self.samples(prompts, with_options(config, steps=count), f"validation, {count} steps"))
                for count in num_steps]


def makers_of(folder: Path, drawn_now: bool) -> list[str]:
    """What drew the batches of a folder, a line each; ``drawn_now``: some were drawn just now, by this code, and the
    line that names it is added to the file."""
    path = folder / "made.json"
    try:
        known = [str(line) for line in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        known = []
    here = environment()
    line = f"{here['revision']}, torch {here['versions']['torch']}, {here['device']}"
    if drawn_now and line not in known:
        known.append(line)
        write_text(path, json.dumps(known))
    return known


def batch_path(folder: Path, start: int) -> Path:
    """The file of the batch whose first sample has the number ``start``."""
    return folder / f"{start:06d}.npy"


def read_batch(path: Path, count: int) -> torch.Tensor | None:
    """The kept batch of ``count`` samples, uint8 (count, 3, H, W); None when it is missing, damaged or not whole."""
    try:
        array = np.load(path, allow_pickle=False)
        whole = array.dtype == np.uint8 and array.ndim == 4 and array.shape[:2] == (count, 3)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        return None
    return torch.from_numpy(array) if whole else None
