"""Fingerprints: by what a resumed run recognises that its data is what it began with."""
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.source import Source
from files.whole import sha256_of

DRAWN_ITEMS = 16  # items of a drawn source in its fingerprint


def state_hash(entries: Iterable[Sequence[object]]) -> str:
    """A hash of entries such as (name, size, time) of files, which need not be opened for it."""
    return hashlib.sha256(json.dumps([list(entry) for entry in entries]).encode()).hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """``files``: a hash of the names, sizes and times of the files, "" for data that is drawn; ``content``: a hash of
    what the items depend on, from the indices that are kept beside images and shards."""

    files: str
    content: str

    def matches(self, other: "Fingerprint") -> bool:
        """Whether both are of the same data. The content decides: copied files have other times."""
        return self.content == other.content


def fingerprint_of_files(root: Path, names: Sequence[str], read: Sequence[str]) -> Fingerprint:
    """The fingerprint of a data set of which most files are never hashed: all files in the folders and under the names
    ``names`` below ``root``. The content is that of the files ``read``, and the names and sizes of the others."""
    files = [file for name in names for file in (sorted((root / name).iterdir()) if (root / name).is_dir()
                                                 else [root / name])]
    about = [(str(file.relative_to(root)), file.stat()) for file in files if file.is_file()]
    hashes = [(name, sha256_of(root / name)) for name in read if (root / name).is_file()]
    return Fingerprint(state_hash((name, one.st_size, one.st_mtime_ns) for name, one in about),
                       state_hash([*hashes, *((name, one.st_size) for name, one in about)]))


def drawn_content(source: Source) -> str:
    """A hash of a source that draws its items: its length, and captions and pixels of some items. It changes with the
    code that draws them."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in np.linspace(0, len(source) - 1, min(len(source), DRAWN_ITEMS)).astype(int).tolist():
        item = source[index]
        digest.update(json.dumps(item["captions"]).encode())
        digest.update(item["image"].numpy().tobytes())
    return digest.hexdigest()
