"""Attention supervised by the known scene: places where an object is drawn attend to the words that name it.

After TokenCompose (Wang et al. 2024), which takes segmentation masks of a published model; here the scene is known, and
the loss is the cross-entropy of the other side: not where a word is looked at, but which words a place looks at. The
denoising loss alone says little of that, because a place whose colour and kind are already to be seen in the noise
needs no words. Some heads are left free, for words that belong to no object. Axis letters: B batch, h heads, N places
of a feature map, L tokens, H W size.
"""
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.attention import CrossAttention

Place = tuple[int, int, float, float, float]  # characters of the words from, to; x, y, radius in units of the side


@dataclass(frozen=True)
class GroundingConfig:
    """``weight`` of the term at the first step, 0 is off; it falls to 0 along a line at the share ``until`` of the run.
    ``heads`` of every cross-attention are supervised, those with the lowest numbers."""

    weight: float = 0.0
    until: float = 0.6
    heads: int = 2

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"weight: {self.weight}; valid: from 0 up")
        if not 0 < self.until <= 1:
            raise ValueError(f"until: {self.until}; valid: a share of the run in (0, 1]")
        if self.heads < 1:
            raise ValueError(f"heads: {self.heads}; valid: from 1 up")

    def weight_at(self, share: float) -> float:
        """The weight when this share of the run is done."""
        return self.weight * max(0.0, 1.0 - share / self.until)


@contextlib.contextmanager
def attention_kept(layers: Sequence[CrossAttention]) -> Iterator[list[Tensor]]:
    """Inside, every layer that runs adds its attention (B, h, N, L) to the list, with its gradient."""
    maps: list[Tensor] = []
    for layer in layers:
        layer.watch = maps.append
    try:
        yield maps
    finally:
        for layer in layers:
            layer.watch = None


def named_tokens(tokenizer: Tokenizer, captions: Sequence[str], places: Sequence[Sequence[Place]], height: int,
                 width: int, length: int) -> Tensor:
    """bool (B, N, L): whether the token is of the words that name what is drawn at the place; N = height x width.

    Of objects that overlap the later one in the list is in front. A place without an object has no token.
    """
    y, x = np.divmod(np.arange(height * width), width)
    x, y = (x + 0.5) / width, (y + 0.5) / height  # (N,)
    found = np.zeros((len(captions), height * width, length), dtype=bool)
    for row, (caption, named) in enumerate(zip(captions, places, strict=True)):
        offsets = np.array(tokenizer.offsets(caption)[:length])  # (tokens, 2)
        for begin, end, centre_x, centre_y, radius in named:
            tokens = (offsets[:, 0] < end) & (offsets[:, 1] > begin)
            inside = np.maximum(np.abs(x - centre_x), np.abs(y - centre_y)) < radius
            found[row, inside] = False
            found[row, :, :len(tokens)] |= inside[:, None] & tokens
    return torch.from_numpy(found)


def grounding_loss(maps: Sequence[Tensor], tokenizer: Tokenizer, captions: Sequence[str],
                   places: Sequence[Sequence[Place]], size: tuple[int, int], heads: int) -> Tensor:
    """-log of the attention that places of an object pay to its words, mean over such places, heads and layers.

    maps (B, h, N, L) of each layer, at any halvings of the latent's size; a scalar, 0 where no object is named.
    """
    targets: dict[int, Tensor] = {}
    losses = []
    for attention in maps:
        count, length = attention.shape[2:]
        if count not in targets:
            scale = math.sqrt(count / (size[0] * size[1]))
            targets[count] = named_tokens(tokenizer, captions, places, round(size[0] * scale), round(size[1] * scale),
                                          length).to(attention.device)
        wanted = targets[count]  # (B, N, L)
        paid = (attention[:, :heads].float() * wanted[:, None]).sum(dim=-1)  # (B, heads, N)
        named = wanted.any(dim=-1)[:, None]  # (B, 1, N)
        # 1e-4: a place that pays nothing must not outweigh all others
        losses.append(-(paid.clamp(min=1e-4).log() * named).sum() / (named.sum() * paid.shape[1]).clamp(min=1))
    return torch.stack(losses).mean()
