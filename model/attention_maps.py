"""Where in the picture a word is looked at: cross-attention of a whole sampling run, gathered a token.

Tang et al. 2022, "What the DAAM": the weights of every layer, head and step, brought to one size and averaged. What
the network computes is not touched. Axis letters: B pictures, h heads, N pixels of a feature map, L tokens, H W size
of a latent.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from model.unet import UNet


class AttentionMaps:
    """Running sums of attention weights, one for every size of feature map; memory does not grow with steps."""

    def __init__(self, pictures: int):
        self.pictures = pictures
        self.sums: dict[int, Tensor] = {}  # N: (B, N, L)
        self.calls: dict[int, int] = {}

    def add(self, weights: Tensor) -> None:
        """weights (B or 2B, h, N, L); of a doubled batch the second half, which sees the prompt, is kept."""
        mean = weights[-self.pictures:].float().mean(dim=1)  # (B, N, L)
        pixels = mean.shape[1]
        self.sums[pixels] = mean + self.sums[pixels] if pixels in self.sums else mean
        self.calls[pixels] = self.calls.get(pixels, 0) + 1

    def maps(self, height: int, width: int) -> Tensor:
        """(B, L, H, W): the share of attention that each token gets at each place; over tokens they add up to 1.

        Raises ValueError when nothing was seen.
        """
        if not self.sums:
            raise ValueError("attention: the network has no layer that looks at the prompt")
        total = torch.zeros((), device=next(iter(self.sums.values())).device)
        for pixels, weights in self.sums.items():
            factor = math.sqrt(height * width / pixels)
            small = weights.transpose(1, 2).unflatten(2, (round(height / factor), round(width / factor)))
            total = total + F.interpolate(small, (height, width), mode="bilinear")  # (B, L, H, W)
        return total / sum(self.calls.values())


@contextmanager
def watched(unet: UNet, maps: AttentionMaps | None) -> Iterator[None]:
    """Within this block the cross-attention layers of ``unet`` show ``maps`` their weights; None watches nothing."""
    layers = unet.cross_attentions() if maps is not None else []
    try:
        for layer in layers:
            layer.watch = maps.add if maps is not None else None
        yield
    finally:
        for layer in layers:
            layer.watch = None
