"""Outputs of frozen networks, computed once and kept on disk: latents of images, states of captions.

A cache of latents holds the mean and log-variance of each image instead of one draw, so every epoch can draw new
latents. The name of a cache is a hash of everything that its numbers depend on (network, precision, preparation and
content of the data, count), so a changed setting leads to another cache. An interrupted cache is continued. A lock file
keeps several processes from writing the same cache together: the first computes it, the others wait and read.
Axis letters: N entries, C latent channels, H W latent size, B of a batch, L tokens, D width.
"""
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from files.whole import lock_file

Encode = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]
EncodeText = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]


def cache_name(key: dict, **more: object) -> str:
    """The name of a cache: the first 16 hex digits of a hash of everything that its numbers depend on."""
    return hashlib.sha256(json.dumps({**key, **more}, sort_keys=True).encode()).hexdigest()[:16]


def cached_rows(folder: Path, name: str, count: int, rows: Callable[[np.ndarray], torch.Tensor], chunk: int,
                what: str, unit: str) -> np.ndarray:
    """Memory-mapped fp16 (N, ...) of ``rows(indices)`` (B, ...), which is called only for rows that are missing.

    Raises ValueError for a damaged file and for rows of several shapes, OSError for a full disk.
    """
    path, progress = folder / f"{name}.npy", folder / f"{name}.done"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / f"{name}.lock"):
        done = int(progress.read_text() or 0) if path.exists() and progress.exists() else 0
        if done == 0:
            progress.unlink(missing_ok=True)  # it may belong to an array that was removed
            shape = rows(np.arange(1)).shape[1:]
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, *shape)).flush()
            if hasattr(os, "posix_fallocate"):  # a full disk raises here; below, it would kill the process
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        try:
            np.load(path, mmap_mode="r")  # refuses a file that is too short; "r+" would lengthen it
            array = np.load(path, mmap_mode="r+" if done < count else "r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"the {what} cache {path} is damaged ({error}); delete it and it is made again") from None
        if done < count:
            with tqdm(total=count, initial=done, desc=f"{what}s", unit=unit) as bar:
                for begin in range(done, count, chunk):
                    indices = np.arange(begin, min(begin + chunk, count))
                    values = rows(indices).to(torch.float16).numpy()  # (B, ...)
                    if values.shape[1:] != array.shape[1:]:
                        raise ValueError(f"{what}s of the shapes {array.shape[1:]} and {values.shape[1:]}; a cache "
                                         "holds one shape: images in aspect buckets are read without it")
                    array[indices] = values
                    array.flush()
                    progress.write_text(str(indices[-1] + 1))  # only after the rows that it counts
                    bar.update(len(indices))
    return np.load(path, mmap_mode="r")


class LatentCache:
    """``moments(indices)`` gives (mean, logvar), each (B, C, H, W) float32, from a memory-mapped fp16 array."""

    def __init__(self, folder: Path, key: dict, count: int, encode: Encode, chunk: int = 128):
        """``encode(indices)`` gives unit-scale mean and logvar (B, C, H, W); it is called only for missing images."""
        def rows(indices: np.ndarray) -> torch.Tensor:
            return torch.stack(encode(indices), dim=1)  # (B, 2, C, H, W)

        self.array = cached_rows(folder, cache_name(key, count=count), count, rows, chunk, "latent", "image")

    def __len__(self) -> int:
        return len(self.array)

    def moments(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logvar of the images ``indices`` at unit scale, each (B, C, H, W) float32."""
        both = torch.from_numpy(self.array[indices]).float()  # (B, 2, C, H, W)
        return both[:, 0], both[:, 1]
