"""Source `shards`: images and captions in tar files with the layout of the webdataset library.

`python -m data.shards SOURCE OUT` writes such files. Members of a tar that share a name up to its first dot are one
sample: 000012.jpg, 000012.json, 000012.txt. The contents of a tar and their offsets are stored beside it
(shard-000000.tar.index), so samples can be read in any order, and shards behave like every other source: the order of
an epoch, a resume and the slice of a process do not depend on them.
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

from data.images.base import ImageConfig, ImageFiles, check_shares, split_of
from data.images.caption_list import Captions, caption_list, lines_of
from data.images.transforms import SUFFIXES, Unreadable, image_size
from data.strings import Strings
from files.whole import sha256_of, whole_file

FORMAT = 1
OPEN = 64  # tar files that a process keeps open at once


@dataclass(frozen=True)
class ShardsConfig(ImageConfig):
    """``root`` is a folder of .tar files. The split of a sample is named in its .json, else it follows from a hash of
    its id with the shares ``validation`` and ``test``."""

    validation: float = 0.02
    test: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)


# ---- the index of a tar

def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], tarfile.TarFile]]:
    """(key, members by extension, the open tar) of every sample: consecutive members with the same key."""
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


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member that is a file."""
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _metadata_and_captions(members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile,
                           name: str) -> tuple[dict, Captions | None]:
    """The .json of a sample and its captions, None if it has no captions. Raises Unreadable."""
    try:
        about = json.loads(_member_bytes(tar, members["json"])) if "json" in members else {}
        if not isinstance(about, dict):
            raise ValueError("its .json is not an object")
        value = about.get("captions") or about.get("caption")
        if not value and "txt" in members:
            value = lines_of(_member_bytes(tar, members["txt"]).decode("utf-8-sig"))
        return about, caption_list(value) if value else None
    except (ValueError, tarfile.TarError) as error:
        raise Unreadable(name, f"its captions cannot be read: {error}") from None


def _index_row(path: Path, key: str, members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> dict[str, Any]:
    """The row of a sample in the index: {"name", "captions", "split", "suffix", "offset", "bytes", "height", "width"},
    with "error" if something of it cannot be read."""
    name = f"{path.name}/{key}"
    row: dict[str, Any] = {"name": name}
    suffix = next((kind for kind in members if "." + kind.rpartition(".")[2] in SUFFIXES), None)
    try:
        about, texts = _metadata_and_captions(members, tar, name)
        captions = None if texts is None else [[*entry] for entry in texts]  # lists, as JSON returns them
        if suffix is None:
            raise Unreadable(name, "it has no image")
        image = members[suffix]
        row |= {"name": str(about.get("id", key)), "captions": captions, "split": about.get("split"),
                "suffix": "." + suffix.rpartition(".")[2], "offset": image.offset_data, "bytes": image.size}
        # the limit on pixels belongs to a run, hence it is applied when the index is read
        row["height"], row["width"] = image_size(_member_bytes(tar, image), name, 2**62)
    except Unreadable as error:
        row["error"] = error.reason
    return row


def shard_index(path: Path) -> dict[str, Any]:
    """The index of a tar, from PATH.index if that fits the tar; otherwise the tar is read and the index written.

    Returns {"format", "bytes", "time", "sha256", "samples": rows}. Raises ValueError for a damaged tar.
    """
    about, kept = path.stat(), path.with_name(path.name + ".index")
    try:
        index = json.loads(kept.read_text(encoding="utf-8"))
        if (index["format"], index["bytes"]) == (FORMAT, about.st_size):
            # a copy has another modification time: then its bytes decide
            if index["time"] == about.st_mtime_ns or index["sha256"] == sha256_of(path):
                return index
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        rows = [_index_row(path, *sample) for sample in _samples(path)]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no tar file: {error}") from None
    index = {"format": FORMAT, "bytes": about.st_size, "time": about.st_mtime_ns, "sha256": sha256_of(path),
             "samples": rows}
    try:
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    except OSError:
        pass  # no permission: the next run reads the tar again
    return index


def shard_files(root: Path) -> list[Path]:
    """The tar files of a folder, sorted."""
    return sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))


# ---- the source

class Shards(ImageFiles):
    """One split of a folder of shards. Raises FileNotFoundError or ValueError if there is nothing to read."""

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
