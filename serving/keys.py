"""Who may ask, and how much: a file of keys, of which only hashes are kept, and a rate for each.

    keys:
    - name: alice
      sha256: 5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8
      limits: {requests: 30, images: 4}

A key has 256 random bits, so its plain SHA-256 gives nothing away, and looking it up in a table tells nothing by time.
"""
import hashlib
import math
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from files.config import from_dict, read_yaml, to_dict
from files.whole import whole_file
from serving.settings import Limits

LOCAL = "local"  # whoever asks where there are no keys


@dataclass(frozen=True)
class Account:
    """The holder of a key."""

    name: str
    sha256: str = field(default="", repr=False)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.@-]{1,64}", self.name):
            raise ValueError("name: valid: 1 to 64 letters, digits and . _ - @")
        if self.sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256: valid: 64 hexadecimal digits in lower case")


@dataclass(frozen=True)
class KeyFile:
    """The content of a file of keys."""

    keys: tuple[Account, ...] = ()

    def __post_init__(self) -> None:
        for what in ("name", "sha256"):
            if len({getattr(key, what) for key in self.keys}) < len(self.keys):
                raise ValueError(f"keys: two with the same {what}; valid: one of its own for each")


class Keys:
    """Accounts by their keys. Without a file everybody is the same account, with ``limits``."""

    def __init__(self, path: str = "", limits: Limits = Limits()):
        self.needed = bool(path)
        self._local = Account(LOCAL, limits=limits)
        self._accounts = {key.sha256: key for key in read_keys(path).keys} if path else {}
        self._rates = MovingWindowRateLimiter(MemoryStorage())

    def find(self, key: str | None) -> Account | None:
        """The holder of a key, None where a key is needed and this is none."""
        if not self.needed:
            return self._local
        return self._accounts.get(hash_of(key)) if key else None

    def named(self, name: str | None) -> Account | None:
        """The account of a name."""
        return next((account for account in self._accounts.values() if account.name == name), None)

    def wait(self, account: Account) -> int:
        """0 if the account may make another request now, which counts; else in how many seconds it may."""
        rate = RateLimitItemPerMinute(account.limits.requests)
        if self._rates.hit(rate, account.name):
            return 0
        return max(1, math.ceil(self._rates.get_window_stats(rate, account.name).reset_time - time.time()))


def hash_of(key: str) -> str:
    """The hash by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: str) -> KeyFile:
    """The keys of a file. Raises ConfigError naming what is not valid."""
    found = from_dict(KeyFile, read_yaml(path))
    if not found.keys or any(not key.sha256 for key in found.keys):
        raise ValueError(f"{path}: no key, or one without sha256; valid: python serve.py --new-key NAME --keys {path}")
    return found


def new_key(path: str, name: str, limits: Limits = Limits()) -> str:
    """Add a key to a file, which is made where there is none, readable by its owner only; the key itself is kept
    nowhere. Raises ValueError for a name that the file has already."""
    known = read_keys(path).keys if Path(path).exists() else ()
    key = "sk-" + secrets.token_urlsafe(32)
    content = KeyFile((*known, Account(name, hash_of(key), limits)))
    with whole_file(Path(path)) as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(content), sort_keys=False), encoding="utf-8")
        os.chmod(temporary, 0o600)
    return key
