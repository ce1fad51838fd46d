"""The data section of a configuration, the source that it names, and what the images of that source depend on."""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from data.emoji.emoji import FILES, Emoji, EmojiConfig, content_hash
from data.fingerprint import Fingerprint, drawn_content, fingerprint_of_files, state_hash
from data.images.base import ImageConfig, ImageFiles, Readable
from data.images.folder import Folder, FolderConfig
from data.images.shards import Shards, ShardsConfig
from data.images.torchvision_sets import Cifar10, CifarConfig, CocoCaptions, CocoConfig, Flowers102, FlowersConfig
from data.shapes.shapes import Shapes, ShapesConfig
from data.source import Source, Split
from files.images import MAX_PIXELS

FILE_SOURCES: dict[str, Callable[[Any, Split], ImageFiles]] = {  # sources that read image files
    "folder": Folder, "shards": Shards, "coco_captions": CocoCaptions, "flowers102": Flowers102, "cifar10": Cifar10}
DRAWN_SOURCES: dict[str, Callable[[Any, Split], Source]] = {"shapes": Shapes, "emoji": Emoji}  # ... that are rendered


@dataclass(frozen=True)
class DataConfig:
    """The name of the source, and the settings of every source. ``bad_share`` is the share of files that may be
    unreadable: those files are listed and skipped; when there are more, the run stops."""

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
        """The same data without aspect buckets, for measurements on held-out images, which all need one size."""
        settings = getattr(self, self.source)
        if not hasattr(settings, "buckets"):
            return self
        return replace(self, **{self.source: replace(settings, buckets=False)})

    @property
    def size(self) -> int:
        """Side of the images in pixels; with aspect buckets, the side of the square of the same area."""
        return getattr(self, self.source).size

    @property
    def max_pixels(self) -> int:
        """The number of pixels above which image files are refused, those of the data and those given to commands."""
        return getattr(getattr(self, self.source), "max_pixels", MAX_PIXELS)

    @property
    def image_shapes(self) -> list[tuple[int, int]]:
        """The sizes (H, W) of the images of the source: one, or one for each aspect bucket."""
        chosen = getattr(self, self.source)
        return chosen.shapes() if isinstance(chosen, ImageConfig) else [(self.size, self.size)]


def build_source(config: DataConfig, split: Split, unreadable: Path | None = None) -> Source:
    """The configured source; raises ValueError or OSError for an unknown split and for data that is missing or damaged.

    ``unreadable`` is the file in which unreadable images are listed; all processes of one run pass the same file.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: '{split}'; valid: {', '.join(get_args(Split))}")
    if config.source in FILE_SOURCES:
        files = FILE_SOURCES[config.source](getattr(config, config.source), split)
        return Readable(files, config.bad_share, unreadable)
    return DRAWN_SOURCES[config.source](getattr(config, config.source), split)


def data_key(config: DataConfig, files: ImageFiles | None = None) -> dict[str, Any]:
    """Everything that the images of a source depend on, for the names of caches; its location is not part of it.
    ``files`` is the training split of a source of image files, where it is open already."""
    settings = getattr(config, config.source)
    if config.source in FILE_SOURCES:
        return {"source": config.source, **(files or FILE_SOURCES[config.source](settings, "train")).key()}
    if config.source == "emoji":
        return {"source": "emoji", **{name: value for name, value in asdict(settings).items() if name != "root"},
                "content": content_hash(settings)}
    return {"source": config.source, **asdict(settings)}


def data_identity(config: DataConfig) -> tuple[dict[str, Any], Fingerprint]:
    """``data_key``, and the fingerprint by which a resumed run recognises its data."""
    settings = getattr(config, config.source)
    if config.source in FILE_SOURCES:
        files = FILE_SOURCES[config.source](settings, "train")
        return data_key(config, files), files.fingerprint()
    drawn = drawn_content(build_source(config, "train"))
    if config.source == "emoji":
        folder = fingerprint_of_files(Path(settings.root), FILES, FILES)
        return data_key(config), Fingerprint(folder.files, state_hash([[folder.content, drawn]]))
    return data_key(config), Fingerprint("", drawn)
