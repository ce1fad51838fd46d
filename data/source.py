"""One interface in front of every kind of data, and the batch it is read into.

A source has a length, ``source[i]`` (a dictionary with at least ``image`` uint8 (3, H, W), ``caption``, ``captions``
and ``id``) and ``source.captions(i)``, the phrasings of item i without drawing it. Item i is always the same.
"""
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from data.emoji import Emoji, EmojiConfig
from data.shapes import Shapes, ShapesConfig

Split = Literal["train", "validation", "test"]


class Source(Protocol):
    """Captioned pictures, each a function of its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self, index: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class DataConfig:
    """Which source, and the settings of each."""

    source: Literal["shapes", "emoji"] = "shapes"
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    emoji: EmojiConfig = field(default_factory=EmojiConfig)

    @property
    def size(self) -> int:
        """Width and height of the pictures."""
        return getattr(self, self.source).size


def build_source(config: DataConfig, split: Split) -> Source:
    """The configured source; raises ValueError for an unknown split and for data that is missing or damaged."""
    if split not in get_args(Split):
        raise ValueError(f"split: '{split}'; valid: {', '.join(get_args(Split))}")
    return Shapes(config.shapes, split) if config.source == "shapes" else Emoji(config.emoji, split)


def data_key(config: DataConfig) -> dict[str, Any]:
    """What the numbers of a source depend on, for the names of caches."""
    return {"source": config.source, **asdict(getattr(config, config.source))}


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] rounded to uint8, same shape; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_batch(source: Source, indices: np.ndarray) -> torch.Tensor:
    """The pictures ``indices`` of a source, (B, 3, H, W) float in [-1, 1]."""
    return to_unit(torch.stack([source[int(index)]["image"] for index in indices]))
