"""Source `emoji`: captioned images of real emoji in five styles, and scenes composed of them.

`python -m data.emoji --out DIR --size 64` builds the folder (data/emoji/build.py); `Emoji(EmojiConfig(root=DIR),
"train")` reads it. Single emoji stand on white or on a named colour; scenes (data/emoji/scenes.py) hold one to three.

Splits are defined by hashes of the names, so they are the same on every machine and for every size and seed:

- 2 % of the names occur in no training image (test, held_out "name");
- 5 % of the (name, style) pairs are held out if training has the name in another style (test, held_out "pair");
- 2 % of the pairs are the validation split.

All skin tones and the mirrored drawing of a name are in the same split, so that no near copy is in two splits.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.emoji.build import FORMAT
from data.emoji.phrasings import STYLE_WORDS, named_spans, noun, plural, scene_captions, single_captions
from data.emoji.scenes import PLAIN, canvas, contrasting_colours, make_scene, over, scene_image
from files.whole import unit_hash

FILES = ("items.jsonl", "images.npy")  # what the images and captions of a folder depend on
STYLES = tuple(STYLE_WORDS)
SPLITS = ("train", "validation", "test")
NAME_SHARE, PAIR_SHARE, VALIDATION_SHARE = 0.02, 0.05, 0.02
SCENE_GROUPS = ("smileys & emotion", "animals & nature", "food & drink", "activities", "objects", "travel & places")


@dataclass(frozen=True)
class EmojiConfig:
    """The folder of emoji, and how single emoji, backgrounds and scenes are mixed."""

    root: str = "runs/data/emoji64"  # folder that `python -m data.emoji` wrote
    size: int = 64  # side in pixels; must be the one the folder was built with
    styles: tuple[str, ...] = STYLES
    tones: int = 1  # skin-tone variants kept of each name, besides the one without a tone; 25 keeps all
    backgrounds: float = 0.25  # share of single emoji on a named colour instead of white
    variants: int = 1  # training images of each single emoji, which differ in the background; scenes grow with them
    scenes: float = 0.3  # share of scenes among the training images; 1 is nothing but scenes
    held_out_scenes: int = 400  # scenes in each of validation and test; none where `scenes` is 0
    seed: int = 0  # of the scenes and backgrounds; the splits do not depend on it

    def __post_init__(self) -> None:
        unknown = [style for style in self.styles if style not in STYLES]
        if unknown or not self.styles or len(set(self.styles)) < len(self.styles):
            raise ValueError(f"styles: {self.styles}; valid: different ones of {', '.join(STYLES)}")
        for field in ("backgrounds", "scenes"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}: {getattr(self, field)}; valid: 0 to 1")
        for field, least in (("size", 8), ("tones", 0), ("variants", 1), ("held_out_scenes", 0), ("seed", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}: {getattr(self, field)}; valid: {least} or more")


def load(config: EmojiConfig) -> tuple[list[dict], Path]:
    """The items of the folder, one for each image, and the path of the array, after a check that they match.

    Raises FileNotFoundError or ValueError with the command that builds the folder.
    """
    root = Path(config.root)
    remedy = f"run `python -m data.emoji --out {root} --size {config.size}`"
    if not (root / "manifest.json").is_file():
        raise FileNotFoundError(f"root: {root} holds no emoji data set; {remedy}")
    try:
        manifest = json.loads((root / "manifest.json").read_text())
        text = (root / "items.jsonl").read_bytes()
        images = np.load(root / "images.npy", mmap_mode="r")
        found = (manifest["format"], manifest["size"], manifest["count"], manifest["items_sha256"])
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise ValueError(f"root: {root} is damaged ({str(error).splitlines()[0]}); delete it and {remedy}") from None
    if found[0] != FORMAT:
        raise ValueError(f"root: {root} was written by another version of this code; delete it and {remedy}")
    if found[1] != config.size:
        raise ValueError(f"size: {config.size}, but {root} holds images of {found[1]} pixels; give another root "
                         f"and {remedy.replace(str(root), 'DIR')}")
    shape = (found[2], 4, config.size, config.size)
    if images.shape != shape or images.dtype != np.uint8 or hashlib.sha256(text).hexdigest() != found[3]:
        raise ValueError(f"root: {root} is damaged (its files do not belong together); delete it and {remedy}")
    return [json.loads(line) for line in text.splitlines()], root / "images.npy"


def content_hash(config: EmojiConfig) -> str:
    """A hash of the contents of the folder, independent of its location. Raises as ``load`` does."""
    load(config)
    manifest = json.loads((Path(config.root) / "manifest.json").read_text())
    digests = [manifest["format"], manifest["items_sha256"], manifest.get("images_sha256")]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def assign_splits(items: Sequence[dict]) -> list[tuple[str, str]]:
    """(split, held_out) of each item. A pair is held out only if training has all its names in another style."""
    where = [("test", "name") if unit_hash("name", item["base"]) < NAME_SHARE else ("train", "") for item in items]
    names: dict[tuple[str, str], set[str]] = {}
    for item, (split, _) in zip(items, where):
        if split == "train":
            names.setdefault((item["base"], item["style"]), set()).add(item["name"])
    split_of: dict[tuple[str, str], tuple[str, str]] = {}
    trained: dict[str, list[tuple[str, str]]] = {}  # base -> its pairs that are trained on
    wanted = []
    for pair in sorted(names):
        draw = unit_hash("pair", *pair)
        if PAIR_SHARE <= draw < PAIR_SHARE + VALIDATION_SHARE:
            split_of[pair] = ("validation", "")
            continue
        trained.setdefault(pair[0], []).append(pair)
        if draw < PAIR_SHARE:
            wanted.append((draw, pair))
    for _, pair in sorted(wanted):
        others = [other for other in trained[pair[0]] if other != pair]
        if names[pair] <= set().union(*(names[other] for other in others)):
            split_of[pair] = ("test", "pair")
            trained[pair[0]] = others
    return [split_of.get((item["base"], item["style"]), place) if place[0] == "train" else place
            for item, place in zip(items, where)]


def rows_with_tones(items: Sequence[dict], count: int) -> list[int]:
    """Rows of the items without a skin tone, and of `count` tones for each name, the same tones in all styles.

    With all five tones, images of people would be more than half of the data. Tones that most styles have come first;
    a hash breaks ties, so all tones are about equally common.
    """
    styles: dict[str, dict[str, int]] = {}
    for item in items:
        if item["tone"]:
            names = styles.setdefault(item["base"], {})
            names[item["name"]] = names.get(item["name"], 0) + 1
    kept = {name for names in styles.values()
            for name in sorted(names, key=lambda n: (-names[n], unit_hash("tone", n)))[:count]}
    return [row for row, item in enumerate(items) if not item["tone"] or item["name"] in kept]


class Emoji:
    """Captioned emoji and scenes of one split; every item is a function of (config, split, index).

    source[i] -> {"image": uint8 (3, S, S) tensor, "caption": str, "captions": tuple of all phrasings, "id": str,
    "scene": dict or None, "style": str, "name": str ("" for a scene), "held_out": "", "pair" or "name"}.
    """

    def __init__(self, config: EmojiConfig, split: Literal["train", "validation", "test"] = "train"):
        if split not in SPLITS:
            raise ValueError(f"split: {split!r}; valid: {', '.join(SPLITS)}")
        self.config, self.split = config, split
        items, self._path = load(config)
        self._images: np.ndarray | None = None
        chosen = [row for row, item in enumerate(items) if item["style"] in config.styles]
        chosen = [chosen[k] for k in rows_with_tones([items[row] for row in chosen], config.tones)]
        places = assign_splits([items[row] for row in chosen])
        self.items = items
        self.row_of = {item["id"]: row for row, item in enumerate(items)}
        self.held_out = {row: held for row, (_, held) in zip(chosen, places)}
        rows = [row for row, (where, _) in zip(chosen, places) if where == split]
        # The folder is sorted by style; after one shuffle the first K items represent all styles.
        self.rows = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
        self._plan_scenes([row for row, (where, _) in zip(chosen, places) if where == "train"])

    def _plan_scenes(self, trained: list[int]) -> None:
        """Set the rows that scenes may show, by style, and the number of scenes."""
        share = self.config.scenes
        singles = len(self.rows) * (self.config.variants if self.split == "train" else 1)
        fit = [row for row in trained if self._fits_scene(row)]
        counts = {row for row in [*fit, *self.rows] if self._fits_scene(row) and plural(self.items[row])}
        self._countable_rows = counts
        self._pool = {style: np.array([row for row in fit if self.items[row]["style"] == style], dtype=np.int64)
                      for style in self.config.styles}
        self._countable = {style: np.array([row for row in pool if row in counts], dtype=np.int64)
                           for style, pool in self._pool.items()}
        self._stars = [row for row in self.rows if self._fits_scene(row)]
        if self.split != "train":
            self._scenes = self.config.held_out_scenes if share > 0 else 0
        else:
            self._scenes = singles if share == 1 else round(singles * share / (1 - share))
        self._singles = 0 if share == 1 else singles
        if not fit or (self.split == "test" and not self._stars):
            self._scenes = 0

    def _fits_scene(self, row: int) -> bool:
        item = self.items[row]
        return item["group"] in SCENE_GROUPS and len(noun(item["label"]).split(" ")) <= 3 and item["subgroup"] != "time"

    def __len__(self) -> int:
        return self._singles + self._scenes

    def locate(self, index: int) -> tuple[int | None, int]:
        """(row, variant) of a single emoji or (None, number) of a scene; scenes are spread evenly over the indices."""
        total = len(self)
        if not -total <= index < total:
            raise IndexError(f"index {index} of {total} items")
        index %= total
        before = index * self._scenes // total
        if (index + 1) * self._scenes // total > before:
            return None, before
        variant, place = divmod(index - before, len(self.rows))
        return self.rows[place], variant

    def rgba(self, row: int) -> np.ndarray:
        """The image of a row of `items`, premultiplied RGBA uint8 (4, S, S)."""
        if self._images is None:
            self._images = np.load(self._path, mmap_mode="r")
        return self._images[row]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_images": None}  # workers map the file themselves; pickling would copy it

    def background(self, row: int, variant: int = 0) -> str:
        """The background colour of a variant of a single emoji."""
        item, draw = self.items[row], (str(self.config.seed), *([str(variant)] if variant else []))
        if unit_hash("background", *draw, item["id"]) >= self.config.backgrounds:
            return "white"
        rng = np.random.default_rng(int(unit_hash("colour", *draw, item["id"]) * 2**48))
        return contrasting_colours(rng, PLAIN, [item["rgb"]], 1)[0]

    def scene(self, number: int) -> dict:
        """Scene `number` of this split. The first emoji of a test scene is held out, the others occur in training."""
        rng = np.random.default_rng([self.config.seed, SPLITS.index(self.split), number])
        first = int(rng.choice(self._stars)) if self.split == "test" else None
        style = self.items[first]["style"] if first is not None else str(rng.choice(self.config.styles))
        pool, countable = self._pool[style], self._countable[style]
        if first is None and not len(pool):  # a tiny folder has no suitable emoji in this style
            style = next(name for name in self.config.styles if len(self._pool[name]))
            pool, countable = self._pool[style], self._countable[style]
        if first is not None and first in self._countable_rows:
            countable = np.append(countable, first)
        return make_scene(rng, self.items, pool, countable, first)

    def _scene_captions(self, scene: dict) -> tuple[str, ...]:
        items = [self.items[self.row_of[thing["id"]]] for thing in scene["objects"]]
        return scene_captions(scene, [noun(item["label"]) for item in items], plural(items[0]))

    def captions(self, index: int) -> tuple[str, ...]:
        """All phrasings of an item, without rendering it."""
        row, number = self.locate(index)
        if row is None:
            return self._scene_captions(self.scene(number))
        return single_captions(self.items[row], self.background(row, number))

    def places(self, index: int, caption: str) -> list[tuple[int, int, float, float, float]]:
        """For each object that a caption of the item names: the characters (from, to) of its words, and x, y and half
        the side of its drawing, in units of the image's side. Captions of tags name nothing."""
        row, number = self.locate(index)
        if row is not None:
            spans = named_spans(caption, [noun(self.items[row]["label"])])
            return [(*span, 0.5, 0.5, 0.5) for span in spans if span]
        things = self.scene(number)["objects"]
        items = [self.items[self.row_of[thing["id"]]] for thing in things]
        counted = len(items) > 1 and items[0]["id"] == items[1]["id"]
        nouns = [plural(item) if counted else noun(item["label"]) for item in items]
        return [(*span, *thing["centre"], thing["size"] / 2)
                for span, thing in zip(named_spans(caption, nouns), things) if span]

    def __getitem__(self, index: int) -> dict:
        row, number = self.locate(index)
        if row is None:
            scene = self.scene(number)
            image = scene_image(scene, lambda name: self.rgba(self.row_of[name]), self.config.size)  # (3, S, S)
            captions = self._scene_captions(scene)
            about = {"id": f"scene/{self.split}/{number:06d}", "scene": scene, "name": "",
                     "style": scene["objects"][0]["style"],
                     "held_out": self.held_out[self.row_of[scene["objects"][0]["id"]]]}
        else:
            item, colour = self.items[row], self.background(row, number)
            image = over(self.rgba(row), canvas({"kind": "plain", "colours": [colour]}, self.config.size))
            captions = single_captions(item, colour)
            about = {"id": item["id"], "scene": None, "name": item["name"], "style": item["style"],
                     "held_out": self.held_out[row]}
        return {"image": torch.from_numpy(image), "caption": captions[0], "captions": captions, **about}
