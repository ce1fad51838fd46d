"""Source `folder`: images in a folder and its subfolders, with captions in a .txt beside each or in one table.

Captions come from captions.jsonl, metadata.jsonl or captions.csv in the root, else from the .txt of the same name
(data/images/caption_list.py). The hash and the size of every image are stored in ROOT/.index.jsonl and computed again
only for files whose length or modification time has changed; a folder that cannot be written is read every time.
"""
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.images.base import ImageConfig, ImageFiles, check_shares, split_of
from data.images.caption_list import TABLES, Captions, plain_name, read_table, read_text_file
from data.images.transforms import SUFFIXES, Unreadable, image_size
from data.strings import Strings
from files.whole import whole_file

INDEX = ".index.jsonl"
SUBFOLDERS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class FolderConfig(ImageConfig):
    """``split``: "hash" splits by a hash of the file names with the shares ``validation`` and ``test``, "folders" by
    the subfolders train, validation (val, valid) and test of the root."""

    split: Literal["hash", "folders"] = "hash"
    validation: float = 0.02
    test: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)


def image_files(root: Path) -> list[str]:
    """Names of all image files below ``root``, relative to it and sorted, without hidden files."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/") for name in files
                  if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _read_index(index: Path) -> dict[str, dict]:
    """The rows of an index by file name."""
    rows = {}
    try:
        for line in index.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            row = json.loads(line)
            rows[row["name"]] = row
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # absent or damaged: all files are read again
    return rows


def _inspect_file(root: Path, name: str, max_pixels: int, known: dict | None) -> dict[str, Any]:
    """The row of a file in the index: {"name", "bytes", "time", "limit", "sha256"?, "height"?, "width"?, "error"?}."""
    path = root / name
    try:
        about = path.stat()
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


def _read_captions(root: Path, names: Sequence[str]
                   ) -> tuple[dict[str, Captions], dict[str, str], list[tuple[str, str]]]:
    """(captions by file, reason by file for unreadable captions, (line, reason) for unreadable lines of a table)."""
    table: dict[str, Captions] = {}
    lines: list[tuple[str, str]] = []
    for path in (root / name for name in TABLES):
        if path.is_file():
            table, lines = read_table(path)
            break
    found: dict[str, Captions] = {}
    wrong = {}
    for name in names:
        try:
            texts = table.get(plain_name(name)) or read_text_file((root / name).with_suffix(".txt"), name)
        except Unreadable as error:
            wrong[name] = error.reason
            continue
        if texts is not None:
            found[name] = texts
    return found, wrong, lines


class Folder(ImageFiles):
    """One split of a folder. Raises FileNotFoundError or ValueError if there is nothing to read."""

    def __init__(self, config: FolderConfig, split: Literal["train", "validation", "test"]):
        root = self.root = Path(config.root)
        if not config.root or not root.is_dir():
            raise FileNotFoundError(f"root: '{config.root}' is no folder; valid: a folder of images with captions")
        names = image_files(root)
        if not names:
            raise ValueError(f"root: {root} holds no images; valid: files that end in {', '.join(SUFFIXES)}")
        captions, wrong, refused = _read_captions(root, names)
        rows = []
        for row in scan_files(root, names, config.max_pixels):
            name = row["name"]
            texts = captions.get(name) or ([(config.fallback, 1.0)] if config.fallback else None)
            reason = row.get("error") or wrong.get(name) or ("" if texts else "it has no caption")
            place = self._split_of_file(config, name)
            if reason:
                refused.append((name, reason))
            elif place is not None:
                rows.append({**row, "captions": json.dumps(texts, ensure_ascii=False), "split": place})
        self.refused, self.found = refused, len(names)
        self.content = hashlib.sha256(json.dumps(
            [[row["name"], row["sha256"], row["captions"]] for row in rows]).encode()).hexdigest()
        mine = [row for row in rows if row["split"] == split]
        super().__init__(config, Strings(row["name"] for row in mine), Strings(row["captions"] for row in mine),
                         np.array([[row["height"], row["width"]] for row in mine], dtype=np.int32).reshape(-1, 2))

    @staticmethod
    def _split_of_file(config: FolderConfig, name: str) -> str | None:
        """The split of a file, None for a file outside the subfolders of the splits."""
        if config.split == "folders":
            return SUBFOLDERS.get(name.partition("/")[0]) if "/" in name else None
        return split_of(plain_name(name), config.validation, config.test)

    def _bytes(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()
