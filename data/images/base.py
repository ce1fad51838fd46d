"""What sources of picture files share: items, augmentation, aspect buckets, splits, and files that cannot be read."""
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.images.caption_list import Captions, chosen, shuffled_tags
from data.images.transforms import Unreadable, bucket_sizes, colour, decoded, fitted, may_flip, nearest_bucket
from data.strings import Strings
from files.whole import locked, unit_hash

SPLITS = ("train", "validation", "test")
DRAWN_ONLY = ("root", "crop", "flip", "shuffle_tags", "keep_tags")  # settings that source[i]["image"] does not know


@dataclass(frozen=True)
class PictureConfig:
    """How files become items: ``size`` is the side of the square, or of the square whose area aspect buckets have.

    ``crop`` and ``flip`` (a chance) concern the drawing of a run; ``source[i]`` is always the centre, not mirrored.
    ``buckets`` keeps the shape of pictures: sides are multiples of ``step``, at most ``max_aspect`` apart.
    ``shuffle_tags`` reorders comma-separated captions behind the first ``keep_tags``. ``fallback`` is the caption of a
    picture without one; "" refuses such a picture.
    """

    root: str = ""
    size: int = 64
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0
    background: str = "white"
    buckets: bool = False
    step: int = 8
    max_aspect: float = 2.0
    max_pixels: int = 80_000_000  # larger pictures are refused before they are decoded
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
        colour(self.background)

    def shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the pictures: one, or one for each aspect bucket."""
        return bucket_sizes(self.size, self.step, self.max_aspect) if self.buckets else [(self.size, self.size)]


def split_of(name: str, validation: float, test: float) -> str:
    """The split an id is in, by its hash: the same on every machine, whatever else is in the data."""
    draw = unit_hash("split", name)
    return "test" if draw < test else "validation" if draw < test + validation else "train"


def check_shares(validation: float, test: float) -> None:
    """Raise ValueError where the shares of the splits leave nothing to train on."""
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(f"validation: {validation} with test: {test}; valid: shares from 0 up, together below 1")


class Pictures:
    """Captioned pictures by index. A subclass gives ``opened`` and ``_captions``, or ``_bytes`` alone.

    source[i] -> {"image": uint8 (3, H, W), "caption": the weightiest, "captions": all, "weights", "id": str, "frame":
    (h, w, top, left, height, width) of the part shown, in pixels of the whole picture, "flipped": bool}.
    """

    refused: Sequence[tuple[str, str]] = ()  # (name, reason) of files that are no items, in all splits together
    found = 0  # files looked at, in all splits together
    content = ""  # hash of everything the items depend on

    def __init__(self, config: PictureConfig, names: Strings, captions: Strings, sizes: np.ndarray):
        self.config, self.names, self._texts, self.sizes = config, names, captions, sizes
        self.shapes = config.shapes()
        numbers = nearest_bucket(sizes, self.shapes) if len(sizes) else np.empty(0, dtype=np.int64)
        self._bucket = numbers.astype(np.int64)  # (N,)

    @property
    def buckets(self) -> np.ndarray | None:
        """Number of the aspect bucket of every item, (N,), into ``shapes``; None where all have one shape."""
        return self._bucket if self.config.buckets else None

    def __len__(self) -> int:
        return len(self.names)

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        return index % len(self)

    def _bytes(self, index: int) -> bytes:
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """The file of an item and its suffix, None where the items are not files. Raises Unreadable."""
        index = self._checked(index)
        try:
            return self._bytes(index), Path(self.names[index]).suffix.lower()
        except OSError as error:
            raise Unreadable(self.names[index], error.strerror or str(error)) from None

    def opened(self, index: int, shape: tuple[int, int] | None = None) -> Image.Image:
        """The upright RGB picture; it may come smaller where only ``shape`` = (H, W) is needed. Raises Unreadable."""
        file = self.encoded(index)
        assert file is not None
        return decoded(file[0], self.names[index], colour(self.config.background), self.config.max_pixels,
                       max(shape) if shape else 0)

    def weighted(self, index: int) -> Captions:
        """Every caption of an item with its weight."""
        return [(text, weight) for text, weight in json.loads(self._texts[self._checked(index)])]

    def captions(self, index: int) -> tuple[str, ...]:
        """Every caption of an item, without decoding its picture."""
        return tuple(text for text, _ in self.weighted(index))

    def _item(self, index: int, captions: Captions, caption: str, place: tuple[float, float],
              flip: bool) -> dict[str, Any]:
        shape = self.shapes[int(self._bucket[index])]
        whole = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        image, frame = fitted(self.opened(index, shape), shape, place, flip, whole)
        return {"image": image, "caption": caption, "captions": tuple(text for text, _ in captions),
                "weights": tuple(weight for _, weight in captions), "id": self.names[index], "frame": frame,
                "flipped": flip}

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._checked(index)
        captions = self.weighted(index)
        return self._item(index, captions, max(captions, key=lambda entry: entry[1])[0], (0.5, 0.5), False)

    def _caption(self, captions: Captions, draw: float, rng: np.random.Generator) -> str:
        caption = chosen(captions, draw)
        return shuffled_tags(caption, self.config.keep_tags, rng) if self.config.shuffle_tags else caption

    def draw_caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption that ``draw`` gives for the same generator, without the picture."""
        return self._caption(self.weighted(index), rng.random(4)[0], rng)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """An item as a run sees it: one caption by weight, its crop, mirrored where every caption allows it."""
        index = self._checked(index)
        pick, mirror, down, across = rng.random(4).tolist()  # always four, so that no setting moves another
        captions = self.weighted(index)
        caption = self._caption(captions, pick, rng)
        place = (down, across) if self.config.crop == "random" else (0.5, 0.5)
        flip = mirror < self.config.flip and all(may_flip(text) for text, _ in captions)
        return self._item(index, captions, caption, place, flip)

    def key(self) -> dict[str, Any]:
        """What the pictures ``source[i]["image"]`` depend on; not where they lie."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in DRAWN_ONLY}
        return {**settings, "content": self.content}


class Readable:
    """A source in which an item that cannot be read is replaced by the next one of its bucket that can.

    Which one is a function of the files alone. Each is listed with its reason in ``path``, a file of JSON lines that
    all processes of a run share, and once on stderr. More than ``share`` of the items: ValueError.
    """

    def __init__(self, source: Pictures, share: float, path: Path | None = None):
        self.source, self.share, self.path = source, share, path
        self.buckets, self.shapes, self.content = source.buckets, source.shapes, source.content
        self._instead: dict[int, int] = {}  # unreadable index -> the index after it
        self._listed: set[str] = set()
        self._length = 0  # of the list when it was read last
        self._read_list()
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
        for line in self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if row.get("content") == self.content:
                self._listed.add(row["name"])
                if 0 <= row["index"] < len(self) and self.source.names[row["index"]] == row["name"]:
                    self._instead[row["index"]] = self._next(row["index"])

    def _list(self, name: str, reason: str, index: int) -> None:
        if name in self._listed:
            return
        if self.path is not None:
            with locked(self.path.with_name(f".{self.path.name}.lock")):
                self._read_list()  # another process may have met it
                if name in self._listed:
                    return
                row = {"name": name, "reason": reason, "index": index, "content": self.content}
                with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._listed.add(name)
        print(f"unreadable: {name}: {reason}", file=sys.stderr)

    def _stop(self, bad: int, of: int, name: str, reason: str) -> None:
        where = f"; all are listed in {self.path}" if self.path else ""
        raise ValueError(f"{bad} of {of} pictures cannot be read, more than data.bad_share = {self.share} allows; the "
                         f"last: {name} ({reason}){where}")

    def _next(self, index: int) -> int:
        bucket = self.source._bucket
        steps = (np.arange(1, len(self)) + index) % len(self)
        same = steps[bucket[steps] == bucket[index]]
        if not len(same):
            raise ValueError(f"{self.source.names[index]} cannot be read and is the only item of its shape")
        return int(same[0])

    def _found(self, index: int) -> int:
        """The readable index that stands for ``index``, as far as this or another process of the run has read."""
        self._read_list()
        for _ in range(len(self)):
            if index not in self._instead:
                return index
            index = self._instead[index]
        raise ValueError(f"none of the {len(self)} pictures can be read")

    def _read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        index %= len(self)
        before = {} if rng is None else rng.bit_generator.state
        while True:
            index = self._found(index)
            try:
                return self.source[index] if rng is None else self.source.draw(index, rng)
            except Unreadable as error:
                if rng is not None:
                    rng.bit_generator.state = before  # its replacement is drawn as if it had been asked for
                self._list(self.source.names[index], error.reason, index)
                self._instead[index] = self._next(index)
                if len(self._instead) > self.share * len(self):
                    self._stop(len(self._instead), len(self), error.name, error.reason)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self.source._checked(index), None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``source.draw``, or that of the item that stands for ``index``."""
        return self._read(self.source._checked(index), rng)

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the picture that ``[index]`` gives, as far as it has been read."""
        return self.source.captions(self._found(self.source._checked(index)))

    def draw_caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption that ``draw`` gives, as far as the picture has been read."""
        return self.source.draw_caption(self._found(self.source._checked(index)), rng)
