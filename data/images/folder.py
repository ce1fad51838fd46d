"""Source `folder`: images in a folder and its subfolders, with captions in a .txt beside each or in tables.

Captions come from a table (captions.jsonl, metadata.jsonl, captions.csv, metadata.csv) in the folder of an image or
above it, else from the .txt of the same name (data/images/folder_files.py). The hash and the size of every image are
stored in ROOT/.index.jsonl and computed again only for files whose length or modification time has changed; a folder
that cannot be written is read every time.
"""
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.fingerprint import state_hash
from data.images.base import SPLIT_NAMES, ImageConfig, ImageFiles, check_shares, split_named, split_of
from data.images.caption_list import plain_name
from data.images.folder_files import INDEX, caption_files_state, find_files, read_captions
from data.images.transforms import SUFFIXES, Unreadable, image_size
from data.strings import Strings
from files.whole import whole_file

OUTSIDE = f"images outside the folders of the splits ({', '.join(SPLIT_NAMES)})"


@dataclass(frozen=True)
class FolderConfig(ImageConfig):
    """``split``: "hash" splits by a hash of the file names with the shares ``validation`` and ``test``, "folders" by
    the subfolders of the root that are called as in ``SPLIT_NAMES``."""

    split: Literal["hash", "folders"] = "hash"
    validation: float = 0.02
    test: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)


def _read_index(index: Path) -> dict[str, dict]:
    """The rows of an index by file name."""
    rows = {}
    try:
        for line in index.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            row = json.loads(line)
            size = () if "error" in row else (row["height"], row["width"])
            whole = [row["bytes"], row["time"], row["limit"], *size]
            text = [row["name"], row["sha256"], row.get("error", "")]
            if {type(value) for value in whole} != {int} or {type(value) for value in text} != {str} \
                    or not all(side in range(1, 2**31) for side in size):
                return {}
            rows[row["name"]] = row
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # absent or damaged: all files are read again
    return rows


def _inspect_file(root: Path, name: str, max_pixels: int, known: dict | None) -> dict[str, Any]:
    """The row of a file in the index: {"name", "bytes", "time", "limit", "sha256"?, "height"?, "width"?, "error"?}."""
    path = root / name
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return {"name": name, "error": "it is no regular file"}  # reading a pipe would wait without end
        row: dict[str, Any] = {"name": name, "bytes": about.st_size, "time": about.st_mtime_ns, "limit": max_pixels}
        if known is not None and all(known.get(key) == row[key] for key in row):
            return known
        data = path.read_bytes()
    except OSError as error:
        return {"name": name, "error": error.strerror or str(error)}
    row["sha256"] = hashlib.sha256(data).hexdigest()
    try:
        row["height"], row["width"] = image_size(data, name, max_pixels)
    except Unreadable as error:
        row["error"] = error.reason
    return row


def scan_files(root: Path, names: Sequence[str], max_pixels: int) -> list[dict[str, Any]]:
    """The index rows of the files ``names`` below ``root``, taken from the index for files that have not changed."""
    index = root / INDEX
    known = _read_index(index)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(lambda name: _inspect_file(root, name, max_pixels, known.get(name)), names))
    kept = [row for row in rows if "sha256" in row]
    if any(known.get(row["name"]) is not row for row in kept) or len(kept) != len(known):
        try:
            with whole_file(index) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        except OSError:
            pass  # no permission or no space: the next run reads the files again
    return rows


class Folder(ImageFiles):
    """One split of a folder. Raises FileNotFoundError or ValueError if there is nothing to read."""

    def __init__(self, config: FolderConfig, split: Literal["train", "validation", "test"]):
        root = self.root = Path(config.root)
        if not config.root or not root.is_dir():
            raise FileNotFoundError(f"root: '{config.root}' is no folder; valid: a folder of images with captions")
        files = find_files(root)
        if not files.images:
            raise ValueError(f"root: {root} holds no images; valid: files that end in {', '.join(SUFFIXES)}")
        captions = read_captions(root, files)
        rows, refused = [], list(captions.lines)
        index_rows = scan_files(root, files.images, config.max_pixels)
        for row in index_rows:
            name = row["name"]
            texts = captions.captions.get(name) or ([(config.fallback, 1.0)] if config.fallback else None)
            reason = row.get("error") or captions.wrong.get(name) or ("" if texts else "it has no caption")
            place = self._split_of_file(config, name)
            if place is None:
                files.leave_out(OUTSIDE, [name])
            elif reason:
                refused.append((name, reason))
            else:
                rows.append({**row, "captions": json.dumps(texts, ensure_ascii=False), "split": place})
        self.refused, self.left_out = refused, files.left_out
        self.found = len(files.images) - len(files.left_out.get(OUTSIDE, []))
        self.content = hashlib.sha256(json.dumps(
            [[row["name"], row["sha256"], row["captions"]] for row in rows]).encode()).hexdigest()
        self.state = state_hash([*((row["name"], row.get("bytes"), row.get("time")) for row in index_rows),
                                 *caption_files_state(root, files)])
        mine = [row for row in rows if row["split"] == split]
        super().__init__(config, Strings(row["name"] for row in mine), Strings(row["captions"] for row in mine),
                         np.array([[row["height"], row["width"]] for row in mine], dtype=np.int32).reshape(-1, 2))

    @staticmethod
    def _split_of_file(config: FolderConfig, name: str) -> str | None:
        """The split of a file, None for a file outside the subfolders of the splits."""
        if config.split == "folders":
            return split_named(name.partition("/")[0]) if "/" in name else None
        return split_of(plain_name(name), config.validation, config.test)

    def _bytes(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()
