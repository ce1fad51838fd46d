"""Randomness of training as a function of (seed, purpose, step): no generator state is ever stored."""
import hashlib

import torch


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose of one step; different purposes and steps draw independent numbers."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
