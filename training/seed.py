"""Randomness of training as a function of (seed, purpose, step): no generator state is ever stored."""
import hashlib

import torch


def step_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose of one step; different purposes and steps are independent."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose of one step."""
    return torch.Generator().manual_seed(step_seed(seed, purpose, step))
