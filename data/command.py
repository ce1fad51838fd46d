"""The data that an argument of a command names: a config, a folder of images or a folder of shards."""
from pathlib import Path

from data.catalog import DataConfig, build_source
from data.images.base import SPLITS, split_named
from data.images.folder import FolderConfig
from data.images.shards import ShardsConfig, shard_files
from data.source import Source
from files.config import from_dict, read_yaml


def data_config_of(argument: str) -> DataConfig:
    """The data section of a config, or one made for a folder of shards or images. Raises ValueError or OSError."""
    path = Path(argument)
    if path.is_dir():
        if shard_files(path):
            return DataConfig(source="shards", shards=ShardsConfig(root=argument))
        inside = {split_named(part.name) for part in path.iterdir() if part.is_dir()} - {None}
        folder = FolderConfig(root=argument, split="folders" if "train" in inside and len(inside) > 1 else "hash")
        return DataConfig(source="folder", folder=folder)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise FileNotFoundError(f"'{argument}' is neither a folder nor a config; valid: a folder of images, a folder "
                                "of .tar shards, or a .yaml file with a data section")
    data = read_yaml(path)
    if not isinstance(data.get("data"), dict):
        raise ValueError(f"{path} has no data section")
    return from_dict(DataConfig, data["data"], "data")


def splits_of(argument: str, unreadable: Path | None = None) -> dict[str, Source]:
    """All splits of the data that ``argument`` names. Raises ValueError or OSError."""
    config = data_config_of(argument)
    return {split: build_source(config, split, unreadable) for split in SPLITS}  # type: ignore[arg-type]
