"""Results in memory until they are fetched, or until their time is over; nothing is written to a disk."""
import secrets
import time
from collections.abc import Callable

from cachetools import TTLCache

MIB = 2**20


class StoreFull(Exception):
    """No room for another image."""


class ImageStore:
    """PNG files by an identity that cannot be guessed. An image leaves when it is fetched, or ``keep`` seconds after it
    came; together they have at most ``largest`` MiB. An image that waits is never pushed out by another."""

    def __init__(self, keep: float, largest: int, clock: Callable[[], float] = time.monotonic):
        self._images: TTLCache[str, bytes] = TTLCache(largest * MIB, keep, timer=clock, getsizeof=len)

    def add(self, png: bytes) -> str:
        """Keep an image; its identity. Raises StoreFull."""
        self._images.expire()
        if self._images.currsize + len(png) > self._images.maxsize:
            raise StoreFull
        name = secrets.token_urlsafe(24)
        self._images[name] = png
        return name

    def take(self, name: str) -> bytes | None:
        """An image, which leaves with this; None if there is none of this name, or none any more."""
        return self._images.pop(name, None)

    def expire(self) -> None:
        """Let go of what is too old."""
        self._images.expire()

    @property
    def bytes(self) -> int:
        """What is kept at the moment."""
        return int(self._images.currsize)
