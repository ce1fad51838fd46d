"""Texts from which a CLIP learns besides whole captions: parts of captions, and captions with one wrong word.

A contrastive loss needs little more than the words that occur (Yuksekgonul et al. 2023, "When and why
vision-language models behave like bags-of-words"). Parts of captions, each a positive of the whole image, teach which
things there are (Zheng et al. 2024, "DreamLIP", section 3.2). A caption with one word exchanged, as an additional wrong
answer, teaches which attributes belong to which thing (NegCLIP, section 4 of the former; here the word comes from the
same context and not from a tagger).
"""
import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch

JOINTS = re.compile(r"(?:,|:|;| and| with| in| inside| on| above| below| beside| next to| under| over| of"
                    r"| (?:to the )?(?:left|right) of)(?= )")
EDGE = ""  # the word before the first and after the last
SMALL = frozenset("a an the one some this that its his her their".split())  # exchanging these makes nothing wrong
COMMON = 3  # occurrences in a context that make a word one of its words


def caption_parts(caption: str) -> list[str]:
    """The parts of a caption between its joints that have at least two words; the caption itself if there are none."""
    parts = [part.strip() for part in JOINTS.split(caption)]
    return [part for part in parts if len(part.split()) > 1] or [caption]


class Substitutes:
    """Words that occur in the same contexts, where a context is the word before and the word after."""

    def __init__(self, captions: Iterable[str]):
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for caption in captions:
            words = [EDGE, *caption.split(), EDGE]
            for before, word, after in zip(words, words[1:], words[2:]):
                if word not in SMALL:
                    found = counts.setdefault((before, after), {})
                    found[word] = found.get(word, 0) + 1
        kept = {context: tuple(sorted(word for word, count in found.items() if count >= COMMON))
                for context, found in counts.items()}
        self.words = {context: words for context, words in kept.items() if len(words) > 1}

    def wrong(self, caption: str, rng: np.random.Generator) -> str:
        """The caption with one word exchanged; the caption itself if no word has a substitute."""
        words = caption.split()
        around = [EDGE, *words, EDGE]
        places = [place for place, word in enumerate(words)
                  if word not in SMALL and (around[place], around[place + 2]) in self.words]
        if not places:
            return caption
        place = int(rng.choice(places))
        others = [word for word in self.words[around[place], around[place + 2]] if word != words[place]]
        if not others:
            return caption
        return " ".join([*words[:place], others[int(rng.integers(len(others)))], *words[place + 1:]])


def cut_to_parts(captions: Sequence[str], share: float, rng: np.random.Generator) -> list[str]:
    """The captions, a ``share`` of them cut down to one of their parts, and half of those without the article in
    front."""
    found = []
    for caption, draw in zip(captions, rng.random(len(captions))):
        parts = caption_parts(caption) if draw < share else [caption]
        text = parts[int(rng.integers(len(parts)))]
        first, _, rest = text.partition(" ")
        found.append(rest if draw < share / 2 and first in SMALL and " " in rest else text)
    return found


def texts_in_captions(captions: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
    """bool (B, T): which texts occur in which captions, word for word. Such a text is no wrong answer for the image,
    since of a hundred scenes several contain "a red star" besides the one it was taken from."""
    padded = [f" {re.sub(r'[,:;.]', ' ', text)} ".replace("  ", " ") for text in captions]
    sought = {text: f" {re.sub(r'[,:;.]', ' ', text).strip()} ".replace("  ", " ") for text in texts}
    return torch.tensor([[sought[text] in caption for text in texts] for caption in padded])


def draw_parts(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Up to ``count`` different parts of each caption, at random."""
    found: list[str] = []
    for caption in captions:
        parts = caption_parts(caption)
        found += [parts[place] for place in rng.permutation(len(parts))[:count]]
    return found


def among_made_up_words(text: str, rng: np.random.Generator) -> str:
    """The text without its article, behind up to two words of random letters and before up to one. What a text names
    does not depend on the words around it, also on those that no caption has."""
    def words(most: int) -> list[str]:
        return ["".join(map(chr, rng.integers(ord("a"), ord("z") + 1, int(length))))
                for length in rng.integers(2, 7, int(rng.integers(most + 1)))]
    return " ".join([*words(2), without_article(text), *words(1)])


def without_article(text: str) -> str:
    """The text without a first word that says nothing about what it names."""
    first, _, rest = text.partition(" ")
    return rest if first in SMALL and rest else text


def parts_in_captions(captions: Sequence[str], parts: Sequence[str]) -> torch.Tensor:
    """bool (B, P): which parts of captions stand in which captions, with any article and in the plural: "a red star"
    stands in "a red picture with three red stars"."""
    padded = [f" {' '.join(re.sub(r'[,:;.]', ' ', text).split())} " for text in captions]
    sought = {}
    for part in set(parts):
        words = " " + without_article(" ".join(re.sub(r"[,:;.]", " ", part).split()))
        sought[part] = [words in caption and any(words + end in caption for end in (" ", "s ", "es "))
                        for caption in padded]
    return torch.tensor([sought[part] for part in parts]).T
