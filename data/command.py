"""What the commands of this folder are given: a config, a folder of pictures or a folder of shards."""
import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data.catalog import DataConfig, build_source
from data.images.base import SPLITS
from data.images.folder import SUBFOLDERS, FolderConfig
from data.images.shards import ShardsConfig, shard_files
from data.source import Source

T = TypeVar("T")


def opened_config(argument: str) -> DataConfig:
    """The data section of a config, or that of a folder of shards or pictures. Raises ValueError or OSError."""
    path = Path(argument)
    if path.is_dir():
        if shard_files(path):
            return DataConfig(source="shards", shards=ShardsConfig(root=argument))
        inside = {SUBFOLDERS.get(part.name) for part in path.iterdir() if part.is_dir()} - {None}
        folder = FolderConfig(root=argument, split="folders" if "train" in inside and len(inside) > 1 else "hash")
        return DataConfig(source="folder", folder=folder)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise FileNotFoundError(f"'{argument}' is neither a folder nor a config; valid: a folder of pictures, a folder "
                                "of .tar shards, or a .yaml file with a data section")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(data.get("data"), dict):
        raise ValueError(f"{path} has no data section")
    return _filled(DataConfig, data["data"], "data")


def _filled(cls: type[T], data: dict, path: str) -> T:
    """The dataclass ``cls`` with the values of a mapping; files/config.py, which also checks every type, is not
    for this folder to import."""
    hints = typing.get_type_hints(cls)
    known = {part.name for part in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"unknown key '{path}.{key}'; valid keys here: {', '.join(sorted(known))}")
        if dataclasses.is_dataclass(hints[key]):
            value = _filled(hints[key], value if isinstance(value, dict) else {}, f"{path}.{key}")
        choices = typing.get_args(hints[key]) if typing.get_origin(hints[key]) is typing.Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{path}.{key}: got {value!r}; valid: one of {', '.join(choices)}")
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}.{error}") from None


def opened_splits(argument: str, unreadable: Path | None = None) -> dict[str, Source]:
    """Every split of what ``argument`` names. Raises ValueError or OSError."""
    config = opened_config(argument)
    return {split: build_source(config, split, unreadable) for split in SPLITS}  # type: ignore[arg-type]
