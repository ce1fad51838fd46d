"""Plain requests of a few words, each with a harmless twin of the same shape, for training.

The texts of the data are descriptions of images. Short direct requests are another kind of text, which a classifier of
descriptions scores near nothing. Every row is a pattern of requests.yaml filled with plain words, a function of the
seed alone. A group holds all rows of one harmful phrase, so that development text has phrases that training has not.
"""
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from files.config import read_yaml
from safety.policy import HEADS
from training.moderation.rows import Row

PATH = Path(__file__).with_name("requests.yaml")


@cache
def patterns() -> dict[str, Any]:
    """words: lists by name; patterns: by category, each with its harmful and its harmless fillers."""
    return read_yaml(PATH)


def filled(pattern: str, filler: str, words: Mapping[str, str]) -> str:
    """A pattern with its filler, with one space between words."""
    return " ".join(pattern.format(filler, **words).split())


def request_rows(count: int, seed: int = 0, group: int = 2**41) -> list[Row]:
    """``2 count`` rows at most, without copies: a request and its harmless twin, which share all but the filler. The
    harmful one is known in its own category only. They are no twins for the margin of training, which would have few
    others then."""
    random = np.random.default_rng(seed)

    def any_of(some: Sequence[str]) -> str:
        return some[int(random.integers(len(some)))]

    rows: dict[str, Row] = {}
    kinds = [(category, kind) for category, some in patterns()["patterns"].items() for kind in some]
    for number in range(count):
        category, kind = kinds[number % len(kinds)]
        words = {name: any_of(some) for name, some in patterns()["words"].items()}
        bad, good = any_of(kind["harmful"]), any_of(kind["harmless"])
        own = group + zlib.crc32(f"{kind['pattern']}{bad}".encode())
        for filler, labels in ((bad, {category: 1.0}), (good, dict.fromkeys(HEADS, 0.0))):
            text = filled(kind["pattern"], filler, words)
            rows.setdefault(text, Row(text, labels, "requests", own, topic=category))
    return list(rows.values())
