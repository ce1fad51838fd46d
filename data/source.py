"""One interface in front of every kind of data, and what a run reads of it.

A source has a length, ``source[i]`` (a dictionary with at least ``image`` uint8 (3, H, W), ``caption``, ``captions``
and ``id``) and ``source.captions(i)``, the phrasings of item i without drawing it. Item i is always the same. Sources
of picture files (data/pictures.py) also have ``draw(i, rng)``, the item as a run sees it: one caption by its weight,
a crop, perhaps mirrored; ``drawn`` below gives it for every source as a function of (seed, epoch, index).
"""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from data.emoji import Emoji, EmojiConfig
from data.emoji import content as emoji_content
from data.folder import Folder, FolderConfig
from data.order import Places
from data.pictures import PictureConfig, Pictures, Readable
from data.shapes import Shapes, ShapesConfig
from data.shards import Shards, ShardsConfig
from data.torchvision_sets import Cifar10, CifarConfig, CocoCaptions, CocoConfig, Flowers102, FlowersConfig

Split = Literal["train", "validation", "test"]
FILES: dict[str, Callable[[Any, Split], Pictures]] = {  # sources whose pictures come from files
    "folder": Folder, "shards": Shards, "coco_captions": CocoCaptions, "flowers102": Flowers102, "cifar10": Cifar10}


class Source(Protocol):
    """Captioned pictures, each a function of its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self, index: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class DataConfig:
    """Which source, and the settings of each. ``bad_share`` is the share of files that may be unreadable: they are
    listed and skipped; one more and the run stops."""

    source: Literal["shapes", "emoji", "folder", "shards", "coco_captions", "flowers102", "cifar10"] = "shapes"
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    emoji: EmojiConfig = field(default_factory=EmojiConfig)
    folder: FolderConfig = field(default_factory=FolderConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    coco_captions: CocoConfig = field(default_factory=CocoConfig)
    flowers102: FlowersConfig = field(default_factory=FlowersConfig)
    cifar10: CifarConfig = field(default_factory=CifarConfig)
    bad_share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.bad_share < 1:
            raise ValueError(f"bad_share: {self.bad_share}; valid: a share in [0, 1)")

    @property
    def size(self) -> int:
        """Width and height of the pictures; with aspect buckets, those of the square of the same area."""
        return getattr(self, self.source).size

    @property
    def shapes_of_pictures(self) -> list[tuple[int, int]]:
        """(H, W) of all pictures a source gives: one, or one for each aspect bucket."""
        chosen = getattr(self, self.source)
        return chosen.shapes() if isinstance(chosen, PictureConfig) else [(self.size, self.size)]


def build_source(config: DataConfig, split: Split, unreadable: Path | None = None) -> Source:
    """The configured source; raises ValueError or OSError for an unknown split and for data that is missing or damaged.

    ``unreadable`` is the file in which pictures that cannot be read are listed; processes of one run give the same.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: '{split}'; valid: {', '.join(get_args(Split))}")
    if config.source in FILES:
        return Readable(FILES[config.source](getattr(config, config.source), split), config.bad_share, unreadable)
    return Shapes(config.shapes, split) if config.source == "shapes" else Emoji(config.emoji, split)


def data_key(config: DataConfig) -> dict[str, Any]:
    """What the pictures of a source depend on, for the names of caches: what is in it, not where it lies."""
    settings = getattr(config, config.source)
    if config.source in FILES:
        return {"source": config.source, **FILES[config.source](settings, "train").key()}
    if config.source == "emoji":
        return {"source": "emoji", **{name: value for name, value in asdict(settings).items() if name != "root"},
                "content": emoji_content(settings)}
    return {"source": config.source, **asdict(settings)}


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


# ---- pictures

def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] rounded to uint8, same shape; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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
