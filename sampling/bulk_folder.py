"""The folder of a bulk call: its shards, the rows of its requests, and what is done already.

    bulk.json                what was asked for; a call that asks for something else is refused
    results.jsonl            a line for each request, in their order, refused ones too
    shard-000012.tar         the images of window 12 with their prompts and settings; or a folder of files
    state/                   000012.jsonl, the lines of a window that wait for those before it; progress.json; locks

A window is drawn by whoever claims it, a lock that the kernel frees when its holder dies. Its shard is written under
another name, reaches the disk and is renamed; its lines follow in the same way, and that they are there is the mark
that the window is done. Lines of finished windows are moved to results.jsonl in order: they are appended, progress.json
says up to which byte they count, and then they are removed. So wherever a process dies, a request has an image and a
line, or neither: what is left behind has a name that nobody reads, or stands behind the byte that counts, and is
removed by who comes next.
"""
import contextlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.write_shards import add_member
from files.run_folder import differences
from files.whole import claim, lock_file, release, whole_file, write_text
from sampling.results import RESULTS

PLAN = "bulk.json"
STATE = "state"

Write = Callable[[str, bytes], None]  # a file of a shard: name, bytes


@dataclass(frozen=True)
class Progress:
    """What results.jsonl holds: whole windows, the bytes of their lines, requests, and how many are refused."""

    windows: int = 0
    bytes: int = 0
    requests: int = 0
    refused: int = 0


class BulkFolder:
    """The folder ``out`` of a bulk call. ``files`` says that images are single files and not members of tars."""

    def __init__(self, out: Path, files: bool = False):
        self.out, self.files = out, files
        self.state, self.results = out / STATE, out / RESULTS

    def begin(self, asked: dict[str, Any], count: Callable[[], int]) -> dict[str, Any]:
        """What is asked for, with the number of requests, which ``count`` finds for a new folder; an existing one must
        have been begun with the same. ``asked`` may name under "threads" what the arithmetic depends on and whoever
        continues takes over. Raises ValueError for another call's folder."""
        plan = self.out / PLAN
        with lock_file(self.state / "begin.lock"):
            if not plan.exists():
                _remove_parts(self.out, PLAN)
                if found := sorted(path.name for path in self.out.iterdir() if path.name != STATE):
                    raise ValueError(f"{self.out} holds {found[0]} and was not begun by --bulk; valid: a new folder")
                known = {**asked, "requests": count()}
                write_text(plan, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
            known = json.loads(plan.read_text(encoding="utf-8"))
        kept = {name: known[name] for name in ("requests", "threads") if name in known}
        if changed := differences(known, {**json.loads(json.dumps(asked)), **kept}):
            raise ValueError(f"{self.out} was begun with another call ({'; '.join(changed[:3])}); valid: the same "
                             "call, or another folder")
        return known

    # ---- windows

    @contextlib.contextmanager
    def claims(self) -> Iterator[Callable[[int], bool]]:
        """A function that claims a window, and gives back the one claimed before; False if it is done, or drawn by
        another process."""
        with open(self.state / "claims.lock", "a") as file:
            held: list[int] = []

            def wanted(window: int) -> bool:
                while held:
                    release(file, held.pop())
                if self.is_done(window) or not claim(file, window):
                    return False
                held.append(window)
                return not self.is_done(window)  # who held it before may have finished it

            yield wanted

    def is_done(self, window: int) -> bool:
        """Whether the lines of a window are there: they wait, or are in results.jsonl."""
        return self._rows(window).exists() or window < self.progress().windows

    def progress(self) -> Progress:
        """What results.jsonl holds."""
        path = self.state / "progress.json"
        return Progress(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Progress()

    def _rows(self, window: int) -> Path:
        return self.state / f"{window:06d}.jsonl"

    def shard(self, window: int) -> Path:
        """The tar file of a window, or its folder."""
        return self.out / (f"shard-{window:06d}" + ("" if self.files else ".tar"))

    @contextlib.contextmanager
    def writing(self, window: int) -> Iterator[Write]:
        """A function that adds a file to the shard of a window. The shard is there after the block, whole, and not if
        the block ends with an error."""
        path = self.shard(window)
        _remove_parts(self.out, path.name)
        if not self.files:
            with whole_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                yield lambda name, data: add_member(tar, name, data)
            return
        folder = self.out / f".{path.name}.{os.getpid()}.part"
        folder.mkdir()
        try:
            yield lambda name, data: _write(folder / name, data)
            _sync(folder)
            if path.exists():  # of a process that died before its lines were written
                shutil.rmtree(path)
            os.rename(folder, path)
            _sync(self.out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, window: int, rows: Sequence[dict[str, Any]]) -> None:
        """Mark a window as done, whose shard is there, and move what can be moved to results.jsonl."""
        _remove_parts(self.state, self._rows(window).name)
        write_text(self._rows(window), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.merge()

    def merge(self) -> Progress:
        """Move the lines of finished windows to results.jsonl, as far as none is missing between them. Raises
        ValueError if results.jsonl has lost lines."""
        with lock_file(self.state / "results.lock"):
            done = self.progress()
            if done.windows and self._rows(done.windows - 1).exists():  # a process died before it removed them
                self._forget(range(done.windows))
            with open(self.results, "ab") as file:
                if file.seek(0, os.SEEK_END) < done.bytes:
                    raise ValueError(f"{self.results} has {file.tell()} bytes; valid: {done.bytes} or more, it was cut "
                                     "by another program")
                file.truncate(done.bytes)
                first = done.windows
                while self._rows(done.windows).exists():
                    lines = self._rows(done.windows).read_bytes()
                    file.write(lines)
                    rows = [json.loads(line) for line in lines.splitlines()]
                    done = Progress(done.windows + 1, done.bytes + len(lines), done.requests + len(rows),
                                    done.refused + sum(row["file"] is None for row in rows))
                file.flush()
                os.fsync(file.fileno())
            if done.windows > first:
                _remove_parts(self.state, "progress.json")
                write_text(self.state / "progress.json", json.dumps(asdict(done)))
                self._forget(range(first, done.windows))
            return done

    def _forget(self, windows: Sequence[int]) -> None:
        """Remove the lines of windows that are in results.jsonl, the last window's last: while those are there, there
        may be others."""
        for window in windows:
            self._rows(window).unlink(missing_ok=True)


def _remove_parts(folder: Path, name: str) -> None:
    """Remove what processes that died have begun to write under ``name``."""
    for part in folder.glob(f".{name}.*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Write a file that reaches the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """The names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
