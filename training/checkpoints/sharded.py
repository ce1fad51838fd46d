"""Checkpoints to which every process writes its slice, and which any number of processes can read.

The format is that of torch.distributed.checkpoint: a folder with one file for each process and an index of the
location of each piece of each tensor. The guarantees are those of single files: folders are written under another name
and renamed, every file has a SHA-256, and damaged folders are refused by name. The index is a pickle, as PyTorch writes
it, so read only checkpoints of your own; the final files of a run are safetensors.
"""
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from files.weights import CheckpointError, free_space
from files.whole import sha256_of, write_text
from training.checkpoints.checkpoint import Checkpoints, warn_refused
from training.distributed import Processes

Fields = dict[str, dict[str, Tensor]]  # parameter -> its state in the optimizer

COMPLETE = "complete.json"


class ShardedCheckpoints(Checkpoints):
    """The states of a stage, one folder ``step_00001000.dcp`` each; all processes call every method."""

    suffix = ".dcp"

    def __init__(self, folder: str | Path, keep: int, processes: Processes):
        super().__init__(folder, keep)
        self.processes = processes

    def save(self, step: int, state: dict[str, Any], about: dict[str, Any] | None = None, regular: bool = True) -> Path:
        """As `Checkpoints.save`; ``state`` has ``tensors``, a flat dictionary, and ``values``, plain data."""
        path, temporary = self.path(step), self.folder / f".step_{step:08d}.part"
        if self.processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.processes.wait()
        try:
            dcp.save(state["tensors"], checkpoint_id=temporary)
            self._complete(temporary, path, {"step": step, "regular": regular, "values": state["values"],
                                             **(about or {})})
        except (CheckpointException, OSError, RuntimeError) as error:
            reason = _first(error)
            space = free_space(path)
            if self.processes.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"could not write {path}: {reason} ({space}); earlier checkpoints are "
                                  "untouched") from None
        self.processes.wait()
        return path

    def _complete(self, temporary: Path, path: Path, about: dict[str, Any]) -> None:
        """Hash the files, every process its own, and give the folder its final name."""
        own = {file.name: sha256_of(file) for file in temporary.glob(f"__{self.processes.rank}_*")}
        hashes: list[Any] = [own]
        if self.processes.world > 1:
            hashes = [None] * self.processes.world
            dist.all_gather_object(hashes, own)
        if not self.processes.main:
            return
        files = {name: digest for part in hashes for name, digest in part.items()}
        files[".metadata"] = sha256_of(temporary / ".metadata")
        write_text(temporary / COMPLETE, json.dumps({**about, "sha256": files}))
        if path.exists():  # a refused state of the same step: the run would have continued from it
            self.remove(path)
        os.replace(temporary, path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        self.prune(path)

    def latest(self, regular: bool = False, like: dict[str, Tensor] | None = None) -> dict[str, Any] | None:
        """As `Checkpoints.latest`; ``like`` holds tensors of the shapes and distribution of those to be read. The state
        of the optimizer is distributed like its parameters."""
        found = self._newest(regular) if self.processes.main else None
        found = self.processes.from_main(found)
        if found is None:
            return None
        path = self.folder / found
        about = self.about(path)
        tensors = self._templates(path, like or {})
        dcp.load(tensors, checkpoint_id=path)
        return {"step": about["step"], "tensors": tensors, "values": about["values"]}

    def _newest(self, regular: bool) -> str | None:
        for path in self.files(regular):
            try:
                for name, digest in self.about(path)["sha256"].items():
                    if sha256_of(path / name) != digest:
                        raise ValueError(f"the bytes of {name} do not match their SHA-256")
                return path.name
            except Exception as error:
                warn_refused(path, error)
        return None

    def _templates(self, path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Empty tensors for everything in a checkpoint; ``optimizer/NAME/FIELD`` is distributed like ``model/NAME``."""
        found = {}
        for key, about in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
            kind, _, name = key.partition("/")
            pattern = like.get(key if kind != "optimizer" else f"model/{name.rpartition('/')[0]}")
            if pattern is not None and pattern.shape == about.size:  # type: ignore[union-attr]
                found[key] = torch.zeros_like(pattern)
            else:
                found[key] = torch.zeros(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        return found

    def about(self, path: Path) -> dict[str, Any]:
        """The record beside the tensors; raises an error if it is missing or damaged."""
        return json.loads((path / COMPLETE).read_text(encoding="utf-8"))

    def remove(self, path: Path) -> None:
        """Delete one state; a half-deleted state is refused."""
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)


def _first(error: BaseException) -> str:
    """The first line of the actual error in the long report of the library."""
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))
        error = inner[0] if isinstance(inner, tuple) else inner
    return (str(error) or type(error).__name__).splitlines()[0]


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the optimizer under ``optimizer/NAME/FIELD``, where NAME is that of a parameter."""
    return {f"optimizer/{name}/{key}": value for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}


def load_optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                           tensors: dict[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    fields: Fields = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, last = rest.rpartition("/")
            fields.setdefault(name, {})[last] = value
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = fields.get(name, {})
