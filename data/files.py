"""Files that are either whole or absent, a lock between processes, hashes, and many strings in little memory."""
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: there is no such lock
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends without an error it becomes ``path`` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself reaches the disk
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; other processes wait. The system frees it if this one dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unit_hash(*parts: str) -> float:
    """A hash of the parts as a number in [0, 1)."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class Strings:
    """A list of strings as one block of bytes. Worker processes share it: a Python list would be copied page by page
    into each of them, since reading an object writes its reference count."""

    def __init__(self, values: Iterable[str]):
        parts = [value.encode("utf-8", "surrogateescape") for value in values]
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self._ends = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index]:self._ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def chosen(self, indices: np.ndarray) -> "Strings":
        """The strings of ``indices``, in that order."""
        return Strings(self[int(index)] for index in indices)
