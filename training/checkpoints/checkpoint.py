"""The states from which a stage resumes, and the best weights so far, in files that are whole or absent.

A file is written under a temporary name, flushed to the disk and renamed, so a crash leaves the previous file. A
state has its SHA-256 beside it. A truncated or damaged state is refused by name, and the previous one is used.
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
    """The best weights so far by a metric, in one file whose metadata hold the step and the value."""

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
        """Save the weights of ``module`` after ``step`` steps if ``measured`` is better; returns whether they were
        saved."""
        value = measured.get(self.metric, float("nan"))
        better = value == value and (self.value is None or self.sign * value > self.sign * self.value)
        if better:
            save_weights(module, self.path, {"step": str(step), "metric": self.metric, "value": repr(value)})
            self.value = value
        return better


class Checkpoints:
    """The states of a stage, ``step_00001000.pt`` with its hash in ``step_00001000.json``; the newest ``keep`` remain.

    States are saved at regular intervals and whenever a run is asked to stop. The newest regular state always
    remains, because a run rolls back to it whether or not it was stopped in between.
    """

    suffix = ".pt"

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: dict[str, Any], about: dict[str, Any] | None = None, regular: bool = True) -> Path:
        """Write ``state`` after ``step`` steps, with ``about`` beside it. Then remove states that are no longer kept,
        and states of later steps: those were refused, or the run would have continued from them.

        Raises CheckpointError if the state cannot be written.
        """
        path = self.path(step)
        try:
            with whole_file(path) as temporary:
                torch.save({"step": step, **state}, temporary)
                digest = sha256_of(temporary)
            # a state is only valid with its hash, so after a crash between the two the previous state is the newest
            about = {"step": step, "regular": regular, "sha256": digest, **(about or {})}
            write_text(path.with_suffix(".json"), json.dumps(about))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            path.unlink(missing_ok=True)
            raise CheckpointError(f"could not write {path}: {error} ({free_space(path)}); earlier checkpoints are "
                                  "untouched") from None
        self.prune(path)
        return path

    def latest(self, regular: bool = False) -> dict[str, Any] | None:
        """The newest undamaged state, or None; with ``regular`` the newest regular one. Damaged states are named on the
        terminal and skipped."""
        for path in self.files(regular):
            try:
                return self.read(path)
            except Exception as error:  # whatever the error, the previous state is tried
                warn_refused(path, error)
        return None

    def read(self, path: Path) -> dict[str, Any]:
        """The state in a file; raises an error if the file is damaged."""
        if sha256_of(path) != self.about(path)["sha256"]:
            raise ValueError("its bytes do not match its SHA-256")
        return torch.load(path, map_location="cpu", weights_only=True)

    def prune(self, newest: Path) -> None:
        """Remove states of later steps than ``newest``, older states that need not remain, and files of killed
        processes."""
        files = self.files()
        place = files.index(newest)
        stay = {*files[place:place + self.keep], *[path for path in files[place:] if self.is_regular(path)][:1]}
        for path in set(files) - stay:
            self.remove(path)
        for part in self.folder.glob(".step_*.part"):  # left by a process that was killed while writing
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    def remove(self, path: Path) -> None:
        """Delete one state. Its hash is deleted last, so that a half-deleted state is refused."""
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)

    def path(self, step: int) -> Path:
        """Path of the state after ``step`` steps."""
        return self.folder / f"step_{step:08d}{self.suffix}"

    def about(self, path: Path) -> dict[str, Any]:
        """The record beside a state; raises an error if it is missing or damaged."""
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def is_regular(self, path: Path) -> bool:
        """Whether a state was saved at its regular interval."""
        try:
            return bool(self.about(path)["regular"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def files(self, regular: bool = False) -> list[Path]:
        """The existing states, newest first."""
        files = sorted(self.folder.glob(f"step_*{self.suffix}"), reverse=True)
        return [path for path in files if self.is_regular(path)] if regular else files


def warn_refused(path: Path, error: Exception) -> None:
    """Print in one line that a checkpoint is not used, and why."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    print(f"warning: checkpoint {path} is refused ({reason}); using the one before")
