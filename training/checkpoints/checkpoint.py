"""Files that are either whole or absent: weights as safetensors, and what a resume needs.

A file is written under a temporary name, flushed to the disk and renamed, so a crash leaves the one before. A state
file has its SHA-256 beside it; one that is cut short or damaged is refused by name and the one before it is used.
"""
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from files.weights import CheckpointError, free_space, save_weights
from files.whole import sha256_of, whole_file, write_text


class Best:
    """The best weights so far by a metric: one file, whose metadata says the step and the value."""

    def __init__(self, path: Path, metric: str, direction: Literal["min", "max"]):
        self.path, self.metric, self.sign = path, metric, 1 if direction == "max" else -1
        self.value: float | None = None
        if path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    self.value = float(file.metadata()["value"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                print(f"warning: {path} is damaged ({error}); the next validation replaces it")

    def offer(self, module: nn.Module, step: int, measured: dict[str, float]) -> bool:
        """Keep the weights of ``module``, after ``step`` steps, if ``measured`` is better; whether it is kept."""
        value = measured.get(self.metric, float("nan"))
        better = value == value and (self.value is None or self.sign * value > self.sign * self.value)
        if better:
            save_weights(module, self.path, {"step": str(step), "metric": self.metric, "value": repr(value)})
            self.value = value
        return better


class Checkpoints:
    """The states of a stage, ``step_00001000.pt`` with its hash in ``step_00001000.json``; the newest ``keep`` stay.

    States are saved at regular intervals, and whenever a run is asked to stop. The newest regular one stays in any
    case: a run that goes back goes back to it, whether or not it was stopped in between.
    """

    suffix = ".pt"

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: dict[str, Any], about: dict[str, Any] | None = None, regular: bool = True) -> Path:
        """Write ``state`` after ``step`` steps and what there is to say ``about`` it, then remove what is older than
        those that stay, and what is ahead of ``step``: it was refused, or the run would have gone on from there."""
        path = self.path(step)
        try:
            with whole_file(path) as temporary:
                torch.save({"step": step, **state}, temporary)
                digest = sha256_of(temporary)
            # the state is only valid with its hash: a crash between the two leaves the state before as newest
            about = {"step": step, "regular": regular, "sha256": digest, **(about or {})}
            write_text(path.with_suffix(".json"), json.dumps(about))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            path.unlink(missing_ok=True)
            raise CheckpointError(f"could not write {path}: {error} ({free_space(path)}); earlier checkpoints are "
                                  "untouched") from None
        self.prune(path)
        return path

    def latest(self, regular: bool = False) -> dict[str, Any] | None:
        """The newest state that is whole, or None; with ``regular`` the newest regular one. A
        damaged one is named on the terminal and passed over."""
        for path in self.files(regular):
            try:
                return self.read(path)
            except Exception as error:  # whatever is wrong with it, the one before is tried
                warn_refused(path, error)
        return None

    def read(self, path: Path) -> dict[str, Any]:
        """The state in a file; raises what is wrong with it."""
        if sha256_of(path) != self.about(path)["sha256"]:
            raise ValueError("its bytes do not match its SHA-256")
        return torch.load(path, map_location="cpu", weights_only=True)

    def prune(self, newest: Path) -> None:
        """Remove what is ahead of ``newest``, what need not stay behind it, and what killed processes left."""
        files = self.files()
        place = files.index(newest)
        stay = {*files[place:place + self.keep], *[path for path in files[place:] if self.is_regular(path)][:1]}
        for path in set(files) - stay:
            self.remove(path)
        for part in self.folder.glob(".step_*.part"):  # of a process that was killed while it wrote
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    def remove(self, path: Path) -> None:
        """Delete one state; its hash goes last, so that a half-deleted one is refused."""
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)

    def path(self, step: int) -> Path:
        """Where the state after ``step`` steps lies."""
        return self.folder / f"step_{step:08d}{self.suffix}"

    def about(self, path: Path) -> dict[str, Any]:
        """What was written beside a state; raises what is wrong with it."""
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def is_regular(self, path: Path) -> bool:
        """Whether a state was saved because the interval was over."""
        try:
            return bool(self.about(path)["regular"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def files(self, regular: bool = False) -> list[Path]:
        """The states that are there, newest first."""
        files = sorted(self.folder.glob(f"step_*{self.suffix}"), reverse=True)
        return [path for path in files if self.is_regular(path)] if regular else files


def warn_refused(path: Path, error: Exception) -> None:
    """Say that a checkpoint is not used, and why, in one line."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    print(f"warning: checkpoint {path} is refused ({reason}); using the one before")
