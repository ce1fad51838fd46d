"""Gaussian noise with one generator per image, so that image k of a batch never depends on its neighbours."""

from collections.abc import Sequence

import torch
from torch import Tensor

LAST_SEED = 2**32 - 1  # torch's CPU generator, a Mersenne Twister, reads the low 32 bits of a seed and no others


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed of which the generator would ignore bits: it would draw what another seed draws."""
    if not 0 <= seed <= LAST_SEED:
        raise ValueError(f"seed: value {seed}; valid: 0 to 2^32 - 1, all that the generator reads (it would draw the "
                         f"same as {seed % 2**32})")


def nearest_noise(candidates: Tensor, x_0: Tensor) -> Tensor:
    """Of candidates (K, B, C, H, W) the one nearest to each image of x_0 (B, C, H, W), same shape.

    Every noise then belongs to fewer images, so that what a network is asked for at high noise contradicts itself less
    (Li et al. 2024, "Immiscible Diffusion"; by a draw of K for each image as in its successor, not by an assignment
    within the batch, so that the noise of an image does not depend on its neighbours). K of one is plain noise.
    """
    distance = (candidates - x_0).flatten(2).square().sum(dim=2)  # (K, B)
    return candidates[distance.argmin(dim=0), torch.arange(len(x_0), device=x_0.device)]


class PerImageNoise:
    """Each call returns the next draw (B, C, H, W) in fp32; the first is x_T, later ones feed stochastic samplers.

    seeds: one integer per image, as `check_seed` takes it. Image k of every draw is a function of seeds[k] and of how
        many draws came before.
    shape: (C, H, W) of one image.
    Draws happen on the CPU, so the same seed gives the same image on every device.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        if len(seeds) == 0:
            raise ValueError("seeds: value []; valid: one integer per image")
        for seed in seeds:
            check_seed(int(seed))
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self) -> Tensor:
        draw = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])  # (B, C, H, W)
        if self.device.type == "cuda":
            draw = draw.pin_memory()  # a pinned copy is queued; a pageable one makes the host wait
        return draw.to(self.device, non_blocking=True)
