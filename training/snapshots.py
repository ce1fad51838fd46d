"""Snapshots of averages of two or more widths, from which an average of any width can be computed afterwards.

Karras et al. 2023 (EDM2, arXiv:2312.02696), section 3.2 and appendix C. See `training/posthoc.py`.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from files.weights import CheckpointError, save_weights
from training.ema import PowerEma, gamma_from_std


@dataclass(frozen=True)
class SnapshotConfig:
    """Averages of the widths ``stds`` are kept every ``every`` steps and after the last one; 0 keeps none."""

    every: int = 0
    stds: tuple[float, ...] = (0.05, 0.1)

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"every: {self.every}; valid: from 0 (never) up")
        if len(set(self.stds)) < 2:
            raise ValueError(f"stds: {list(self.stds)}; valid: at least two widths")
        for std in self.stds:
            gamma_from_std(std)


class Snapshot(NamedTuple):
    """An average of width ``std`` after ``step`` steps."""

    path: Path
    step: int
    std: float


def save_snapshots(folder: Path, averages: list[PowerEma], config: SnapshotConfig, step: int, main: bool) -> None:
    """Write the averages of the configured widths after ``step`` steps; all processes call this, and the main one
    writes."""
    for ema in averages:
        if ema.std in config.stds:
            average = ema.averaged_model()
            if main:
                save_weights(average, folder / f"step_{step:08d}_std_{ema.std:g}.safetensors",
                             {"step": str(step), "std": repr(ema.std)})


def snapshots_in(folder: Path) -> list[Snapshot]:
    """The snapshots of a stage, oldest first. Raises CheckpointError naming one that is damaged."""
    found = []
    for path in sorted(folder.glob("step_*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
            found.append(Snapshot(path, int(about["step"]), float(about["std"])))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no snapshot: {error}") from None
    return found
