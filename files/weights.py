"""Weights as safetensors files, written whole or not at all. No pickle is ever executed."""
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from files.whole import whole_file


class CheckpointError(ValueError):
    """A file of weights or state that cannot be used; the message names it."""


def save_weights(module: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write every parameter and buffer of ``module`` as safetensors, in plain memory order."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            os.chmod(temporary, 0o644)  # the library writes 0600; a run folder is meant to be read by others
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"could not write {path}: {error} ({free_space(path)})") from None


def free_space(path: str | Path) -> str:
    """How much room there is where ``path`` lies, in words."""
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
