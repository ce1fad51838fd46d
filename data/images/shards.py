"""Source `shards`: pictures and captions in tar files of the layout that the webdataset library reads and writes.

    python -m data.shards SOURCE OUT [--shard-size 1000]

SOURCE is a folder of pictures, a folder of shards, or a config (its `data` section). Members of a tar that share a name
up to its first dot are one sample: 000012.jpg, 000012.json, 000012.txt. What a tar holds and where is kept beside it
(shard-000000.tar.index), so every sample is read on its own: order, resume and slices by rank are those of any source.
"""
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.images.base import PictureConfig, Pictures, check_shares, split_of
from data.images.caption_list import Captions, caption_list, lines_of
from data.images.transforms import SUFFIXES, Unreadable, picture_size
from data.strings import Strings
from files.whole import sha256_of, whole_file

FORMAT = 1
OPEN = 64  # tar files kept open at once by a process


@dataclass(frozen=True)
class ShardsConfig(PictureConfig):
    """``root`` is a folder of .tar files. A sample is in the split that its .json names, else by hash of its id with
    the shares ``validation`` and ``test``."""

    validation: float = 0.02
    test: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)


# ---- the index of a tar

def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], tarfile.TarFile]]:
    """(key, members by extension, the open tar) of every sample: members that follow each other with one key."""
    with tarfile.open(path, "r:") as tar:
        key: str | None = None
        members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            match = re.match(r"^((?:.*/)?[^./]+)\.([^/]*)$", member.name)
            if not member.isfile() or match is None:
                continue
            if match[1] != key and members:
                yield key or "", members, tar
                members = {}
            key = match[1]
            members[match[2].lower()] = member
        if members:
            yield key or "", members, tar


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _about(members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile, name: str) -> tuple[dict, Captions | None]:
    """The .json of a sample and its captions, None where it has none. Raises Unreadable."""
    try:
        about = json.loads(_read(tar, members["json"])) if "json" in members else {}
        if not isinstance(about, dict):
            raise ValueError("its .json is not an object")
        value = about.get("captions") or about.get("caption")
        if not value and "txt" in members:
            value = lines_of(_read(tar, members["txt"]).decode("utf-8-sig"))
        return about, caption_list(value) if value else None
    except (ValueError, tarfile.TarError) as error:
        raise Unreadable(name, f"its captions cannot be read: {error}") from None


def _row(path: Path, key: str, members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> dict[str, Any]:
    """{"name", "captions", "split", "offset", "bytes", "height", "width"}, or "error" in place of what is missing."""
    name = f"{path.name}/{key}"
    row: dict[str, Any] = {"name": name}
    suffix = next((kind for kind in members if "." + kind.rpartition(".")[2] in SUFFIXES), None)
    try:
        about, texts = _about(members, tar, name)
        captions = None if texts is None else [[*entry] for entry in texts]  # as they come back from the file
        if suffix is None:
            raise Unreadable(name, "it has no picture")
        picture = members[suffix]
        row |= {"name": str(about.get("id", key)), "captions": captions, "split": about.get("split"),
                "suffix": "." + suffix.rpartition(".")[2], "offset": picture.offset_data, "bytes": picture.size}
        # the limit on pixels belongs to a run, so it is applied to these numbers when they are read
        row["height"], row["width"] = picture_size(_read(tar, picture), name, 2**62)
    except Unreadable as error:
        row["error"] = error.reason
    return row


def shard_index(path: Path) -> dict[str, Any]:
    """What a tar holds, from PATH.index where that fits the tar; else it is read and the index written.

    {"format", "bytes", "time", "sha256", "samples": rows}. Raises ValueError for a damaged tar.
    """
    about, kept = path.stat(), path.with_name(path.name + ".index")
    try:
        index = json.loads(kept.read_text(encoding="utf-8"))
        if (index["format"], index["bytes"]) == (FORMAT, about.st_size):
            # copied elsewhere it has another time: then its bytes decide
            if index["time"] == about.st_mtime_ns or index["sha256"] == sha256_of(path):
                return index
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        rows = [_row(path, *sample) for sample in _samples(path)]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no tar file: {error}") from None
    index = {"format": FORMAT, "bytes": about.st_size, "time": about.st_mtime_ns, "sha256": sha256_of(path),
             "samples": rows}
    try:
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    except OSError:
        pass  # not ours to write in: the next run reads the tar again
    return index


def shard_files(root: Path) -> list[Path]:
    """The tar files of a folder, sorted."""
    return sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))


# ---- the source

class Shards(Pictures):
    """One split of a folder of shards. Raises FileNotFoundError or ValueError where there is nothing to read."""

    def __init__(self, config: ShardsConfig, split: Literal["train", "validation", "test"]):
        root = Path(config.root)
        self.files = shard_files(root) if config.root and root.is_dir() else []
        if not self.files:
            raise FileNotFoundError(f"root: '{config.root}' holds no .tar files; write them with: "
                                    "python -m data.shards SOURCE OUT")
        mine, refused, digest, self.found = [], [], hashlib.sha256(), 0
        for number, path in enumerate(self.files):
            index = shard_index(path)
            digest.update(f"{path.name} {index['sha256']}\n".encode())
            self.found += len(index["samples"])
            for row in index["samples"]:
                texts = row.get("captions") or ([(config.fallback, 1.0)] if config.fallback else None)
                reason = row.get("error") or ("" if texts else "it has no caption")
                if not reason and row["height"] * row["width"] > config.max_pixels:
                    reason = f"{row['width']} x {row['height']} pixels are more than max_pixels = {config.max_pixels}"
                if reason:
                    refused.append((row["name"], reason))
                elif (row["split"] or split_of(row["name"], config.validation, config.test)) == split:
                    mine.append((row["name"], json.dumps(texts, ensure_ascii=False), row["height"], row["width"],
                                 number, row["offset"], row["bytes"], row["suffix"]))
        self.content, self.refused = digest.hexdigest(), refused
        self.where = np.array([row[4:7] for row in mine], dtype=np.int64).reshape(-1, 3)  # shard, offset, bytes
        self.suffixes = Strings(row[7] for row in mine)
        self._handles: dict[int, int] = {}
        self._owner = os.getpid()
        super().__init__(config, Strings(row[0] for row in mine), Strings(row[1] for row in mine),
                         np.array([row[2:4] for row in mine], dtype=np.int32).reshape(-1, 2))

    def _bytes(self, index: int) -> bytes:
        shard, offset, count = self.where[index].tolist()
        if self._owner != os.getpid():  # a worker opens files of its own: closing the parent's would be wrong
            self._handles, self._owner = {}, os.getpid()
        if shard not in self._handles:
            if len(self._handles) >= OPEN:
                self.close()
            self._handles[shard] = os.open(self.files[shard], os.O_RDONLY)
        data = os.pread(self._handles[shard], count, offset)
        if len(data) < count:
            raise Unreadable(self.names[index], f"{self.files[shard].name} ends before it")
        return data

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        index = self._checked(index)
        try:
            return self._bytes(index), self.suffixes[index]
        except OSError as error:
            raise Unreadable(self.names[index], error.strerror or str(error)) from None

    def close(self) -> None:
        """Close the tar files; they open again when they are needed."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}, "_owner": -1}
