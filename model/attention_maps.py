"""Maps of the cross-attention that each token receives over a whole sampling run.

Tang et al. 2022, "What the DAAM": the weights of every layer, head and step are resized to one size and averaged.
The output of the network does not change. Axis letters: B images, h heads, N pixels of a feature map, L tokens, H W
size of a latent.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model.unet import UNet


class AttentionMaps:
    """Running sums of attention weights, one for each size of feature map, so memory does not grow with the number of
    steps."""

    def __init__(self, images: int):
        self.images = images
        self.sums: dict[int, Tensor] = {}  # N: (B, N, L)
        self.calls: dict[int, int] = {}

    def add(self, weights: Tensor) -> None:
        """Add weights (B or 2B, h, N, L). Of a doubled batch only the second half is kept, which sees the prompt."""
        mean = weights[-self.images:].float().mean(dim=1)  # (B, N, L)
        pixels = mean.shape[1]
        self.sums[pixels] = mean + self.sums[pixels] if pixels in self.sums else mean
        self.calls[pixels] = self.calls.get(pixels, 0) + 1

    def maps(self, height: int, width: int) -> Tensor:
        """The share of attention that each token receives at each place, (B, L, H, W); the shares of all tokens sum to
        1.

        Raises ValueError if no weights were added.
        """
        if not self.sums:
            raise ValueError("attention: the network has no layer that looks at the prompt")
        total = torch.zeros((), device=next(iter(self.sums.values())).device)
        for pixels, weights in self.sums.items():
            factor = math.sqrt(height * width / pixels)
            small = rearrange(weights, "b (h w) l -> b l h w", h=round(height / factor), w=round(width / factor))
            total = total + F.interpolate(small, (height, width), mode="bilinear")  # (B, L, H, W)
        return total / sum(self.calls.values())


@contextmanager
def record_attention(unet: UNet, maps: AttentionMaps | None) -> Iterator[None]:
    """Inside this block the cross-attention layers of ``unet`` add their weights to ``maps``; with None nothing is
    recorded."""
    layers = unet.cross_attentions() if maps is not None else []
    try:
        for layer in layers:
            layer.watch = maps.add if maps is not None else None
        yield
    finally:
        for layer in layers:
            layer.watch = None
