"""Latents encoded once and kept on disk: posterior mean and log-variance of every picture of a source.

The moments are kept, not one sample, so every epoch draws new latents. The folder's name is a hash of all that the
numbers depend on (autoencoder, data, count): a changed key is another cache. A cache that was interrupted continues.
Axis letters: N pictures, C latent channels, H W latent size.
"""
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

Encode = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]


class LatentCache:
    """``moments(indices)`` gives (mean, logvar), each (B, C, H, W) float32, from a memory-mapped fp16 array."""

    def __init__(self, folder: Path, key: dict, count: int, encode: Encode, chunk: int = 128):
        """``encode(indices)`` gives unit-scale mean and logvar (B, C, H, W); it is called for what is not there yet."""
        name = hashlib.sha256(json.dumps({**key, "count": count}, sort_keys=True).encode()).hexdigest()[:16]
        path, progress = folder / f"{name}.npy", folder / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        done = int(progress.read_text() or 0) if path.exists() and progress.exists() else 0
        if done == 0:
            progress.unlink(missing_ok=True)  # it may speak of an array that was removed
            mean, _ = encode(np.arange(1))
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, 2, *mean.shape[1:])).flush()
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, a dead process at the first write below
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        try:
            np.load(path, mmap_mode="r")  # refuses a file that is too short, where "r+" makes it longer
            array = np.load(path, mmap_mode="r+")
        except (ValueError, EOFError) as error:
            raise ValueError(f"the latent cache {path} is damaged ({error}); delete it and it is made again") from None
        if done < count:
            with tqdm(total=count, initial=done, desc="latents", unit="image") as bar:
                for begin in range(done, count, chunk):
                    indices = np.arange(begin, min(begin + chunk, count))
                    moments = torch.stack(encode(indices), dim=1)  # (B, 2, C, H, W)
                    array[indices] = moments.to(torch.float16).numpy()
                    array.flush()
                    progress.write_text(str(indices[-1] + 1))  # only after the numbers it speaks of
                    bar.update(len(indices))
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def moments(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logvar of the pictures ``indices``, unit scale, (B, C, H, W) float32 each."""
        both = torch.from_numpy(self.array[indices]).float()  # (B, 2, C, H, W)
        return both[:, 0], both[:, 1]
