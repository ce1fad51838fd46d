"""A list of strings that takes little memory."""
from collections.abc import Iterable

import numpy as np


class Strings:
    """A list of strings as one block of bytes, which worker processes share. A Python list would be copied page by
    page into each of them, because reading an object writes its reference count."""

    def __init__(self, values: Iterable[str]):
        parts = [value.encode("utf-8", "surrogateescape") for value in values]
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self._ends = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index]:self._ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")
