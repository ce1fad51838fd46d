"""A log of decisions that reveals no prompt and in which every change is detected.

A line holds the hour, an HMAC-SHA-256 of the normalised prompt cut to 128 bits, stage, category, score, action, policy,
model, and the chain: an HMAC over the chain of the previous line and the line itself. The hash is keyed, because
prompts can be guessed and their plain hashes looked up. The log never holds a prompt, a word of it, or a matched term.
"""
import datetime
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from safety.normalize import fold
from safety.policy import Decision

START = "0" * 64
FIELDS = ("time", "prompt", "stage", "category", "score", "action", "policy", "model", "chain")


class AuditError(ValueError):
    """A log that cannot be written or verified; the message names the file and the line."""


def new_key(path: str | Path) -> None:
    """Write 32 random bytes, readable by the owner only. Raises AuditError if the file exists."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AuditError(f"audit key {path}: there is one, and it is never replaced; valid: a new name") from None
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(32))


def read_key(path: str | Path) -> bytes:
    """The key in a file; raises AuditError if it is missing, too short, or readable by others."""
    path = Path(path)
    try:
        key, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise AuditError(f"audit key {path}: {error.strerror}; make one with: python moderate.py key {path}") from None
    if len(key) < 32:
        raise AuditError(f"audit key {path}: {len(key)} bytes; valid: from 32 up")
    if mode & 0o077:
        raise AuditError(f"audit key {path}: others can read it; valid: mode 0600")
    return key


def prompt_hash(prompt: str, key: bytes) -> str:
    """32 hexadecimal digits, equal for prompts that fold to the same text."""
    try:
        text = " ".join(fold(prompt)[0].split())
    except ValueError:
        text = str(prompt)[:2000]
    return hmac.new(key, b"prompt:" + text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


class AuditLog:
    """A file of JSON lines and the older files of its rotation: NAME.1 is the one before NAME.

    A file of ``largest`` bytes or more is rotated, and ``keep`` older files are kept. Several processes may write.
    """

    def __init__(self, path: str | Path, key: bytes, largest: int = 10_000_000, keep: int = 12):
        if len(key) < 32:
            raise AuditError(f"audit key: {len(key)} bytes; valid: from 32 up")
        if largest < 1 or keep < 1:
            raise AuditError(f"audit: largest {largest}, keep {keep}; valid: from 1 up")
        self.path, self._key, self.largest, self.keep = Path(path), key, largest, keep

    def write(self, prompt: str, stage: str, decision: Decision) -> None:
        """Append a line and flush it to the disk; raises AuditError if that fails."""
        now = datetime.datetime.now(datetime.timezone.utc)
        line = {"time": now.strftime("%Y-%m-%dT%H"), "prompt": prompt_hash(prompt, self._key), "stage": stage,
                "category": decision.category, "score": round(decision.score, 2), "action": decision.action,
                "policy": decision.policy_version, "model": decision.model_hash}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._append(line)
            finally:
                os.close(lock)
        except OSError as error:
            raise AuditError(f"audit log {self.path}: {error.strerror}") from None

    def _append(self, line: dict) -> None:
        before = self._last_chain()
        if self.path.exists() and self.path.stat().st_size >= self.largest:
            self._rotate()
        line["chain"] = _chain_hash(self._key, before, line)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _last_chain(self) -> str:
        for path in (self.path, self._older(1)):
            if path.exists() and path.stat().st_size:
                with open(path, "rb") as file:
                    file.seek(max(0, path.stat().st_size - 4096))
                    last = file.read().decode("utf-8", "replace").splitlines()[-1]
                return _parse_line(last, path, 0)["chain"]
        return START

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _rotate(self) -> None:
        self._older(self.keep).unlink(missing_ok=True)
        for number in range(self.keep - 1, 0, -1):
            if self._older(number).exists():
                os.replace(self._older(number), self._older(number + 1))
        os.replace(self.path, self._older(1))

    def verify(self) -> int:
        """The number of lines; raises AuditError naming the first line, from the oldest file on, that breaks the chain.

        If rotation has deleted the oldest file, the chain starts at the first line that remains. Lines that were cut
        off at the end are detected only by comparison with a copy of the last chain value.
        """
        numbers = sorted((int(match[1]) for path in self.path.parent.glob(self.path.name + ".*")
                          if (match := re.fullmatch(r".*\.(\d+)", path.name))), reverse=True)
        if numbers != list(range(len(numbers), 0, -1)):
            raise AuditError(f"audit log {self.path}: files are missing among .1 to .{max(numbers)}")
        cut = len(numbers) >= self.keep
        before, count = START, 0
        for path in [*map(self._older, numbers), self.path]:
            for number, line in _read_lines(path):
                if not (cut and count == 0) and not hmac.compare_digest(
                        line["chain"].encode("utf-8", "replace"), _chain_hash(self._key, before, line).encode()):
                    raise AuditError(f"{path}: line {number} was changed, or lines before it were removed")
                before, count = line["chain"], count + 1
        return count


def _chain_hash(key: bytes, before: str, line: dict) -> str:
    """The chain value of a line after the chain value ``before``."""
    content = json.dumps({name: line[name] for name in FIELDS if name != "chain"})
    return hmac.new(key, f"chain:{before}:{content}".encode(), hashlib.sha256).hexdigest()


def _parse_line(text: str, path: Path, number: int) -> dict:
    """A line of the log; raises AuditError naming it, with number 0 for the last line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or sorted(line) != sorted(FIELDS) or not isinstance(line["chain"], str):
        raise AuditError(f"{path}: {f'line {number}' if number else 'the last line'} is no line of this log")
    return line


def _read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(number, line) of all lines of a file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise AuditError(f"audit log {path}: {error.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        yield number, _parse_line(line, path, number)
