"""Which source a configuration names, and what the images of it depend on."""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from data.emoji.emoji import Emoji, EmojiConfig
from data.emoji.emoji import content as emoji_content
from data.images.base import PictureConfig, Pictures, Readable
from data.images.folder import Folder, FolderConfig
from data.images.shards import Shards, ShardsConfig
from data.images.torchvision_sets import Cifar10, CifarConfig, CocoCaptions, CocoConfig, Flowers102, FlowersConfig
from data.shapes.shapes import Shapes, ShapesConfig
from data.source import Source, Split

FILES: dict[str, Callable[[Any, Split], Pictures]] = {  # sources whose pictures come from files
    "folder": Folder, "shards": Shards, "coco_captions": CocoCaptions, "flowers102": Flowers102, "cifar10": Cifar10}


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
    def squares(self) -> "DataConfig":
        """The same data without aspect buckets: what is measured on held-out images is measured on one size."""
        settings = getattr(self, self.source)
        if not hasattr(settings, "buckets"):
            return self
        return replace(self, **{self.source: replace(settings, buckets=False)})

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
