"""Files that are either whole or absent: weights as safetensors, and what a resume needs.

A file is written under a temporary name, flushed to the disk and renamed, so a crash leaves the one before. A state
file has its SHA-256 beside it; one that is cut short or damaged is refused by name and the one before it is used.
"""
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


class CheckpointError(ValueError):
    """A file of weights or state that cannot be used; the message names it."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends without an error it becomes ``path`` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself reaches the disk
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_weights(module: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write every parameter and buffer of ``module`` as safetensors, in plain memory order."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            os.chmod(temporary, 0o644)  # the library writes 0600; a run folder is meant to be read by others
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"could not write {path}: {error} ({_free(path)})") from None


def _free(path: str | Path) -> str:
    return f"{shutil.disk_usage(Path(path).parent).free / 1e6:.0f} MB free on that disk"


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill ``module`` from safetensors. Raises CheckpointError listing every tensor that is missing or misshapen."""
    if not Path(path).is_file():
        raise CheckpointError(f"no weights file {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
              for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(wrong)}")
    module.load_state_dict(tensors)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Checkpoints:
    """The states of a stage, ``step_00001000.pt`` with its hash in ``step_00001000.json``; the newest ``keep`` stay."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``state`` after ``step`` steps, then remove what is older than the newest ``keep``, and what is ahead
        of ``step``: it was refused, or the run would have gone on from there."""
        path = self.folder / f"step_{step:08d}.pt"
        try:
            with whole_file(path) as temporary:
                torch.save({"step": step, **state}, temporary)
                digest = file_hash(temporary)
            # the state is only valid with its hash: a crash between the two leaves the state before as newest
            write_text(path.with_suffix(".json"), json.dumps({"step": step, "sha256": digest}))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            path.unlink(missing_ok=True)
            raise CheckpointError(f"could not write {path}: {error} ({_free(path)}); earlier checkpoints are "
                                  "untouched") from None
        files = self._files()
        place = files.index(path)
        for old in files[:place] + files[place + self.keep:]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
        for part in self.folder.glob(".step_*.part"):  # of a process that was killed while it wrote
            part.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest state that is whole, or None. A damaged one is named on the terminal and passed over."""
        for path in self._files():
            try:
                expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
                if file_hash(path) != expected:
                    raise ValueError("its bytes do not match its SHA-256")
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever is wrong with it, the one before is tried
                reason = (str(error) or type(error).__name__).splitlines()[0]
                print(f"warning: checkpoint {path} is refused ({reason}); using the one before")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"), reverse=True)
