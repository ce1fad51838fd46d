"""One interface in front of every kind of data, and what a run reads of it.

A source has a length, ``source[i]`` (a dictionary with at least ``image`` uint8 (3, H, W), ``caption``, ``captions``
and ``id``) and ``source.captions(i)``, the phrasings of item i without drawing it. Item i is always the same. Sources
of picture files (data/images/base.py) also have ``draw(i, rng)``, the item as a run sees it: one caption by its weight,
a crop, perhaps mirrored; ``drawn`` below gives it for every source as a function of (seed, epoch, index).
"""
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from data.order import Places
from files.images import to_unit

Split = Literal["train", "validation", "test"]


class Source(Protocol):
    """Captioned pictures, each a function of its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self, index: int) -> tuple[str, ...]: ...


# ---- items as a run sees them

def _caption_rng(epoch: int, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([7, seed, epoch, index])  # 7 keeps it apart from the permutations of data/order.py


def drawn(source: Source, index: int, epoch: int, seed: int, caption_dropout: float = 0.0) -> dict[str, Any]:
    """Item ``index`` as epoch ``epoch`` sees it, a function of (seed, epoch, index): ``caption`` is one of its own, or
    "" with chance ``caption_dropout``; crop and mirroring as the source is configured."""
    rng = _caption_rng(epoch, index, seed)
    drop = rng.random() < caption_dropout
    if hasattr(source, "draw"):
        item = source.draw(index, rng)
    else:
        item = source[index]
        item["caption"] = item["captions"][int(rng.random() * len(item["captions"]))]
    return {**item, "caption": ""} if drop else item


def drawn_caption(source: Source, index: int, epoch: int, seed: int, caption_dropout: float = 0.0) -> str:
    """The caption of ``drawn``, without the picture."""
    rng = _caption_rng(epoch, index, seed)
    if rng.random() < caption_dropout:
        return ""
    if hasattr(source, "draw_caption"):
        return source.draw_caption(index, rng)
    captions = source.captions(index)
    return captions[int(rng.random() * len(captions))]


def caption_batch(source: Source, places: Places, seed: int, caption_dropout: float = 0.0) -> list[str]:
    """The captions a batch of these places has, without its pictures."""
    return [drawn_caption(source, int(index), int(epoch), seed, caption_dropout)
            for epoch, index in zip(places.epochs, places.indices)]


def stacked(items: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The pictures of items, uint8 (B, 3, H, W); raises ValueError where they have several sizes."""
    found = {tuple(item["image"].shape[1:]) for item in items}
    if len(found) > 1:
        raise ValueError(f"a batch of pictures of the sizes {sorted(found)}; valid: one aspect bucket a batch, as "
                         "data.order.Order gives with the source's buckets")
    return torch.stack([item["image"] for item in items])


def image_batch(source: Source, indices: np.ndarray) -> torch.Tensor:
    """The pictures ``indices`` of a source as they are, (B, 3, H, W) float in [-1, 1]."""
    return to_unit(stacked([source[int(index)] for index in indices]))
