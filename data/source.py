"""The interface of every data source, and the items that a run reads from it.

A source has a length, ``source[i]`` (a dictionary with at least ``image`` uint8 (3, H, W), ``caption``, ``captions``
and ``id``) and ``source.captions(i)``, the captions of item i without its image. Item i is always the same. Sources of
image files (data/images/base.py) also have ``random_item(i, rng)``, an item with one caption chosen by weight, a crop
and perhaps a reflection; ``item_in_epoch`` gives such an item for every source as a function of (seed, epoch, index).
A source may have ``word_pairs()``, pairs of captions that differ in one word, by what the word names: training then
measures how far apart these words are (training/stages/contexts.py).
"""
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from data.order import Places
from files.images import to_unit

Split = Literal["train", "validation", "test"]


class Source(Protocol):
    """Captioned images by index; an index always gives the same item."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self, index: int) -> tuple[str, ...]: ...


# ---- items as a run reads them

def _caption_rng(epoch: int, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([7, seed, epoch, index])  # 7 keeps it apart from the permutations of data/order.py


def item_in_epoch(source: Source, index: int, epoch: int, seed: int, caption_dropout: float = 0.0) -> dict[str, Any]:
    """Item ``index`` as epoch ``epoch`` reads it, a function of (seed, epoch, index). ``caption`` is one of its
    captions, or "" with probability ``caption_dropout``; the source's configuration decides on crops and mirroring."""
    rng = _caption_rng(epoch, index, seed)
    drop = rng.random() < caption_dropout
    if hasattr(source, "random_item"):
        item = source.random_item(index, rng)
    else:
        item = source[index]
        item["caption"] = item["captions"][int(rng.random() * len(item["captions"]))]
    return {**item, "caption": ""} if drop else item


def caption_in_epoch(source: Source, index: int, epoch: int, seed: int, caption_dropout: float = 0.0) -> str:
    """The caption of ``item_in_epoch``, without reading the image."""
    rng = _caption_rng(epoch, index, seed)
    if rng.random() < caption_dropout:
        return ""
    if hasattr(source, "random_caption"):
        return source.random_caption(index, rng)
    captions = source.captions(index)
    return captions[int(rng.random() * len(captions))]


def caption_batch(source: Source, places: Places, seed: int, caption_dropout: float = 0.0) -> list[str]:
    """The captions of the batch of ``places``, without reading its images."""
    return [caption_in_epoch(source, int(index), int(epoch), seed, caption_dropout)
            for epoch, index in zip(places.epochs, places.indices)]


def stack_images(items: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The images of the items, uint8 (B, 3, H, W); raises ValueError if they have several sizes."""
    found = {tuple(item["image"].shape[1:]) for item in items}
    if len(found) > 1:
        raise ValueError(f"a batch of images of the sizes {sorted(found)}; valid: one aspect bucket a batch, as "
                         "data.order.Order gives with the source's buckets")
    return torch.stack([item["image"] for item in items])


def image_batch(source: Source, indices: np.ndarray) -> torch.Tensor:
    """The images ``source[i]`` of ``indices``, (B, 3, H, W) float in [-1, 1]."""
    return to_unit(stack_images([source[int(index)] for index in indices]))
