"""The common part of all sources of image files: items, augmentation, aspect buckets, splits, unreadable files."""
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.fingerprint import Fingerprint
from data.images.caption_list import Captions, caption_by_weight, shuffled_tags
from data.images.folder_files import LeftOut, left_out_line
from data.images.transforms import (
    Unreadable,
    bucket_sizes,
    crop_to_size,
    decode_image,
    may_flip,
    nearest_bucket,
    rgb_of,
)
from data.strings import Strings
from files.images import MAX_PIXELS
from files.text import lines_of
from files.whole import lock_file, unit_hash

SPLITS = ("train", "validation", "test")
# the names that a folder or a sample may give to a split, in any case: those of the datasets library
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test",
               "evaluation": "test"}
_SAID: set[tuple[str, str]] = set()  # (root, entry) that this process has said; the splits of a source share them
# settings that source[i]["image"] does not depend on
RANDOM_ONLY = ("root", "crop", "flip", "shuffle_tags", "keep_tags")


@dataclass(frozen=True)
class ImageConfig:
    """How files become items: ``size`` is the side of the images, or of a square with the area of the aspect buckets.

    ``crop`` and ``flip`` (a probability) apply to ``random_item``; ``source[i]`` is always the centre, not mirrored.
    ``buckets`` keeps the aspect ratio of images: their sides are multiples of ``step`` with a ratio of at most
    ``max_aspect``. ``shuffle_tags`` reorders comma-separated captions after the first ``keep_tags`` tags. ``fallback``
    is the caption of an image that has none; with "" such an image is refused.
    """

    root: str = ""
    size: int = 64
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0
    background: str = "white"
    buckets: bool = False
    step: int = 8
    max_aspect: float = 2.0
    max_pixels: int = MAX_PIXELS  # larger images are refused before they are decoded
    shuffle_tags: bool = False
    keep_tags: int = 0
    fallback: str = ""

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size: {self.size}; valid: 8 to 4096 pixels")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: {self.flip}; valid: a chance from 0 to 1")
        if self.buckets and (self.step < 1 or self.size % self.step):
            raise ValueError(f"step: {self.step}; valid: a divisor of size = {self.size}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect: {self.max_aspect}; valid: from 1 up")
        for name in ("max_pixels", "keep_tags"):
            if getattr(self, name) < (name == "max_pixels"):
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from {int(name == 'max_pixels')} up")
        rgb_of(self.background)

    def shapes(self) -> list[tuple[int, int]]:
        """The sizes (H, W) of the images: one, or one for each aspect bucket."""
        return bucket_sizes(self.size, self.step, self.max_aspect) if self.buckets else [(self.size, self.size)]


def split_of(name: str, validation: float, test: float) -> str:
    """The split of an id, by its hash: the same on every machine and whatever else is in the data."""
    draw = unit_hash("split", name)
    return "test" if draw < test else "validation" if draw < test + validation else "train"


def split_named(name: object) -> str | None:
    """The split that a folder or a sample calls ``name``, None for any other name."""
    return SPLIT_NAMES.get(name.strip().lower()) if isinstance(name, str) else None


def check_shares(validation: float, test: float) -> None:
    """Raise ValueError if the shares of the splits leave nothing to train on."""
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(f"validation: {validation} with test: {test}; valid: shares from 0 up, together below 1")


class ImageFiles:
    """Captioned image files by index. A subclass implements ``_bytes``, or ``file_bytes`` and ``open_image``.

    source[i] -> {"image": uint8 (3, H, W), "caption": that of the largest weight, "captions": all, "weights", "id":
    str, "frame": (h, w, top, left, height, width) of the crop in pixels of the whole image, "flipped": bool}.
    """

    refused: Sequence[tuple[str, str]] = ()  # (name, reason) of files that cannot be items, over all splits
    found = 0  # number of files, over all splits
    left_out: LeftOut = {}  # names that are no items by the reason, over all splits
    content: str  # hash of everything that the items depend on; a subclass sets it
    state = ""  # hash of the names, sizes and times of all files

    def __init__(self, config: ImageConfig, names: Strings, captions: Strings, sizes: np.ndarray):
        """names: ids; captions: JSON [[text, weight], ...] of each; sizes (N, 2): height and width of each."""
        self.config, self.names, self._texts, self.sizes = config, names, captions, sizes
        self.shapes = config.shapes()
        numbers = nearest_bucket(sizes, self.shapes) if len(sizes) else np.empty(0, dtype=np.int64)
        self._bucket = numbers.astype(np.int64)  # (N,)

    @property
    def buckets(self) -> np.ndarray | None:
        """Index (N,) into ``shapes`` of the aspect bucket of every item; None if all items have one size."""
        return self._bucket if self.config.buckets else None

    def __len__(self) -> int:
        return len(self.names)

    def _positive_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        return index % len(self)

    def _bytes(self, index: int) -> bytes:
        raise NotImplementedError

    def file_bytes(self, index: int) -> tuple[bytes, str] | None:
        """The bytes and the suffix of an item's file, None for items that are not files. Raises Unreadable."""
        index = self._positive_index(index)
        try:
            return self._bytes(index), Path(self.names[index]).suffix.lower()
        except OSError as error:
            raise Unreadable(self.names[index], error.strerror or str(error)) from None

    def open_image(self, index: int, shape: tuple[int, int] | None = None) -> Image.Image:
        """The upright RGB image, perhaps reduced if only ``shape`` = (H, W) is needed. Raises Unreadable."""
        file = self.file_bytes(index)
        assert file is not None
        return decode_image(file[0], self.names[index], rgb_of(self.config.background), self.config.max_pixels,
                            max(shape) if shape else 0)

    def weighted_captions(self, index: int) -> Captions:
        """All captions of an item with their weights."""
        return [(text, weight) for text, weight in json.loads(self._texts[self._positive_index(index)])]

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of an item, without decoding its image."""
        return tuple(text for text, _ in self.weighted_captions(index))

    def _item(self, index: int, captions: Captions, caption: str, place: tuple[float, float],
              flip: bool) -> dict[str, Any]:
        """An item whose crop lies at ``place``: (0, 0) is the top left, (1, 1) the bottom right."""
        shape = self.shapes[int(self._bucket[index])]
        whole = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        image, frame = crop_to_size(self.open_image(index, shape), shape, place, flip, whole)
        return {"image": image, "caption": caption, "captions": tuple(text for text, _ in captions),
                "weights": tuple(weight for _, weight in captions), "id": self.names[index], "frame": frame,
                "flipped": flip}

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._positive_index(index)
        captions = self.weighted_captions(index)
        return self._item(index, captions, max(captions, key=lambda entry: entry[1])[0], (0.5, 0.5), False)

    def _caption(self, captions: Captions, draw: float, rng: np.random.Generator) -> str:
        caption = caption_by_weight(captions, draw)
        return shuffled_tags(caption, self.config.keep_tags, rng) if self.config.shuffle_tags else caption

    def random_caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption of ``random_item`` for the same generator, without reading the image."""
        return self._caption(self.weighted_captions(index), rng.random(4)[0], rng)

    def random_item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """An item with one caption chosen by weight, cropped as configured, mirrored if every caption allows it."""
        index = self._positive_index(index)
        pick, mirror, down, across = rng.random(4).tolist()  # always four numbers, so that no setting affects another
        captions = self.weighted_captions(index)
        caption = self._caption(captions, pick, rng)
        place = (down, across) if self.config.crop == "random" else (0.5, 0.5)
        flip = mirror < self.config.flip and all(may_flip(text) for text, _ in captions)
        return self._item(index, captions, caption, place, flip)

    def key(self) -> dict[str, Any]:
        """Everything that the images ``source[i]["image"]`` depend on; their location is not part of it."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in RANDOM_ONLY}
        return {**settings, "content": self.content}

    def fingerprint(self) -> Fingerprint:
        """That of all splits."""
        return Fingerprint(self.state, self.content)


class Readable:
    """A source in which an unreadable item is replaced by the next readable item of its bucket.

    The replacement is a function of the files alone. Every unreadable item is listed with its reason in ``path``, a
    file of JSON lines that all processes of a run share, and once on stderr; so is one line about what is left out. If
    there are more unreadable items than the share ``share`` of all, a ValueError is raised.
    """

    def __init__(self, source: ImageFiles, share: float, path: Path | None = None):
        self.source, self.share, self.path = source, share, path
        self.buckets, self.shapes, self.content = source.buckets, source.shapes, source.content
        self._instead: dict[int, int] = {}  # unreadable index -> the index after it
        self._listed: set[str] = set()
        self._length = 0  # bytes of the list when it was last read
        self._read_list()
        left_out = left_out_line(source.config.root, source.left_out)
        if left_out:
            self._list("", left_out, -1)
        for name, reason in source.refused:
            self._list(name, reason, -1)
        if len(source.refused) > share * source.found:
            self._stop(len(source.refused), source.found, *source.refused[-1])

    def __len__(self) -> int:
        return len(self.source)

    def _read_list(self) -> None:
        try:
            length = 0 if self.path is None else os.stat(self.path).st_size
        except FileNotFoundError:
            length = 0
        if self.path is None or length == self._length:
            return
        self._length = length
        for line in lines_of(self.path.read_text(encoding="utf-8", errors="surrogateescape")):
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a process that was killed is incomplete
                continue
            if row.get("content") == self.content:
                self._listed.add(row["name"] or row["reason"])
                if 0 <= row["index"] < len(self) and self.source.names[row["index"]] == row["name"]:
                    self._instead[row["index"]] = self._next_in_bucket(row["index"])

    def _list(self, name: str, reason: str, index: int) -> None:
        """List a file, or with an empty name a line about the whole source, and say it on stderr the first time."""
        entry = name or reason
        if entry in self._listed:
            return
        if self.path is not None:
            with lock_file(self.path.with_name(f".{self.path.name}.lock")):
                self._read_list()  # another process may have listed it
                if entry in self._listed:
                    return
                row = {"name": name, "reason": reason, "index": index, "content": self.content}
                with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif (self.source.config.root, entry) in _SAID:
            return
        self._listed.add(entry)
        _SAID.add((self.source.config.root, entry))
        said = f"unreadable: {name}: {reason}" if name else reason
        print(" ".join(lines_of(said)), file=sys.stderr)

    def _stop(self, bad: int, of: int, name: str, reason: str) -> None:
        where = f"; all are listed in {self.path}" if self.path else ""
        raise ValueError(f"{bad} of {of} images cannot be read, more than data.bad_share = {self.share} allows; the "
                         f"last: {name} ({reason}){where}")

    def _next_in_bucket(self, index: int) -> int:
        bucket = self.source._bucket
        steps = (np.arange(1, len(self)) + index) % len(self)
        same = steps[bucket[steps] == bucket[index]]
        if not len(same):
            raise ValueError(f"{self.source.names[index]} cannot be read and is the only item of its shape")
        return int(same[0])

    def _replacement(self, index: int) -> int:
        """The index that replaces ``index``, as far as this or another process of the run has read."""
        self._read_list()
        for _ in range(len(self)):
            if index not in self._instead:
                return index
            index = self._instead[index]
        raise ValueError(f"none of the {len(self)} images can be read")

    def _read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        index %= len(self)
        before = {} if rng is None else rng.bit_generator.state
        while True:
            index = self._replacement(index)
            try:
                return self.source[index] if rng is None else self.source.random_item(index, rng)
            except Unreadable as error:
                if rng is not None:
                    rng.bit_generator.state = before  # the replacement gets the same random numbers
                self._list(self.source.names[index], error.reason, index)
                self._instead[index] = self._next_in_bucket(index)
                if len(self._instead) > self.share * len(self):
                    self._stop(len(self._instead), len(self), error.name, error.reason)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self.source._positive_index(index), None)

    def random_item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``source.random_item`` of ``index`` or of its replacement."""
        return self._read(self.source._positive_index(index), rng)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of ``self[index]``, as far as its image has been read."""
        return self.source.captions(self._replacement(self.source._positive_index(index)))

    def random_caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption of ``random_item``, as far as the image has been read."""
        return self.source.random_caption(self._replacement(self.source._positive_index(index)), rng)
