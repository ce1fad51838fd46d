"""Atomic writing of files that overwrites nothing unless it is meant to, a lock between processes, and hashes."""
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: there is no such lock
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def whole_file(path: str | Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which is renamed to ``path`` if the block ends without an error. With
    ``new`` a file that has this name already is kept, and FileExistsError is raised."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if new:
            _rename_to_new(temporary, path)
        else:
            os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself reaches the disk
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Give a file another name that no file has; raises FileExistsError otherwise."""
    try:
        os.link(temporary, path)  # unlike a rename, it fails where there is a file
    except OSError:  # also on file systems without links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists and is not written over") from None
        os.rename(temporary, path)


def free_path(path: str | Path) -> Path:
    """``path`` NAME.EXT if nothing has this name, otherwise the first of NAME_1.EXT, NAME_2.EXT ... that is free."""
    path = Path(path)
    stem, ending = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    numbered = (path.with_name(f"{stem}_{number}{ending}") for number in itertools.count(1))
    return next(one for one in itertools.chain([path], numbered) if not os.path.lexists(one))


def set_aside(path: str | Path) -> Path | None:
    """Rename the file or folder at ``path`` to the name that ``free_path`` gives, and return that name; None if there
    is nothing."""
    path = Path(path)
    if not os.path.lexists(path):
        return None
    kept = free_path(path)
    os.rename(path, kept)
    return kept


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock on the file ``path`` while the block runs; other processes wait. It is freed if this one dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed; False if another process, or another opening of it, holds the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def claim(file: IO, place: int) -> bool:
    """Lock the byte ``place`` of an open file, whether it has that byte or not, until it is released or this process
    closes the file or ends; False if another process holds it. Locks of one process do not exclude each other."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        return False
    return True


def release(file: IO, place: int) -> None:
    """Give back what ``claim`` locked."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unit_hash(*parts: str) -> float:
    """A hash of the parts as a number that is uniform in [0, 1)."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
