"""Source `shapes`: captioned scenes of coloured shapes, rendered on the fly without any download.

Item `index` of a split depends on (seed, split, index) alone: items can be made in any order and in any process, and
do not change when the split grows. The splits share no scene graph (data/shapes/scene_graph.py), and some pairs of
colour and shape occur in the test split only.
"""

from dataclasses import dataclass
from typing import Any

import torch

from data.shapes.phrasings import Facts, named_places, phrasings, word_pairs
from data.shapes.render import render
from data.shapes.scene_graph import SPLITS, Scene, SceneMix, Split, draw_scene, has_room, pick, stream


@dataclass(frozen=True)
class ShapesConfig:
    """``size`` is the side of the images in pixels; ``train``, ``validation`` and ``test`` are numbers of items.

    ``lattice`` 0 places objects anywhere; n places them on multiples of 1/n of the side with exact sizes, which is far
    easier to learn.
    """

    size: int = 64
    train: int = 100_000
    validation: int = 2_000
    test: int = 2_000
    seed: int = 0
    lattice: int = 0
    mix: SceneMix = SceneMix()
    mood_share: float = 0.2
    unseen_share: float = 0.25  # of the test split: scenes with a pair of colour and shape that training never shows

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 2048:
            raise ValueError(f"size: value {self.size}; valid: 16 to 2048 pixels")
        valid = [lattice for lattice in range(1, 65) if has_room(lattice)]
        if self.lattice and self.lattice not in valid:
            raise ValueError(f"lattice: value {self.lattice}; valid: 0 for none, or {', '.join(map(str, valid))}")
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise ValueError(f"{split}: value {getattr(self, split)}; valid: an integer >= 0")
        for name in ("mood_share", "unseen_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: value {getattr(self, name)}; valid: a number in [0, 1]")


class Shapes:
    """One split of the source.

    `source[i]` is {"image": uint8 (3, size, size), "caption": str, "captions": all phrasings, "id": str, "scene":
    scene graph, "facts": those that each phrasing promises, "phrasing": index of "caption" in "captions"}.
    """

    def __init__(self, config: ShapesConfig, split: Split):
        if split not in SPLITS:
            raise ValueError(f"split: value {split!r}; valid: {', '.join(SPLITS)}")
        self.config = config
        self.split: Split = split

    def __len__(self) -> int:
        return getattr(self.config, self.split)

    def scene(self, index: int) -> Scene:
        """The scene graph of an item; data/shapes/scene_graph.py describes its keys."""
        config, index = self.config, self._positive_index(index)
        rng = stream("shapes", config.seed, self.split, index)
        return draw_scene(rng, self.split, config.mix, config.mood_share, config.unseen_share,
                          config.lattice)

    def prompts(self, index: int) -> list[tuple[str, Facts]]:
        """All phrasings of an item with the facts that they promise, without rendering the image."""
        return phrasings(self.scene(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """All phrasings of an item, without rendering the image."""
        return tuple(caption for caption, _ in self.prompts(index))

    def places(self, index: int, caption: str) -> list[tuple[int, int, float, float, float]]:
        """Which words of a caption of the item name what is drawn where: `named_places` of `data.shapes.phrasings`."""
        return named_places(self.scene(index), caption)

    def word_pairs(self) -> dict[str, list[tuple[str, str]]]:
        """Pairs of captions that differ in one word, by what the word names, see `phrasings.word_pairs`."""
        return word_pairs()

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._positive_index(index)
        scene = self.scene(index)
        captions, facts = zip(*phrasings(scene))
        phrasing = pick(stream("phrasing", self.config.seed, self.split, index), range(len(captions)))
        return {"image": torch.from_numpy(render(scene, self.config.size)), "caption": captions[phrasing],
                "captions": captions, "id": f"shapes-{self.split}-{index:06d}", "scene": scene, "facts": facts,
                "phrasing": phrasing}

    def _positive_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} items of shapes {self.split}")
        return index % len(self)
