"""Supervision of attention by the known scene: places where an object is drawn attend to the words that name it.

After TokenCompose (Wang et al. 2024), which takes segmentation masks of a published model. Here the scene is known,
and the loss is the cross-entropy in the other direction: it does not ask at which places a word is looked at, but at
which words a place looks. The denoising loss alone teaches little of that, because a place whose colour and kind can
already be seen in the noise needs no words. Some heads stay free for words that belong to no object. The second term
predicts the words from the features of such a place, to which attention has to bring them. Axis letters: B batch, h
heads, N places of a feature map, L tokens, V vocabulary, C channels, H W size.
"""
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from model.attention import CrossAttention
from model.blocks import to_tokens

Place = tuple[int, int, float, float, float]  # characters of the words from, to; x, y, radius in units of the side


@dataclass(frozen=True)
class GroundingConfig:
    """``attention`` and ``words`` are the weights of the two terms at the first step, 0 for off; they fall linearly to
    0 at the share ``until`` of the run. The first ``heads`` heads of every cross-attention are supervised."""

    attention: float = 0.0
    words: float = 0.0
    until: float = 0.6
    heads: int = 2

    def __post_init__(self):
        for name in ("attention", "words"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")
        if not 0 < self.until <= 1:
            raise ValueError(f"until: {self.until}; valid: a share of the run in (0, 1]")
        if self.heads < 1:
            raise ValueError(f"heads: {self.heads}; valid: from 1 up")

    @property
    def on(self) -> bool:
        """Whether any term is used."""
        return self.attention > 0 or self.words > 0

    def left_at(self, share: float) -> float:
        """The factor of the weights after this share of the run."""
        return max(0.0, 1.0 - share / self.until)


@contextlib.contextmanager
def keep_attention(layers: Sequence[CrossAttention]) -> Iterator[list[Tensor]]:
    """Inside this block every layer that runs appends its attention (B, h, N, L), with its gradient, to the list."""
    maps: list[Tensor] = []
    for layer in layers:
        layer.watch = maps.append
    try:
        yield maps
    finally:
        for layer in layers:
            layer.watch = None


@contextlib.contextmanager
def unwatched(layers: Sequence[CrossAttention]) -> Iterator[None]:
    """Inside this block nobody is given the attention of the layers."""
    watches = [layer.watch for layer in layers]
    for layer in layers:
        layer.watch = None
    try:
        yield
    finally:
        for layer, watch in zip(layers, watches):
            layer.watch = watch


@contextlib.contextmanager
def keep_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside this block the module appends its output to the list whenever it runs."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        yield kept
    finally:
        hook.remove()


def named_tokens(tokenizer: Tokenizer, captions: Sequence[str], places: Sequence[Sequence[Place]], height: int,
                 width: int, length: int) -> Tensor:
    """bool (B, N, L): whether the token belongs to the words that name the object at the place; N = height x width.

    Where objects overlap, the later one in the list is in front. A place without an object has no token.
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


def attention_loss(maps: Sequence[Tensor], tokenizer: Tokenizer, captions: Sequence[str],
                   places: Sequence[Sequence[Place]], size: Sequence[int], heads: int) -> Tensor:
    """-log of the attention that places of an object pay to its words, mean over words, places, heads and layers.

    maps (B, h, N, L) of each layer, at any halvings of the latent's size; a scalar, 0 if no object is named. It is
    least if every word has the same share. The joint share of all words could be raised by looking at the colour alone,
    and kinds of shapes would be ignored.
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
        share = wanted / wanted.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, N, L), of each word
        paid = attention[:, :heads].float().clamp(min=1e-4).log()  # bounded: no place outweighs the others
        count_named = wanted.any(dim=-1).sum() * paid.shape[1]
        losses.append(-(paid * share[:, None]).sum() / count_named.clamp(min=1))
    return torch.stack(losses).mean()


def words_loss(features: Tensor, head: nn.Linear, tokenizer: Tokenizer, captions: Sequence[str],
               places: Sequence[Sequence[Place]]) -> Tensor:
    """Cross-entropy of the words that ``head`` (C -> V) predicts from the features (B, C, H, W) of places where an
    object is drawn, against the words that name it, each with the same share; a scalar, 0 if no object is named."""
    ids, _ = tokenizer.encode(list(captions))  # (B, L)
    height, width = features.shape[2:]
    wanted = named_tokens(tokenizer, captions, places, height, width, ids.shape[1])  # (B, N, L)
    rows, spots = wanted.any(dim=-1).nonzero(as_tuple=True)  # (M,) each
    if not len(rows):
        return features.new_zeros(())
    share = wanted[rows, spots].float()  # (M, L)
    share = (share / share.sum(dim=-1, keepdim=True)).to(features.device)
    logits = head(to_tokens(features)[rows.to(features.device), spots.to(features.device)])  # (M, V)
    read = logits.float().log_softmax(dim=-1).gather(1, ids[rows].to(features.device))  # (M, L)
    return -(read * share).sum() / len(rows)
