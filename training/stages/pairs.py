"""The input of the denoiser stage for a step: posteriors of latents and captions, from a cache or from the images.

Axis letters: B images of this process, C latent channels, H W latent size.
"""
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from data.cache import LatentCache
from data.loader import Loader
from data.order import Order, Places, Slice
from data.source import caption_batch, image_batch
from files.images import to_unit
from files.whole import sha256_of
from model.autoencoder import Autoencoder
from training.stages.context import StageContext
from training.stages.grounding import Place


class PairBatch(NamedTuple):
    """Mean and log-variance of latents, each (B, C, H, W), on the CPU, and one caption each, "" if it is dropped."""

    mean: torch.Tensor
    logvar: torch.Tensor
    captions: list[str]
    places: list[list[Place]] | None = None  # which words name the object at which place, if the source knows it


class Pairs(Protocol):
    """Latents of images with captions, on which a denoiser is trained."""

    def __len__(self) -> int: ...

    def at(self, step: int) -> PairBatch: ...  # the data of this process for a step

    def close(self) -> None: ...


Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images (B, 3, .., ..) -> mean, logvar


def latent_encoder(autoencoder: Autoencoder, device: torch.device) -> Encode:
    """A function from images in [-1, 1] to the mean and log-variance of their latents on the CPU."""
    @torch.no_grad()
    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = autoencoder.encode(images.to(device))
        return posterior.mean.cpu(), posterior.logvar.cpu()
    return encode


class CachedPairs:
    """Latents of the first ``count`` images of a split, encoded once before the first step; captions are drawn anew in
    every epoch."""

    def __init__(self, context: StageContext, split: Literal["train", "validation"], count: int, encode: Encode,
                 batch: int, dropout: float = 0.0, places: bool = False):
        source = context.source if split == "train" else context.validation
        if places and not hasattr(source, "places"):
            raise ValueError(f"grounding: on; valid for {type(source).__name__}: attention 0 and words 0, it does not "
                             "say where in its images things are")
        key = {**context.data_key, "split": split, "precision": "float32",
               "autoencoder": sha256_of(context.run.weights("autoencoder"))}
        with context.processes.main_first():
            self.latents = LatentCache(context.run.path / "cache", key, count,
                                       lambda indices: encode(image_batch(source, indices)), min(batch, 128))
        self.source, self.batch, self.dropout, self.with_places = source, batch, dropout, places
        self.seed, self.processes = context.seed, context.processes
        self.order = Order(count, context.seed)

    def __len__(self) -> int:
        return len(self.latents)

    def at(self, step: int) -> PairBatch:
        """The slice of this process of the batch of ``step``."""
        return self.of(self.order.places(step, self.batch, Slice(self.processes.rank, self.processes.world)))

    def of(self, places: Places) -> PairBatch:
        """The pairs at these places."""
        mean, logvar = self.latents.moments(places.indices)
        captions = caption_batch(self.source, places, self.seed, self.dropout)
        return PairBatch(mean, logvar, captions, self.places_of(places.indices, captions))

    def places_of(self, indices: np.ndarray, captions: list[str]) -> list[list[Place]] | None:
        """Which words of each caption name the object at which place; None if places are not used."""
        if not self.with_places:
            return None
        return [self.source.places(int(index), caption)  # type: ignore[attr-defined]
                for index, caption in zip(indices, captions)]

    def first(self, count: int) -> PairBatch:
        """The first ``count`` pairs, with the captions of epoch 0."""
        return self.of(Places(np.zeros(count, dtype=np.int64), np.arange(count)))

    def close(self) -> None:
        """Do nothing, because no file is open."""


class ReadPairs:
    """Images read and encoded in every step, cropped and mirrored anew in every epoch, in aspect buckets if there are
    any."""

    def __init__(self, context: StageContext, count: int, encode: Encode, batch: int, dropout: float, workers: int):
        buckets: Any = getattr(context.source, "buckets", None)
        order = Order(count, context.seed, None if buckets is None else buckets[:count])
        self.count, self.encode = count, encode
        part = Slice(context.processes.rank, context.processes.world)
        self.loader = Loader(context.source, order, batch, context.seed, workers, part, dropout)

    def __len__(self) -> int:
        return self.count

    def at(self, step: int) -> PairBatch:
        """The slice of this process of the batch of ``step``."""
        batch = self.loader.batch_at(step)
        return PairBatch(*self.encode(to_unit(batch.images)), batch.captions)

    def close(self) -> None:
        """End the loader workers."""
        self.loader.close()
