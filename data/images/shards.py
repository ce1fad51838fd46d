"""Source `shards`: images and captions in tar files with the layout of the webdataset library.

`python -m data.shards SOURCE OUT` writes such files. Members of a tar that share a name up to its first dot are one
sample: 000012.jpg, 000012.json, 000012.txt (data/images/tar_index.py). The contents of a tar and their offsets are
stored beside it (shard-000000.tar.index), so samples can be read in any order, and shards behave like every other
source: the order of an epoch, a resume and the slice of a process do not depend on them. What a writer lists, in
index.json or in the statistics of img2dataset, must be there.
"""
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.fingerprint import state_hash
from data.images.base import SPLIT_NAMES, ImageConfig, ImageFiles, check_shares, split_named, split_of
from data.images.folder_files import LeftOut
from data.images.tar_index import FORMAT, shard_index
from data.images.transforms import Unreadable
from data.strings import Strings

OPEN = 64  # tar files that a process keeps open at once


@dataclass(frozen=True)
class ShardsConfig(ImageConfig):
    """``root`` is a folder of .tar files. The split of a sample is named in its .json, as in ``SPLIT_NAMES``, else it
    follows from a hash of its id with the shares ``validation`` and ``test``."""

    validation: float = 0.02
    test: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)


# ---- what a folder holds, and what it should hold

def shard_files(root: Path) -> list[Path]:
    """The tar files of a folder, sorted."""
    return sorted(path for path in root.iterdir() if path.suffix.lower() == ".tar" and not path.name.startswith("."))


def other_tars(root: Path) -> LeftOut:
    """Tar files that are not read, by reason."""
    left_out: LeftOut = {}
    for path in sorted(root.iterdir()):
        packed = [ending for ending in (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
                  if path.name.lower().endswith(ending)]
        if packed:
            left_out.setdefault("compressed tar files; unpack them to .tar", []).append(path.name)
        elif path.is_dir():
            inside = [str(tar.relative_to(root)) for tar in sorted(path.glob("*.tar"))]
            if inside:
                left_out.setdefault("tar files in subfolders", []).extend(inside)
    return left_out


def _listed_in(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of a tar, {"samples", "bytes", "sha256"} as far as they are listed) in an index.json: that of
    data/write_shards.py, or the shard list of the wids library."""
    data = json.loads(path.read_bytes())
    if "shards" in data:
        for shard in data["shards"]:
            yield shard["name"], {name: shard[name] for name in ("samples", "bytes", "sha256")}
    else:
        for shard in data["shardlist"]:
            about = {"samples": shard["nsamples"], "bytes": shard.get("filesize")}
            yield shard["url"].rpartition("/")[2], {name: value for name, value in about.items() if value is not None}


def check_listed(root: Path, indices: dict[str, dict[str, Any]]) -> None:
    """Compare the tars, whose indices are given by name, with index.json and with the NAME_stats.json that img2dataset
    writes for each. Raises ValueError naming the first difference."""
    listed: dict[str, dict[str, Any]] = {}
    path = root / "index.json"
    if not path.exists() and (root / ".plan.json").exists():
        raise ValueError(f"{root} is not finished; valid: the command that began it (python -m data.shards) to its end")
    try:
        if path.exists():
            listed = dict(_listed_in(path))
            extra = sorted(set(indices) - set(listed))
            if extra:
                raise ValueError(f"{path} does not list {extra[0]}; valid: the tars that it lists and no others; "
                                 "remove it if the tars were changed on purpose")
        for path in sorted(root.glob("*_stats.json")):
            name = path.name.removesuffix("_stats.json") + ".tar"
            listed.setdefault(name, {"samples": json.loads(path.read_bytes())["successes"]})
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or lists no shards ({error!r}); remove it if it is not about the tars "
                         "beside it") from None
    for name, about in listed.items():
        if name not in indices:
            raise ValueError(f"{root}: {name} is missing, which index.json or a _stats.json lists; remove that file if "
                             "the tar was removed on purpose")
        found = {**indices[name], "samples": len(indices[name]["samples"])}
        differs = [f"{key} {found[key]} and not {value}" for key, value in about.items() if found[key] != value]
        if differs:
            raise ValueError(f"{root / name} is not the one that index.json or its _stats.json lists: "
                             f"{', '.join(differs)}")


# ---- the source

def _reason_against(row: dict[str, Any], config: ShardsConfig) -> str:
    """Why a sample cannot be an item, "" if it can."""
    if "error" in row:
        return row["error"]
    if row["split"] is not None and split_named(row["split"]) is None:
        return f"its split is {str(row['split'])[:80]!r}; valid: {', '.join(SPLIT_NAMES)}"
    if not row["captions"] and not config.fallback:
        return f"it has no caption; its members: {row['members']}"
    if row["height"] * row["width"] > config.max_pixels:
        return f"{row['width']} x {row['height']} pixels are more than max_pixels = {config.max_pixels}"
    return ""


class Shards(ImageFiles):
    """One split of a folder of shards. Raises FileNotFoundError or ValueError if there is nothing to read."""

    def __init__(self, config: ShardsConfig, split: Literal["train", "validation", "test"]):
        root = Path(config.root)
        self.files = shard_files(root) if config.root and root.is_dir() else []
        if not self.files:
            raise FileNotFoundError(f"root: '{config.root}' holds no .tar files; write them with: "
                                    "python -m data.shards SOURCE OUT")
        indices = [shard_index(path) for path in self.files]
        check_listed(root, {path.name: index for path, index in zip(self.files, indices)})
        self.left_out = other_tars(root)
        for path, index in zip(self.files, indices):
            for reason, names in index["left_out"].items():
                self.left_out.setdefault(reason, []).extend(f"{path.name}/{name}" for name in names)
        self.found = sum(len(index["samples"]) for index in indices)
        mine, self.refused = self._rows(config, split, indices)
        digest = hashlib.sha256(f"format {FORMAT}\n".encode())  # which samples a tar holds depends on the format
        for path, index in zip(self.files, indices):
            digest.update(f"{path.name} {index['sha256']}\n".encode("utf-8", "surrogateescape"))
        self.content = digest.hexdigest()
        self.state = state_hash((path.name, index["bytes"], index["time"]) for path, index in zip(self.files, indices))
        self.where = np.array([row[4:7] for row in mine], dtype=np.int64).reshape(-1, 3)  # shard, offset, bytes
        self.suffixes = Strings(row[7] for row in mine)
        self._handles: dict[int, int] = {}
        self._owner = os.getpid()
        super().__init__(config, Strings(row[0] for row in mine), Strings(row[1] for row in mine),
                         np.array([row[2:4] for row in mine], dtype=np.int32).reshape(-1, 2))

    def _rows(self, config: ShardsConfig, split: str,
              indices: list[dict[str, Any]]) -> tuple[list[tuple], list[tuple[str, str]]]:
        """((name, captions, height, width, shard, offset, bytes, suffix) of the samples of a split, (shard/key, reason)
        of all that are refused). A name that several samples have is replaced by shard/key, which is unique."""
        often = Counter(row["name"] for index in indices for row in index["samples"] if "error" not in row)
        mine, refused, places = [], [], set()
        for number, (path, index) in enumerate(zip(self.files, indices)):
            for row in index["samples"]:
                place = f"{path.name}/{row['key']}"
                reason = _reason_against(row, config)
                if not reason and place in places:
                    reason = "its shard holds an earlier sample of this name"
                if reason:
                    refused.append((place, reason))
                    continue
                places.add(place)
                if (split_named(row["split"]) or split_of(row["name"], config.validation, config.test)) == split:
                    texts = row["captions"] or [(config.fallback, 1.0)]
                    mine.append((place if often[row["name"]] > 1 else row["name"],
                                 json.dumps(texts, ensure_ascii=False), row["height"], row["width"], number,
                                 row["offset"], row["bytes"], row["suffix"]))
        return mine, refused

    def _bytes(self, index: int) -> bytes:
        shard, offset, count = self.where[index].tolist()
        if self._owner != os.getpid():  # a worker opens the files itself: it must not close the handles of its parent
            self._handles, self._owner = {}, os.getpid()
        if shard not in self._handles:
            if len(self._handles) >= OPEN:
                self.close()
            self._handles[shard] = os.open(self.files[shard], os.O_RDONLY)
        data = os.pread(self._handles[shard], count, offset)
        if len(data) < count:
            raise Unreadable(self.names[index], f"{self.files[shard].name} ends before it")
        return data

    def file_bytes(self, index: int) -> tuple[bytes, str] | None:
        """The bytes and the suffix of the image of a sample. Raises Unreadable."""
        index = self._positive_index(index)
        try:
            return self._bytes(index), self.suffixes[index]
        except OSError as error:
            raise Unreadable(self.names[index], error.strerror or str(error)) from None

    def open_image(self, index: int, shape: tuple[int, int] | None = None) -> Image.Image:
        """The image as every source gives it. Raises Unreadable with the name of the shard."""
        try:
            return super().open_image(index, shape)
        except Unreadable as error:
            shard = self.files[self.where[index, 0]].name
            raise Unreadable(error.name, f"{error.reason} (in {shard})") from None

    def close(self) -> None:
        """Close the tar files; they are opened again when needed."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}, "_owner": -1}
