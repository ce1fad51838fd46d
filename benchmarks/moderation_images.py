"""Image moderation on stand-ins: forbid "a red triangle", let red circles and blue triangles through.

    python -m benchmarks.moderation_images [--steps 1000]

Trains the small CLIP of docs/clip.md on scenes of shapes, calibrates each concept on harmless scenes for 1 % false
positives, and measures recall on other scenes: phrasings like those of training, phrasings of another grammar, and
colours on shapes that no training scene had. Nothing harmful is drawn; recall on real harm is not measured.
"""
import argparse

import numpy as np
import torch

from benchmarks.clip_figure import pairs, trained
from benchmarks.moderation_metrics import shown, table
from data.scene_graph import COLOURS, SHAPES, UNSEEN_PAIRS
from data.shapes import Shapes, ShapesConfig
from data.tokenizer import Tokenizer, TokenizerConfig
from safety.image import Concept, ImageModerator

SEEN = ("a {} {}", "one {} {}", "a large {} {}", "a small {} {} on a white background")
UNSEEN = ("{} {}", "this shows the {} {}", "some {} {} somewhere", "{} {}, nothing but {} {}")
PAIRS = (("red", "triangle"), ("blue", "star"), ("green", "circle"), ("purple", "cross"), ("yellow", "moon"),
         ("orange", "square"))


def scenes(split: str, start: int, count: int, size: int) -> tuple[torch.Tensor, list[set[tuple[str, str]]]]:
    """Pictures (B, 3, size, size) in [-1, 1] and the (colour, shape) of every thing in each."""
    source = Shapes(ShapesConfig(size=size), split)  # type: ignore[arg-type]
    items = [source[i] for i in range(start, min(start + count, len(source)))]
    things = [{(thing["colour"], thing["shape"]) for thing in item["scene"]["objects"]} for item in items]
    return torch.stack([item["image"] for item in items]).float() / 127.5 - 1, things


def concept(pair: tuple[str, str], phrasings: tuple[str, ...], neighbours: bool) -> Concept:
    """A concept and, if asked for, its neighbours: the same colour on other shapes, other colours on the same shape."""
    colour, shape = pair
    near = [(colour, other) for other in SHAPES if other != shape]
    near += [(other, shape) for other in COLOURS if other != colour]
    texts = tuple(text.format(*(pair * text.count("{}"))[: text.count("{}")]) for text in phrasings)
    allowed = tuple(tuple(text.format(*one) for text in SEEN) for one in near) if neighbours else ()
    return Concept(" ".join(pair), "stand_in", texts, allowed)


def measured(moderator: ImageModerator, calibration: tuple, test: tuple, pair: tuple[str, str]) -> tuple:
    """(recall hits, false positives on all harmless scenes, on those that share a colour or a shape), 0 or 1 each."""
    calm = torch.tensor([pair not in things for things in calibration[1]])
    fixed = ImageModerator.calibrated(moderator, moderator.margins(calibration[0])[calm], 0.01)
    over = (moderator.margins(test[0])[:, 0] > fixed[0].threshold).numpy().astype(float)
    here = np.array([pair in things for things in test[1]])
    near = np.array([any(thing != pair and (thing[0] == pair[0]) + (thing[1] == pair[1]) for thing in things)
                     for things in test[1]]) & ~here
    return over[here], over[~here], over[near]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=20_000, help="that the CLIP is trained on")
    parser.add_argument("--scenes", type=int, default=2000, help="of calibration, and of the test")
    options = parser.parse_args()
    images, captions = pairs("train", options.pairs, 32)
    tokenizer = Tokenizer.train(captions, TokenizerConfig(vocab_size=400, length=40))
    clip = trained(images, captions, tokenizer, options.steps)

    @torch.inference_mode()
    def embed_images(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([clip.image_vectors(part) for part in pictures.split(256)])

    @torch.inference_mode()
    def embed_texts(texts) -> torch.Tensor:
        return clip.text_vectors(*tokenizer.encode(list(texts)))

    calibration = scenes("train", options.pairs, options.scenes, 32)  # the CLIP has not seen them
    test = scenes("train", options.pairs + options.scenes, options.scenes, 32)
    odd = scenes("test", 0, options.scenes, 32)
    rows = []
    for name, group, phrasings, on in (("seen phrasings", PAIRS, SEEN, test), ("unseen phrasings", PAIRS, UNSEEN, test),
                                       ("unseen compositions", UNSEEN_PAIRS, SEEN, odd)):
        for neighbours in (False, True):
            found = [measured(ImageModerator([concept(pair, phrasings, neighbours)], embed_images, embed_texts),
                              calibration, on, pair) for pair in group]
            rows.append([name, "yes" if neighbours else "no",
                         *(shown(np.mean, np.concatenate(part), percent=True) for part in zip(*found))])
    print(table(("concepts", "neighbours", "recall", "false positives", "of those that share colour or shape"), rows))


if __name__ == "__main__":
    main()
