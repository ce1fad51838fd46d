"""Weights as safetensors files, written whole or not at all. No pickle is ever loaded."""
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from files.whole import whole_file

LISTED = 20  # tensors that a message names; a file of another network differs in all of them


class CheckpointError(ValueError):
    """A file of weights or training state that cannot be used; the message names it."""


def save_weights(module: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write all parameters and buffers of ``module`` as safetensors. Raises CheckpointError if that fails."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            os.chmod(temporary, 0o644)  # the library writes 0600; a run folder is meant to be read by others
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"could not write {path}: {error} ({free_space(path)})") from None


def free_space(path: str | Path) -> str:
    """The free space on the disk of ``path``, in words."""
    return f"{shutil.disk_usage(Path(path).parent).free / 1e6:.0f} MB free on that disk"


def load_weights(module: nn.Module, path: str | Path, new: tuple[str, ...] = ()) -> None:
    """Fill ``module`` from safetensors; tensors whose names begin with one of ``new`` keep their values if the file has
    none. Raises CheckpointError listing tensors that are missing or misshapen."""
    if not Path(path).is_file():
        raise CheckpointError(f"no weights file {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(new)}
    fill_module(module, {**own, **tensors}, path)


def read_pickled_tensors(path: str | Path) -> dict[str, Tensor]:
    """The table of tensors in a file that torch.save wrote. Only tensors are read, and nothing in the file is executed.

    Raises CheckpointError for a file that is missing, is damaged, or holds something other than tensors.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no weights file {path}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for what it will not or cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged, or holds more than tensors, which is not executed: "
                              f"{reason}") from None


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path, name: str = "the model",
                ignored: str = "") -> None:
    """Copy ``tensors``, which were read from ``path``, into ``module``, which messages call ``name``.

    Tensors whose names end in ``ignored`` need not be there and are not copied. Raises CheckpointError that lists the
    first tensors that are missing, unexpected or of another shape; the module is then unchanged.
    """
    def needed(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in table.items() if not (ignored and key.endswith(ignored))}

    own, theirs = needed(module.state_dict()), needed(tensors)
    wrong = [f"missing {key}" for key in own if key not in theirs]
    wrong += [f"unexpected {key}" for key in theirs if key not in own]
    wrong += [f"{key} is {tuple(theirs[key].shape)}, expected {tuple(own[key].shape)}"
              for key in own if key in theirs and theirs[key].shape != own[key].shape]
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise CheckpointError(f"{path} does not fit {name}: {'; '.join(wrong[:LISTED])}{more}")
    module.load_state_dict(theirs, strict=not ignored)
